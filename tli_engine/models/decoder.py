"""A causal model run token by token: prompts in packs, then steps of one token a text."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tli_engine.data.words import Pack, Word, pack
from tli_engine.models.causal import CausalModel, soft_capped
from tli_engine.models.document_attention import Documents
from tli_engine.models.fused import Rows
from tli_engine.models.graph_recorder import capture
from tli_engine.models.kv_cache import CachedAttention, KVCache, Prefill
from tli_engine.models.packed_attention import Attends

# tokens of the prompts that are run at once, unless one alone has more
_PREFILL_TOKENS = 8192
# slots are a multiple of so many where a graph is captured for each number of them
_GRAPH_SLOTS = 256
# steps after which the host looks whether all texts have ended, where it would wait for the device
_LOOK_EVERY = 8
# rotary embeddings that ask the host how long the texts have become
_HOST_ROPE = ("dynamic", "longrope")


class Decoder:
    """Continues batches of texts by a model, whose weights and adapters stay as they are meanwhile.

    Memory is taken by the first batch; those that follow need no more rows or slots.

    Args:
        model: Its blocks may be fused or not.
        cuda_graph: Whether steps are replayed from a CUDA graph, on a GPU.

    Attributes:
        look_every: Steps after which a caller had best look whether the texts have ended.
    """

    def __init__(self, model: CausalModel, *, cuda_graph: bool = True) -> None:
        self._model = model
        on_gpu = model.early.device.type == "cuda"
        self.look_every = _LOOK_EVERY if on_gpu else 1
        self._graphs = cuda_graph and on_gpu and not waits_for_lengths(model)
        self._memory: Tensor | None = None
        self._cache: KVCache | None = None
        self._steps: dict[tuple[int, int], _CapturedStep] = {}
        self._caches: dict[tuple[int, int], KVCache] = {}

    @torch.no_grad()
    def begin(self, prompts: Sequence[tuple[int, ...]], new_tokens: int, copies: int = 1) -> Tensor:
        """Run prompts, and make room to continue each so many times over.

        Args:
            prompts: Token ids, none empty.
            new_tokens: Tokens by which they are continued at most.
            copies: Rows that each prompt takes from here on, one after the other.

        Returns:
            Logits of what follows each prompt, ``[prompts, V]``, fp32.
        """
        cache = self._cache = self._cache_for(prompts, new_tokens, copies)
        logits, first = [], 0
        for part in _parts(prompts):
            logits.append(self._prefill(part, first, cache, copies))
            first += len(part)
        return torch.cat(logits)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Continue each row by a token, ``[rows]``; return logits of what follows, ``[rows, V]``, fp32.

        They are overwritten by the next step.
        """
        cache = self._cache
        assert cache is not None
        key = cache.rows, cache.slots
        if not self._graphs:
            logits = self._run_step(cache, tokens, cache.filled + 1)
        else:
            if key not in self._steps:
                run = partial(self._run_step, cache, seen=cache.slots)
                self._steps[key] = _CapturedStep(run, tokens)
            logits = self._steps[key](tokens)
        cache.advance()
        return logits

    def reorder(self, sources: Tensor) -> None:
        """Let each row go on from what row ``sources`` of its own prompt has generated, ``[rows]``."""
        assert self._cache is not None
        self._cache.reorder(sources)

    def _cache_for(
        self, prompts: Sequence[tuple[int, ...]], new_tokens: int, copies: int
    ) -> KVCache:
        longest = max(map(len, prompts))
        slots = longest + new_tokens
        if self._graphs:
            slots = -(-slots // _GRAPH_SLOTS) * _GRAPH_SLOTS
        early = self._model.early
        begin = torch.tensor([longest - len(p) for p in prompts]).repeat_interleave(copies)
        key = len(begin), slots
        if key not in self._caches:
            block: Any = early.blocks[0]
            heads = early.config.num_key_value_heads
            shape = (2, early.depth, *key, heads, block.self_attn.head_dim)
            keys, values = self._take(shape).unbind()
            self._caches[key] = KVCache(keys, values)
        self._caches[key].restart(longest, begin)
        return self._caches[key]

    def _take(self, shape: tuple[int, ...]) -> Tensor:
        """Some of the memory that all batches share."""
        size = torch.Size(shape).numel()
        if self._memory is None or self._memory.numel() < size:
            # graphs and caches of the old memory are of no use
            self._caches.clear()
            self._steps.clear()
            self._memory = self._model.early.decoder.embed_tokens.weight.new_empty(size)
        return self._memory[:size].view(shape)

    def _prefill(
        self, prompts: Sequence[tuple[int, ...]], first: int, cache: KVCache, copies: int
    ) -> Tensor:
        """Run prompts of numbers from ``first`` on."""
        device = self._model.early.device
        packed = pack([Word(ids, (True,) * len(ids)) for ids in prompts])
        lengths = torch.tensor([len(ids) for ids in prompts])
        rows = copies * torch.arange(first, first + len(prompts))
        starts = rows * cache.slots + cache.prompt - lengths
        at = packed.position_ids + starts.repeat_interleave(lengths)
        at = at + cache.slots * torch.arange(copies)[:, None]
        packed, at = packed.to(device), at.to(device)
        documents = Documents.of(packed, self._model.attention)
        depth = range(self._model.early.depth)
        layers = [Prefill(documents, cache, block, at) for block in depth]
        return self._logits(packed, layers, packed.offsets[1:] - 1)

    def _run_step(self, cache: KVCache, tokens: Tensor, seen: int) -> Tensor:
        layers = [CachedAttention(cache, block, seen) for block in range(self._model.early.depth)]
        return self._logits(_one_each(tokens, cache.positions), layers, None)

    def _logits(self, packed: Pack, layers: Sequence[Attends], rows: Tensor | None) -> Tensor:
        """What follows the rows of a pack, or some of them; each block attends by its own layer."""
        model, early = self._model, self._model.early
        x = early.embed(packed, documents=True)
        residual: Tensor | None = None
        if early.fused is None:
            rotary = early.rotary(packed)
            for block, layer in enumerate(layers):
                x = early.run_block(block, x, packed, rotary, layer)
        else:
            cos, sin = early.fused.angles(packed.position_ids, x[:1])
            for fused, layer in zip(early.fused.blocks, layers, strict=True):
                x, residual = fused(x, residual, Rows(cos, sin, None, layer))
        x = model.read_out(x, residual, rows)
        logits = torch.nn.functional.linear(x, model.head).float()
        return soft_capped(logits, early.config)


class _CapturedStep:
    """A step as a CUDA graph."""

    def __init__(self, run: Any, tokens: Tensor) -> None:
        self._tokens = tokens.clone()
        stream = torch.cuda.Stream(tokens.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(tokens.device))
        with torch.cuda.stream(stream):
            # libraries set themselves up in a first call, which no graph may hold
            run(self._tokens)
        torch.cuda.current_stream(tokens.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with capture(self._graph, stream=stream):
            self._logits: Tensor = run(self._tokens)

    def __call__(self, tokens: Tensor) -> Tensor:
        self._tokens.copy_(tokens)
        self._graph.replay()
        return self._logits


def waits_for_lengths(model: CausalModel) -> bool:
    """Whether the model's rotary embeddings ask the device how long the texts are."""
    parameters = getattr(model.early.config, "rope_parameters", None) or {}
    # of one kind of layer, or of each kind
    kinds = [parameters, *(p for p in parameters.values() if isinstance(p, dict))]
    return any(kind.get("rope_type") in _HOST_ROPE for kind in kinds)


def _parts(prompts: Sequence[tuple[int, ...]]) -> Iterator[Sequence[tuple[int, ...]]]:
    """Prompts in packs of some thousand tokens."""
    first = tokens = 0
    for i, prompt in enumerate(prompts):
        if i > first and tokens + len(prompt) > _PREFILL_TOKENS:
            yield prompts[first:i]
            first, tokens = i, 0
        tokens += len(prompt)
    yield prompts[first:]


def _one_each(tokens: Tensor, positions: Tensor) -> Pack:
    """A pack of one token a text."""
    rows = torch.arange(len(tokens), device=tokens.device)
    offsets = torch.arange(len(tokens) + 1, device=tokens.device)
    return Pack(
        tokens, positions, torch.ones_like(rows, dtype=torch.bool), offsets, rows[:, None], rows
    )
