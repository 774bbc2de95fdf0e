"""What the benches of whole models run on: a model, and words for it.

``smollm2-135m`` has real weights and words. The larger ones have random weights of a model's shape,
made where they are to lie: no speed here depends on the values. The peers are given the very bytes
that the engine has.
"""

import copy
import random
import zlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.nf4_shapes import bnb_linear, bnb_weight
from tli_engine.config import RunConfig, apply_overrides, read_recipe, resolve_config
from tli_engine.data.pairs import PairList
from tli_engine.data.splits import Split, read_run_pairs, tokenize_splits, tokens_of
from tli_engine.data.words import Word
from tli_engine.models.early import EarlyModel, load_early
from tli_engine.models.files import ModelFiles, open_model
from tli_engine.nf4 import NF4Weight
from tli_engine.ops import nf4_quantize

# the published data: 623 pairs to train on, 63 to check; lengths are those of bare words
PAIRS = {"train": 623, "control": 63}
SHORTEST, MEAN_LENGTH, LONGEST = 2, 4, 8
_STD = 0.02

_LLAMA_3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "tie_word_embeddings": False,
}
_QWEN2_72B = {
    "model_type": "qwen2",
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    # its tokenizer puts nothing before a text
    "bos_token_id": None,
    "eos_token_id": 151643,
    "tie_word_embeddings": False,
}
_QWEN2_1_5B = {
    **_QWEN2_72B,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
RANDOM = {"llama-3-8b": _LLAMA_3_8B, "qwen2-72b": _QWEN2_72B, "qwen2-1.5b": _QWEN2_1_5B}
NAMES = ("smollm2-135m", *RANDOM)


class RandomSource:
    """A :class:`~tli_engine.models.sources.TensorSource` of values drawn anew by name at each read.

    Weights are normal, norms one; the linear layers of blocks are stored in NF4 if ``nf4``, their
    absmax in 8 bits if ``double_quant``. They are of ``drawn_in``, or of ``dtype`` if that is None.
    """

    def __init__(
        self,
        config: Any,
        dtype: torch.dtype,
        device: torch.device,
        nf4: bool,
        double_quant: bool = False,
        drawn_in: torch.dtype | None = None,
    ) -> None:
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        self._shapes = {
            name.removeprefix("model."): parameter.shape
            for name, parameter in model.named_parameters()
        }
        self._dtype, self._drawn_in, self._device = dtype, drawn_in or dtype, device
        self._nf4, self._double_quant = nf4, double_quant

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def read(self, name: str) -> Tensor:
        """Draw one tensor."""
        if name.endswith("norm.weight"):
            return torch.ones(self._shapes[name], dtype=self._dtype, device=self._device)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        tensor = torch.empty(self._shapes[name], dtype=self._drawn_in, device=self._device)
        return tensor.normal_(0, _STD, generator=generator).to(self._dtype)

    def read_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Some rows of a matrix, which is drawn in full."""
        return self.read(name)[list(rows)]

    def read_nf4(self, name: str) -> NF4Weight | None:
        """A linear layer of a block, quantised; ``None`` for others."""
        if not self._nf4 or not name.startswith("layers.") or len(self._shapes[name]) != 2:
            return None
        return nf4_quantize(self.read(name), double_quant=self._double_quant)


@dataclass(frozen=True)
class Subject:
    """A model and words to bench on.

    Attributes:
        name: The model.
        files: Its tensors.
        config: The published recipe on it.
        splits: Words, tokenised.
        dtype: What is not NF4 is held in, and activations computed in.
        device: Where it runs.
    """

    name: str
    files: ModelFiles
    config: RunConfig
    splits: list[Split]
    dtype: torch.dtype
    device: torch.device

    @property
    def nf4(self) -> bool:
        """Whether the blocks' linear layers are NF4."""
        return self.config.quantize == "nf4"

    @property
    def label(self) -> str:
        """Model and arithmetic, for a row of results."""
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]
        return f"{self.name} {'nf4 ' * self.nf4}{dtype}"

    @property
    def special(self) -> list[int]:
        """Tokens that are no part of a word."""
        config = self.files.config
        return [t for t in (config.bos_token_id, config.eos_token_id) if t is not None]

    def early(self, depth: int, config: RunConfig | None = None) -> EarlyModel:
        """The engine's model of the first blocks, with the rows of the embeddings that it needs."""
        config = config or self.config
        return load_early(
            self.files,
            depth,
            dtype=self.dtype,
            device=self.device,
            quantize=config.quantize,
            numerics=config.numerics,
            weight_residency=config.weight_residency,
            token_ids=tokens_of(self.splits),
        )

    def in_whole_batches(self, pairs: int) -> "Subject":
        """The same with as many training pairs as make whole batches of ``pairs``."""
        train, *others = self.splits
        kept = len(train.pairs) // pairs * pairs
        whole = Split(train.name, train.pairs[:kept], train.source[:kept], train.target[:kept])
        return replace(self, splits=[whole, *others])

    def causal_lm(self, depth: int | None = None) -> Any:
        """The causal LM of transformers, first ``depth`` blocks or whole; NF4 by bitsandbytes."""
        return causal_lm(self.files, depth, self.dtype, self.device, self.nf4)


def find(name: str, device: torch.device) -> Subject:
    """One of ``NAMES``."""
    if name in RANDOM:
        return random_subject(name, config_of(name), torch.bfloat16, device)
    overrides = [f"model=builtin:{name}", "quantize=none", "dtype=float32"]
    config = resolve_config(apply_overrides(read_recipe("paper"), overrides), "paper")
    files = open_model(config.model)
    splits = tokenize_splits(read_run_pairs(config.data), files.tokenizer, config.words)
    return Subject(name, files, config, splits, torch.float32, device)


def config_of(name: str) -> Any:
    """Configuration of one of ``RANDOM``."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**RANDOM[name])


def random_subject(
    name: str,
    model_config: Any,
    dtype: torch.dtype,
    device: torch.device,
    nf4: bool = True,
    double_quant: bool = False,
    drawn_in: torch.dtype | None = None,
) -> Subject:
    """A model of random weights and words of random tokens, both the same at every call."""
    source = RandomSource(model_config, dtype, device, nf4, double_quant, drawn_in)
    files = ModelFiles(name, name, Path(), None, model_config, source)
    overrides = [f"model={name}", f"quantize={'nf4' if nf4 else 'none'}"]
    config = resolve_config(apply_overrides(read_recipe("paper"), overrides), "paper")
    draw = random.Random(0)
    splits = [random_split(of, pairs, model_config, draw) for of, pairs in PAIRS.items()]
    return Subject(name, files, config, splits, dtype, device)


def random_split(name: str, pairs: int, config: Any, draw: random.Random) -> Split:
    """Pairs of words of random tokens, ``MEAN_LENGTH`` of them in the mean; no two share a text."""
    lengths = [SHORTEST] * (2 * pairs)
    room = list(range(len(lengths)))
    for _ in range((MEAN_LENGTH - SHORTEST) * len(lengths)):
        i = draw.choice(room)
        lengths[i] += 1
        if lengths[i] == LONGEST:
            # in order: it is found faster than by a look at each
            del room[bisect_left(room, i)]
    words = [_random_word(length, config, draw) for length in lengths]
    texts = [f"{name} {i}" for i in range(len(words))]
    pair_list = PairList(("source", "target"), tuple(texts[:pairs]), tuple(texts[pairs:]))
    return Split(name, pair_list, words[:pairs], words[pairs:])


def _random_word(length: int, config: Any, draw: random.Random) -> Word:
    """A first token as the tokenizer adds it, if it does, and tokens below the special ones."""
    first = () if config.bos_token_id is None else (config.bos_token_id,)
    last = min(t for t in (*first, config.eos_token_id) if t is not None)
    ids = (*first, *(draw.randrange(last) for _ in range(length - len(first))))
    return Word(ids, tuple(i >= len(first) for i in range(length)))


def causal_lm(
    files: ModelFiles, depth: int | None, dtype: torch.dtype, device: torch.device, nf4: bool
) -> Any:
    """The causal LM of transformers, filled one tensor at a time."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(files.config)
    config.num_hidden_layers = depth or config.num_hidden_layers
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    source = files.source
    for path, module in list(model.named_modules()):
        name = path.removeprefix("model.")
        weight = (
            source.read_nf4(f"{name}.weight") if nf4 and isinstance(module, nn.Linear) else None
        )
        if weight is not None:
            owner, _, leaf = path.rpartition(".")
            bias = None if module.bias is None else source.read(f"{name}.bias")
            setattr(model.get_submodule(owner), leaf, bnb_linear(*bnb_weight(weight), bias))
            continue
        for leaf, _ in list(module.named_parameters(recurse=False)):
            if f"{name}.{leaf}" in source:
                # a copy of its own: it may be trained, and the source keeps its tensors
                tensor = source.read(f"{name}.{leaf}").to(device, dtype, copy=True)
                setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary_emb.to(device)
    # by which PEFT knows bitsandbytes' layers
    model.is_loaded_in_4bit = nf4
    return model.eval()
