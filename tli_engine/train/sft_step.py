"""A step of fine-tuning: the loss of some batches, its gradient, the update."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed import DistError

from tli_engine.align.objective import batch_loss
from tli_engine.align.space import PairSpace
from tli_engine.config import RunConfig
from tli_engine.data.examples import Example
from tli_engine.data.packing import TextPack, text_pack, without_labels
from tli_engine.data.splits import Split
from tli_engine.distributed.flat_gradients import FlatGradients
from tli_engine.distributed.gathered import gather_rows
from tli_engine.distributed.world import ALONE, World
from tli_engine.errors import StoppedElsewhere
from tli_engine.models.causal import CausalModel, without_dropout
from tli_engine.train.module_step import check_finite, check_gradients, pairs_of_rank
from tli_engine.train.order import batch_rows, step_seed
from tli_engine.train.pack_graphs import PackGraphs, add_gradient, captures
from tli_engine.train.readback import Readback
from tli_engine.train.schedule import learning_rate
from tli_engine.train.sft_order import Batch, SftOrder, batches_of_rank
from tli_engine.train.updates import Updates


class Examples(Protocol):
    """Tokenised examples, by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Example: ...


@dataclass(frozen=True)
class Pairs:
    """What joint training aligns beside.

    Attributes:
        train: Word pairs, tokenised.
        space: Where they are compared.
    """

    train: Split
    space: PairSpace


@dataclass(frozen=True)
class SftObserved:
    """What a step came to.

    Attributes:
        tokens: Rows of its packs.
        labels: Tokens that the loss is the mean over.
        loss: Cross-entropy, nats a label.
        grad_norm: Before clipping.
        aligned: Of joint training: alignment loss, raw cosine of true pairs and of random ones.
    """

    tokens: int
    labels: int
    loss: float
    grad_norm: float
    aligned: tuple[float, float, float] | None


@dataclass(frozen=True)
class _Launched:
    """A step whose gradients are computed, or about to be."""

    step: int
    tokens: int
    labels: int
    loss: Tensor
    aligned: tuple[Tensor, ...]


class SftStep:
    """Computes steps, each when it is asked for; on a GPU the gradients of the next one are begun too.

    Args:
        model: Whole, on the engine's ops if it is to be.
        tensors: What is trained, by name.
        examples: To train on.
        order: Which of them each step takes.
        config: The run.
        pairs: Of joint training, or None.
        say: Takes lines on what cannot be replayed from CUDA graphs.
        world: The ranks, among which a step's rows are shared out.

    Attributes:
        tensors: As given.
        updates: The optimizer.
        graphs: Runs packs where launches would take longer than the work, or None.
        runs_ahead: Whether the next step may be launched before a step's figures are there, so that a
            GPU has work while the host reads and reports them; not where a backward pass updates weights.
    """

    def __init__(
        self,
        model: CausalModel,
        tensors: dict[str, nn.Parameter],
        examples: Examples,
        order: SftOrder,
        config: RunConfig,
        pairs: Pairs | None,
        say: Callable[[str], None] = lambda line: None,
        world: World = ALONE,
    ) -> None:
        self._world = world
        self._model, self._examples, self._order = model, examples, order
        self._config, self._pairs = config, pairs
        self.tensors = tensors
        for tensor in tensors.values():
            tensor.requires_grad_(True)
        self._gradients = FlatGradients(tensors, world)
        self.updates = Updates(tensors, config.train)
        self.graphs: PackGraphs | None = None
        self.runs_ahead = model.early.device.type == "cuda" and not config.train.in_backward
        if captures(config, model, say, world.size):
            met = ALONE if model.spread is None else world
            self.use_graphs(PackGraphs(model, config.sft.context, say, world=met))
        self._ready: tuple[int, list[TextPack]] | None = None
        self._ahead: _Launched | None = None

    def use_graphs(self, graphs: PackGraphs) -> None:
        """Run packs by ``graphs`` from here on: gradients stay where they are, or are written there again."""
        self.graphs, self.runs_ahead = graphs, True
        if self._model.spread is None:
            self.updates.keeps_gradients = True
        else:
            self._model.spread.place_gradients()

    def run(self, step: int, *, ahead: bool = True) -> SftObserved:
        """Run a step, counted from 0.

        Args:
            step: Number.
            ahead: Whether the next one may be launched, too: not where something else comes before it,
                whose time the GPU would share with it.

        Raises:
            TrainingError: A tensor without a finite gradient, or a loss that is not finite. The weights
                are of no use any more.
        """
        launched = self._ahead
        if launched is None or launched.step != step:
            self.forget()
            launched = self._launch(step)
        self._ahead = None
        found = (launched.loss, self.updates.clip(), *launched.aligned)
        # what is no number is noticed after an update that the run then ends with
        # the norm of gradients that are offloaded is on the host
        device = launched.loss.device
        figures = Readback(torch.stack([value.float().to(device) for value in found]))
        train, total = self._config.train, self._order.total_steps
        self.updates.set_rate(learning_rate(train, step, total))
        self.updates.step()
        # while a GPU is busy with this step
        self._prepare(step + 1)
        # gradients alone: weights and statistics are those after this step
        if ahead and self.runs_ahead and step + 1 < total:
            self._launch_ahead(step + 1)
        share, grad_norm, *of_pairs = self._read(figures)
        loss, _ = self._sum(share, 0.0)
        with self._world.speaking_once():
            check_finite(step, loss, grad_norm)
        cosines = (of_pairs[0], of_pairs[1], of_pairs[2]) if of_pairs else None
        return SftObserved(launched.tokens, launched.labels, loss, grad_norm, cosines)

    def forget(self) -> None:
        """Give up gradients of a step that was begun ahead of time."""
        if self._ahead is not None:
            self.updates.clear_gradients()
        self._ahead = None

    def pause(self) -> None:
        """Give up what was begun for the next step, and of several processes the graphs.

        NCCL ends only after those that hold what passes between processes.
        """
        self.forget()
        if self.graphs is not None and self._world.size > 1:
            self.graphs.clear()

    def _launch_ahead(self, step: int) -> None:
        try:
            self._ahead = self._launch(step)
        except torch.OutOfMemoryError:
            if self._world.size > 1:
                # the others have been told
                raise
            # the step that is done is reported first; then this one is tried again
            self.updates.clear_gradients()

    def _launch(self, step: int) -> _Launched:
        """Begin to compute the gradients of a step."""
        config, packs = self._config, self._take(step)
        # of all ranks: the loss is the mean over the labels of the step
        labels, tokens = map(int, self._sum(*_sizes(packs)))
        torch.manual_seed(step_seed(config.seed, step, self._world.rank))
        if config.train.in_backward:
            self.updates.set_rate(learning_rate(config.train, step, self._order.total_steps))
        try:
            loss, aligned = self._add_gradients(step, packs, labels)
        except torch.OutOfMemoryError:
            self._stop_others()
            raise
        self._gradients.finish()
        if step == 0 and not config.train.in_backward:
            with self._world.speaking_once():
                check_gradients(self.tensors)
        return _Launched(step, tokens, labels, loss, aligned)

    def _add_gradients(
        self, step: int, packs: list[TextPack], labels: int
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run the packs there and back; return their share of the loss, and what alignment came to."""
        loss = torch.zeros((), device=self._model.early.device)
        for number, pack in enumerate(packs):
            if self.graphs is not None:
                loss += self.graphs.add(pack, labels, stay=self._gradients.stay)
                continue
            if number == len(packs) - 1 and self._pairs is None:
                self._gradients.overlap()
            loss += add_gradient(self._model, pack, labels)
        return loss, () if self._pairs is None else self._align(step, self._pairs)

    def _stop_others(self) -> None:
        """Go on to where the other ranks wait, and tell them to stop.

        Where ranks meet in the middle of a pass, they wait elsewhere, until this process has ended.
        """
        meets_within = self._pairs is not None or self._model.fetch is not None
        if self._gradients.sums and not meets_within:
            self._gradients.finish()
            self._world.sum([0.0, 0.0, 1.0])

    def _sum(self, first: float, second: float) -> list[float]:
        """Sums over the ranks, wherever in a step they are: one of them may have to stop."""
        *sums, stopped = self._world.sum([first, second, 0.0])
        if stopped:
            raise StoppedElsewhere(1)
        return sums

    def _read(self, figures: Readback) -> list[float]:
        """A step's figures, once they are there."""
        if self.graphs is None or not self.graphs.meets:
            return figures.wait()
        try:
            # what passes between GPUs in a graph NCCL's watchdog does not see
            return figures.wait(self._config.distributed.timeout)
        except TimeoutError as error:
            raise DistError(f"{error} (distributed.timeout)") from None

    def _take(self, step: int) -> list[TextPack]:
        """The batches of a step, prepared before or now."""
        if self._ready is None or self._ready[0] != step:
            self._prepare(step)
        assert self._ready is not None
        return self._ready[1]

    def _prepare(self, step: int) -> None:
        if step < self._order.total_steps:
            size = self._config.train.batch_size
            batches = batches_of_rank(self._order.batches(step), size, self._world)
            self._ready = step, [self.pack(batch) for batch in batches]

    def pack(self, batch: Batch) -> TextPack:
        """The examples of a batch, end to end: attention stays inside each."""
        return pack_of(self._examples, batch)

    def _align(self, step: int, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        """Add the gradient of the alignment loss of a batch of pairs."""
        config, train = self._config, pairs.train
        rows = batch_rows(len(train.source), config.sft.align_pairs, config.seed, step)
        batch = pairs_of_rank(train, train.groups, rows, config, self._world)
        gather = partial(gather_rows, count=len(rows), world=self._world)
        result = batch_loss(
            self._model.early, batch.to(self._model.early.device), pairs.space, config.align, gather
        )
        self._gradients.overlap()
        torch.autograd.backward(config.sft.align_weight * result.loss)
        return result.loss.detach(), result.cosine_true, result.cosine_random


def pack_of(examples: Examples, batch: Batch) -> TextPack:
    """The examples of a batch, end to end; of an empty one some tokens, none of them a label."""
    if batch:
        return text_pack([examples[i] for row in batch for i in row])
    return without_labels(text_pack([examples[0]]))


def _sizes(packs: Sequence[TextPack]) -> tuple[int, int]:
    """Labels, and tokens of the packs that have some."""
    return sum(p.labels for p in packs), sum(p.tokens for p in packs if p.labels)


@torch.no_grad()
def mean_loss(
    model: CausalModel,
    examples: Examples,
    batches: Sequence[Batch],
    world: World = ALONE,
    look: Callable[[], None] = lambda: None,
) -> float:
    """Cross-entropy of examples, nats a label, dropout off; each rank runs a share of the batches.

    ``look`` is called before each batch, equally often on all ranks; what it raises ends this.
    """
    device, labels = model.early.device, 0
    # nothing waits for the device before all is launched
    total = torch.zeros((), dtype=torch.float64, device=device)
    size = max(map(len, batches))
    with without_dropout(model):
        for batch in batches_of_rank(list(batches), size, world):
            look()
            pack = pack_of(examples, batch)
            total += model.loss(pack.to(device))
            labels += pack.labels
    loss, count = world.sum([float(total), labels])
    return loss / count
