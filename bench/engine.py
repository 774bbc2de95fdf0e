"""tli-engine's side of the benches of whole models, and the floor of its training step."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch

from bench.models import Subject
from tli_engine.align.encode import stage
from tli_engine.align.scan import scan
from tli_engine.align.space import fit_space
from tli_engine.config import RunConfig
from tli_engine.evaluate.alignment import encode_before_after, layer_curve
from tli_engine.models.adapters import add_lora, add_transposed_copies
from tli_engine.models.early import EarlyModel
from tli_engine.train.loop import Trainer

# steps between two waits for the GPU
STEPS_A_CALL = 32
# packed codes and an fp32 absmax for each 64
NF4_BYTES = 0.5625


@dataclass(frozen=True)
class Floor:
    """Bytes and operations of each matmul that a step cannot do without."""

    products: tuple[tuple[int, int], ...]

    @property
    def bytes(self) -> int:
        """Of all."""
        return sum(nbytes for nbytes, _ in self.products)

    @property
    def flops(self) -> int:
        """Of all."""
        return sum(flops for _, flops in self.products)

    def seconds(self, bandwidth: float, rate: float) -> float:
        """Each matmul takes its bytes' time or its operations', whichever is longer."""
        return sum(max(nbytes / bandwidth, flops / rate) for nbytes, flops in self.products)


def step_floor(config: Any, tokens: int, layer: int, first_adapted: int = 0) -> Floor:
    """Floor of a training step with NF4 weights and adapters from block ``first_adapted`` on.

    Forward, the weights of the first ``layer`` blocks are read once for all tokens. Backward, those
    through which a gradient has to pass: from the first adapted block on, less that block's q, k
    and v, whose input needs none. Adapters, activations and embeddings are left out.
    """
    qkv, others = _weights_of_block(config)
    weights = (qkv + others) * layer
    weights += others + (qkv + others) * (layer - 1 - first_adapted)
    return Floor(tuple((round(n * NF4_BYTES), 2 * n * tokens) for n in weights))


def scan_floor(subject: Subject) -> Floor:
    """Floor of the scan: the training pairs' words, each once, through all blocks.

    The blocks' weights are read once. Activations, norms, attention and retrieval are left out.
    """
    config = subject.files.config
    qkv, others = _weights_of_block(config)
    weights = (qkv + others) * config.num_hidden_layers
    tokens = sum(len(word) for word in dict.fromkeys(subject.splits[0].words))
    each = NF4_BYTES if subject.nf4 else subject.dtype.itemsize
    return Floor(tuple((round(n * each), 2 * n * tokens) for n in weights))


def _weights_of_block(config: Any) -> tuple[list[int], list[int]]:
    """How many weights a block's matrices have: q, k, v, and the others."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    return [hidden * q, hidden * kv, hidden * kv], [
        q * hidden,
        hidden * ffn,
        hidden * ffn,
        ffn * hidden,
    ]


def engine_trainer(subject: Subject, config: RunConfig) -> Trainer:
    """A run on the subject's training pairs, as ``tli-engine train`` sets it up."""
    layer = config.align.layer
    model = subject.early(layer, config)
    add_lora(model, config.lora, layer, config.seed)
    model.fuse_on_gpu()
    add_transposed_copies(model)
    space = fit_space("raw", torch.empty(0), torch.empty(0))
    return Trainer(model, config, subject.splits[0], space)


def engine_step(subject: Subject, config: RunConfig) -> tuple[Callable[[], float], int, Floor]:
    """Steps of the recipe on the subject's training pairs, as ``tli-engine train`` runs them.

    Returns:
        A call that trains some steps and returns the first one's loss; how many those are, for on
        a GPU no step waits for the one before; and a step's floor.
    """
    trainer = engine_trainer(subject, config)
    engine, layer = trainer.engine, config.align.layer
    trainer.model.train()
    steps, a_call = count(), STEPS_A_CALL if subject.device.type == "cuda" else 1

    def call() -> float:
        for _ in range(a_call):
            engine.launch(next(steps))
        first, *_ = engine.collect(wait=True)
        return first.loss

    return call, a_call, step_floor(subject.files.config, batch_tokens(subject, config), layer)


def batch_tokens(subject: Subject, config: RunConfig) -> int:
    """Tokens of a batch, both languages together, in the mean."""
    train = subject.splits[0]
    tokens = sum(len(word) for word in train.words)
    return round(config.train.batch_size * tokens / len(train.pairs))


def scan_model(subject: Subject) -> EarlyModel:
    """All blocks, as ``tli-engine scan`` runs them."""
    model = subject.early(subject.files.config.num_hidden_layers)
    model.fuse_on_gpu()
    return model


def engine_scan(model: EarlyModel, subject: Subject) -> Callable[[], object]:
    """The scan of the training pairs at every layer, proposal included."""
    train = subject.splits[0]
    return lambda: scan(model, subject.name, train.pairs, train.source, train.target, "paper")


def engine_forward(model: EarlyModel, subject: Subject) -> Callable[[], None]:
    """The scan's words through all blocks and no more: what a scan cannot do without."""
    staged = stage(model, subject.splits[0].words, ["paper"])

    @torch.no_grad()
    def forward() -> None:
        for part in staged.packs:
            for _ in model.hidden_states(part.pack):
                pass
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    return forward


def engine_evaluation(subject: Subject) -> Callable[[], object]:
    """Alignment of every split before and after training, retrieval included."""
    layer = subject.config.align.layer
    model = subject.early(layer)
    add_lora(model, subject.config.lora, layer, seed=0)
    model.fuse_on_gpu()
    return lambda: [_evaluate(model, split, layer) for split in subject.splits]


def _evaluate(model: EarlyModel, split: Any, layer: int) -> object:
    return layer_curve(encode_before_after(model, split, [layer], "content"))
