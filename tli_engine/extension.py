"""The CUDA C++ extension, ``tli_engine/_C.so``: loads it if it was built, and says why if it is not there."""

import logging
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_LIBRARY = Path(__file__).with_name("_C.so")
# with arguments of the same kinds
_OPS = ("tli_engine::nf4_linear_sm90", "tli_engine::nf4_gemv_sm90")


def load() -> bool:
    """Load the extension, once, and return whether its ops are there; :func:`status` says why not."""
    return _load() is None


def status() -> str:
    """Say in a line whether the extension is loaded, and if not, why."""
    return _load() or f"loaded from {_LIBRARY.name}"


@cache
def _load() -> str | None:
    """What keeps the extension from loading; None if it is loaded."""
    if not _LIBRARY.is_file():
        return (
            "the extension is not built: make cuda, or TLI_ENGINE_CUDA=1 pip install "
            "--no-build-isolation . (needs nvcc)"
        )
    try:
        torch.ops.load_library(str(_LIBRARY))  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError) as e:
        # the first line, of the cause if there is one, names the missing symbol or library
        why = str(e.__cause__ or e).splitlines()[0]
        reason = f"the extension cannot be loaded, build it anew: {why}"
        logging.getLogger(__name__).warning("%s", reason)
        return reason
    for op in _OPS:
        torch.library.register_fake(op, _fake)
    return None


def _fake(
    x: Tensor,
    records: Tensor,
    bias: Tensor | None,
    lora_x: Tensor | None,
    lora_b: Tensor | None,
    sizes: list[int],
    rows: int,
    contraction: int,
    transposed: bool,
    exact: bool,
    plan: list[int],
    workspace: Tensor,
    flags: Tensor,
) -> Tensor:
    return x.new_empty(x.shape[0], rows)
