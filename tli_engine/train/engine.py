"""What the training loop asks of whoever computes a step, and what it gets."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class Observed:
    """What one step came to; steps count from 0.

    Attributes:
        tokens: Rows of the batch's pack.
        grad_norm: Before clipping.
        cosine_true: Mean cosine of the batch's pairs, raw.
        cosine_random: The same of its mismatched pairs; NaN if there are none.
    """

    step: int
    tokens: int
    loss: float
    grad_norm: float
    cosine_true: float
    cosine_random: float


class Engine(Protocol):
    """Computes the steps of a training run."""

    @property
    def tensors(self) -> dict[str, nn.Parameter]:
        """The trainable tensors, by their names in a checkpoint."""

    def launch(self, step: int) -> None:
        """Begin a step: forward, backward, update. Steps follow one another."""

    def collect(self, wait: bool) -> Iterator[Observed]:
        """Give the steps that are done, in order, and take note of them; ``wait`` for all begun.

        Raises:
            TrainingError: An adapter tensor without a finite gradient, or a non-finite loss.
        """

    def state(self) -> dict[str, Tensor]:
        """The optimizer's statistics as ``<tensor>/<statistic>``, on the CPU."""

    def restore(self, statistics: dict[str, Tensor]) -> None:
        """Go back to statistics that :meth:`state` gave; the tensors are set already.

        Raises:
            KeyError: They are of other tensors.
            RuntimeError: They are of another shape.
        """
