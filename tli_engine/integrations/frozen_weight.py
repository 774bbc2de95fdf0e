"""A 4-bit weight of bitsandbytes as the engine's kernels take it, and whether it is still the same."""

from typing import Any

import torch
from torch import Tensor

from tli_engine.layouts import PortableWeight, RecordedWeight, lay_out
from tli_engine.nf4 import BLOCK_SIZES, CODE, NestedAbsmax, NF4Weight
from tli_engine.ops.nf4_dequantize import check_stored

# statistics in a block of the doubly quantised ones: bitsandbytes' only size, and the kernels'
_NESTED_BLOCK_SIZE = 256


class NotReplacedError(Exception):
    """A layer stays as it is; the message says why."""


def nf4_weight(parameter: Any) -> NF4Weight:
    """Read a ``Params4bit`` in place.

    Args:
        parameter: The weight of a ``Linear4bit``.

    Returns:
        Views of its bytes and statistics; nothing is copied.

    Raises:
        NotReplacedError: It is not quantised yet, not NF4, or in blocks that no kernel reads.
    """
    state = getattr(parameter, "quant_state", None)
    if state is None:
        raise NotReplacedError("not quantised yet; move the model to its device first")
    if state.quant_type != "nf4":
        raise NotReplacedError(f"holds {state.quant_type} data; the kernels read nf4")
    if getattr(state, "packing_format_for_cpu", False):
        raise NotReplacedError(
            "bitsandbytes packed it for its CPU kernels when it inferred, which rounds the "
            "statistics; accelerate a model before it infers"
        )
    if state.blocksize not in BLOCK_SIZES:
        raise NotReplacedError(f"blocks of {state.blocksize}; the kernels read {BLOCK_SIZES}")
    if not torch.equal(state.code.detach().cpu().float(), CODE):
        raise NotReplacedError("quantised with other values than NF4's sixteen")
    if len(state.shape) != 2:
        raise NotReplacedError(f"a weight of shape {list(state.shape)}")
    packed = parameter.detach().as_subclass(Tensor)
    if not packed.is_contiguous():
        raise NotReplacedError(f"bytes with strides {list(packed.stride())}")
    weight = NF4Weight(
        # bnb_4bit_quant_storage may name any dtype: the bytes are the same
        packed.view(torch.uint8).view(-1, 1),
        state.absmax.detach(),
        tuple(state.shape),
        state.dtype,
        state.blocksize,
        _nested(state),
    )
    try:
        # the kernels trust the sizes
        check_stored(weight)
    except ValueError as reason:
        raise NotReplacedError(str(reason)) from None
    return weight


def _nested(state: Any) -> NestedAbsmax | None:
    if not state.nested:
        return None
    inner = state.state2
    if inner.blocksize != _NESTED_BLOCK_SIZE:
        raise NotReplacedError(
            f"statistics in blocks of {inner.blocksize}, not {_NESTED_BLOCK_SIZE}"
        )
    offset = torch.as_tensor(state.offset, dtype=torch.float32, device=inner.absmax.device)
    return NestedAbsmax(
        inner.absmax.detach(), inner.code.detach(), offset.detach(), inner.blocksize
    )


class FrozenWeight:
    """A weight laid out for the kernels, beside the parameter that it was read from.

    Attributes:
        stored: What the kernels read.
        repacked_nbytes: Bytes held beside bitsandbytes' own.
    """

    def __init__(self, parameter: Any) -> None:
        weight = nf4_weight(parameter)
        self.stored: PortableWeight | RecordedWeight = lay_out(weight)
        own = {weight.packed.data_ptr(), weight.absmax.data_ptr()}
        held = (getattr(self.stored, name, None) for name in ("packed", "absmax", "records"))
        self.repacked_nbytes = sum(
            tensor.nbytes for tensor in held if tensor is not None and tensor.data_ptr() not in own
        )
        self._parameter, self._state = parameter, parameter.quant_state
        self._seen = self._look(parameter)

    def is_of(self, parameter: Any) -> bool:
        """Whether ``parameter`` still is what was laid out."""
        return parameter is self._parameter and self._look(parameter) == self._seen

    def _look(self, parameter: Any) -> tuple[object, ...]:
        state = parameter.quant_state
        seen = _place(state.absmax)
        if state.nested:
            seen = (*seen, *_place(state.state2.absmax), *_place(state.offset))
        # bitsandbytes' parameters see every access to an attribute, 2 us each, unless told not to
        with torch._C.DisableTorchFunctionSubclass():
            bytes_ = (parameter.data_ptr(), parameter._version)
        # the state is kept, so that its number is not given to another
        return (*bytes_, id(state), *seen)


def _place(statistics: Any) -> tuple[object, ...]:
    """Where they lie and how often they were written to; a number as it is."""
    if not isinstance(statistics, Tensor):
        return (statistics,)
    return statistics.data_ptr(), statistics._version
