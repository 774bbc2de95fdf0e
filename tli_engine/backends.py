"""Which implementation runs an op on an accelerator: ``cuda``, ``triton`` or ``reference``.

``cuda`` is the extension, of which some ops have a kernel; beside it, all others run on Triton.
"""

import importlib
import logging
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from tli_engine import extension

# in order of preference
_MODULES = {
    "cuda": "tli_engine.kernels.{op}_sm90",
    "triton": "tli_engine.kernels.{op}",
    "reference": "tli_engine.reference.{op}",
}
_ENV = "TLI_ENGINE_BACKEND"
_CUDA_OPS = ("nf4_linear_records", "nf4_linear_records_backward")


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run here."""


def choice() -> str | None:
    """Return the backend that ``$TLI_ENGINE_BACKEND`` names for GPUs, None if it names none.

    Raises:
        BackendUnavailableError: There is none of that name.
    """
    value = os.environ.get(_ENV) or None
    if value is not None and value not in _MODULES:
        raise BackendUnavailableError(f"{_ENV}={value}: not one of {', '.join(_MODULES)}")
    return value


def _load(op: str, backend: str) -> Callable[..., Any]:
    name = _MODULES[backend].format(op=op)
    if backend == "cuda" and not extension.load():
        raise BackendUnavailableError(f"cuda: {extension.status()}")
    try:
        implementation: Callable[..., Any] = getattr(importlib.import_module(name), op)
    except ModuleNotFoundError as e:
        missing = e.name == name or name.startswith(f"{e.name}.")
        reason = f"has no {op}" if missing else f"needs {e.name}, which is not installed"
        raise BackendUnavailableError(f"{backend} {reason}") from e
    except ImportError as e:
        raise BackendUnavailableError(f"{backend} cannot be imported: {e}") from e
    return implementation


@cache
def _resolve(op: str, named: str | None) -> tuple[str, Callable[..., Any], tuple[str, ...]]:
    reasons: list[str] = []
    # an op without a CUDA C++ kernel has its only one in Triton
    chosen = ("cuda", "triton") if named == "cuda" else (named,) if named else tuple(_MODULES)
    if op in _CUDA_OPS and named is None:
        # records are for the extension: undoing them in every call would be slow, and silent
        chosen = ("cuda",)
    if named == "cuda" and not extension.load():
        raise BackendUnavailableError(f"{_ENV}=cuda: {extension.status()}")
    for backend in chosen:
        if backend == "cuda" and op not in _CUDA_OPS:
            continue
        try:
            return backend, _load(op, backend), tuple(reasons)
        except BackendUnavailableError as e:
            reasons.append(str(e))
            if e.__cause__ is not None and not str(e).startswith(f"{backend} has no"):
                logging.getLogger(__name__).warning("%s: %s", op, e)
    raise BackendUnavailableError(f"no backend for {op!r}: {'; '.join(reasons)}")


def resolve(op: str) -> Callable[..., Any]:
    """Return the implementation of ``op`` that an accelerator runs.

    Args:
        op: Name of the op, of its module and of its function.

    Raises:
        BackendUnavailableError: The backend named by ``$TLI_ENGINE_BACKEND``, or every backend,
            lacks the op here.
    """
    return _resolve(op, choice())[1]


def explain(op: str) -> tuple[str, tuple[str, ...]]:
    """Return the backend that an accelerator runs ``op`` on, and why not each better one."""
    backend, _, reasons = _resolve(op, choice())
    return backend, reasons


def has_extension(device: torch.device) -> bool:
    """Whether the CUDA extension's kernels run on ``device`` and are not ruled out by choice.

    Raises:
        BackendUnavailableError: ``$TLI_ENGINE_BACKEND`` asks for them, and they do not run there.
    """
    chosen = choice()
    if device.type != "cuda" or chosen not in (None, "cuda"):
        return False
    hopper = torch.cuda.get_device_capability(device) == (9, 0)
    if chosen == "cuda" and not (hopper and extension.load()):
        why = extension.status() if hopper else "the GPU is no Hopper GPU"
        raise BackendUnavailableError(f"{_ENV}=cuda: {why}")
    return hopper and extension.load()
