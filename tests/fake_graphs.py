"""What stands for CUDA graphs where there is no GPU."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor


class FakeGraph:
    """What a replay of launches amounts to: they are made again."""

    def __init__(self, run: Callable[[], Tensor], result: Tensor) -> None:
        self.run, self.result, self.replays = run, result, 0

    def replay(self) -> None:
        self.replays += 1
        self.result.copy_(self.run())


class FakeRecorder:
    """Launches at once; what it records is not run before a replay.

    Attributes:
        launched: Runs that were launched.
        graphs: That were recorded.
        shares: Tensors that a capture gives gradients, if they have none: by FSDP2.
    """

    def __init__(self, device: torch.device) -> None:
        self.launched = 0
        self.graphs: list[FakeGraph] = []
        self.shares: list[Tensor] = []

    def launch(self, run: Callable[[], Tensor], in_pool: bool) -> Tensor:
        # beside what the graphs hold there would not be room for activations again
        assert in_pool
        self.launched += 1
        return run()

    def record(self, run: Callable[[], Tensor]) -> tuple[FakeGraph, Tensor]:
        if self.shares and all(tensor.grad is None for tensor in self.shares):
            run()
            run = partial(self._write, run)
        self.graphs.append(FakeGraph(run, torch.zeros(())))
        return self.graphs[-1], self.graphs[-1].result

    def _write(self, run: Callable[[], Tensor]) -> Tensor:
        """Compute gradients as if there were none; a replay gives tensors none."""
        before = [tensor.grad for tensor in self.shares]
        for tensor in self.shares:
            tensor.grad = None
        result = run()
        for tensor, gradient in zip(self.shares, before, strict=True):
            tensor.grad = gradient
        return result
