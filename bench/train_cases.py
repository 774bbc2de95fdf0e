"""What the bench of fine-tuning steps runs: cases, providers, batches, the floor of a step."""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig

from bench.engine import Floor
from bench.models import RANDOM, Subject, config_of, random_subject
from tli_engine.models.builtin import find
from tli_engine.testing import tiny_config

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 16, 32
LEARNING_RATE = 2e-4
# different batches, used in turns
BATCHES = 4
NAMES = ("tiny", "smollm2-135m", *RANDOM)


class Absent(Exception):
    """A provider that cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        name: Of the case.
        method: Adapters, or every weight.
        layers: Blocks with adapters, as ``lora.layers``.
    """

    name: str
    method: Literal["lora", "full"]
    layers: str = "all"

    @property
    def early(self) -> list[int] | None:
        """Blocks with adapters where these are not all."""
        first, _, last = self.layers.partition("-")
        return None if self.layers == "all" else list(range(int(first), int(last) + 1))

    @property
    def first_trained(self) -> int:
        """The lowest block through which a gradient has to pass."""
        return self.early[0] if self.early else 0


CASES = {
    case.name: case
    for case in (Case("lora_early", "lora", "0-2"), Case("lora_all", "lora"), Case("full", "full"))
}


@dataclass(frozen=True)
class Provider:
    """Who trains, and how.

    Attributes:
        name: In the results; what follows the colon is how, where it is not the usual.
        kind: Whose code it is.
        activations: ``recompute`` is gradient checkpointing; ``save`` keeps everything, ``auto``
            (the engine's) what fits; ``offload`` is Unsloth's.
        dense: Weights in bf16 where they would be in NF4.
        liger: Patched by Liger.
        memory_gib: The engine's limit; none if 0.
        rounding: Of the engine's full fine-tuning.
        in_backward: Of the engine's full fine-tuning.
        accumulate: Parts into which a step's batch is cut; their gradients are added up.
        fp32: Activations and sums are in fp32, of the others' weights: what losses are judged by.
        graphs: Whether the engine's packs are replayed from CUDA graphs; None: by its own rule.
    """

    name: str
    kind: Literal["engine", "transformers", "unsloth"]
    activations: Literal["recompute", "auto", "save", "offload"] = "recompute"
    dense: bool = False
    liger: bool = False
    memory_gib: int = 0
    rounding: Literal["master", "stochastic"] = "master"
    in_backward: bool = False
    accumulate: int = 1
    fp32: bool = False
    graphs: bool | None = None


_GRAPHS = (
    Provider("tli-engine:graphs", "engine", "auto", graphs=True),
    Provider("tli-engine:launches", "engine", "auto", graphs=False),
)
# the first one that runs is the baseline; those that matter most come first, a run may be cut
_LORA = (
    Provider("peft+bitsandbytes", "transformers"),
    Provider("peft+bitsandbytes+liger", "transformers", liger=True),
    Provider("peft+bitsandbytes+liger:save", "transformers", "save", liger=True),
    Provider("tli-engine", "engine", "auto"),
    *_GRAPHS,
    Provider("tli-engine:fp32", "engine", "auto", fp32=True),
    Provider("tli-engine:12-gib", "engine", "auto", memory_gib=12),
    Provider("tli-engine:12-gib-in-4", "engine", "auto", memory_gib=12, accumulate=4),
    # beside what Unsloth takes of the 8B shape with adapters on all blocks
    Provider("tli-engine:11-gib-in-4", "engine", "auto", memory_gib=11, accumulate=4),
    Provider("tli-engine:9-gib-in-4", "engine", "auto", memory_gib=9, accumulate=4),
    Provider("peft+bitsandbytes+liger:save-in-4", "transformers", "save", liger=True, accumulate=4),
    Provider("tli-engine:recompute", "engine"),
    Provider("tli-engine:save", "engine", "save"),
    Provider("tli-engine:bf16", "engine", "auto", dense=True),
    Provider("unsloth", "unsloth"),
    Provider("unsloth:offload", "unsloth", "offload"),
    Provider("unsloth:save", "unsloth", "save"),
    Provider("peft+bitsandbytes:save", "transformers", "save"),
    Provider("peft+liger:bf16", "transformers", dense=True, liger=True),
    Provider("peft+liger:bf16-save", "transformers", "save", dense=True, liger=True),
)
_FULL = (
    Provider("transformers", "transformers"),
    Provider("transformers+liger", "transformers", liger=True),
    Provider("transformers+liger:save", "transformers", "save", liger=True),
    Provider("tli-engine", "engine", "auto"),
    *_GRAPHS,
    Provider("tli-engine:recompute", "engine"),
    Provider("tli-engine:save", "engine", "save"),
    Provider("tli-engine:stochastic", "engine", "auto", rounding="stochastic"),
    Provider("tli-engine:stochastic-recompute", "engine", rounding="stochastic"),
    Provider("tli-engine:in-backward", "engine", in_backward=True),
    Provider(
        "tli-engine:stochastic-in-backward", "engine", rounding="stochastic", in_backward=True
    ),
    Provider("transformers:save", "transformers", "save"),
)
# full fine-tuning takes 8-bit states, and gradients that are not all held at once
_LARGE = ("llama-3-8b",)
# too large to be trained by the peers on one GPU of 80 GB
_ALONE = ("qwen2-72b",)
_WITHIN_80_GB = Provider("tli-engine:79-gib", "engine", "auto", memory_gib=79)
PROVIDER_NAMES = tuple(dict.fromkeys(p.name for p in (*_LORA, *_FULL, _WITHIN_80_GB)))


def providers_of(case: Case, model: str) -> list[Provider]:
    """Who takes part, the baseline first."""
    found = list(_LORA if case.method == "lora" else _FULL)
    if model in _ALONE:
        found = [p for p in found if p not in _GRAPHS]
        found = [p for p in found if p.kind == "engine" and not (p.dense or p.fp32 or p.memory_gib)]
        return [*found, _WITHIN_80_GB]
    if case.method == "full" and model in _LARGE:
        peers = ("transformers", "transformers+liger")
        return [p for p in found if p.name in peers or p.in_backward]
    return found


def optimizer_of(case: Case, model: str, provider: Provider) -> Literal["adamw", "adamw-8bit"]:
    """The optimizer, as ``train.optimizer`` calls it."""
    large = case.method == "full" and model in _LARGE
    # random rounding is of AdamW with statistics in bf16 alone
    return "adamw-8bit" if large and provider.rounding == "master" else "adamw"


def train_config(name: str) -> Any:
    """Configuration of one of ``NAMES``."""
    if name == "tiny":
        return tiny_config("llama", hidden_size=64, intermediate_size=128)
    if name == "smollm2-135m":
        # of random weights here, as the others
        return AutoConfig.for_model(**find(f"builtin:{name}").config)
    return config_of(name)


def train_subject(
    name: str, device: torch.device, *, nf4: bool, double_quant: bool, fp32: bool = False
) -> Subject:
    """A model to fine-tune, its weights random; computed in fp32 on a CPU, or where it is asked for."""
    usual = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype, config = torch.float32 if fp32 else usual, train_config(name)
    return random_subject(name, config, dtype, device, nf4, nf4 and double_quant, usual)


def random_batches(config: Any, rows: int, length: int) -> list[Tensor]:
    """Tokens to train on, ``[rows, length]`` each, on the CPU; the same at every call."""
    generator = torch.Generator().manual_seed(0)
    size = (rows, length)
    most = min(config.vocab_size, config.eos_token_id or config.vocab_size)
    return [torch.randint(most, size, generator=generator) for _ in range(BATCHES)]


@torch.no_grad()
def draw_adapters(tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Give the A matrices among ``tensors`` values by their names: every provider's start alike.

    Names are PEFT's or the engine's; B matrices stay zero. The spread is that of PEFT's own.
    """
    for name, tensor in tensors:
        if "lora_A" not in name:
            continue
        key = name[name.index("layers.") :].partition(".lora_A")[0]
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        bound = tensor.shape[1] ** -0.5
        tensor.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator))


def train_floor(config: Any, rows: int, length: int, case: Case) -> Floor:
    """Products that a step cannot do without, nothing recomputed.

    Forward: every linear layer of the blocks, the output layer, attention's two products (half of
    the pairs are masked). Backward: of a frozen layer the input's gradient, of a trained one the
    weight's too; attention's four products. Nothing goes below the first trained block, nor to its
    q, k and v from frozen embeddings. Adapters: rank times inputs and outputs, three times.
    """
    hidden, ffn = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    qkv = [(q, hidden), (kv, hidden), (kv, hidden)]
    others = [(hidden, q), (ffn, hidden), (ffn, hidden), (hidden, ffn)]
    depth, tokens = config.num_hidden_layers, rows * length
    full, first = case.method == "full", case.first_trained
    sizes = [n * k for n, k in qkv + others]
    block, reads_input = sum(sizes), sum(sizes[:3])
    flops = 2 * tokens * block * depth
    flops += 2 * tokens * (block * (depth - first) - (0 if full else reads_input))
    flops += 2 * tokens * block * depth if full else 0
    labels = rows * (length - 1)
    flops += 2 * labels * hidden * config.vocab_size * (3 if full else 2)
    flops += 2 * tokens * length * q * (depth + 2 * (depth - first))
    adapted = 0 if full else len(case.early or range(depth))
    flops += 6 * tokens * RANK * adapted * sum(n + k for n, k in qkv + others)
    return Floor(((0, flops),))


@dataclass(frozen=True)
class Step:
    """A provider's step, ready to run.

    Attributes:
        call: Trains on the next batch; its mean loss. It may return before the GPU is done.
        trained: Parameters that are trained.
    """

    call: Callable[[], Tensor | float]
    trained: int
