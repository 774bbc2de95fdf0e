"""The early blocks of a decoder: embeddings and blocks ``0 … k-1``, enough for ``hidden_states[k]``."""

import copy
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from tli_engine.config import Numerics, Quantize, Residency
from tli_engine.data.words import Laid, Pack
from tli_engine.errors import UserError
from tli_engine.models import packed_attention
from tli_engine.models.files import ModelFiles
from tli_engine.models.fused import FusedBlocks, Rows
from tli_engine.models.packed_attention import Attends
from tli_engine.models.projection import NotFusedError
from tli_engine.models.tensor_reader import TensorReader
from tli_engine.nf4_checkpoint import nf4_state_dict
from tli_engine.nn import NF4Linear

_EMBEDDING = "embed_tokens"

# cosines and sines of positions, by the kind of layer where a model has several, else under ""
Rotary = dict[str, tuple[Tensor, Tensor]]


class EarlyModel(nn.Module):
    """Embeddings and the first ``depth`` blocks of a decoder, run on packs of words.

    Attributes:
        config: The whole model's configuration.
        depth: Number of blocks built; ``hidden_states[0 … depth]`` can be had.
        fused: The blocks on the engine's ops, once :meth:`fuse` was called; they then run instead of
            transformers' modules.
        computes_on: Device of what goes through it, where the weights lie on another.
    """

    row_of: Tensor | None

    def __init__(self, config: Any, depth: int) -> None:
        super().__init__()
        self.config = config
        self.depth = depth
        truncated = copy.deepcopy(config)
        truncated.num_hidden_layers = depth
        if getattr(config, "layer_types", None):
            truncated.layer_types = config.layer_types[:depth]
        truncated._attn_implementation = packed_attention.NAME
        with _parameters_on_meta():
            self.decoder = AutoModel.from_config(truncated)
        if depth < config.num_hidden_layers:
            # the model's final norm belongs to the last block alone
            del self.decoder.norm
        # row of each token where only some were read, [V], int64; -1 has none
        self.register_buffer("row_of", None, persistent=False)
        self.fused: FusedBlocks | None = None
        self.computes_on: torch.device | None = None
        self.requires_grad_(False)
        self.train(False)

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks that were built."""
        blocks: nn.ModuleList = self.decoder.layers
        return blocks

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        device: torch.device = self.decoder.embed_tokens.weight.device
        return self.computes_on or device

    def hidden_states(self, pack: Pack) -> Iterator[tuple[int, Tensor]]:
        """Run a pack upwards, one block a step.

        Args:
            pack: Words on the model's device.

        Yields:
            ``(k, hidden_states[k])`` for k = 0 … depth; hidden states are ``[T, D]``. As in
            transformers, 0 is the embeddings, k the output of block k-1, and the last of the
            whole model is taken after its final norm.
        """
        hidden, rotary = self.embed(pack), self.rotary(pack)
        yield 0, hidden
        for k in range(1, self.depth + 1):
            hidden = self.run_block(k - 1, hidden, pack, rotary)
            yield k, self.read_out(k, hidden)

    def embed(self, pack: Laid, *, documents: bool = False) -> Tensor:
        """What block 0 takes: the embeddings of a pack's tokens, ``[T, D]``.

        Args:
            pack: Words on the model's device.
            documents: The blocks will attend within windows, so words may be longer than those.

        Raises:
            UserError: A word is longer than the attention window.
        """
        if not documents:
            self.check_window(pack.longest)
        rows = pack.input_ids if self.row_of is None else self.row_of[pack.input_ids]
        hidden: Tensor = self.decoder.embed_tokens(rows[None])[0]
        return hidden

    def fuse(self, *, later: bool = False) -> FusedBlocks:
        """Run the blocks, with the adapters they have now, on the engine's ops from here on.

        Args:
            later: Join weights of a block when :meth:`FusedBlocks.join` is called, not now.

        Raises:
            NotFusedError: A family, a projection or an adapter that the ops do not run.
        """
        if self.fused is None:
            self.fused = FusedBlocks(self.decoder, self.config, later=later)
        return self.fused

    def fuse_on_gpu(self) -> str | None:
        """:meth:`fuse` where the ops have kernels, if they run this model; return why not."""
        if self.device.type != "cuda":
            return "the ops have kernels for GPUs"
        try:
            self.fuse()
        except NotFusedError as reason:
            return str(reason)
        return None

    def embedding_table(self) -> tuple[Tensor, Tensor]:
        """The embeddings that are held, ``[R, D]``, and each token's row, ``[V]``, on the CPU."""
        rows = torch.arange(self.decoder.embed_tokens.num_embeddings, device=self.device)
        row_of = rows if self.row_of is None else self.row_of
        table: Tensor = self.decoder.embed_tokens(rows)
        return table, row_of.cpu()

    def rotary(self, pack: Pack) -> Rotary | Rows:
        """What the blocks need to know of a pack's rows: cosines and sines of positions."""
        if self.fused is not None:
            return self.fused.rows_of(pack, self.decoder.embed_tokens.weight[:1])
        like, positions = self.decoder.embed_tokens.weight, pack.position_ids[None]
        if self.config.model_type != "gemma3_text":
            return {"": self.decoder.rotary_emb(like, positions)}
        kinds = dict.fromkeys(self.config.layer_types[: self.depth])
        return {kind: self.decoder.rotary_emb(like, positions, kind) for kind in kinds}

    def run_block(
        self,
        block: int,
        hidden: Tensor,
        pack: Pack,
        rotary: Rotary | Rows,
        documents: Attends | None = None,
    ) -> Tensor:
        """Run one block on what the block below put out, ``[T, D]`` to ``[T, D]``.

        ``documents`` attend in transformers' modules, if given; in fused blocks those of ``rotary`` do.
        """
        if self.fused is not None and isinstance(rotary, Rows):
            return self.fused.run(hidden, rotary, block, block + 1)
        assert isinstance(rotary, dict)
        kind = "" if "" in rotary else self.config.layer_types[block]
        out: Tensor = self.blocks[block](
            hidden[None],
            attention_mask=None,
            position_ids=pack.position_ids[None],
            position_embeddings=rotary[kind],
            pack=pack,
            documents=documents,
        )
        return out[0]

    def read_out(self, k: int, hidden: Tensor) -> Tensor:
        """``hidden_states[k]`` of what block k-1 put out: after the final norm if it is the last."""
        last = k > 0 and k == self.config.num_hidden_layers
        out: Tensor = self.decoder.norm(hidden) if last else hidden
        return out

    def forward(self, pack: Pack, layer: int) -> Tensor:
        """Return ``hidden_states[layer]``, ``[T, D]``; blocks above it do not run."""
        return next(hidden for k, hidden in self.hidden_states(pack) if k == layer)

    def gather_rows(self, token_ids: Sequence[int]) -> None:
        """Take note that the embedding holds the rows of these tokens only, in this order."""
        embedding = self.decoder.embed_tokens
        embedding.num_embeddings, embedding.padding_idx = len(token_ids), None
        row_of = torch.full((self.config.vocab_size,), -1)
        row_of[list(token_ids)] = torch.arange(len(token_ids))
        self.row_of = row_of

    def check_window(self, longest: int) -> None:
        """Raise ``UserError`` if a word of so many tokens is longer than the attention window."""
        window = getattr(self.config, "sliding_window", None)
        if window is not None and longest > window:
            raise UserError(
                f"a word of {longest} tokens is longer than this model's attention window of "
                f"{window}; remove it"
            )

    def base_digest(self) -> str:
        """SHA-256 over the frozen weights, adapters left out."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.frozen_tensors().items()):
            add_to_digest(digest, name, tensor)
        return digest.hexdigest()

    def frozen_tensors(self) -> dict[str, Tensor]:
        """Every tensor of the frozen weights by name, adapters left out, NF4 in its parts."""
        tensors = {n: t for n, t in self.state_dict().items() if ".lora_" not in n}
        for path, module in self.named_modules():
            if isinstance(module, NF4Linear):
                tensors |= nf4_state_dict(module.weight, f"{path}.weight")
        return {n.replace(".base_layer.", "."): t for n, t in tensors.items()}


def add_to_digest(digest: Any, name: str, tensor: Tensor) -> None:
    """Take a tensor and its name into a digest of weights."""
    digest.update(name.encode())
    # the bytes: numpy knows no bf16, and a scalar cannot be viewed as bytes
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Build modules without memory for their parameters; buffers stay real."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        register(self, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def load_early(
    files: ModelFiles,
    depth: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantize: Quantize = "auto",
    double_quant: bool = False,
    numerics: Numerics = "exact",
    weight_residency: Residency = "nf4",
    token_ids: Iterable[int] | None = None,
) -> EarlyModel:
    """Read the embeddings and the first ``depth`` blocks, one tensor at a time, and nothing else.

    Args:
        files: An opened model.
        depth: Number of blocks, enough for ``hidden_states[depth]``.
        dtype: What weights that are not NF4 are held in, and activations computed in.
        device: Where to.
        quantize: ``nf4`` quantises the blocks' linear layers as they are read, ``none`` holds them
            in ``dtype``, ``auto`` keeps what the checkpoint has.
        double_quant: Store the absmax of what is quantised here in 8 bits.
        numerics: Of products with NF4 weights, as for :class:`tli_engine.nn.NF4Linear`.
        weight_residency: Of NF4 weights, as there.
        token_ids: Tokens that will be used; only their embedding rows are read. All by default.

    Raises:
        UserError: The model has fewer blocks, a tensor is missing, has another shape, or holds
            values that are not finite.
    """
    total = files.config.num_hidden_layers
    if not 0 <= depth <= total:
        raise UserError(f"{files.name}: hidden_states[{depth}] does not exist; it has 0 … {total}")
    model = EarlyModel(files.config, depth)
    read = TensorReader(files, dtype, device, quantize, double_quant, numerics, weight_residency)
    for path, module in list(model.decoder.named_modules()):
        if path == _EMBEDDING and token_ids is not None:
            rows = sorted(set(token_ids))
            module.weight = read.parameter(f"{path}.weight", module.weight, rows)
            model.gather_rows(rows)
        elif (
            isinstance(module, nn.Linear) and (adopted := read.nf4_linear(path, module)) is not None
        ):
            owner, _, leaf = path.rpartition(".")
            setattr(model.decoder.get_submodule(owner), leaf, adopted)
        else:
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, read.parameter(f"{path}.{name}", parameter))
    return model.to(device)
