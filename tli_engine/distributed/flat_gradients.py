"""Gradients of small tensors in one buffer, summed over ranks while the backward pass goes on."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch import distributed as dist

from tli_engine.distributed.fully_sharded import is_sharded
from tli_engine.distributed.gradient_hooks import on_gradient
from tli_engine.distributed.world import World

# bytes of gradients that are sent at once: adapters of a few blocks go as one
_BUCKET = 16 << 20


class _Bucket:
    """Parameters whose gradients lie together in the buffer, and are sent together."""

    def __init__(self, flat: Tensor, parameters: list[nn.Parameter]) -> None:
        self.flat, self.parameters = flat, parameters
        sizes = [p.numel() for p in parameters]
        self.views = [
            part.view(p.shape) for part, p in zip(torch.split(flat, sizes), parameters, strict=True)
        ]
        self.missing = 0
        self.work: dist.Work | None = None

    def send(self) -> None:
        for view, parameter in zip(self.views, self.parameters, strict=True):
            if parameter.grad is None:
                view.zero_()
            elif parameter.grad is not view:
                view.copy_(parameter.grad)
        self.work = dist.all_reduce(self.flat, async_op=True)

    def receive(self) -> None:
        assert self.work is not None
        self.work.wait()
        self.work = None
        for view, parameter in zip(self.views, self.parameters, strict=True):
            if parameter.grad is not None:
                parameter.grad = view


class FlatGradients:
    """Sums gradients over ranks: one all-reduce, or one for each 16 MiB, begun as they come.

    The last tensor's gradient is taken to come first. Where graphs replay the passes, all are sent after
    the last of these, from where they lie. Between :meth:`overlap` and :meth:`finish`
    every rank runs one backward pass; what it does not reach, or earlier passes added, goes too.
    All ranks send the same buckets in the same order, whatever their passes reach.
    """

    def __init__(
        self, tensors: Mapping[str, nn.Parameter], world: World, bucket_bytes: int = _BUCKET
    ) -> None:
        """Lay out the buffer.

        Args:
            tensors: Of one dtype and device, by name. Of sharded ones the gradients are summed as
                they are shared out, and nothing is held or sent here.
            world: Who adds up. Alone, nothing is held or sent.
            bucket_bytes: Sent at once, or more if a tensor is larger.

        Raises:
            ValueError: Tensors of several dtypes or devices.
        """
        self._buckets: list[_Bucket] = []
        self._waiting: list[_Bucket] = []
        self._overlaps = False
        if world.size == 1 or any(map(is_sharded, tensors.values())):
            return
        parameters = list(tensors.values())[::-1]
        if len({(p.dtype, p.device) for p in parameters}) > 1:
            raise ValueError("tensors must be of one dtype, on one device")
        parts: list[list[nn.Parameter]] = [[]]
        for parameter in parameters:
            if sum(p.nbytes for p in parts[-1]) + parameter.nbytes > bucket_bytes and parts[-1]:
                parts.append([])
            parts[-1].append(parameter)
        sizes = [sum(p.numel() for p in part) for part in parts]
        first = parameters[0]
        flat = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
        for number, (piece, part) in enumerate(zip(torch.split(flat, sizes), parts, strict=True)):
            self._buckets.append(_Bucket(piece, part))
            for parameter in part:
                on_gradient(parameter, self._take, number)

    @property
    def sums(self) -> bool:
        """Whether there is anything to send."""
        return bool(self._buckets)

    @property
    def stay(self) -> bool:
        """Whether gradients that there are stay where they are: in the buffer, once they came there."""
        return all(
            parameter.grad is view
            for bucket in self._buckets
            for view, parameter in zip(bucket.views, bucket.parameters, strict=True)
        )

    def overlap(self) -> None:
        """Send gradients as the next backward pass makes them; it is the last before the update."""
        self._overlaps, self._waiting = True, list(self._buckets)
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)

    def finish(self) -> None:
        """Send what is left, and wait: ``grad`` is then the sum over ranks."""
        waiting = self._waiting if self._overlaps else self._buckets
        self._overlaps, self._waiting = False, []
        for bucket in waiting:
            bucket.send()
        for bucket in self._buckets:
            bucket.receive()

    def _take(self, number: int, parameter: Tensor) -> None:
        if not self._overlaps:
            return
        self._buckets[number].missing -= 1
        # in the buckets' order, which is everyone's
        while self._waiting and self._waiting[0].missing == 0:
            self._waiting.pop(0).send()
