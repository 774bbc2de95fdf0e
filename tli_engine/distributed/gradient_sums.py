"""Gradients of shared-out weights summed over ranks: how they travel, and where the sums lie."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

# torch 2.11 has the older name, which later ones warn of
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class GradientSums:
    """Sums the gradients of one module over ranks: what FSDP2 calls a custom ``ReduceScatter``.

    Gradients of the sums' dtype go through a reduce-scatter. Narrower ones are sent as they are: each rank
    sends every other its share, and adds up what it got, in a fixed order. FSDP2 itself widens them first,
    which passes twice the bytes for the same sums; a reduce-scatter in 16 bits rounds every sum. That is
    for ranks of one machine: between machines a ring passes fewer bytes.

    Sums that are to be added to gradients, and all others unless ``in_place``, lie in memory of their own,
    which FSDP2 makes the gradients or gives back.

    Args:
        dtype: That gradients are sent in; what FSDP2 is told to reduce in is the sums'.
        parameters: Of the module: the shares that FSDP2 gives gradients.

    Attributes:
        in_place: Whether sums that become the gradients lie where those before them lay, so that what a
            CUDA graph writes is what every other writes.
    """

    def __init__(self, dtype: torch.dtype, parameters: Sequence[Tensor]) -> None:
        self._dtype, self._parameters = dtype, tuple(parameters)
        self._is_sent_next = True
        self._place: Tensor | None = None
        self.in_place = False

    @property
    def kept_nbytes(self) -> int:
        """Bytes of the place, also while there are no gradients."""
        return 0 if self._place is None else self._place.nbytes

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory, by turns, of what is sent and of the sums: in this order FSDP2 asks for it.

        Raises:
            RuntimeError: Sums in place of gradients of other tensors than those before them.
        """
        is_sent, self._is_sent_next = self._is_sent_next, not self._is_sent_next
        if is_sent:
            return torch.empty(*size, dtype=self._dtype, device=device)
        if not self.in_place or any(p.grad is not None for p in self._parameters):
            return torch.empty(*size, dtype=dtype, device=device)
        if self._place is None:
            self._place = torch.empty(*size, dtype=dtype, device=device)
        if self._place.shape != torch.Size(size):
            raise RuntimeError(
                f"gradients of {size[0]} weights, where those of {len(self._place)} were"
            )
        return self._place

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Write the sums of this rank's share, ``[n]``, of ``[ranks * n]`` of each rank."""
        if op != dist.ReduceOp.SUM or async_op:
            raise NotImplementedError(f"sums in order alone, not {op} (async_op={async_op})")
        if input_tensor.dtype == output_tensor.dtype:
            _reduce_scatter(output_tensor, input_tensor, op=op, group=group)
            return
        received = torch.empty_like(input_tensor)
        # as bytes: not every backend knows the dtype
        dist.all_to_all_single(
            received.view(torch.uint8), input_tensor.view(torch.uint8), group=group
        )
        parts = received.view(-1, len(output_tensor))
        torch.sum(parts, 0, dtype=output_tensor.dtype, out=output_tensor)
