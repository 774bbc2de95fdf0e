"""A whole causal language model: all blocks and the output layer, its loss on packed documents."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tli_engine.config import Numerics, Quantize, Residency
from tli_engine.data.words import Laid, Pack
from tli_engine.errors import UserError
from tli_engine.models.adapters import adapter_parameters, adapters
from tli_engine.models.document_attention import Attention, choose_attention
from tli_engine.models.early import EarlyModel, Rotary, load_early
from tli_engine.models.files import ModelFiles
from tli_engine.models.fused import FusedBlock, Rows
from tli_engine.models.linear_cross_entropy import chunk_rows, linear_cross_entropy
from tli_engine.models.recompute import Activations, Block, Reserve, Spread
from tli_engine.models.tensor_reader import TensorReader
from tli_engine.nn import NF4Linear

_HEAD = "lm_head.weight"
FULL_IN_NF4 = (
    "method: full trains every weight, but this model's are held in NF4; "
    "use quantize: none with a model that is not quantised, or method: lora"
)


class Texts(Protocol):
    """Packed documents, and which of their tokens are to be predicted."""

    @property
    def words(self) -> Laid:
        """The documents, each a word of the pack."""

    @property
    def predicting(self) -> Tensor:
        """Positions whose next token is predicted, ``[L]``, int64."""

    @property
    def targets(self) -> Tensor:
        """Those tokens, ``[L]``, int64."""


class CausalModel(nn.Module):
    """An :class:`EarlyModel` of all blocks, and the output embeddings.

    Attributes:
        early: The decoder.
        lm_head: Output embeddings, ``[V, D]``; None where they are the input's.
        attention: What attends within documents once the blocks are fused; see :meth:`fuse`.
        fetch: Called with a block's number before it runs, for weights that are not always there.
        fetched_nbytes: Bytes that those take here, if they are not the layers' own.
        spread: Where the weights lie, if each of several GPUs holds a share of all.
        activations: Which blocks are run again on the way back; all save unless it is replaced.
    """

    lm_head: nn.Parameter | None

    def __init__(self, early: EarlyModel, lm_head: nn.Parameter | None) -> None:
        super().__init__()
        self.early = early
        self.attention: Attention = "sdpa"
        self.fetch: Callable[[int], None] | None = None
        self.fetched_nbytes: int | None = None
        self.spread: Spread | None = None
        self.activations = Activations("save")
        self.register_parameter("lm_head", lm_head)
        self.train(False)

    @property
    def head(self) -> nn.Parameter:
        """Output embeddings, ``[V, D]``."""
        tied: nn.Parameter = self.early.decoder.embed_tokens.weight
        return tied if self.lm_head is None else self.lm_head

    def loss(
        self, texts: Texts, *, weights: Tensor | None = None, seeds: Tensor | None = None
    ) -> Tensor:
        """Sum of the cross-entropies of the targets, a scalar in fp32; 0 without targets.

        Documents see nothing of one another.

        Args:
            texts: Packed documents, on the model's device; whole packs unless the blocks are fused.
            weights: Factor of each target's cross-entropy, ``[L]``, fp32; all 1 by default.
            seeds: Of the dropout masks, as :meth:`draw_seeds` gives them; drawn by default.
        """
        hidden = self.hidden_states(texts.words, texts.predicting, seeds)
        softcap = getattr(self.early.config, "final_logit_softcapping", None)
        options: dict[str, Any] = {"softcap": softcap, "weights": weights}
        return linear_cross_entropy(hidden, self.head, texts.targets, **options)

    def hidden_states(
        self, pack: Laid, rows: Tensor | None = None, seeds: Tensor | None = None
    ) -> Tensor:
        """What the output layer reads, ``[T, D]``, or of some ``rows`` alone, ``[L, D]``."""
        spread = self.spread
        if spread is not None:
            spread.begin()
        x: Tensor = self.early.embed(pack, documents=True)
        residual: Tensor | None = None
        seeds = self.draw_seeds() if seeds is None else seeds
        blocks, first = self._blocks(pack, seeds), self._first_trained(x)
        for number, block in enumerate(blocks):
            if number < first:
                with torch.no_grad():
                    x, residual = block(x, residual)
                continue
            if number == first and self._undecided and torch.is_grad_enabled():
                self.activations.plan(blocks[first:], first, x, residual, self.reserve(), spread)
            run = partial(self.activations.run, number, block, draws=self._draws)
            if spread is None:
                x, residual = run(x, residual)
            else:
                x, residual = spread.run(number, run, x, residual)
        return self.read_out(x, residual, rows)

    def read_out(self, x: Tensor, residual: Tensor | None, rows: Tensor | None) -> Tensor:
        """What the output layer reads of what the blocks put out, ``x + residual``, ``[T, D]``.

        Args:
            x: ``[T, D]``.
            residual: ``[T, D]``, or None.
            rows: Those that are wanted, ``[L]``; all by default.
        """
        if rows is not None:
            x = x.index_select(0, rows)
            residual = None if residual is None else residual.index_select(0, rows)
        early = self.early
        if early.fused is not None:
            return early.fused.final_norm(x, residual)
        return early.read_out(early.depth, x)

    def fuse(self, attention: Attention = "auto", moves_to: torch.device | None = None) -> None:
        """Run the blocks, with the adapters they have now, on the engine's ops from here on.

        Args:
            attention: What attends within documents; ``auto`` is varlen where it runs, else sdpa.
            moves_to: Where each block goes, to be joined there; by default all stay and are joined now.

        Raises:
            NotFusedError: A family, a projection or an adapter that the ops do not run.
            UserError: An attention that was asked for by name cannot run here.
        """
        weight = self.early.decoder.embed_tokens.weight
        block: Any = self.early.blocks[0]
        head_dim = block.self_attn.head_dim
        chosen = choose_attention(attention, moves_to or weight.device, weight.dtype, head_dim)
        self.early.fuse(later=moves_to is not None)
        self.attention = chosen

    @property
    def drops(self) -> int:
        """Seeds of dropout masks that a run takes; fused blocks alone take any."""
        fused = self.early.fused
        return 0 if fused is None else sum(block.drops for block in fused.blocks)

    def draw_seeds(self, out: Tensor | None = None) -> Tensor:
        """A seed for each mask, ``[drops]``, int64, from torch's generator of the device."""
        if out is None:
            out = torch.empty(self.drops, dtype=torch.int64, device=self.early.device)
        # nothing is drawn where nothing drops
        return out.random_(2**63 - 1) if out.numel() else out

    def _blocks(self, pack: Laid, seeds: Tensor) -> list[Block]:
        """What runs each block on a pack."""
        blocks, fetch = self._resident_blocks(pack, seeds), self.fetch
        if fetch is None:
            return blocks
        # the last layer too is run again: its weight will not have stayed
        return [Block((partial(_fetched, fetch, i, block),)) for i, block in enumerate(blocks)]

    def _resident_blocks(self, pack: Laid, seeds: Tensor) -> list[Block]:
        early = self.early
        if early.fused is None:
            assert isinstance(pack, Pack)
            rotary = early.rotary(pack)
            runs = (partial(_run_modules, early, i, pack, rotary) for i in range(early.depth))
            return [Block((run,)) for run in runs]
        like = early.decoder.embed_tokens.weight[:1]
        rows, of_block = early.fused.document_rows(pack, like, self.attention), iter(seeds.unbind())
        return [
            _fused(block, rows, list(islice(of_block, block.drops)), pack)
            for block in early.fused.blocks
        ]

    @property
    def _undecided(self) -> bool:
        return self.activations.undecided or (self.spread is not None and self.spread.undecided)

    @property
    def _draws(self) -> bool:
        """Whether blocks draw random numbers as they run."""
        # the fused ones take seeds that were drawn before
        if self.early.fused is not None or not self.training:
            return False
        return any(a.dropout.training and a.dropout.p > 0 for a in adapters(self.early).values())

    def _first_trained(self, x: Tensor) -> int:
        """Number of the lowest block that a gradient passes; nothing is kept below it."""
        if x.requires_grad:
            return 0
        trained = (
            i
            for i, block in enumerate(self.early.blocks)
            if any(p.requires_grad for p in block.parameters())
        )
        return next(trained, self.early.depth)

    def reserve(self) -> Reserve:
        """Bytes of what a step makes besides activations."""
        trained, head = self.trainable().values(), self.head
        if self.spread is None:
            # a gradient, and AdamW's two moments in fp32
            states = sum(p.numel() * (p.element_size() + 8) for p in trained if p.grad is None)
        else:
            states = self.spread.to_come
        softcap = getattr(self.early.config, "final_logit_softcapping", None)
        # their gradient takes the logits' place, but for capped ones
        rows_at_once = chunk_rows(len(head), trained=head.requires_grad)
        logits = rows_at_once * len(head) * (head.element_size() + (12 if softcap else 0))
        # a gradient's sum in fp32, and rounded
        weight = head.numel() * (4 + head.element_size()) if head.requires_grad else 0
        rows = 3 * head.shape[1] * head.element_size()
        block, decoded = (0, 0)
        if self.early.fused is not None:
            block, decoded = self.early.fused.blocks[0].working(head.element_size())
        return Reserve(states, block, decoded, logits + weight, rows)

    def train_all(self, *, own: bool = True) -> None:
        """Let gradients reach every weight: full fine-tuning.

        Args:
            own: Copy weights that may be a file's memory; not needed if they are to move anyway.

        Raises:
            UserError: Some weights are held in NF4.
        """
        if any(isinstance(module, NF4Linear) for module in self.modules()):
            raise UserError(FULL_IN_NF4)
        self.requires_grad_(True)
        joined: set[int] = set()
        if self.early.fused is not None:
            for projection in self.early.fused.projections():
                projection.layer.requires_grad_(True)
                joined |= {id(p) for p in projection.joined_weights().values()}
        for parameter in self.trainable().values():
            # on a CPU it may be the mapped file's own memory, which others read
            if own and parameter.device.type == "cpu" and id(parameter) not in joined:
                parameter.data = parameter.data.clone()

    def trainable(self) -> dict[str, nn.Parameter]:
        """The tensors that gradients reach, by name: adapters, or after :meth:`train_all` all.

        In fused blocks, tensors of layers that share an input are joined, and so are their names.
        """
        named = self.weights()
        if self.early.fused is not None:
            projections = self.early.fused.projections()
            views = {id(p) for projection in projections for p in projection.views()}
            named = {n: p for n, p in named.items() if id(p) not in views}
            for projection in projections:
                named |= projection.joined() | projection.joined_weights()
        return {n: p for n, p in named.items() if p.requires_grad}

    @property
    def trained_parameters(self) -> int:
        """Numbers that training changes: the adapters', or without any those of all weights."""
        return adapter_parameters(self.early) or sum(p.numel() for p in self.weights().values())

    def weights(self) -> dict[str, nn.Parameter]:
        """Every weight by transformers' name within the decoder, and ``lm_head.weight`` if untied.

        Adapters are among them. In fused blocks some are views of the tensors of :meth:`trainable`,
        whose values they follow; change those in place. Where joined layers stand in for their parts,
        names are joined: see :meth:`apart`.
        """
        named = dict(self.early.decoder.named_parameters())
        return named if self.lm_head is None else named | {_HEAD: self.lm_head}

    def apart(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """One of :meth:`weights`, whole, by transformers' names; of joined layers views of its rows."""
        projections = [] if self.early.fused is None else self.early.fused.projections()
        joined = next((p for p in projections if name in p.joined_weights()), None)
        return {name: tensor} if joined is None else joined.split(name, tensor)


def _run_modules(
    early: EarlyModel, number: int, pack: Pack, rotary: Rotary | Rows, x: Tensor, _: Tensor | None
) -> tuple[Tensor, None]:
    return early.run_block(number, x, pack, rotary), None


def _fetched(
    fetch: Callable[[int], None], number: int, block: Block, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    fetch(number)
    return block(x, residual)


def _fused(block: FusedBlock, rows: Rows, seeds: list[Tensor], pack: Laid) -> Block:
    # drawn before: a second run takes the same
    first = block.qkv.drops + block.o.drops
    second = first + block.gate_up.drops

    def attention(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return block.attention(x, residual, rows, iter(seeds[:first]))

    def gated(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return block.gated(x, residual, iter(seeds[first:second]))

    def mlp(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        x, residual = gated(x, residual)
        return block.put_out(x, iter(seeds[second:])), residual

    work = block.work(len(pack.input_ids), pack.longest)
    if block.ends_freely:
        return Block((attention, gated), block.down, work)
    return Block((attention, mlp), None, work)


def soft_capped(logits: Tensor, config: Any) -> Tensor:
    """Logits as a model gives them: squeezed into ``±final_logit_softcapping`` where it has that."""
    cap = getattr(config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


@contextmanager
def without_dropout(model: CausalModel) -> Iterator[None]:
    """Run a model as it is evaluated; afterwards it is in the mode that it was in."""
    training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(training)


def load_causal(
    files: ModelFiles,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantize: Quantize = "auto",
    double_quant: bool = False,
    numerics: Numerics = "exact",
    weight_residency: Residency = "nf4",
) -> CausalModel:
    """Read a whole model, one tensor at a time; options as :func:`tli_engine.models.early.load_early`.

    Raises:
        UserError: A tensor is missing, has another shape, or holds values that are not finite.
    """
    options: dict[str, Any] = {
        "dtype": dtype,
        "device": device,
        "quantize": quantize,
        "double_quant": double_quant,
        "numerics": numerics,
        "weight_residency": weight_residency,
    }
    early = load_early(files, files.config.num_hidden_layers, **options)
    head = None
    if not files.config.tie_word_embeddings:
        embeddings: Tensor = early.decoder.embed_tokens.weight
        head = TensorReader(files, **options).parameter(_HEAD, embeddings)
    return CausalModel(early, head)
