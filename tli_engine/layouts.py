"""How a frozen NF4 weight lies in memory, and the ops that run on it.

Each layout holds bitsandbytes' bytes once, permuted without loss, and gives them back. Records may
be held a second time, transposed, for the gradient of the input.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tli_engine import backends
from tli_engine.nf4 import NF4Weight
from tli_engine.ops.nf4_linear import tile, untile
from tli_engine.ops.nf4_linear_records import from_records, to_records


class Adapter(NamedTuple):
    """A LoRA update as the ops take it; see :func:`tli_engine.ops.nf4_lora_linear`."""

    lora_A: Tensor
    lora_B: Tensor
    seed: Tensor | None
    sizes: list[int]
    scaling: float
    dropout: float


class PortableWeight:
    """bitsandbytes' own bytes, or on a GPU tiles of them for the Triton kernels.

    Attributes:
        N, K: Rows and columns of the weight.
        packed: Two codes a byte, uint8, ``[ceil(N K / 2), 1]``, or tiled, of as many bytes.
        absmax: Of each block, fp32, in the order of the bytes.
        tiled: Whether the bytes are tiles; see ``tli_engine.reference.nf4_linear.tile``.
    """

    transposed_nbytes = 0

    def __init__(self, weight: NF4Weight) -> None:
        self.N, self.K = weight.shape
        self.packed, self.absmax = weight.packed, weight.absmax_fp32()
        self.tiled = weight.device.type == "cuda" and weight.block_size == 64 and self.K % 128 == 0
        if self.tiled:
            self.packed, self.absmax = tile(self.packed, self.absmax, self.N, self.K)
        # the only copy of the bytes is this one; of the statistics, what it lacks
        absmax = self.absmax if weight.nested is None else weight.absmax
        self._source = replace(weight, packed=self.packed, absmax=absmax)

    @property
    def device(self) -> torch.device:
        """Where the bytes are."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        decoded = self.absmax.nbytes if self._source.nested is not None else 0
        return self._source.nbytes + decoded

    def weight(self) -> NF4Weight:
        """Return the weight, bitsandbytes' bytes; a copy where they are tiled."""
        if not self.tiled:
            return self._source
        packed, absmax = untile(self.packed, self.absmax, self.N, self.K)
        if self._source.nested is not None:
            absmax = self._source.absmax
        return replace(self._source, packed=packed, absmax=absmax)

    def product(self, x: Tensor, bias: Tensor | None, fast: bool) -> Tensor:
        """Return ``x @ W.T + bias``, ``[M, N]``."""
        stored = (self.packed, self.absmax, bias, self.N)
        options = (self._source.block_size, self.tiled, fast)
        y: Tensor = torch.ops.tli_engine.nf4_linear.default(x, *stored, *options)
        return y

    def adapted(self, x: Tensor, bias: Tensor | None, adapter: Adapter, fast: bool) -> Tensor:
        """Return the product and the adapter's update, ``[M, N]``."""
        stored = (self.packed, self.absmax, bias, *adapter)
        options = (self._source.block_size, self.tiled, fast)
        y: Tensor = torch.ops.tli_engine.nf4_lora_linear.default(x, *stored, *options)[0]
        return y

    def add_transposed_copy(self) -> None:
        """Do nothing: these kernels read one copy in both directions."""

    def tensors(self) -> list[Tensor]:
        """What the kernels read."""
        return [self.packed, self.absmax]

    def set_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Read the same bytes elsewhere, and give up the own ones."""
        self.packed, self.absmax = tensors
        absmax = self.absmax if self._source.nested is None else self._source.absmax
        self._source = replace(self._source, packed=self.packed, absmax=absmax)


class RecordedWeight:
    """Records for the CUDA C++ kernel, and on demand those of the transpose for the way back.

    For blocks of 64, and N and K multiples of 64: see :func:`lay_out`.

    Attributes:
        N, K: Rows and columns of the weight.
        records: uint8, ``[N / 64, 2 ceil(K / 128), 2304]``.
        transposed: uint8, ``[K / 64, 2 ceil(N / 128), 2304]``, or None.
    """

    def __init__(self, weight: NF4Weight) -> None:
        self.N, self.K = weight.shape
        # of double quantised statistics, the records hold the decoded ones
        held = weight.absmax if weight.nested else weight.absmax.new_empty(0)
        self._source = replace(weight, packed=weight.packed.new_empty(0), absmax=held)
        self.records = to_records(weight.packed, weight.absmax_fp32(), self.N, self.K, False)
        self.transposed: Tensor | None = None
        self._settle()

    @property
    def device(self) -> torch.device:
        """Where the records are."""
        return self.records.device

    @property
    def nbytes(self) -> int:
        """Bytes held, the transposed copy among them."""
        return self._source.nbytes + self.records.nbytes + self.transposed_nbytes

    @property
    def transposed_nbytes(self) -> int:
        """Bytes of the transposed copy."""
        return 0 if self.transposed is None else self.transposed.nbytes

    def weight(self) -> NF4Weight:
        """Return the weight, a copy of bitsandbytes' bytes."""
        packed, absmax = from_records(self.records, self.N, self.K, False)
        absmax = absmax if self._source.nested is None else self._source.absmax
        return replace(self._source, packed=packed, absmax=absmax)

    def product(self, x: Tensor, bias: Tensor | None, fast: bool) -> Tensor:
        """Return ``x @ W.T + bias``, ``[M, N]``."""
        stored = (self.records, self.transposed, bias)
        y: Tensor = torch.ops.tli_engine.nf4_linear_records.default(
            x, *stored, None, None, None, [], 1.0, 0.0, self.N, fast
        )[0]
        return y

    def adapted(self, x: Tensor, bias: Tensor | None, adapter: Adapter, fast: bool) -> Tensor:
        """Return the product and the adapter's update, ``[M, N]``."""
        y: Tensor = torch.ops.tli_engine.nf4_linear_records.default(
            x, self.records, self.transposed, bias, *adapter, self.N, fast
        )[0]
        return y

    def add_transposed_copy(self) -> None:
        """Hold the transpose too: the gradient of the input takes the fused kernel, for as many bytes."""
        if self.transposed is None:
            packed, absmax = from_records(self.records, self.N, self.K, False)
            self.transposed = to_records(packed, absmax, self.N, self.K, True)
            self._settle()

    def tensors(self) -> list[Tensor]:
        """What the kernels read."""
        return [self.records, *([] if self.transposed is None else [self.transposed])]

    def set_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Read the same bytes elsewhere, and give up the own ones."""
        self.records, self.transposed = tensors[0], (*tensors[1:], None)[0]
        self._settle()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a copy's state."""
        self.__dict__.update(state)
        self._settle()

    def _settle(self) -> None:
        # the kernel fetches records before it waits for the kernel before it: none may write them
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


class RowsOf:
    """Some rows of a weight that lies elsewhere, joined with others that share its input.

    A product multiplies by all rows and keeps its own: it is for use off the hot path.
    """

    transposed_nbytes = 0
    # counted where they lie
    nbytes = 0

    def __init__(
        self, whole: PortableWeight | RecordedWeight, first: int, source: NF4Weight
    ) -> None:
        self.N, self.K = source.shape
        self._whole, self._rows = whole, slice(first, first + self.N)
        # what the joined weight has no place for: a double quantised absmax
        nested = None if source.nested is None else (source.absmax, source.nested)
        self._dtype, self._nested = source.dtype, nested

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self._whole.device

    def weight(self) -> NF4Weight:
        """Return the weight, bitsandbytes' bytes; a copy."""
        whole = self._whole.weight()
        first, last = self._rows.start * self.K, self._rows.stop * self.K
        packed = whole.packed[first // 2 : last // 2].clone()
        blocks = slice(first // whole.block_size, last // whole.block_size)
        absmax, nested = self._nested or (whole.absmax[blocks].clone(), None)
        shape = (self.N, self.K)
        return NF4Weight(packed, absmax, shape, self._dtype, whole.block_size, nested)

    def product(self, x: Tensor, bias: Tensor | None, fast: bool) -> Tensor:
        """Return ``x @ W.T + bias``, ``[M, N]``."""
        y = self._whole.product(x, None, fast)[:, self._rows]
        return y.contiguous() if bias is None else y + bias

    def adapted(self, x: Tensor, bias: Tensor | None, adapter: Adapter, fast: bool) -> Tensor:
        """Return the product and the adapter's update, ``[M, N]``."""
        before, after = self._rows.start, self._whole.N - self._rows.stop
        padding = (0, 0, before, after)
        # other rows' update is zero; they count to the first group and to the last
        sizes = list(adapter.sizes)
        sizes[0] += before
        sizes[-1] += after
        lora_B = torch.nn.functional.pad(adapter.lora_B, padding)
        whole = adapter._replace(lora_B=lora_B, sizes=sizes)
        bias = None if bias is None else torch.nn.functional.pad(bias, padding[2:])
        return self._whole.adapted(x, bias, whole, fast)[:, self._rows].contiguous()

    def add_transposed_copy(self) -> None:
        """Do nothing: the joined weight has its own."""

    def tensors(self) -> list[Tensor]:
        """None: they are the joined weight's."""
        return []

    def set_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Do nothing, as there are none."""


@contextmanager
def run_again(device: torch.device) -> Iterator[None]:
    """Run a block again during a backward: weights decoded inside are kept for its way back.

    They are given up as they are used, and what is left with the next block, or when the backward
    ends. On a CPU nothing is kept.
    """
    if device.type != "cuda":
        yield
        return
    keep = backends.resolve("keep_decoded")
    torch.autograd.Variable._execution_engine.queue_callback(
        partial(keep, keeping=False, forget=True)
    )
    keep(keeping=True, forget=True)
    try:
        yield
    finally:
        keep(keeping=False, forget=False)


def lay_out(weight: NF4Weight) -> PortableWeight | RecordedWeight:
    """Choose the layout of the fastest kernels that run here: records, where the extension does."""
    N, K = weight.shape
    fits = weight.block_size == 64 and N % 64 == 0 and K % 64 == 0 and N > 0 and K > 0
    if fits and backends.has_extension(weight.device):
        return RecordedWeight(weight)
    return PortableWeight(weight)
