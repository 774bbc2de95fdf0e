"""The training loop of the align objective."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from tli_engine.align.collapse import CollapseDetector
from tli_engine.align.objective import PairBatch, batch_loss, pair_batch
from tli_engine.align.space import PairSpace
from tli_engine.config import RunConfig
from tli_engine.data.splits import Split
from tli_engine.errors import TrainingError
from tli_engine.models.adapters import adapter_tensors
from tli_engine.models.device import peak_mib
from tli_engine.models.early import EarlyModel
from tli_engine.train.order import batch_rows, step_seed, steps_per_epoch
from tli_engine.train.schedule import learning_rate


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
    """

    model: EarlyModel
    config: RunConfig
    pairs: Split
    space: PairSpace
    on_step: Callable[[StepMetrics], None] = lambda step: None
    on_warning: Callable[[str], None] = lambda line: None
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        train = self.config.train
        self._tensors = adapter_tensors(self.model)
        for tensor in self._tensors.values():
            tensor.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(
            self._tensors.values(), lr=train.learning_rate, weight_decay=train.weight_decay
        )
        self._groups = self.pairs.groups
        rows = len(self.pairs.source)
        self.steps_per_epoch = steps_per_epoch(rows, train.batch_size)
        self.total_steps = train.steps or self.steps_per_epoch * (train.epochs or 1)
        margin = None if self.config.align.loss == "infonce" else self.config.align.margin
        self._collapse = CollapseDetector(margin)

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Train to the end, or to the first step after which ``until`` holds.

        Raises:
            TrainingError: An adapter tensor without a finite gradient, or a non-finite loss.
        """
        self.model.train()
        try:
            # dropout draws from torch's global generator, which is the caller's
            with torch.random.fork_rng():
                while self.step < self.total_steps and not until():
                    self.one_step()
        finally:
            self.model.eval()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Adapter tensors, and the optimizer's as ``<tensor>/<statistic>``."""
        adapter = {name: tensor.detach().cpu() for name, tensor in self._tensors.items()}
        statistics = {
            f"{name}/{key}": value.detach().cpu()
            for name, tensor in self._tensors.items()
            for key, value in self.optimizer.state.get(tensor, {}).items()
        }
        return adapter, statistics

    def restore(self, step: int, adapter: dict[str, Tensor], statistics: dict[str, Tensor]) -> None:
        """Go back to a step with the tensors that :meth:`state` gave there.

        Raises:
            KeyError: The tensors are of other adapters.
            RuntimeError: They are of another shape.
        """
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(adapter[name])
        numbers = {name: i for i, name in enumerate(self._tensors)}
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in statistics.items():
            name, _, statistic = key.partition("/")
            state.setdefault(numbers[name], {})[statistic] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.step = step

    def replay(self, steps: Iterable[Mapping[str, float]]) -> list[str]:
        """Show the collapse detector steps of an interrupted run; return what it said of them."""
        lines = []
        for step in steps:
            line = self._collapse.update(step["loss"], step["cosine_true"], step["cosine_random"])
            lines += [f"step {step['step']}: {line}"] if line else []
        return lines

    def one_step(self) -> None:
        """Run one step: forward, backward, update, report."""
        start = time.perf_counter()
        config, train = self.config, self.config.train
        rows = batch_rows(len(self.pairs.source), train.batch_size, config.seed, self.step)
        batch = self._batch(rows).to(self.model.device)
        torch.manual_seed(step_seed(config.seed, self.step))
        lr = learning_rate(train, self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        result = batch_loss(self.model, batch, self.space, config.align)
        torch.autograd.backward(result.loss)
        if self.step == 0:
            self._check_gradients()
        grad_norm = torch.nn.utils.clip_grad_norm_(
            self._tensors.values(), train.max_grad_norm or math.inf
        )
        loss = result.loss.item()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise TrainingError(
                f"step {self.step + 1}: loss {loss}, gradient norm {float(grad_norm)}; lower "
                f"train.learning_rate or set train.max_grad_norm"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        seconds = time.perf_counter() - start
        self._report(
            StepMetrics(
                step=self.step,
                epoch=1 + (self.step - 1) // self.steps_per_epoch,
                loss=loss,
                lr=lr,
                grad_norm=float(grad_norm),
                cosine_true=float(result.cosine_true),
                cosine_random=float(result.cosine_random),
                tokens_per_s=len(batch.words.input_ids) / seconds,
                seconds=seconds,
                peak_mib=peak_mib(self.model.device),
            )
        )

    def _batch(self, rows: list[int]) -> PairBatch:
        source_groups, target_groups = self._groups
        return pair_batch(
            [self.pairs.source[i] for i in rows],
            [self.pairs.target[i] for i in rows],
            [source_groups[i] for i in rows],
            [target_groups[i] for i in rows],
            self.config.align.mask_duplicates,
        )

    def _report(self, metrics: StepMetrics) -> None:
        self.on_step(metrics)
        warning = self._collapse.update(metrics.loss, metrics.cosine_true, metrics.cosine_random)
        if warning is not None:
            self.on_warning(f"step {metrics.step}: {warning}")

    def _check_gradients(self) -> None:
        for name, tensor in self._tensors.items():
            if tensor.grad is None:
                raise TrainingError(f"no gradient reaches {name}; the loss does not depend on it")
            if not torch.isfinite(tensor.grad).all():
                raise TrainingError(f"the gradient of {name} is not finite")
