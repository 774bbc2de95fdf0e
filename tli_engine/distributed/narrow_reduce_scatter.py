"""Gradients of 16 bits summed over ranks in fp32, at the bytes of 16."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


class NarrowReduceScatter:
    """Sends gradients as they are, and adds them up where they arrive: what FSDP2 calls a custom ``ReduceScatter``.

    FSDP2 itself widens them first: a reduce-scatter in fp32 passes twice the bytes for the same sums, and
    one in bf16 rounds every sum. Here each rank sends every other its share, and adds up what it got, in a
    fixed order. That is for ranks of one machine: between machines a ring passes fewer bytes.

    Args:
        dtype: Of the gradients; what FSDP2 is told to reduce in is the sums'.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype, self._is_sent_next = dtype, True

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory, by turns, of what is sent and of the sums: in this order FSDP2 asks for it."""
        is_sent, self._is_sent_next = self._is_sent_next, not self._is_sent_next
        return torch.empty(*size, dtype=self._dtype if is_sent else dtype, device=device)

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
        received = torch.empty_like(input_tensor)
        # as bytes: not every backend knows the dtype
        dist.all_to_all_single(
            received.view(torch.uint8), input_tensor.view(torch.uint8), group=group
        )
        parts = received.view(-1, len(output_tensor))
        torch.sum(parts, 0, dtype=output_tensor.dtype, out=output_tensor)
