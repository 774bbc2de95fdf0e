"""What ``torch.autocast`` means for the NF4 ops: the input is cast, nothing within is.

``torch.library.register_autocast`` would cast the statistics of the weight too.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def cast_input(x: Tensor) -> Tensor:
    """Return ``x`` in autocast's dtype where it is on, as ``nn.Linear`` does; fp64 stays."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def without_autocast(device: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``run`` with autocast off inside: the op's dtypes are those of its inputs."""

    def call(*args: Any) -> Any:
        if not torch.is_autocast_enabled(device):
            return run(*args)
        with torch.autocast(device, enabled=False):
            return run(*args)

    return call
