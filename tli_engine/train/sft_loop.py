"""The training loop of fine-tuning: steps, the loss on unseen articles, when to stop."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tli_engine.align.collapse import CollapseDetector
from tli_engine.config import RunConfig
from tli_engine.distributed.fully_sharded import is_sharded
from tli_engine.distributed.world import ALONE, World
from tli_engine.errors import NotFiniteError, TrainingError
from tli_engine.models.causal import CausalModel
from tli_engine.models.device import peak_mib
from tli_engine.train.checkpoint import Shards
from tli_engine.train.checkpoint_state import NotesError
from tli_engine.train.joined_names import join_parts
from tli_engine.train.memory import out_of_memory
from tli_engine.train.run_folder import plain_json
from tli_engine.train.schedule import learning_rate
from tli_engine.train.sft_order import Batch, SftOrder
from tli_engine.train.sft_step import Examples, SftObserved, SftStep, mean_loss


@dataclass(frozen=True)
class SftMetrics:
    """Figures of one step, a line of ``metrics.jsonl``; steps count from 1.

    ``figures`` has those of some steps or runs alone: ``validation_loss``, and of joint training
    ``align_loss``, ``cosine_true`` and ``cosine_random``.
    """

    step: int
    epoch: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    labels: int
    tokens_per_s: float
    seconds: float
    peak_mib: float
    figures: dict[str, float]

    def to_json(self) -> dict[str, float]:
        """Plain numbers."""
        values = {k: v for k, v in vars(self).items() if k != "figures"}
        return values | self.figures


@dataclass(frozen=True)
class Validation:
    """Articles that are not trained on, and the batches in which they are run."""

    examples: Examples
    batches: list[Batch]


@dataclass
class Best:
    """The lowest loss on unseen articles so far.

    Attributes:
        loss: That loss; infinity before the first measurement.
        step: Steps done by then.
        since: Measurements since then, none of them lower.
        before: The loss before the first step; NaN where it was not measured.
    """

    loss: float = math.inf
    step: int = 0
    since: int = 0
    before: float = math.nan

    def update(self, loss: float, step: int) -> bool:
        """Take note of a measurement; return whether it is the best."""
        if loss < self.loss:
            self.loss, self.step, self.since = loss, step, 0
            return True
        self.since += 1
        return False


class _StoppedError(Exception):
    """A measurement was left; it is made when the run goes on."""


@dataclass
class SftTrainer:
    """Runs the steps of fine-tuning.

    Attributes:
        config: The run.
        model: What is trained.
        engine: Computes a step.
        order: Batches of every step.
        validation: What to measure on, or None.
        on_step: Called with the figures of each step; may be set later.
        on_best: Called when the loss on unseen articles is the lowest so far; may be set later.
        on_warning: Called with a line that the user should read.
        world: The ranks that share each batch.
        step: Steps done.
        best: Of the measurements so far.
        seconds: That the steps took.
    """

    config: RunConfig
    model: CausalModel
    engine: SftStep
    order: SftOrder
    validation: Validation | None
    on_step: Callable[[SftMetrics], None] = lambda step: None
    on_best: Callable[[], None] = lambda: None
    on_warning: Callable[[str], None] = lambda line: None
    world: World = ALONE
    step: int = field(default=0, init=False)
    best: Best = field(default_factory=Best, init=False)
    total_steps: int = field(default=0, init=False)
    seconds: float = field(default=0.0, init=False)
    # the last step, if the loss on unseen articles after it is still to be measured
    _unmeasured: SftMetrics | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.total_steps = self.order.total_steps
        align = self.config.align
        self._collapse = CollapseDetector(None if align.loss == "infonce" else align.margin)

    @property
    def stopped_early(self) -> bool:
        """Whether the loss on unseen articles has not fallen for ``sft.patience`` measurements."""
        patience = self.config.sft.patience
        return patience is not None and self.best.since >= patience

    @property
    def rows_of_step(self) -> int:
        """Rows of a full step, which the ranks share out."""
        return sum(map(len, self.order.batches(0)))

    @property
    def is_spent(self) -> bool:
        """Whether the steps took ``train.seconds``, if that is set."""
        limit = self.config.train.seconds
        return limit is not None and self.seconds >= limit

    @property
    def _has_ended(self) -> bool:
        return self.step >= self.total_steps or self.stopped_early or self.is_spent

    @property
    def reported(self) -> int:
        """Steps whose figures were given to ``on_step``."""
        return self.step - (self._unmeasured is not None)

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Train to the end, or to the first step after which ``until`` holds.

        It is asked before each batch of unseen articles, too; then a step may be done and not reported.

        Raises:
            TrainingError: A tensor without a finite gradient, a loss that is not finite, of a step or of
                unseen articles, or no memory.
        """
        self.model.train()
        try:
            # dropout draws from torch's global generator, which is the caller's
            with torch.random.fork_rng():
                with suppress(_StoppedError):
                    self._run(until)
                self.engine.pause()
        except torch.OutOfMemoryError as e:
            raise TrainingError(out_of_memory(self.model, self.engine.updates, e)) from None
        finally:
            self.model.eval()

    def validate(self, until: Callable[[], bool] = lambda: False) -> float:
        """Cross-entropy of the articles that are not trained on, nats a label."""
        assert self.validation is not None

        def look() -> None:
            if until():
                raise _StoppedError

        unseen = self.validation
        return mean_loss(self.model, unseen.examples, unseen.batches, self.world, look)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Trained tensors, and the optimizer's."""
        tensors = self.engine.tensors.items()
        return {n: t.detach().to("cpu", copy=True) for n, t in tensors}, self.engine.updates.state()

    def shards(self) -> Shards | None:
        """What is trained, where each rank holds a share of it; None where each holds all."""
        if not any(map(is_sharded, self.engine.tensors.values())):
            return None
        updates = self.engine.updates
        return Shards(self.engine.tensors, updates.live() or updates.blank(), self.world.patient)

    def notes(self) -> dict[str, Any]:
        """What a checkpoint says besides."""
        # JSON has no infinity and no NaN
        best = {k: v for k, v in vars(self.best).items() if math.isfinite(v)}
        step = self._unmeasured
        return {"best": best} | ({} if step is None else {"unmeasured": plain_json(vars(step))})

    def restore(
        self,
        step: int,
        tensors: dict[str, Tensor],
        statistics: dict[str, Tensor],
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Go back to a step with what :meth:`state` and :meth:`notes` gave there.

        Raises:
            KeyError: The tensors are of another model or other adapters.
            RuntimeError: They are of another shape.
            NotesError: The notes lack something.
        """
        names = self.engine.tensors
        tensors, statistics = join_parts(tensors, names), join_parts(statistics, names)
        self.set_tensors(tensors)
        # several GPUs keep no other copy than one in fp32
        masters = [n for n in self.engine.updates.with_master if tensors[n].dtype == torch.float32]
        copies = {f"{name}/master": tensors[name] for name in masters}
        self.engine.updates.restore(copies | statistics)
        self.step = step
        if notes is not None:
            self._recall(notes)

    def _recall(self, notes: Mapping[str, Any]) -> None:
        try:
            best, left, unmeasured = Best(**notes["best"]), notes.get("unmeasured"), None
            if left is not None:
                figures = {k: math.nan if v is None else v for k, v in left["figures"].items()}
                unmeasured = SftMetrics(**left | {"figures": figures})
        except KeyError as e:
            raise NotesError(f"it has no {e.args[0]}") from None
        except (AttributeError, TypeError) as e:
            raise NotesError(str(e)) from None
        self.best, self._unmeasured = best, unmeasured
        if unmeasured is not None:
            self.seconds += unmeasured.seconds

    @torch.no_grad()
    def set_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the trained tensors other values.

        Raises:
            KeyError: The values are of other tensors.
        """
        for name, tensor in self.engine.tensors.items():
            tensor.copy_(tensors[name])

    def replay(self, steps: Iterable[Mapping[str, float]]) -> list[str]:
        """Show the collapse detector steps of an interrupted run; return what it said of them."""
        steps = list(steps)
        self.seconds += sum(step["seconds"] for step in steps)
        lines = (self._watch(s["step"], s) for s in steps if "cosine_true" in s)
        return [line for line in lines if line]

    def _run(self, until: Callable[[], bool]) -> None:
        if self.step == 0 and self.validation is not None:
            self.best.before = self._validated(until, "the base model's", "try another dtype")
        if self._unmeasured is not None:
            self._measure(self._unmeasured, until)
        while not self._has_ended and not until():
            self._one_step(until)

    def _one_step(self, until: Callable[[], bool]) -> None:
        start, step = time.perf_counter(), self.step
        observed = self.engine.run(step, ahead=not self._pauses_after(step + 1))
        # the slowest's: all ranks end after the same step
        (seconds,) = self.world.largest([time.perf_counter() - start])
        self.step += 1
        self.seconds += seconds
        metrics = SftMetrics(
            step=self.step,
            epoch=1 + self.order.epoch(step),
            loss=observed.loss,
            lr=learning_rate(self.config.train, step, self.total_steps),
            grad_norm=observed.grad_norm,
            tokens=observed.tokens,
            labels=observed.labels,
            tokens_per_s=observed.tokens / seconds,
            seconds=seconds,
            peak_mib=peak_mib(self.model.early.device),
            figures=self._figures(observed),
        )
        due = self.step % self.config.sft.evaluate_steps == 0 or self._has_ended
        if due and self.validation is not None:
            self._measure(metrics, until)
        else:
            self._report(metrics)

    def _pauses_after(self, steps: int) -> bool:
        """Whether something is measured or written next: the GPU's time for a step would be lost in it."""
        train, sft = self.config.train, self.config.sft
        measures = self.validation is not None and steps % sft.evaluate_steps == 0
        return measures or steps % train.checkpoint_steps == 0

    def _measure(self, metrics: SftMetrics, until: Callable[[], bool]) -> None:
        """Measure the loss on unseen articles after a step, and report both."""
        self._unmeasured = metrics
        remedy = "lower train.learning_rate or set train.max_grad_norm"
        loss = self._validated(until, f"step {self.step}: the", remedy)
        metrics.figures["validation_loss"] = loss
        self._unmeasured = None
        if self.best.update(loss, self.step):
            # before a checkpoint says that it is there
            self.on_best()
        self._report(metrics)

    def _validated(self, until: Callable[[], bool], whose: str, remedy: str) -> float:
        """:meth:`validate`, which must give a number: weights that do not are no result."""
        loss = self.validate(until)
        with self.world.speaking_once():
            if not math.isfinite(loss):
                raise NotFiniteError(f"{whose} loss on unseen articles is {loss}; {remedy}")
        return loss

    def _report(self, metrics: SftMetrics) -> None:
        self.on_step(metrics)
        figures = metrics.figures
        line = self._watch(self.step, figures) if "cosine_true" in figures else None
        if line is not None:
            self.on_warning(line)

    def _figures(self, observed: SftObserved) -> dict[str, float]:
        if observed.aligned is None:
            return {}
        return dict(
            zip(("align_loss", "cosine_true", "cosine_random"), observed.aligned, strict=True)
        )

    def _watch(self, step: float, figures: Mapping[str, float]) -> str | None:
        values = figures["align_loss"], figures["cosine_true"], figures["cosine_random"]
        line = self._collapse.update(*values)
        return None if line is None else f"step {step:.0f}: {line}"
