"""A training step through transformers' own modules and PyTorch's autograd: any model, any device."""

import math
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from tli_engine.align.objective import PairBatch, batch_loss, pair_batch
from tli_engine.align.space import PairSpace
from tli_engine.config import RunConfig
from tli_engine.data.splits import Split
from tli_engine.distributed.flat_gradients import FlatGradients
from tli_engine.distributed.fully_sharded import is_sharded
from tli_engine.distributed.gathered import gather_rows, share_of
from tli_engine.distributed.world import ALONE, World
from tli_engine.errors import NotFiniteError, TrainingError
from tli_engine.models.adapters import adapter_tensors
from tli_engine.models.early import EarlyModel
from tli_engine.train.engine import Observed
from tli_engine.train.order import batch_rows, step_seed
from tli_engine.train.schedule import learning_rate


class ModuleStep:
    """Computes each step when it is asked for it, and waits for it."""

    def __init__(
        self,
        model: EarlyModel,
        config: RunConfig,
        pairs: Split,
        space: PairSpace,
        total_steps: int,
        world: World = ALONE,
    ) -> None:
        self._world = world
        self._model, self._config, self._pairs, self._space = model, config, pairs, space
        self._total_steps = total_steps
        self._groups = pairs.groups
        self.tensors: dict[str, nn.Parameter] = adapter_tensors(model)
        for tensor in self.tensors.values():
            tensor.requires_grad_(True)
        self._gradients = FlatGradients(self.tensors, world)
        train = config.train
        self._optimizer = torch.optim.AdamW(
            self.tensors.values(), lr=train.learning_rate, weight_decay=train.weight_decay
        )
        self._done: list[Observed] = []

    def launch(self, step: int) -> None:
        """Run a step: forward, backward, update."""
        config, train = self._config, self._config.train
        rows = batch_rows(len(self._pairs.source), train.batch_size, config.seed, step)
        batch = pairs_of_rank(self._pairs, self._groups, rows, config, self._world)
        batch = batch.to(self._model.device)
        torch.manual_seed(step_seed(config.seed, step, self._world.rank))
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(train, step, self._total_steps)
        gather = partial(gather_rows, count=len(rows), world=self._world)
        result = batch_loss(self._model, batch, self._space, config.align, gather)
        self._gradients.overlap()
        torch.autograd.backward(result.loss)
        self._gradients.finish()
        if step == 0:
            with self._world.speaking_once():
                check_gradients(self.tensors)
        grad_norm = torch.nn.utils.clip_grad_norm_(
            self.tensors.values(), train.max_grad_norm or math.inf
        )
        loss = result.loss.item()
        with self._world.speaking_once():
            check_finite(step, loss, float(grad_norm))
        self._optimizer.step()
        self._optimizer.zero_grad()
        tokens = sum(
            len(side[i]) for side in (self._pairs.source, self._pairs.target) for i in rows
        )
        cosines = float(result.cosine_true), float(result.cosine_random)
        self._done.append(Observed(step, tokens, loss, float(grad_norm), *cosines))

    def collect(self, wait: bool) -> Iterator[Observed]:
        """Give the steps that were run."""
        while self._done:
            yield self._done.pop(0)

    def state(self) -> dict[str, Tensor]:
        """The optimizer's statistics."""
        return {
            f"{name}/{key}": value.detach().cpu()
            for name, tensor in self.tensors.items()
            for key, value in self._optimizer.state.get(tensor, {}).items()
        }

    def restore(self, statistics: dict[str, Tensor]) -> None:
        """Go back to statistics that :meth:`state` gave."""
        numbers = {name: i for i, name in enumerate(self.tensors)}
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in statistics.items():
            name, _, statistic = key.partition("/")
            state.setdefault(numbers[name], {})[statistic] = value
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})


def pairs_of_rank(
    pairs: Split,
    groups: tuple[list[int], list[int]],
    rows: list[int],
    config: RunConfig,
    world: World,
) -> PairBatch:
    """The words of a rank's share of a batch, and the negatives of all of it.

    Args:
        pairs: To choose from.
        groups: Of all ``pairs``.
        rows: Numbers of the batch's pairs.
        config: Of the run.
        world: The ranks. One without a share encodes a pair for :func:`gather_rows` to leave out.
    """
    own = [rows[i] for i in share_of(len(rows), world)] or rows[:1]
    source, target = ([side[i] for i in own] for side in (pairs.source, pairs.target))
    s_groups, t_groups = ([side[i] for i in rows] for side in groups)
    return pair_batch(source, target, s_groups, t_groups, config.align.mask_duplicates)


def check_gradients(tensors: Mapping[str, nn.Parameter]) -> None:
    """Raise ``TrainingError`` for a tensor without a finite gradient, by name."""
    for name, tensor in tensors.items():
        if tensor.grad is None:
            raise TrainingError(f"no gradient reaches {name}; the loss does not depend on it")
        # of a sharded one, the norm that is looked at later is everyone's
        if not is_sharded(tensor) and not torch.isfinite(tensor.grad).all():
            raise NotFiniteError(f"the gradient of {name} is not finite")


def check_finite(step: int, loss: float, grad_norm: float) -> None:
    """Raise ``NotFiniteError`` unless both are numbers."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise NotFiniteError(
            f"step {step + 1}: loss {loss}, gradient norm {grad_norm}; lower "
            f"train.learning_rate or set train.max_grad_norm"
        )
