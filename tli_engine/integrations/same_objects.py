"""Whether objects and tensors are what they were."""

from collections.abc import Sequence
from operator import is_

import torch
from torch import Tensor


def are_identical(some: Sequence[object], others: Sequence[object]) -> bool:
    """Whether both are the same objects in the same order."""
    return len(some) == len(others) and all(map(is_, some, others))


def versions(tensors: Sequence[Tensor | None]) -> list[int]:
    """How often each was written to; -1 for those of inference mode, and for ``None``."""
    # bitsandbytes' parameters see every access to an attribute, 2 us each, unless told not to
    with torch._C.DisableTorchFunctionSubclass():
        try:
            return [-1 if tensor is None else tensor._version for tensor in tensors]
        except RuntimeError:
            # tensors of inference mode have none, and are not written to outside it
            return [
                -1 if tensor is None or tensor.is_inference() else tensor._version
                for tensor in tensors
            ]
