"""A model of any size, run on a CPU one block at a time."""

import copy
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tli_engine.config import Quantize
from tli_engine.data.words import Word, pack
from tli_engine.errors import UserError
from tli_engine.models.adapters import wrap
from tli_engine.models.causal import soft_capped
from tli_engine.models.early import EarlyModel, add_to_digest, load_early
from tli_engine.models.files import ModelFiles
from tli_engine.models.peft_format import StoredAdapter
from tli_engine.models.sources import HEAD, TensorSource
from tli_engine.nf4 import NF4Weight

# rows of the head that are widened at a time
_HEAD_ROWS = 8192
_FIRST_BLOCK = re.compile(r"^layers\.0\.")


@dataclass(frozen=True)
class Held:
    """How a run holds a model's frozen weights; the options are :func:`load_early`'s.

    Attributes:
        dtype: What they are rounded to, and quantised from.
        quantize: Which of them are held in NF4.
        double_quant: With their absmax in 8 bits.
    """

    dtype: torch.dtype = torch.float32
    quantize: Quantize = "auto"
    double_quant: bool = False

    def load(self, files: ModelFiles, depth: int, token_ids: set[int]) -> EarlyModel:
        """Blocks on the CPU that compute in fp32, with the values that the run's have."""
        quantised = {"quantize": self.quantize, "double_quant": self.double_quant}
        where = {"dtype": self.dtype, "device": torch.device("cpu")}
        return load_early(files, depth, **where, **quantised, token_ids=token_ids).float()  # type: ignore[arg-type]


@torch.no_grad()
def logits_of(
    files: ModelFiles,
    words: Sequence[Word],
    adapter: StoredAdapter | None = None,
    strength: float = 1.0,
    advance: Callable[[int], None] = lambda blocks: None,
    *,
    held: Held = Held(),
) -> Tensor:
    """Run a whole model on words, in fp32 on the CPU, with one block in memory at a time.

    Args:
        files: The model.
        words: Laid end to end; none is longer than the attention window.
        adapter: Put on the model's blocks.
        strength: Scales what the adapter adds.
        advance: Called with the number of blocks done.
        held: Values that the weights take; by default those of the files.

    Returns:
        Logits, ``[T, V]``, fp32.

    Raises:
        UserError: As :func:`load_early`.
    """
    tokens = pack(words)
    hidden = held.load(files, 0, {t for w in words for t in w.input_ids}).embed(tokens)
    total = files.config.num_hidden_layers
    for k in range(total):
        block = held.load(_one_block(files, k), 1, {0})
        if adapter is not None:
            _adapt(block, k, adapter, strength)
        hidden = block.run_block(0, hidden, tokens, block.rotary(tokens))
        if k == total - 1:
            hidden = block.read_out(1, hidden)
        advance(1)
    return _logits(files, hidden, held)


def base_digest_of(
    files: ModelFiles,
    depth: int,
    held: Held,
    *,
    device: torch.device,
    token_ids: Iterable[int] | None = None,
) -> str:
    """:meth:`EarlyModel.base_digest` of a model as :func:`load_early` would hold it, block by block.

    Args:
        files: The model.
        depth: Number of blocks.
        held: How they are held.
        device: Where weights are quantised.
        token_ids: Tokens whose embedding rows are held; all by default.

    Returns:
        SHA-256 in hexadecimal.

    Raises:
        UserError: As :func:`load_early`.
    """
    digest, here = hashlib.sha256(), "decoder.layers.0."
    how: Any = {
        "dtype": held.dtype,
        "device": device,
        "quantize": held.quantize,
        "double_quant": held.double_quant,
    }
    below = load_early(files, 0, **how, token_ids=token_ids).frozen_tensors()
    for name, tensor in sorted(below.items()):
        add_to_digest(digest, name, tensor)
    last, above = files.config.num_hidden_layers - 1, {}
    # the order of their names, in which a whole model's tensors are taken
    for k in sorted(range(depth), key=lambda k: f"{k}."):
        part = _one_block(files, k)
        # the final norm belongs to the last block alone
        part.config.num_hidden_layers = 1 if k == last else 2
        block = load_early(part, 1, **how, token_ids={0}).frozen_tensors()
        for name, tensor in sorted(block.items()):
            if name.startswith(here):
                add_to_digest(digest, f"decoder.layers.{k}.{name.removeprefix(here)}", tensor)
            elif k == last and name not in below:
                above[name] = tensor
    for name, tensor in sorted(above.items()):
        add_to_digest(digest, name, tensor)
    return digest.hexdigest()


class _OneBlock:
    """A model's tensors with one of its blocks in the place of block 0."""

    def __init__(self, source: TensorSource, block: int) -> None:
        self._source, self._prefix = source, f"layers.{block}."

    def _name(self, name: str) -> str:
        return _FIRST_BLOCK.sub(self._prefix, name)

    def __contains__(self, name: str) -> bool:
        return self._name(name) in self._source

    def read(self, name: str) -> Tensor:
        return self._source.read(self._name(name))

    def read_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        return self._source.read_rows(self._name(name), rows)

    def read_nf4(self, name: str) -> NF4Weight | None:
        return self._source.read_nf4(self._name(name))


def _one_block(files: ModelFiles, block: int) -> ModelFiles:
    """The model as if it consisted of one of its blocks, with its own kind of attention."""
    config: Any = copy.deepcopy(files.config)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[block : block + 1]
    return replace(files, config=config, source=_OneBlock(files.source, block))


def _adapt(model: EarlyModel, block: int, adapter: StoredAdapter, strength: float) -> None:
    prefix = f"layers.{block}."
    for name, (a, b) in adapter.tensors.items():
        if name.startswith(prefix):
            here = f"layers.0.{name.removeprefix(prefix)}"
            layer = wrap(model, here, r=adapter.r, alpha=adapter.alpha, rslora=adapter.rslora)
            layer.lora_A.weight.copy_(a)
            layer.lora_B.weight.copy_(b)
            layer.scaling *= strength


def _logits(files: ModelFiles, hidden: Tensor, held: Held) -> Tensor:
    name = "embed_tokens.weight" if files.config.tie_word_embeddings else HEAD
    if name not in files.source:
        raise UserError(f"{files.name}: has no tensor {name}; is the download complete?")
    parts = files.source.read(name).split(_HEAD_ROWS)  # type: ignore[no-untyped-call]
    logits = torch.cat([hidden @ rows.to(held.dtype).float().T for rows in parts], 1)
    return soft_capped(logits, files.config)
