"""Unsloth's kernels as a peer, without the rest of the package.

``import unsloth`` patches transformers and PEFT, which would change the other peers of a run, and
needs trl, datasets, torchao and more. Its NF4 and LoRA functions need none of it: they are imported
from the installed distribution as they are, below packages whose ``__init__`` does not run.
"""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# the parents of what is imported: their __init__ would patch and pull in the rest
_BARE = ("unsloth", "unsloth.kernels", "unsloth_zoo", "unsloth_zoo.temporary_patches")


@dataclass(frozen=True)
class Unsloth:
    """Unsloth's functions on a weight as ``bench.nf4_shapes.bnb_weight`` holds it.

    Its state may be double quantised or not; rows are bf16.
    """

    dequantize: Callable[[Tensor, Any], Tensor]
    gemv: Callable[[Tensor, Tensor, Any], Tensor]
    matmul_lora: Callable[..., Tensor]
    lora_w: Any

    def forward(self, x: Tensor, packed: Tensor, state: Any) -> Tensor:
        """``(M, K)`` to ``(M, N)``, as ``fast_linear_forward`` chooses on sm_90.

        One row takes its GEMV. More rows take its dequantisation and cuBLAS: its GEMV of several
        rows is switched on for other GPUs only.
        """
        if x.shape[0] == 1:
            return self.gemv(x[None], packed, state)[0]
        return self.matmul_lora(x, packed, state, None, None, None)

    def input_gradient(self, dy: Tensor, packed: Tensor, state: Any) -> Tensor:
        """``(M, N)`` to ``(M, K)``, the lines of ``LoRA_W.backward`` for the weight."""
        return dy @ self.dequantize(packed.t(), state).t()

    def lora_forward(
        self, x: Tensor, packed: Tensor, state: Any, A: Tensor, B: Tensor, scaling: float
    ) -> Tensor:
        """``(M, K)`` to ``(M, N)`` with an adapter, differentiable: ``LoRA_W``."""
        y: Tensor = self.lora_w.apply(x[None], packed, state, A, B, scaling)
        # not y[0]: its gradient would be a kernel more
        return y.squeeze(0)


@functools.cache
def load_unsloth() -> Unsloth | None:
    """Unsloth's functions, or ``None`` after a line that says why there are none."""
    known = [name for name in _BARE if name in sys.modules]
    try:
        for name in _BARE:
            _add_bare(name)
        utils = importlib.import_module("unsloth.kernels.utils")
        fast_lora = importlib.import_module("unsloth.kernels.fast_lora")
    except ImportError as error:
        for name in _BARE:
            if name not in known:
                sys.modules.pop(name, None)
        print(f"unsloth is not measured: {error}")
        return None
    if not utils._USE_NF4_KERNELS:
        print("unsloth is not measured: its Triton kernels are off, bitsandbytes' would be timed")
        return None
    return Unsloth(utils.fast_dequantize, utils.fast_gemv, utils.matmul_lora, fast_lora.LoRA_W)


def _add_bare(name: str) -> None:
    """Put a package in ``sys.modules`` that finds its modules but has run nothing."""
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ImportError(f"{name} is not installed")
    sys.modules[name] = importlib.util.module_from_spec(spec)
