"""What is to be done with a gradient as soon as it is there."""

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakMethod

from torch import Tensor


def on_gradient(tensor: Tensor, method: Callable[..., None], *arguments: Any) -> None:
    """Call a bound method with ``arguments`` and a tensor, each time its gradient has been added up.

    Its owner is not kept alive by that: a tensor's hooks are out of the garbage collector's sight, and
    an owner that holds the tensor would stay for good. The same goes for ``arguments``.
    """
    hook = partial(_call, WeakMethod(method), arguments)
    tensor.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]


def _call(
    method: WeakMethod[Callable[..., None]], arguments: tuple[Any, ...], tensor: Tensor
) -> None:
    if (alive := method()) is not None:
        alive(*arguments, tensor)
