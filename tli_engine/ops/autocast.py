"""What ``torch.autocast`` means for the NF4 ops: the input is cast, nothing within is.

``torch.library.register_autocast`` would cast the statistics of the weight too.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# those that the ops run on; autocast does not know "meta"
_DEVICES = ("cpu", "cuda")


def cast_input(x: Tensor) -> Tensor:
    """Return ``x`` in autocast's dtype where it is on, as ``nn.Linear`` does; fp64 stays."""
    device = x.device.type
    if device not in _DEVICES or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def without_autocast(device: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``run`` with autocast off inside: the op's dtypes are those of its inputs."""

    def call(*args: Any) -> Any:
        if not torch.is_autocast_enabled(device):
            return run(*args)
        with torch.autocast(device, enabled=False):
            return run(*args)

    return call
