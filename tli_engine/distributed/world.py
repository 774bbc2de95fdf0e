"""The processes of a run, and the few words that they exchange on the CPU."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from tli_engine.errors import StoppedElsewhere, TrainingError, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among those of a run; alone, nothing is exchanged.

    Every method but the properties is to be called by all of them, in the same order. What they
    exchange lies on the CPU; gradients and weights go their own ways.

    Attributes:
        rank: Number of this process, from 0.
        size: Processes there are.
        patient: Group for words that some may be long in coming to: a download, a checkpoint, an
            evaluation. Others are waited for as long as the run's timeout says.
        one_machine: Whether all of them are on one.
    """

    rank: int = 0
    size: int = 1
    patient: Any = field(default=None, compare=False, repr=False)
    one_machine: bool = True

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the processes, in fp64: of whole numbers exact."""
        return self._reduced(values, dist.ReduceOp.SUM) if self.size > 1 else list(values)

    def largest(self, values: Sequence[float]) -> list[float]:
        """Largest of each over the processes."""
        return self._reduced(values, dist.ReduceOp.MAX) if self.size > 1 else list(values)

    def any(self, flag: bool) -> bool:
        """Whether it holds on any of them."""
        return self.largest([float(flag)])[0] > 0

    def share(self, value: Any) -> Any:
        """The first process's value, which JSON can hold."""
        return json.loads(self.gather(json.dumps(value) if self.is_first else "null")[0])

    def gather(self, text: str) -> list[str]:
        """Everyone's text, in the order of ranks."""
        if self.size == 1:
            return [text]
        data = torch.frombuffer(bytearray(text.encode() + b"\0"), dtype=torch.uint8)
        longest = int(self._reduced([len(data)], dist.ReduceOp.MAX, self.patient)[0])
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = data
        everyone = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(everyone, padded, group=self.patient)
        return [bytes(t.numpy()).partition(b"\0")[0].decode() for t in everyone]

    def together(self, work: Callable[[], T]) -> T:
        """Do something that may be wrong on some of them alone; then it fails on all.

        Raises:
            UserError: On the first process where ``work`` raised one, with its rank.
            StoppedElsewhere: On the others.
        """
        result, error = None, None
        try:
            result = work()
        except UserError as e:
            error = e
        own = [float(error is not None) * (self.size - self.rank)]
        alone = self.size == 1
        failed = (own if alone else self._reduced(own, dist.ReduceOp.MAX, self.patient))[0]
        if not failed:
            return result  # type: ignore[return-value]
        if error is not None and failed == self.size - self.rank:
            raise error
        raise StoppedElsewhere(2)

    def check_alike(self, what: str, text: str, remedy: str) -> None:
        """Raise ``UserError`` with a remedy unless everyone has the same text."""
        everyone = self.gather(text)
        wrong = [rank for rank, other in enumerate(everyone) if other != everyone[0]]

        def check() -> None:
            if wrong:
                raise UserError(f"{what} on rank {wrong[0]} is not that of rank 0; {remedy}")

        self.together(check)

    @contextmanager
    def speaking_once(self) -> Iterator[None]:
        """For an error that is everyone's: the first process raises it, the others stop."""
        try:
            yield
        except TrainingError:
            if self.is_first:
                raise
            raise StoppedElsewhere(1) from None

    def _reduced(self, values: Sequence[float], op: Any, group: Any = None) -> list[float]:
        tensor = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(tensor, op, group=group)
        return tensor.tolist()


ALONE = World()
