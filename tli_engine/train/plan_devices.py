"""Devices that a run can be planned for without having them."""

import re
from dataclasses import dataclass, replace

import torch

from tli_engine.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Target:
    """A device, as far as a plan depends on it.

    Attributes:
        name: What the user calls it.
        memory: Bytes that CUDA reports as its total; None on a CPU.
        hopper: Whether the CUDA extension's kernels run there.
        results: Its name in the committed results of the benches, if it was measured.
        limited: Whether ``memory`` is a share of the device that the process may take.
        here: Whether it is this machine's.
    """

    name: str
    memory: int | None = None
    hopper: bool = False
    results: str | None = None
    limited: bool = False
    here: bool = False

    @property
    def kind(self) -> torch.device:
        """The kind of device."""
        return torch.device("cpu" if self.memory is None else "cuda")


def _gpu(name: str, gib: float, hopper: bool = False, results: str | None = None) -> Target:
    return Target(name, int(gib * GIB), hopper, results)


# what CUDA reports is less than what is printed on the box
_TARGETS = [
    Target("cpu"),
    _gpu("h100", 79.2, True, "NVIDIA-H100-80GB-HBM3"),
    _gpu("h200", 139.8, True, "NVIDIA-H200"),
    _gpu("gh200", 94.5, True),
    _gpu("b200", 178.4),
    _gpu("a100", 79.3),
    _gpu("a100-40", 39.4),
    _gpu("l40s", 44.4),
    _gpu("a6000", 47.4),
    _gpu("a10", 22.1),
    _gpu("l4", 22.0),
    _gpu("5090", 31.4),
    _gpu("4090", 23.6),
    _gpu("3090", 23.6),
]
NAMES = [target.name for target in _TARGETS]
# those that large models are trained on
LARGE = ("a100", "h100", "h200", "b200")


def find_target(name: str | None, configured: str) -> Target:
    """The device of a plan: the one named, else the one that a run would take here.

    Args:
        name: One of ``NAMES``, or None.
        configured: The run's ``device``.

    Raises:
        UserError: There is none of that name.
    """
    if name is not None:
        target = next((t for t in _TARGETS if t.name == name.lower()), None)
        if target is None:
            raise UserError(f"--device {name}: not known; there are {', '.join(NAMES)}")
        return target
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", configured):
        raise UserError(f"device: {configured!r} is not supported; use auto, cpu, cuda or cuda:1")
    if configured == "cpu" or not torch.cuda.is_available():
        # a run that names a GPU is planned for the usual one
        return replace(_TARGETS[0], here=True) if configured in ("auto", "cpu") else _TARGETS[1]
    properties = torch.cuda.get_device_properties(None if configured == "auto" else configured)
    label = properties.name.replace(" ", "-")
    hopper = (properties.major, properties.minor) == (9, 0)
    return Target(properties.name, properties.total_memory, hopper, label, here=True)
