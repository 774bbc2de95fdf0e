"""A training step on the engine's own ops, replayed from a CUDA graph where there is one.

Nothing in a step waits for the device: a batch comes by one copy, learning rates lie there, and what
a step came to is read when it is done.
"""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist

from tli_engine.align.encode import stage
from tli_engine.align.objective import BatchLoss, pack_loss, vectors_loss
from tli_engine.align.space import PairSpace
from tli_engine.config import RunConfig
from tli_engine.data.splits import Split
from tli_engine.data.words import Word
from tli_engine.distributed.gathered import gather_rows, share_of
from tli_engine.distributed.world import ALONE, World
from tli_engine.models.early import EarlyModel
from tli_engine.models.fused import Rows
from tli_engine.models.graph_recorder import GraphRecorder
from tli_engine.ops import segment_mean
from tli_engine.train.engine import Observed
from tli_engine.train.flat_adamw import FlatAdamW
from tli_engine.train.module_step import check_finite
from tli_engine.train.order import batch_rows, step_seed
from tli_engine.train.readback import Readback
from tli_engine.train.schedule import learning_rate
from tli_engine.train.staging import Batch, BatchBuffer, Ints, WordTable, padded


@dataclass
class _Captured:
    """A shape's buffers, and the graph that computes a step from them."""

    buffer: BatchBuffer
    graph: torch.cuda.CUDAGraph | None = None
    observed: Tensor | None = None


@dataclass(frozen=True)
class _Pending:
    step: int
    tokens: int
    values: Readback


@dataclass(frozen=True)
class _Part:
    """Words of a batch that are encoded together, and their rows."""

    words: slice
    tokens: slice


def _parts(lengths: Ints, most: int | None) -> list[_Part]:
    """Cut words of these lengths into parts of at most ``most`` rows, or of one word."""
    ends = lengths.cumsum().tolist()
    parts, word, row = [], 0, 0
    for i, end in enumerate(ends, 1):
        full = most is not None and i < len(ends) and ends[i] - row > most
        if full or i == len(ends):
            parts.append(_Part(slice(word, i), slice(row, end)))
            word, row = i, end
    return parts


class FusedStep:
    """Computes steps on :class:`FusedBlocks`, without waiting for them.

    The blocks below the first adapted one run once for each word, before training. Batches are
    filled up to few numbers of rows, each of which has its graph; without graphs the same launches
    are made one by one, and give the same bits.
    """

    def __init__(
        self,
        model: EarlyModel,
        config: RunConfig,
        pairs: Split,
        space: PairSpace,
        total_steps: int,
        world: World = ALONE,
    ) -> None:
        self._model, self._config, self._space, self._world = model, config, space, world
        self._blocks = model.fuse()
        # what ranks send to one another is launched, not replayed
        asked = config.train.cuda_graph is not False and world.size == 1
        self._graphs = asked and model.device.type == "cuda"
        self._pairs = len(pairs.source)
        source_groups, target_groups = pairs.groups
        self._groups = np.array([source_groups, target_groups])
        self._adapted = [p for p in self._blocks.projections() if p.adapters]
        joined = {name: tensor for p in self._adapted for name, tensor in p.joined().items()}
        rates = [learning_rate(config.train, step, total_steps) for step in range(total_steps)]
        self._optimizer = FlatAdamW(
            joined,
            torch.tensor(rates),
            weight_decay=config.train.weight_decay,
            max_grad_norm=config.train.max_grad_norm or math.inf,
        )
        for projection in self._adapted:
            projection.expose()
        self._leaves = list(joined.values())
        self._first = next(
            i
            for i, block in enumerate(self._blocks.blocks)
            if any(p.adapters for p in block.projections)
        )
        self._inputs, self._words = self._table_of(pairs)
        self._angles = self._table_of_angles(pairs.words)
        self._shapes: dict[tuple[int, ...], _Captured] = {}
        self._pending: deque[_Pending] = deque()
        self._recorder = GraphRecorder(model.device) if self._graphs else None

    @cached_property
    def tensors(self) -> dict[str, nn.Parameter]:
        """The adapters' own tensors, views of the joined ones."""
        return {
            name: parameter
            for projection in self._adapted
            for name, parameter, _, _ in projection.parts()
        }

    def launch(self, step: int) -> None:
        """Begin a step; returns while the device computes."""
        config = self._config
        rows = np.array(batch_rows(self._pairs, config.train.batch_size, config.seed, step))
        own = share_of(len(rows), self._world)
        # a rank without a share encodes a pair that is then left out
        mine = rows[own.start : own.stop] if len(own) else rows[:1]
        chosen = np.concatenate([mine, mine + self._pairs])
        lengths = self._words.lengths[chosen]
        tokens = int(lengths.sum())
        shape = self._shape(padded(tokens), len(mine), len(rows))
        batch = shape.buffer.fill()
        self._words.write(chosen, batch)
        batch.groups.numpy()[:] = self._groups[:, rows]
        seed = step_seed(config.seed, step, self._world.rank)
        batch.seeds.numpy()[:] = [step_seed(seed, i) for i in range(len(batch.seeds))]
        shape.buffer.send()
        observed = self._run(shape, lengths)
        if self._world.size > 1:
            # those of all ranks
            tokens = int(self._words.lengths[np.concatenate([rows, rows + self._pairs])].sum())
        self._pending.append(_Pending(step, tokens, Readback(observed)))

    def collect(self, wait: bool) -> Iterator[Observed]:
        """Give the steps that are done."""
        while self._pending:
            first = self._pending[0]
            if not wait and not first.values.is_there:
                return
            self._pending.popleft()
            loss, true, random, grad_norm, *_ = first.values.wait()
            with self._world.speaking_once():
                check_finite(first.step, loss, grad_norm)
            yield Observed(first.step, first.tokens, loss, grad_norm, true, random)

    def state(self) -> dict[str, Tensor]:
        """The optimizer's statistics, by the adapters' own names."""
        joined, own = self._optimizer.state(), {}
        for projection in self._adapted:
            for name, _, whole, rows in projection.parts():
                for key, value in joined.items():
                    if key.startswith(f"{whole}/"):
                        # no two may share memory in a checkpoint
                        part = (value[rows] if value.ndim else value).clone()
                        own[f"{name}/{key.removeprefix(f'{whole}/')}"] = part
        return own

    def restore(self, statistics: dict[str, Tensor]) -> None:
        """Go back to statistics that :meth:`state` gave."""
        joined: dict[str, Tensor] = {}
        left = dict(statistics)
        for projection in self._adapted if statistics else ():
            shapes = {name: tensor.shape for name, tensor in projection.joined().items()}
            for name, parameter, whole, rows in projection.parts():
                joined[f"{whole}/step"] = left.pop(f"{name}/step")
                for key in ("exp_avg", "exp_avg_sq"):
                    value = left.pop(f"{name}/{key}")
                    if value.shape != parameter.shape:
                        wanted, got = list(parameter.shape), list(value.shape)
                        raise RuntimeError(f"{name}/{key} must be {wanted}, got {got}")
                    zeros = torch.zeros(shapes[whole])
                    joined.setdefault(f"{whole}/{key}", zeros)[rows] = value
        if left:
            raise KeyError(min(left))
        self._optimizer.load(joined)

    def _run(self, shape: _Captured, lengths: Ints) -> Tensor:
        parts = _parts(lengths, self._config.train.chunk_tokens)
        if len(parts) > 1:
            return self._compute_in_parts(shape.buffer.batch, parts)
        return self._replay(shape) if self._graphs else self._compute(shape.buffer.batch)

    def _compute(self, batch: Batch) -> Tensor:
        """A step: loss, mean cosines, gradient norm, learning rate, whether skipped; ``[6]``."""
        hidden = self._hidden(batch, slice(0, len(batch.rows)), batch.seeds)
        words, align = (batch.weight, batch.offsets), self._config.align
        if self._world.size == 1:
            found = pack_loss(hidden, *words, batch.groups, self._space, align)
        else:
            found = self._loss_of_vectors(segment_mean(hidden, *words), batch)
        self._optimizer.write_gradients(torch.autograd.grad(found.loss, self._leaves))
        return self._update(found)

    def _compute_in_parts(self, batch: Batch, parts: list[_Part]) -> Tensor:
        """The same step with one part's activations at a time, each encoded twice.

        Source: Gao et al. 2021 (GradCache).
        """
        with torch.no_grad():
            encoded = [self._vectors(batch, part, i) for i, part in enumerate(parts)]
        vectors = torch.cat(encoded).requires_grad_()
        found = self._loss_of_vectors(vectors, batch)
        (gradient,) = torch.autograd.grad(found.loss, vectors)
        sums = list(self._optimizer.gradients.values())
        self._optimizer.zero_grad()
        for i, part in enumerate(parts):
            of_part = self._vectors(batch, part, i)
            gradients = torch.autograd.grad(of_part, self._leaves, gradient[part.words])
            torch._foreach_add_(sums, gradients)
        return self._update(found)

    def _loss_of_vectors(self, vectors: Tensor, batch: Batch) -> BatchLoss:
        """The loss of pooled words, ``[2 R, D]``, among those of the other ranks."""
        if self._world.size > 1:
            count = batch.groups.shape[1]
            sides = (gather_rows(side, count, self._world) for side in vectors.chunk(2))
            vectors = torch.cat(list(sides))
        return vectors_loss(vectors, batch.groups, self._space, self._config.align)

    def _update(self, found: BatchLoss) -> Tensor:
        if self._world.size > 1:
            dist.all_reduce(self._optimizer.grad)
        observed = (found.loss.detach(), found.cosine_true, found.cosine_random)
        return torch.stack([*observed, *self._optimizer.step().unbind()])

    def _hidden(self, batch: Batch, tokens: slice, seeds: Tensor) -> Tensor:
        """Hidden states of some rows, whole words, at the loss's layer."""
        x = self._inputs.index_select(0, batch.rows[tokens])
        cos, sin = {}, {}
        for kind, table in self._angles.items():
            cos[kind], sin[kind] = table.index_select(0, batch.positions[tokens]).chunk(2, 1)
        bounds = batch.bounds[:, tokens]
        rows = Rows(cos, sin, bounds - tokens.start if tokens.start else bounds)
        depth = self._config.align.layer
        masks = iter(seeds.unbind()) if len(seeds) else None
        return self._model.read_out(depth, self._blocks.run(x, rows, self._first, depth, masks))

    def _vectors(self, batch: Batch, part: _Part, number: int) -> Tensor:
        """Vectors of a part's words, ``[S, D]``, fp32; the part has masks of its own."""
        hidden = self._hidden(batch, part.tokens, batch.seeds + number)
        offsets = batch.offsets[part.words.start : part.words.stop + 1] - part.tokens.start
        return segment_mean(hidden, batch.weight[part.tokens], offsets)

    def _shape(self, tokens: int, pairs: int, everyone: int) -> _Captured:
        key = (tokens, pairs, everyone)
        if key not in self._shapes:
            drops = sum(projection.drops for projection in self._adapted)
            buffer = BatchBuffer(tokens, pairs, drops, self._model.device, everyone)
            self._shapes[key] = _Captured(buffer)
        return self._shapes[key]

    def _replay(self, shape: _Captured) -> Tensor:
        if shape.graph is None:
            self._capture(shape)
        assert shape.graph is not None
        assert shape.observed is not None
        shape.graph.replay()
        return shape.observed

    def _capture(self, shape: _Captured) -> None:
        """Record a step of this shape, after one that is undone: kernels are compiled by it."""
        assert self._recorder is not None
        optimizer, batch = self._optimizer, shape.buffer.batch
        mutable = (optimizer.parameters, optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.counts)
        kept = [tensor.clone() for tensor in mutable]

        def undone() -> None:
            self._compute(batch)
            for tensor, before in zip(mutable, kept, strict=True):
                tensor.copy_(before)

        self._recorder.launch(undone)
        shape.graph, shape.observed = self._recorder.record(lambda: self._compute(batch))

    @torch.no_grad()
    def _table_of(self, pairs: Split) -> tuple[Tensor, WordTable]:
        """What the first adapted block takes, a row a token, and the words' places in it."""
        model, words, pooling = self._model, pairs.words, self._config.align.pooling
        model.check_window(max(len(word) for word in words))
        if self._first == 0:
            table, row_of = model.embedding_table()
            rows = [[int(row_of[token]) for token in word.input_ids] for word in words]
            return table, WordTable(words, rows, pooling)
        staged = stage(model, words, [])
        embedding: Tensor = model.decoder.embed_tokens.weight
        inputs = embedding.new_empty(staged.tokens, embedding.shape[1])
        sizes = [len(part.pack.input_ids) for part in staged.packs]
        for part, hidden in zip(staged.packs, torch.split(inputs, sizes), strict=True):
            hidden.copy_(model(part.pack, self._first))
        # words lie in the table as they were staged
        ends = dict(zip(staged.row_of, accumulate(map(len, staged.row_of)), strict=True))
        places = [range(ends[word] - len(word), ends[word]) for word in words]
        return inputs, WordTable(words, places, pooling)

    def _table_of_angles(self, words: list[Word]) -> dict[str, Tensor]:
        """Cosines, then sines, of each position, by kind of rotary embedding."""
        longest = max(len(word) for word in words)
        positions = torch.arange(longest, device=self._model.device)
        cos, sin = self._blocks.angles(positions, self._inputs[:1])
        return {kind: torch.cat([cos[kind], sin[kind]], 1) for kind in cos}
