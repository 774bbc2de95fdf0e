"""Losses and gradients of packs of texts, replayed from CUDA graphs.

A replay launches a whole forward and backward pass at once. It is worth it where the host takes longer
to launch a block's kernels than a GPU to run them; see :func:`captures`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed import DistError

from tli_engine.config import RunConfig
from tli_engine.data.packing import TextPack
from tli_engine.distributed.fully_sharded import own_part
from tli_engine.distributed.world import ALONE, World
from tli_engine.errors import TrainingError
from tli_engine.models.causal import CausalModel
from tli_engine.models.decoder import waits_for_lengths
from tli_engine.models.graph_recorder import GraphRecorder
from tli_engine.train.filled import FilledBuffer, FilledTexts, Shape, fill, shape_of
from tli_engine.train.sft_order import rows_at_once

# weights of a block times tokens of a pack up to which a step is taken to wait for its launches. On one H100
# four packs at 4.5e11 (Llama-3-8B's shape, 2,048 tokens) took 746 ms, of which the GPU was busy 461; one at
# 1.8e12 took 461 ms, busy 450
_LAUNCH_BOUND = 9e11
# the same where several GPUs have shares of all weights: graphs keep these' gradients, in fp32
_LAUNCH_BOUND_OF_SHARES = 4e11
# shapes beyond which packs are launched one by one
_MOST_SHAPES = 48


def captures(
    config: RunConfig, model: CausalModel, say: Callable[[str], None], ranks: int = 1
) -> bool:
    """Whether the packs of a run are to be replayed from graphs; says why not where they cannot be.

    ``train.cuda_graph: auto`` captures where a block's weights times a pack's tokens are at most 9e11, or
    4e11 where ranks have shares of them; ``true`` whatever they are.
    """
    rows = rows_at_once(config.train, ranks)
    if model.early.device.type != "cuda" or not wants_graphs(config, model, rows, ranks):
        return False
    reason = why_not_captured(config, model)
    if reason is not None:
        say(launched_one_by_one(reason))
    return reason is None


def launched_one_by_one(reason: str) -> str:
    """A line on why a step is not replayed."""
    return f"train.cuda_graph: a step's kernels are launched one by one: {reason}"


def wants_graphs(config: RunConfig, model: CausalModel, rows: int, ranks: int) -> bool:
    """Whether graphs are asked for, or by the rule of ``auto`` are worth it.

    Args:
        config: The run.
        model: What is trained.
        rows: That a rank takes at once.
        ranks: How many there are.
    """
    tokens = rows * config.sft.context
    if config.train.cuda_graph == "auto":
        bound = _LAUNCH_BOUND_OF_SHARES if config.method == "full" and ranks > 1 else _LAUNCH_BOUND
        # transformers' modules have none
        return 0 < block_weights(model) * tokens <= bound
    return config.train.cuda_graph


def block_weights(model: CausalModel) -> int:
    """Elements of the linear layers of a block; of a model whose blocks are not fused, 0."""
    if model.early.fused is None:
        return 0
    layers = [p.layer for p in model.early.fused.blocks[0].projections]
    return sum(layer.out_features * layer.in_features for layer in layers)


def why_not_captured(config: RunConfig, model: CausalModel) -> str | None:
    """What keeps a forward and backward pass from being captured."""
    if config.distributed.offload:
        return "gradients go to shares of the weights in the host's memory"
    if config.distributed.weights == "sharded":
        return "weights are gathered block by block"
    if model.early.fused is None:
        return "transformers' modules wait for the GPU"
    if model.attention == "sdpa":
        return "sdpa asks the GPU where documents begin; sft.attention=varlen does not"
    if waits_for_lengths(model):
        return "its rotary embeddings ask the GPU how long texts are"
    if config.train.in_backward:
        return "train.in_backward updates weights in the backward pass"
    return None


@dataclass
class _Pass:
    """What runs the pack of a shape."""

    runs: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    loss: Tensor | None = None


@dataclass
class _Prepared:
    """A shape's buffer, and the passes over what lies there: that add to gradients, and that write them."""

    buffer: FilledBuffer
    adds: _Pass = field(default_factory=_Pass)
    writes: _Pass = field(default_factory=_Pass)


def add_gradient(model: CausalModel, pack: TextPack, labels: int) -> Tensor:
    """Add the gradient of a pack's part of a step's loss, launched kernel by kernel; return that part.

    It is over all labels of the step: batches of few labels weigh no more than their labels.
    """
    part = model.loss(pack.to(model.early.device)) / labels
    torch.autograd.backward(part)
    return part.detach()


def _places(gradients: Iterable[Tensor | None]) -> list[int | None]:
    return [None if grad is None else own_part(grad).data_ptr() for grad in gradients]


class PackGraphs:
    """Adds up gradients of packs, each filled up to one of few shapes.

    A shape's first pack is launched kernel by kernel, in the stream that records; its second is recorded.
    A graph adds to the gradients that the tensors have when it is recorded: they must stay where they are.
    Gradients of shares, which :meth:`Spread.place_gradients` gave a place, are written there by a step's
    first pack, when there are none, and added to by its others: a shape then has two graphs.
    What passes between GPUs within a pass is recorded with it, and takes replays on all of them: NCCL's
    operations are captured by all ranks or by none.
    What is launched takes its memory where graphs have theirs: activations are held once, not twice.

    Args:
        model: Its blocks fused.
        longest: Tokens of the longest text.
        say: Takes a line once there are too many shapes.
        record: Record graphs; otherwise all is launched kernel by kernel, and comes to the same bits.
        world: Ranks that meet within a pass: their packs are filled up to one shape.

    Source: NVIDIA, NCCL User Guide, Using NCCL with CUDA Graphs.
    """

    def __init__(
        self,
        model: CausalModel,
        longest: int,
        say: Callable[[str], None],
        record: bool = True,
        world: World = ALONE,
    ) -> None:
        self._model, self._longest, self._say, self._world = model, longest, say, world
        self._shapes: dict[Shape, _Prepared] = {}
        self._is_full = False
        self._trained = [*model.trainable().values()]
        # gradients of shares, where every pass writes them
        self._written: list[Tensor | None] = []
        self._recorder = GraphRecorder(model.early.device) if record else None

    @property
    def captured(self) -> int:
        """Graphs so far."""
        return sum(p.graph is not None for s in self._shapes.values() for p in (s.adds, s.writes))

    @property
    def meets(self) -> bool:
        """Whether ranks meet within a pass."""
        return self._world.size > 1

    def clear(self) -> None:
        """Give up all graphs: the next packs are launched, and recorded anew."""
        self._shapes.clear()

    def add(self, pack: TextPack, labels: int, *, stay: bool = True) -> Tensor:
        """Add the gradient of a pack's part of a step's loss; return that part, a scalar in fp32.

        It is overwritten by the next pack.

        Args:
            pack: On the host.
            labels: Of the whole step.
            stay: Whether gradients that there are stay where they are; until then nothing is recorded.

        Raises:
            TrainingError: A step cannot be captured, for a reason that was not known before.
        """
        shape = shape_of(pack, self._longest, self._model.drops, self._world)
        prepared = self._shapes.get(shape)
        if prepared is None:
            if len(self._shapes) >= _MOST_SHAPES:
                self._warn()
                return self._launch(lambda: add_gradient(self._model, pack, labels))
            prepared = _Prepared(FilledBuffer(shape, self._model.early.device))
            self._shapes[shape] = prepared
        fill(prepared.buffer.fill(), pack, labels)
        prepared.buffer.send()
        self._model.draw_seeds(prepared.buffer.batch.seeds)
        return self._run(prepared, stay)

    def _run(self, prepared: _Prepared, stay: bool) -> Tensor:
        batch = prepared.buffer.batch
        writes = self._model.spread is not None and all(t.grad is None for t in self._trained)
        run = prepared.writes if writes else prepared.adds
        run.runs += 1
        if run.graph is None:
            held = stay and (writes or all(t.grad is not None for t in self._trained))
            if self._recorder is None or run.runs == 1 or not held:
                loss = self._launch(lambda: self._compute(batch))
                if writes:
                    self._written = [t.grad for t in self._trained]
                return loss
            run.graph, run.loss = self._record(self._recorder, batch)
            if writes:
                self._check_place()
        assert run.loss is not None
        run.graph.replay()
        if writes:
            for tensor, gradient in zip(self._trained, self._written, strict=True):
                tensor.grad = gradient
        return run.loss

    def _check_place(self) -> None:
        """Raise ``RuntimeError`` if a graph writes gradients elsewhere than the passes that were launched."""
        if _places(t.grad for t in self._trained) != _places(self._written):
            raise RuntimeError("a graph writes gradients beside those of passes that were launched")

    def _launch(self, run: Callable[[], Tensor]) -> Tensor:
        return run() if self._recorder is None else self._recorder.launch(run, in_pool=True)

    def _record(
        self, recorder: GraphRecorder, batch: FilledTexts
    ) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        try:
            return recorder.record(lambda: self._compute(batch))
        except (torch.OutOfMemoryError, DistError):
            # of another process that is gone, too, nothing here is the reason
            raise
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise TrainingError(
                f"train.cuda_graph: a step cannot be captured ({reason}); set train.cuda_graph=false"
            ) from error

    def _compute(self, texts: FilledTexts) -> Tensor:
        loss = self._model.loss(texts, weights=texts.weights, seeds=texts.seeds)
        scale = texts.scale.to(loss.dtype)
        torch.autograd.backward(loss, scale)
        return loss.detach() * scale

    def _warn(self) -> None:
        if not self._is_full:
            self._say(
                f"train.cuda_graph: packs come in more than {_MOST_SHAPES} shapes; the kernels of "
                f"further ones are launched one by one"
            )
        self._is_full = True
