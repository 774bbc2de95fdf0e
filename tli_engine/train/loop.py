"""The training loop of the align objective."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from tli_engine.align.collapse import CollapseDetector
from tli_engine.align.space import PairSpace
from tli_engine.config import RunConfig
from tli_engine.data.splits import Split
from tli_engine.distributed.world import ALONE, World
from tli_engine.models.device import peak_mib
from tli_engine.models.early import EarlyModel
from tli_engine.train.engine import Engine, Observed
from tli_engine.train.fused_step import FusedStep
from tli_engine.train.module_step import ModuleStep
from tli_engine.train.order import batch_rows, steps_per_epoch
from tli_engine.train.schedule import learning_rate

# steps begun before the first of them must be done: enough for no one to wait, few for a signal
_MOST_AHEAD = 64


@dataclass(frozen=True)
class StepMetrics:
    """Figures of one step, a line of ``metrics.jsonl``; steps count from 1."""

    step: int
    epoch: int
    loss: float
    lr: float
    grad_norm: float
    cosine_true: float
    cosine_random: float
    tokens_per_s: float
    seconds: float
    peak_mib: float

    def to_json(self) -> dict[str, float]:
        """Plain numbers."""
        return asdict(self)


@dataclass
class Trainer:
    """Runs the steps of a training run.

    Attributes:
        model: Early blocks with adapters.
        config: The run.
        pairs: What to train on.
        space: Where vectors are compared.
        on_step: Called with the figures of each step; may be set later.
        on_warning: Called with a line that the user should read.
        step: Steps begun. Where ``on_step`` is called for a step at which a checkpoint is due, all
            are done, and the state is that step's.
        seconds: That the steps took.
        world: The ranks that share each batch.
    """

    model: EarlyModel
    config: RunConfig
    pairs: Split
    space: PairSpace
    on_step: Callable[[StepMetrics], None] = lambda step: None
    on_warning: Callable[[str], None] = lambda line: None
    world: World = ALONE
    step: int = field(default=0, init=False)
    total_steps: int = field(default=0, init=False)
    seconds: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        train = self.config.train
        self.steps_per_epoch = steps_per_epoch(len(self.pairs.source), train.batch_size)
        self.total_steps = train.steps or self.steps_per_epoch * (train.epochs or 1)
        self.engine = self._choose_engine()
        margin = None if self.config.align.loss == "infonce" else self.config.align.margin
        self._collapse = CollapseDetector(margin)
        self._reported = time.perf_counter()

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Train to the end, or to the first step after which ``until`` holds.

        Raises:
            TrainingError: An adapter tensor without a finite gradient, or a non-finite loss.
        """
        self.model.train()
        self._reported = time.perf_counter()
        reported = self.step
        try:
            # dropout draws from torch's global generator, which is the caller's
            with torch.random.fork_rng():
                while self.step < self.total_steps and not self._spent() and not until():
                    self.engine.launch(self.step)
                    self.step += 1
                    due = self.step % self.config.train.checkpoint_steps == 0
                    full = self.step - reported >= _MOST_AHEAD
                    reported += self._report(wait=due or full)
                self._report(wait=True)
        finally:
            self.model.eval()

    @property
    def rows_of_step(self) -> int:
        """Pairs of a full step, which the ranks share out."""
        return len(batch_rows(len(self.pairs.source), self.config.train.batch_size, 0, 0))

    @property
    def is_spent(self) -> bool:
        """Whether the steps took ``train.seconds``, if that is set."""
        limit = self.config.train.seconds
        return limit is not None and self.seconds >= limit

    def _spent(self) -> bool:
        """:attr:`is_spent` on any rank; each has a clock of its own."""
        return self.config.train.seconds is not None and self.world.any(self.is_spent)

    @property
    def reported(self) -> int:
        """Steps whose figures were given to ``on_step``."""
        return self.step

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Adapter tensors, and the optimizer's as ``<tensor>/<statistic>``."""
        adapter = {name: tensor.detach().cpu() for name, tensor in self.engine.tensors.items()}
        return adapter, self.engine.state()

    def shards(self) -> None:
        """None: each rank holds all that is trained."""

    def notes(self) -> dict[str, Any]:
        """What a checkpoint says besides: nothing."""
        return {}

    def restore(
        self,
        step: int,
        tensors: dict[str, Tensor],
        statistics: dict[str, Tensor],
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Go back to a step with the tensors that :meth:`state` gave there.

        Raises:
            KeyError: The tensors are of other adapters.
            RuntimeError: They are of another shape.
        """
        with torch.no_grad():
            for name, tensor in self.engine.tensors.items():
                tensor.copy_(tensors[name])
        self.engine.restore(statistics)
        self.step = step

    def replay(self, steps: Iterable[Mapping[str, float]]) -> list[str]:
        """Show the collapse detector steps of an interrupted run; return what it said of them."""
        lines = []
        for step in steps:
            self.seconds += step["seconds"]
            line = self._collapse.update(step["loss"], step["cosine_true"], step["cosine_random"])
            lines += [f"step {step['step']}: {line}"] if line else []
        return lines

    def _choose_engine(self) -> Engine:
        model, total = self.model, self.total_steps
        arguments = (model, self.config, self.pairs, self.space, total, self.world)
        # blocks that were put on the engine's ops do not go back
        fused = self.model.fused is not None or self.config.train.engine == "fused"
        return FusedStep(*arguments) if fused else ModuleStep(*arguments)

    def _report(self, wait: bool) -> int:
        """Report the steps that are done; return how many."""
        done = list(self.engine.collect(wait))
        now = time.perf_counter()
        # steps that end together share the time since the last report
        seconds = (now - self._reported) / max(1, len(done))
        for observed in done:
            self._report_one(observed, seconds)
        if done:
            self._reported = now
        return len(done)

    def _report_one(self, observed: Observed, seconds: float) -> None:
        self.seconds += seconds
        metrics = StepMetrics(
            step=observed.step + 1,
            epoch=1 + observed.step // self.steps_per_epoch,
            loss=observed.loss,
            lr=learning_rate(self.config.train, observed.step, self.total_steps),
            grad_norm=observed.grad_norm,
            cosine_true=observed.cosine_true,
            cosine_random=observed.cosine_random,
            tokens_per_s=observed.tokens / seconds,
            seconds=seconds,
            peak_mib=peak_mib(self.model.device),
        )
        self.on_step(metrics)
        warning = self._collapse.update(metrics.loss, metrics.cosine_true, metrics.cosine_random)
        if warning is not None:
            self.on_warning(f"step {metrics.step}: {warning}")
