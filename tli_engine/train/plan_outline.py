"""What a run holds, counted on its own modules, which are built without memory for their values."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tli_engine.config import RunConfig
from tli_engine.errors import UserError
from tli_engine.models.adapters import adapter_parameters, adapters, add_lora, gradient_passes
from tli_engine.models.causal import FULL_IN_NF4, CausalModel
from tli_engine.models.device import choose_dtype
from tli_engine.models.document_attention import choose_attention
from tli_engine.models.early import EarlyModel
from tli_engine.models.projection import NotFusedError
from tli_engine.models.survey import Survey, model_without_memory
from tli_engine.train.checks import (
    check_alignment,
    check_model,
    check_run,
    not_fused,
    wants_fused,
)
from tli_engine.train.plan_devices import Target
from tli_engine.train.prepare import go_on_from

_BLOCK = 64
# absmax that share a second one, and what belongs to a weight as a whole: 256 codes and an offset
_NESTED, _NESTED_BYTES = 256, 257 * 4


def nf4_bytes(rows: int, columns: int, double_quant: bool, records: bool) -> int:
    """Bytes of a weight in NF4 as it is held, its absmax decoded.

    Args:
        rows: Of the weight.
        columns: Of the weight.
        double_quant: Whether the 8-bit absmax is held beside the decoded one.
        records: Whether it lies in the records of the CUDA extension, if it fits there.
    """
    elements = rows * columns
    blocks = -(-elements // _BLOCK)
    nested = blocks + 4 * -(-blocks // _NESTED) + _NESTED_BYTES if double_quant else 0
    if records and rows % 64 == 0 and columns % 64 == 0:
        return rows // 64 * (-(-columns // 128) * 2) * 2304 + nested
    return -(-elements // 2) + 4 * blocks + nested


@dataclass(frozen=True)
class Outline:
    """A run's model and what is trained of it, on torch's meta device.

    Attributes:
        run: The run.
        target: Where it is planned to be.
        early: The decoder, adapters included.
        causal: The whole model; None where the objective reads hidden states alone.
        trained: Tensors that gradients reach.
        dtype: What weights are held in that are not NF4.
        nf4: Whether the blocks' linear layers are NF4.
        double_quant: Whether their absmax is in 8 bits.
        linear: Linear layers of the blocks, ``(rows, columns)`` by name.
        gpus: That share the run.
    """

    run: RunConfig
    target: Target
    early: EarlyModel
    causal: CausalModel | None
    trained: dict[str, nn.Parameter]
    dtype: torch.dtype
    nf4: bool
    double_quant: bool
    linear: dict[str, tuple[int, int]]
    gpus: int = 1

    @property
    def config(self) -> Any:
        """Of the model."""
        return self.early.config

    @property
    def element(self) -> int:
        """Bytes of a weight that is not NF4, and of a hidden state."""
        return self.dtype.itemsize

    @property
    def fused(self) -> bool:
        """Whether the engine's ops run the blocks."""
        return self.early.fused is not None

    @property
    def trained_parameters(self) -> int:
        """Numbers that are trained; ``trained`` has zeros beside, where layers are joined."""
        return (
            adapter_parameters(self.early)
            if self.causal is None
            else self.causal.trained_parameters
        )

    @property
    def on_gpu(self) -> bool:
        """Whether it is planned for a GPU."""
        return self.target.kind.type == "cuda"

    @property
    def first_trained(self) -> int:
        """The lowest block that a gradient passes."""
        if self.run.method == "full":
            return 0
        return min(_block_of(name) for name in adapters(self.early))

    def linear_bytes(self) -> int:
        """Bytes of the blocks' linear layers, biases left out."""
        if not self.nf4:
            return self.element * sum(n * k for n, k in self.linear.values())
        options = (self.double_quant, self.target.hopper)
        return sum(nf4_bytes(n, k, *options) for n, k in self.linear.values())

    def transposed_bytes(self) -> int:
        """Bytes of transposed copies, which the align objective holds where the extension runs."""
        if not self.nf4 or not self.target.hopper or self.causal is not None:
            return 0
        first, total = self.first_trained, 0
        for name, (rows, columns) in self.linear.items():
            if gradient_passes(name, _block_of(name), first):
                total += nf4_bytes(columns, rows, False, True)
        return total

    def other_bytes(self) -> int:
        """Bytes of norms and biases."""
        named = self.early.decoder.named_parameters()
        matrices = {f"{name}.weight" for name in self.linear}
        others: Iterator[int] = (
            p.numel()
            for n, p in named
            if n.replace(".base_layer", "") not in matrices
            and ".lora_" not in n
            and not n.startswith("embed_tokens")
        )
        return self.element * sum(others)

    def embedding_bytes(self, rows: int | None) -> int:
        """Bytes of embeddings, of some ``rows`` alone, and of an output layer of its own."""
        vocabulary: int = self.config.vocab_size
        hidden: int = self.config.hidden_size
        head = self.causal is not None and self.causal.lm_head is not None
        return self.element * hidden * ((vocabulary if rows is None else rows) + vocabulary * head)

    def tensor_names(self) -> list[str]:
        """Names of the tensors that are read, within the decoder, and of the output layer's."""
        names = [n.replace(".base_layer", "") for n, _ in self.early.decoder.named_parameters()]
        names = [n for n in names if ".lora_" not in n]
        head = self.causal is not None and self.causal.lm_head is not None
        return names + ["lm_head.weight"] * head


def _block_of(name: str) -> int:
    return int(name.split(".")[1])


def outline(run: RunConfig, model: Survey, target: Target, gpus: int = 1) -> Outline:
    """Build a run's model without memory for its weights, and put on it what is trained.

    Args:
        run: The run, as one GPU sees it.
        model: What it starts from.
        target: Where it is planned to be.
        gpus: That share it.

    Raises:
        UserError: What training refuses before it reads articles and weights.
    """
    check_run(run, target.kind, here=target.here)
    check_model(run, model.name, model.config)
    config, aligns = model.config, run.objective == "align"
    depth = run.align.layer if aligns else config.num_hidden_layers
    nf4 = run.quantize == "nf4" or (run.quantize == "auto" and model.quantised is not None)
    if nf4 and run.method == "full":
        raise UserError(FULL_IN_NF4)
    dtype = choose_dtype(run.dtype, target.kind)
    early = model_without_memory(config, depth).to(dtype)
    linear = {
        name: (module.out_features, module.in_features)
        for name, module in early.decoder.named_modules()
        if isinstance(module, nn.Linear)
    }
    causal = None if aligns else CausalModel(early, _head(config, dtype))
    if run.method == "full" and causal is not None:
        causal.train_all()
    elif run.lora.init is None:
        add_lora(early, run.lora, depth, run.seed)
    else:
        go_on_from(early, run, lambda line: None)
    check_alignment(run, early)
    _fuse(run, early, causal, target)
    trained = _trained_adapters(early) if causal is None else causal.trainable()
    stored = model.quantised or {}
    double = stored.get("bnb_4bit_use_double_quant", run.double_quant)
    return Outline(run, target, early, causal, trained, dtype, nf4, bool(double), linear, gpus)


def _head(config: Any, dtype: torch.dtype) -> nn.Parameter | None:
    if config.tie_word_embeddings:
        return None
    size = (config.vocab_size, config.hidden_size)
    return nn.Parameter(torch.empty(size, dtype=dtype, device="meta"), requires_grad=False)


def _trained_adapters(early: EarlyModel) -> dict[str, nn.Parameter]:
    """As the align objective trains them: joined where the blocks are fused."""
    if early.fused is not None:
        return {n: p for joined in early.fused.projections() for n, p in joined.joined().items()}
    named = early.decoder.named_parameters()
    return {n: p for n, p in named if ".lora_" in n}


def _fuse(run: RunConfig, early: EarlyModel, causal: CausalModel | None, target: Target) -> None:
    """Put the blocks on the engine's ops as training would."""
    if not wants_fused(run, target.kind):
        return
    weight: Any = early.decoder.embed_tokens.weight
    block: Any = early.blocks[0]
    wanted = run.sft.attention, target.kind, weight.dtype, block.self_attn.head_dim
    attention = None if causal is None else choose_attention(*wanted, here=target.here)
    try:
        early.fuse()
    except NotFusedError as reason:
        not_fused(run, reason)
        return
    if causal is not None and attention is not None:
        causal.attention = attention
