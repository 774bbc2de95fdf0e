"""Whether objects and tensors are what they were."""

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

# values that are what they say
PLAIN = frozenset((bool, int, float, str))


def are_identical(some: Sequence[object], others: Sequence[object]) -> bool:
    """Whether both are the same objects in the same order."""
    return len(some) == len(others) and all(map(is_, some, others))


def are_same_weights(some: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> bool:
    """Whether both are the same parameters; of 4-bit ones those on the same bytes, too.

    PEFT puts such a one in the place of each that it dequantises on a CPU, in a forward of DoRA.
    """
    if are_identical(some, others):
        return True
    return len(some) == len(others) and all(map(_are_one_weight, some, others))


def _are_one_weight(one: Tensor | None, other: Tensor | None) -> bool:
    if one is other:
        return True
    state = getattr(one, "__dict__", {}).get("quant_state")
    if state is None or getattr(other, "__dict__", {}).get("quant_state") is not state:
        return False
    return _place(one) == _place(other)


def places(tensors: Sequence[Tensor]) -> list[tuple[object, ...]]:
    """Where each lies, how, and whether it has a gradient."""
    # bitsandbytes' parameters see every access to an attribute, 2 us each, unless told not to
    with torch._C.DisableTorchFunctionSubclass():
        return [*map(_place, tensors)]


def _place(tensor: Any) -> tuple[object, ...]:
    layout = tensor.dtype, tensor.device, tensor.shape, tensor.stride()
    return tensor.data_ptr(), *layout, tensor.requires_grad


def versions(tensors: Sequence[Tensor | None]) -> list[int]:
    """How often each was written to; -1 for those of inference mode, and 0 for ``None``."""
    # bitsandbytes' parameters see every access to an attribute, 2 us each, unless told not to
    with torch._C.DisableTorchFunctionSubclass():
        try:
            return [0 if tensor is None else tensor._version for tensor in tensors]
        except RuntimeError:
            # tensors of inference mode have none
            return [*map(_version, tensors)]


def _version(tensor: Tensor | None) -> int:
    if tensor is None:
        return 0
    return -1 if tensor.is_inference() else tensor._version


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """Where each lies; 0 for ``None``, and for tensors without memory of their own."""
    with torch._C.DisableTorchFunctionSubclass():
        try:
            return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        except RuntimeError:
            return [*map(_address, tensors)]


def _address(tensor: Tensor | None) -> int:
    try:
        return 0 if tensor is None else tensor.data_ptr()
    except RuntimeError:
        # inside a transform of torch.func, say
        return 0
