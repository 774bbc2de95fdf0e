"""A gated activation of a projection that yields gate and up side by side, in plain PyTorch."""

from torch import Tensor
from torch.nn.functional import gelu, silu


def swiglu(gate_up: Tensor, act: str) -> Tensor:
    """Return ``act(gate) * up``; the arguments are those of :func:`tli_engine.ops.swiglu`.

    The activation is rounded to the dtype before it is multiplied, as in transformers.
    """
    gate, up = gate_up.chunk(2, dim=1)
    return ((silu(gate) if act == "silu" else gelu(gate, approximate="tanh")) * up).contiguous()
