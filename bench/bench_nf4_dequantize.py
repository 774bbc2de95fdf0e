"""NF4 dequantisation, plain and double quantised: microseconds against bitsandbytes, Unsloth."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.harness import Row, copy_bandwidth, print_gpu_rows, time_graphs, write_results
from bench.nf4_shapes import SHAPES, bnb_weight, copies, random_nf4, rotate, rows_of
from bench.peers import load_unsloth
from tli_engine.kernels.nf4_dequantize import dequantize_tiles
from tli_engine.kernels.nf4_records import dequantize_records
from tli_engine.layouts import PortableWeight
from tli_engine.nf4 import NF4Weight, quantize
from tli_engine.ops import nf4_dequantize
from tli_engine.reference.nf4_records import to_records

Calls = dict[str, list[Callable[[], object]]]
PEERS = ["bitsandbytes", "unsloth"]


def bench_shape(name: str, N: int, K: int, bandwidth: float) -> list[Row]:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    plain = [random_nf4(N, K, seed) for seed in range(copies(N, K, 0.5625))]
    tiles = [PortableWeight(w) for w in plain]
    records = [to_records(w.packed, w.absmax, N, K, False) for w in plain]
    dense = plain[0].dequantize(torch.bfloat16)
    nested = quantize(dense, double_quant=True)
    packed, state = quantize_4bit(dense, blocksize=64, quant_type="nf4", compress_statistics=True)
    theirs = NF4Weight(packed, state.absmax, (N, K), torch.bfloat16, nested=_nested_of(state))
    same = torch.equal(nf4_dequantize(theirs), dequantize_4bit(packed, state))
    same &= torch.equal(nf4_dequantize(plain[0]), dequantize_4bit(*bnb_weight(plain[0])))
    if not same:
        raise SystemExit(f"{name}: not the bits of bitsandbytes; not timed")
    doubles = [nested, *(quantize(w.dequantize(), double_quant=True) for w in plain[1:])]
    bnb_plain = [bnb_weight(w) for w in plain]
    bnb_double = [
        quantize_4bit(w.dequantize(), blocksize=64, quant_type="nf4", compress_statistics=True)
        for w in plain
    ]

    def tiled(weight: PortableWeight) -> torch.Tensor:
        return dequantize_tiles(weight.packed, weight.absmax, N, K, torch.bfloat16, 64, True)

    cases = {
        "dequantize": {
            "bitsandbytes": rotate(dequantize_4bit, *zip(*bnb_plain, strict=True)),
            "tli-engine": rotate(nf4_dequantize, plain),
            "tli-engine:tiled": rotate(tiled, tiles),
            "tli-engine:records": rotate(
                lambda r: dequantize_records(r, N, K, torch.bfloat16), records
            ),
        },
        "dequantize-double": {
            "bitsandbytes": rotate(dequantize_4bit, *zip(*bnb_double, strict=True)),
            "tli-engine": rotate(nf4_dequantize, doubles),
        },
    }
    cases["dequantize"] |= _unsloth(bnb_plain, name)
    cases["dequantize-double"] |= _unsloth(bnb_double, name)
    rows = []
    for case, calls in cases.items():
        times = time_graphs(calls, max(8, len(plain)))
        # codes and absmax read once, bf16 written once
        nbytes = int(N * K * (2.5625 if case == "dequantize" else 2.515625))
        floor = nbytes / bandwidth
        rows += rows_of(case, {"N": N, "K": K}, name, times, "bitsandbytes", floor, bytes=nbytes)
        print_gpu_rows(rows[-len(calls) :])
    return rows


def _unsloth(weights: Sequence[tuple[torch.Tensor, Any]], name: str) -> Calls:
    """Unsloth's kernel on a rotation of bitsandbytes' weights; empty without Unsloth."""
    from bitsandbytes.functional import dequantize_4bit

    unsloth = load_unsloth()
    if unsloth is None:
        return {}
    if not torch.equal(unsloth.dequantize(*weights[0]), dequantize_4bit(*weights[0])):
        raise SystemExit(f"{name}: unsloth: not the bits of bitsandbytes; not timed")
    return {"unsloth": rotate(unsloth.dequantize, *zip(*weights, strict=True))}


def _nested_of(state: object) -> object:
    from tli_engine.nf4 import NestedAbsmax

    inner = state.state2  # type: ignore[attr-defined]
    return NestedAbsmax(inner.absmax, inner.code, state.offset, inner.blocksize)  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    args = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e12:.2f} TB/s")
    rows: list[Row] = []
    for name in args.shapes:
        rows += bench_shape(name, *SHAPES[name], bandwidth)
        torch.cuda.empty_cache()
    print(f"written: {write_results('nf4_dequantize', rows, PEERS, copy_bytes_per_s=bandwidth)}")


if __name__ == "__main__":
    main()
