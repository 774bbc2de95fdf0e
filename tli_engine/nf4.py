"""NF4 weights in bitsandbytes' own bytes, without bitsandbytes.

A weight, flattened row-major, is cut into blocks of ``block_size`` elements; the last may be
short. Each element is stored as the 4-bit index of the value of ``CODE`` that is nearest to
``w / absmax``, where ``absmax`` is the largest magnitude in its block; element 2i lies in the high
nibble of byte i, element 2i + 1 in the low one. Back: ``CODE[q] * absmax`` in fp32, rounded once.
Double quantised, absmax is itself 8-bit: ``nested.code[q] * nested.absmax``, rounded, plus
``nested.offset``, rounded.

bitsandbytes' names, in QuantState and on disk: ``absmax``; ``code``, ``quant_map`` (``CODE``);
``blocksize``; ``state2.absmax``, ``nested_absmax``; ``state2.code``, ``nested_quant_map``;
``offset``, ``nested_offset``.

Source: Dettmers et al. 2023 (QLoRA), App. E; bitsandbytes 0.50, ``backends/default/ops.py`` and,
for CUDA, ``csrc/kernels.cu``. Packed bytes and fp32 absmax are those that bitsandbytes computes on a
CPU, bit for bit. Where it differs from itself, the choices here are:

- An all-zero block gets code 7 (zero), as on its CPU, so it stays zero whatever double quantisation
  makes of its absmax. Its CUDA kernels write code 0 (minus one), which does not.
- ``1 / absmax`` is rounded correctly, as on its CPU. Its CUDA kernels approximate it (they are
  compiled with ``--use_fast_math``), which moves weights that lie next to a threshold.
- ``offset`` is the mean in fp64. Its own is an fp32 sum whose last bit varies with the device and
  with the number of threads.
- Double quantised absmax takes the nearest code, as on CUDA. Its CPU library looks codes up in
  65536 bins, coarser than the codes around zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

CODE = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022833334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    dtype=torch.float32,
    device="cpu",
)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_NESTED_BLOCK_SIZE = 256
# a block of a smaller absmax is divided by this, whose reciprocal is finite
_MIN_ABSMAX = 1e-38
# elements at a time: temporaries stay under 20 MB; a multiple of every block size
_CHUNK = 1 << 20


def _dynamic_map() -> Tensor:
    """The signed 8-bit dynamic map, bitsandbytes' ``create_dynamic_map()``."""
    values = [0.0, 1.0]
    for exponent in range(-6, 1):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + 6) + 1, dtype=torch.float32, device="cpu")
        means = 10**exponent * ((edges[:-1] + edges[1:]) / 2)
        values += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


_DYNAMIC_MAP = _dynamic_map()
# half-way between neighbours; a value on a threshold goes down
_THRESHOLDS: list[float] = ((CODE[:-1] + CODE[1:]) / 2).tolist()
# the two codes of every byte as one int64, so that a lookup yields two weights
_BYTES = torch.arange(256, device="cpu")
_PAIRS = torch.stack([CODE[_BYTES >> 4], CODE[_BYTES & 15]], 1).view(torch.int64).view(-1)


@dataclass(frozen=True, eq=False)
class NestedAbsmax:
    """What turns a double quantised absmax back into fp32.

    Attributes:
        absmax: Largest magnitude of each block of ``absmax - offset``, ``[blocks]``, fp32.
        code: Values of the 256 codes, ``[256]``, fp32.
        offset: Mean of the absmax, ``[]``, fp32.
        block_size: Number of absmax that share one of ``absmax``.
    """

    absmax: Tensor
    code: Tensor
    offset: Tensor
    block_size: int = _NESTED_BLOCK_SIZE


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """A weight in 4 bits, in bitsandbytes' own bytes.

    Attributes:
        packed: Two codes a byte, ``[ceil(numel / 2), 1]``, uint8.
        absmax: Largest magnitude of each block, ``[blocks]``; fp32, or uint8 when ``nested``.
        shape: Shape of the weight, ``(out_features, in_features)`` for a linear layer.
        dtype: What the weight was quantised from, and is dequantised to unless told otherwise.
        block_size: Number of elements that share an absmax.
        nested: How to read a double quantised absmax; None when ``absmax`` is fp32.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    block_size: int = 64
    nested: NestedAbsmax | None = None

    @property
    def device(self) -> torch.device:
        """Where the bytes are."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of all the tensors."""
        nested = self.nested
        statistics = (nested.absmax, nested.code, nested.offset) if nested else ()
        return sum(t.nbytes for t in (self.packed, self.absmax, *statistics))

    def to(self, device: torch.device | str) -> "NF4Weight":
        """Return the weight on another device; tensors already there are shared."""
        nested = self.nested and NestedAbsmax(
            self.nested.absmax.to(device),
            self.nested.code.to(device),
            self.nested.offset.to(device),
            self.nested.block_size,
        )
        packed, absmax = self.packed.to(device), self.absmax.to(device)
        return NF4Weight(packed, absmax, self.shape, self.dtype, self.block_size, nested)

    def absmax_fp32(self) -> Tensor:
        """Return the absmax of every block, ``[blocks]``, fp32; decoded if double quantised."""
        if self.nested is None:
            return self.absmax
        absmax = self.nested.code.index_select(0, self.absmax.int())
        # two roundings, as bitsandbytes' dequantisation does; an FMA would be one bit off
        return _scale_blocks(absmax, self.nested.absmax, self.nested.block_size).add_(
            self.nested.offset
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight in full, bit for bit as bitsandbytes dequantises it.

        Args:
            dtype: fp32, fp16 or bf16; ``self.dtype`` if None.

        Returns:
            The weight, ``self.shape``, contiguous; zeros for an all-zero block.

        Raises:
            ValueError: Another dtype.
        """
        dtype = dtype or self.dtype
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {DTYPES}, got {dtype}")
        packed, absmax, pairs = self.packed.view(-1), self.absmax_fp32(), _PAIRS.to(self.device)
        weight = torch.empty(prod(self.shape), dtype=dtype, device=self.device)
        for start in range(0, weight.numel(), _CHUNK):
            piece = weight[start : start + _CHUNK]
            codes = packed[start // 2 :][: (piece.numel() + 1) // 2]
            # as int64 the pairs are looked up 3.4 times as fast as rows of two fp32 are
            values = pairs.index_select(0, codes.int()).view(torch.float32)[: piece.numel()]
            piece.copy_(_scale_blocks(values, absmax[start // self.block_size :], self.block_size))
        return weight.view(self.shape)


def quantize(weight: Tensor, *, block_size: int = 64, double_quant: bool = False) -> NF4Weight:
    """Quantise a weight to NF4.

    The result depends on the values alone: not on the device, nor on the number of threads. It takes
    20 MB besides the result (and 16 bytes a block for ``double_quant``, if that is more), and a copy
    of a weight that is not contiguous.

    Args:
        weight: Weight of any shape but ``[]`` and not empty; fp32, fp16 or bf16.
        block_size: Elements that share an absmax: a power of two from 32 to 4096.
        double_quant: Whether to store absmax in 8 bits: 0.516 bytes a weight instead of 0.5625.

    Returns:
        The quantised weight, on ``weight``'s device.

    Raises:
        ValueError: An argument is not as above, or the weight holds NaN or infinity.
    """
    check_weight(weight, block_size)
    flat = weight.detach().reshape(-1)
    numel, device = flat.numel(), flat.device
    packed = torch.empty((numel + 1) // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-numel // block_size), dtype=torch.float32, device=device)
    for start in range(0, numel, _CHUNK):
        scaled, largest = _normalise(flat[start : start + _CHUNK].float(), block_size)
        absmax[start // block_size :][: largest.numel()] = largest
        pairs = _pack(_nearest(scaled))
        packed[start // 2 :][: pairs.numel()] = pairs
    if not absmax.isfinite().all():
        raise ValueError(name_non_finite(flat, absmax, weight.shape, block_size))
    nested = None
    if double_quant:
        absmax, nested = nest_absmax(absmax)
    return NF4Weight(packed[:, None], absmax, tuple(weight.shape), weight.dtype, block_size, nested)


def concatenate(weights: Sequence[NF4Weight]) -> NF4Weight:
    """Put linear layers' weights one below the other: projections of one input run as one.

    Args:
        weights: ``[N_g, K]`` each, of one K, dtype, block size and device.

    Returns:
        ``[sum of N_g, K]``, bit for bit the same values; its absmax in fp32.

    Raises:
        ValueError: None are given, they do not fit together, or a block reaches into the next row
            at a weight's end.
    """
    if not weights:
        raise ValueError("weights must not be empty")
    first = weights[0]
    common = (first.shape[1:], first.dtype, first.block_size, first.device)
    for weight in weights:
        if (weight.shape[1:], weight.dtype, weight.block_size, weight.device) != common:
            wanted, got = (
                f"{list(w.shape)} {w.dtype}, blocks of {w.block_size}, on {w.device}"
                for w in (first, weight)
            )
            raise ValueError(
                f"weights must share all but their first size with the first, {wanted}; got {got}"
            )
        if len(weight.shape) != 2 or weight.shape[0] * weight.shape[1] % weight.block_size:
            raise ValueError(
                f"weights must be [N, K], N * K a multiple of the block size {weight.block_size}, "
                f"got {list(weight.shape)}"
            )
    packed = torch.cat([w.packed for w in weights])
    absmax = torch.cat([w.absmax_fp32() for w in weights])
    rows = sum(w.shape[0] for w in weights)
    return NF4Weight(packed, absmax, (rows, *first.shape[1:]), first.dtype, first.block_size)


def check_weight(weight: Tensor, block_size: int) -> None:
    """Refuse, by a ``ValueError``, what :func:`quantize` does not take."""
    if weight.dtype not in DTYPES:
        raise ValueError(f"weight must be one of {DTYPES}, got {weight.dtype}")
    if weight.ndim == 0 or weight.numel() == 0:
        raise ValueError(f"weight must have a dimension and an element, got {weight.shape}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {block_size}")


def name_non_finite(flat: Tensor, absmax: Tensor, shape: torch.Size, block_size: int) -> str:
    """Say which element is the first that is not finite, and where."""
    block = int((~absmax.isfinite()).nonzero()[0])
    piece = flat[block * block_size : (block + 1) * block_size]
    index = int((~piece.isfinite()).nonzero()[0])
    where = [int(i) for i in torch.unravel_index(torch.tensor(block * block_size + index), shape)]
    return f"weight must be finite, got {piece[index].item()} at {where}"


def _normalise(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return ``x``, ``[numel]``, over the absmax of its blocks, and the absmax."""
    full = x.numel() // block_size * block_size
    blocks, tail = x[:full].view(-1, block_size), x[full:]
    absmax = blocks.abs().amax(1)
    scaled = (blocks * absmax.clamp(min=_MIN_ABSMAX).reciprocal()[:, None]).view(-1)
    if tail.numel() == 0:
        return scaled, absmax
    # bitsandbytes stores the clamped absmax of a short block, and divides by it
    tail_absmax = tail.abs().amax().clamp(min=_MIN_ABSMAX)
    return torch.cat([scaled, tail / tail_absmax]), torch.cat([absmax, tail_absmax[None]])


def _nearest(scaled: Tensor) -> Tensor:
    """Return the index of the NF4 code nearest to each value, uint8."""
    codes = torch.zeros_like(scaled, dtype=torch.uint8)
    above = torch.empty_like(scaled, dtype=torch.bool)
    # 15 vectorised passes take 0.4 of torch.bucketize's time (2 cores with AVX-512)
    for threshold in _THRESHOLDS:
        codes.add_(torch.gt(scaled, threshold, out=above).view(torch.uint8))
    return codes


def _pack(codes: Tensor) -> Tensor:
    # bitsandbytes fills the last nibble of an odd number of weights with a zero
    if codes.numel() % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=7)
    return (codes[::2] << 4) | codes[1::2]


def nest_absmax(absmax: Tensor) -> tuple[Tensor, NestedAbsmax]:
    """Quantise absmax to 8 bits; return the codes and what decodes them."""
    offset = absmax.mean(dtype=torch.float64).float()
    code = _DYNAMIC_MAP.to(absmax.device, copy=True)
    scaled, largest = _normalise(absmax - offset, _NESTED_BLOCK_SIZE)
    codes = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2, out_int32=True)
    return codes.to(torch.uint8), NestedAbsmax(largest, code, offset)


def _scale_blocks(values: Tensor, scale: Tensor, block_size: int) -> Tensor:
    """Multiply each block of ``values``, ``[numel]``, by its scale, in place."""
    full = values.numel() // block_size
    values[: full * block_size].view(-1, block_size).mul_(scale[:full, None])
    if full * block_size < values.numel():
        values[full * block_size :].mul_(scale[full])
    return values
