"""``grad`` of parameters whose class sees every access to an attribute.

Optimizers ask all parameters of a model for it twice a step, most of them frozen ones of bitsandbytes,
where each answer takes as long as half a launch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def direct_grad(owner: Any) -> Iterator[None]:
    """Read and write ``grad`` as of any tensor while inside.

    Args:
        owner: A class of tensors that leaves it as it is. One without a ``__torch_function__`` of its own
            is left alone.
    """
    if "__torch_function__" not in owner.__dict__ or "grad" in owner.__dict__:
        yield
        return
    theirs: Any = torch.Tensor.grad

    def read(tensor: Tensor) -> Tensor | None:
        with torch._C.DisableTorchFunctionSubclass():
            found: Tensor | None = theirs.__get__(tensor)
        return found

    def write(tensor: Tensor, value: Tensor | None) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            theirs.__set__(tensor, value)

    def delete(tensor: Tensor) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            theirs.__delete__(tensor)

    owner.grad = property(read, write, delete)
    try:
        yield
    finally:
        del owner.grad
