"""Causal attention within each document of a pack, by whichever implementation runs here."""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tli_engine.data.words import Laid
from tli_engine.errors import UserError
from tli_engine.models.packed_attention import window_mask

Attention = Literal["auto", "sdpa", "varlen", "flash-attn"]

# what FlashAttention's kernels take
_FLASH_DTYPES = (torch.bfloat16, torch.float16)
_WIDEST = 256
_BATCHED = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]


@dataclass(frozen=True)
class Documents:
    """Where the documents of a pack begin, and what attends within them.

    Attributes:
        offsets: First token of each document, then ``T``; ``[S + 1]``, int32.
        longest: Tokens of the longest one, or more.
        tokens: Of all.
        attention: ``sdpa``, ``varlen`` or ``flash-attn``.
    """

    offsets: Tensor
    longest: int
    tokens: int
    attention: Attention

    @classmethod
    def of(cls, pack: Laid, attention: Attention) -> "Documents":
        """The words of a pack as documents."""
        return cls(pack.offsets.to(torch.int32), pack.longest, len(pack.input_ids), attention)

    @property
    def alike(self) -> bool:
        """Whether all have one length; known without waiting for the device."""
        return self.tokens == self.longest * (len(self.offsets) - 1)

    @cached_property
    def bounds(self) -> list[int]:
        """The offsets on the host; waits for the device."""
        ends: list[int] = self.offsets.tolist()
        return ends

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """Attend within each document, or a window of its tokens.

        Args:
            q: Queries, rotated, ``[T, Hq, D]``.
            k: Keys, rotated, ``[T, Hkv, D]``; ``Hkv`` divides ``Hq``.
            v: Values, as ``k``.
            scale: Factor of the scores.
            window: Tokens that a token sees, itself included; None: all before it.

        Returns:
            ``[T, Hq, D]``.
        """
        if window is not None and window >= self.longest:
            window = None
        return _RUN[self.attention](q, k, v, self, scale, window)


def choose_attention(
    name: Attention, device: torch.device, dtype: torch.dtype, head_dim: int, *, here: bool = True
) -> Attention:
    """The implementation to use: of ``auto``, varlen where it runs, else sdpa, which runs anywhere.

    Of a device that is not ``here`` the kind alone counts: what is installed there is not known.

    Raises:
        UserError: One that was asked for by name cannot run here; says why.
    """
    if name == "auto":
        return "sdpa" if _why_not_flash("varlen", device, dtype, head_dim, here) else "varlen"
    reason = None if name == "sdpa" else _why_not_flash(name, device, dtype, head_dim, here)
    if reason is not None:
        raise UserError(f"sft.attention: {name} cannot run here: {reason}; use auto or sdpa")
    return name


def attentions(device: torch.device) -> dict[str, str]:
    """Each choice of ``sft.attention``, and what keeps it from running on a device in bf16."""
    flash = {n: _why_not_flash(n, device, torch.bfloat16, 128) for n in ("varlen", "flash-attn")}
    return {"sdpa": "runs"} | {name: reason or "runs" for name, reason in flash.items()}


def _why_not_flash(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, here: bool = True
) -> str | None:
    if device.type != "cuda":
        return f"it needs a GPU, the model is on {device.type}"
    if dtype not in _FLASH_DTYPES:
        return f"it needs bfloat16 or float16, the model is in {str(dtype).removeprefix('torch.')}"
    if head_dim > _WIDEST or head_dim % 8:
        return f"it needs heads of at most {_WIDEST} and a multiple of 8, these are of {head_dim}"
    if not here:
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs compute capability 8.0, {torch.cuda.get_device_name(device)} has less"
    try:
        function = _function(name)
    except (ImportError, AttributeError) as e:
        return f"{e}"
    if name == "varlen" and "window_size" not in inspect.signature(function).parameters:
        return "this torch's varlen_attn has no windows; torch 2.11 has them"
    return None


@cache
def _function(name: str) -> Callable[..., Tensor]:
    """The function behind a name.

    Raises:
        ImportError, AttributeError: It is not there.
    """
    module, symbol = {
        "varlen": ("torch.nn.attention.varlen", "varlen_attn"),
        "flash-attn": ("flash_attn", "flash_attn_varlen_func"),
    }[name]
    function: Callable[..., Tensor] = getattr(importlib.import_module(module), symbol)
    return function


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, window: int | None
) -> Tensor:
    """One document after the other."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    parts = []
    for start, end in pairwise(documents.bounds):
        if start == end:
            continue
        heads: Any = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        options: dict[str, Any] = {"scale": scale, "is_causal": True}
        if window is not None and end - start > window:
            options |= {
                "is_causal": False,
                "attn_mask": window_mask(end - start, window, q.device),
            }
        parts.append(scaled_dot_product_attention(*heads, **options)[0].transpose(0, 1))
    return torch.cat(parts)


def _batched(q: Tensor, k: Tensor, v: Tensor, length: int, scale: float) -> Tensor:
    """Documents of one length as a batch: cuDNN takes half of varlen's time on Hopper GPUs."""
    q, k, v = (x.view(-1, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(_BATCHED, set_priority=True):
        out = scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out.transpose(1, 2).flatten(0, 1)


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, window: int | None
) -> Tensor:
    if window is None and documents.alike:
        return _batched(q, k, v, documents.longest, scale)
    function = _function("varlen")
    known = inspect.signature(function).parameters
    options: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0)}
    if "scale" in known:
        options["scale"] = scale
    else:
        q = q * (scale * q.shape[2] ** 0.5)
    # before there was the option, fewer key heads were taken as they came
    if "enable_gqa" in known:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    offsets, longest = documents.offsets, documents.longest
    return function(q, k, v, offsets, offsets, longest, longest, **options)


def _flash_attn(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, window: int | None
) -> Tensor:
    offsets, longest = documents.offsets, documents.longest
    return _function("flash-attn")(
        *(q, k, v, offsets, offsets, longest, longest),
        softmax_scale=scale,
        causal=True,
        window_size=(-1 if window is None else window - 1, 0 if window is not None else -1),
    )


_RUN: dict[str, Callable[..., Tensor]] = {
    "sdpa": _sdpa,
    "varlen": _varlen,
    "flash-attn": _flash_attn,
}
