"""NF4 weights in bitsandbytes' checkpoint format, read strictly and written without bitsandbytes.

A weight named ``p`` is ``p`` (the packed bytes), ``p.absmax``, ``p.quant_map`` and, as JSON in a
uint8 tensor, ``p.quant_state.bitsandbytes__nf4``; double quantised, ``p.nested_absmax`` and
``p.nested_quant_map`` besides.

Source: bitsandbytes 0.50, ``QuantState.as_dict(packed=True)`` and ``QuantState.from_dict``.
"""

import json
import reprlib
from collections.abc import Mapping
from math import prod
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from tli_engine.errors import UserError
from tli_engine.nf4 import CODE, NestedAbsmax, NF4Weight

_FLOAT32_MAX = torch.finfo(torch.float32).max
PositiveInt = Annotated[int, Field(ge=1)]
Float32 = Annotated[float, Field(ge=-_FLOAT32_MAX, le=_FLOAT32_MAX)]


class _QuantState(BaseModel):
    """What bitsandbytes keeps of a weight beside its tensors, in its order of keys."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    quant_type: Literal["nf4"]
    blocksize: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]
    dtype: Literal["float32", "float16", "bfloat16"]
    shape: Annotated[list[PositiveInt], Field(min_length=1)]
    nested_blocksize: PositiveInt | None = None
    nested_dtype: Literal["float32"] | None = None
    nested_offset: Float32 | None = None

    @model_validator(mode="after")
    def _nested_is_whole(self) -> "_QuantState":
        nested = (self.nested_blocksize, self.nested_dtype, self.nested_offset)
        if None in nested and any(value is not None for value in nested):
            raise ValueError("nested_blocksize, nested_dtype and nested_offset go together")
        return self


def nf4_state_dict(weight: NF4Weight, prefix: str) -> dict[str, Tensor]:
    """Return the tensors under which bitsandbytes saves a weight.

    Args:
        weight: The weight; its tensors are not copied.
        prefix: Name of the weight, such as ``model.layers.0.mlp.up_proj.weight``.

    Returns:
        The weight under ``prefix``, the rest under ``prefix`` and a dot; safetensors takes them.
    """
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": weight.block_size,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": weight.shape,
    }
    # copies, since safetensors refuses tensors that share memory
    tensors = {
        prefix: weight.packed,
        f"{prefix}.absmax": weight.absmax,
        f"{prefix}.quant_map": CODE.to(weight.device, copy=True),
    }
    if weight.nested is not None:
        tensors[f"{prefix}.nested_absmax"] = weight.nested.absmax
        tensors[f"{prefix}.nested_quant_map"] = weight.nested.code.clone()
        state["nested_blocksize"] = weight.nested.block_size
        state["nested_dtype"] = "float32"
        state["nested_offset"] = weight.nested.offset.item()
    encoded = list(json.dumps(state).encode())
    tensors[_state_key(prefix)] = torch.tensor(encoded, dtype=torch.uint8, device=weight.device)
    return tensors


def from_state_dict(tensors: Mapping[str, Tensor], prefix: str) -> NF4Weight:
    """Read a weight that bitsandbytes, or :func:`nf4_state_dict`, has saved.

    Args:
        tensors: Tensors of a checkpoint, by name; others than this weight's are ignored.
        prefix: Name of the weight, such as ``model.layers.0.mlp.up_proj.weight``.

    Returns:
        The weight; it shares the checkpoint's tensors.

    Raises:
        UserError: The weight is not NF4, or a tensor is missing, of a wrong type or size, or not
            finite; the message begins with its name.
    """
    state = _read_state(tensors, prefix)
    numel = prod(state.shape)
    blocks = -(-numel // state.blocksize)
    absmax_dtype = torch.float32 if state.nested_blocksize is None else torch.uint8
    absmax = _take(tensors, f"{prefix}.absmax", absmax_dtype, blocks)
    quant_map = _take(tensors, f"{prefix}.quant_map", torch.float32, 16)
    if not torch.equal(quant_map.cpu(), CODE):
        raise UserError(f"{prefix}.quant_map: not the 16 values of NF4; only NF4 is read")
    return NF4Weight(
        _take_packed(tensors, prefix, (numel + 1) // 2),
        absmax,
        tuple(state.shape),
        getattr(torch, state.dtype),
        state.blocksize,
        _read_nested(tensors, prefix, state, blocks),
    )


def _state_key(prefix: str, quant_type: str = "nf4") -> str:
    return f"{prefix}.quant_state.bitsandbytes__{quant_type}"


def _read_state(tensors: Mapping[str, Tensor], prefix: str) -> _QuantState:
    key = _state_key(prefix)
    if key not in tensors and _state_key(prefix, "fp4") in tensors:
        raise UserError(
            f"{prefix}: is FP4; only NF4 is read, so quantise the original weight again"
        )
    encoded = _get(tensors, key)
    if encoded.dtype != torch.uint8:
        raise UserError(f"{key}: must be JSON in a torch.uint8 tensor, got {encoded.dtype}")
    try:
        return _QuantState.model_validate_json(encoded.cpu().numpy().tobytes())
    except ValidationError as e:
        raise UserError(f"{key}: {_explain(e.errors()[0])}") from None


def _explain(error: Any) -> str:
    if error["type"] == "json_invalid":
        return "is not JSON; the checkpoint is damaged"
    where = ".".join(str(part) for part in error["loc"]) or "(top level)"
    if error["type"] == "missing":
        return f"{where}: is required"
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}: {message[0].lower()}{message[1:]} (got {reprlib.repr(error['input'])})"


def _read_nested(
    tensors: Mapping[str, Tensor], prefix: str, state: _QuantState, blocks: int
) -> NestedAbsmax | None:
    if state.nested_blocksize is None:
        return None
    absmax = _take(
        tensors, f"{prefix}.nested_absmax", torch.float32, -(-blocks // state.nested_blocksize)
    )
    code = _take(tensors, f"{prefix}.nested_quant_map", torch.float32, 256)
    offset = torch.tensor(state.nested_offset, dtype=torch.float32, device=absmax.device)
    return NestedAbsmax(absmax, code, offset, state.nested_blocksize)


def _get(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise UserError(f"{key}: missing; not a weight that bitsandbytes saved as NF4")
    return tensors[key]


def _take(tensors: Mapping[str, Tensor], key: str, dtype: torch.dtype, numel: int) -> Tensor:
    tensor = _get(tensors, key)
    if tensor.dtype != dtype or tensor.shape != (numel,):
        raise UserError(
            f"{key}: must be {dtype} [{numel}], got {tensor.dtype} {list(tensor.shape)}"
        )
    if dtype.is_floating_point and not tensor.isfinite().all():
        raise UserError(f"{key}: holds NaN or infinity; the checkpoint is damaged")
    return tensor.contiguous()


def _take_packed(tensors: Mapping[str, Tensor], prefix: str, nbytes: int) -> Tensor:
    packed = _get(tensors, prefix)
    # bnb_4bit_quant_storage may name any dtype: the bytes are the same
    if packed.ndim != 2 or packed.shape[1] != 1 or packed.nbytes != nbytes:
        got = f"{packed.dtype} {list(packed.shape)}"
        raise UserError(f"{prefix}: must be {nbytes} bytes in one column, got {got}")
    return packed.contiguous().view(torch.uint8).view(-1, 1)
