"""Which implementation runs an op on an accelerator: ``triton`` or ``reference``."""

import importlib
import logging
import os
from collections.abc import Callable
from functools import cache
from typing import Any

# in order of preference
_MODULES = {
    "triton": "tli_engine.kernels.{op}",
    "reference": "tli_engine.reference.{op}",
}
_ENV = "TLI_ENGINE_BACKEND"


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run here."""


def _load(op: str, backend: str) -> Callable[..., Any]:
    if backend not in _MODULES:
        raise BackendUnavailableError(f"{_ENV}={backend}: not one of {', '.join(_MODULES)}")
    name = _MODULES[backend].format(op=op)
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
def _resolve(op: str, choice: str | None) -> tuple[str, Callable[..., Any], tuple[str, ...]]:
    reasons: list[str] = []
    for backend in (choice,) if choice else _MODULES:
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
    return _resolve(op, os.environ.get(_ENV) or None)[1]


def explain(op: str) -> tuple[str, tuple[str, ...]]:
    """Return the backend that an accelerator runs ``op`` on, and why not each better one."""
    backend, _, reasons = _resolve(op, os.environ.get(_ENV) or None)
    return backend, reasons
