"""Decoding's attention on a GPU: against its definition in fp64, and replayed from a CUDA graph."""

import pytest
import torch
from torch import Tensor

from tli_engine import backends
from tli_engine.ops.cached_attention import cached_attention_
from tli_engine.reference.cached_attention import cached_attention as reference
from tli_engine.testing import assert_within_error_budget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CASES = [  # rows, heads, key heads, D, slots, slot
    pytest.param(16, 32, 8, 128, 768, 575, id="8B"),
    pytest.param(1, 32, 8, 128, 768, 575, id="8B-one-row"),
    pytest.param(4, 64, 8, 128, 2048, 2047, id="72B"),
    pytest.param(5, 9, 3, 64, 512, 1, id="SmolLM2"),
    pytest.param(3, 4, 1, 256, 768, 700, id="Gemma-3-270M"),
    pytest.param(300, 4, 2, 80, 64, 40, id="one-part"),
]


def make_inputs(
    rows: int, heads: int, key_heads: int, D: int, slots: int, slot: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    qkv = torch.randn(rows, heads + 2 * key_heads, D, device="cuda").to(dtype)
    kept = torch.randn(2, rows, slots, key_heads, D, device="cuda").to(dtype)
    q, k, v = qkv.split([heads, key_heads, key_heads], 1)
    begin = torch.randint(slot + 1, (rows,), device="cuda")
    at = torch.tensor([slot], device="cuda")
    # a slot that no row sees holds anything
    kept[:, :, slot:] = torch.nan
    found = {"q": q, "k": k, "v": v, "keys": kept[0], "values": kept[1]}
    return found | {"begin": begin, "slot": at}


def by_definition(inputs: dict[str, Tensor], dtype: torch.dtype, window: int | None) -> Tensor:
    """Of copies in another dtype, NaN left out; the cache of ``inputs`` is left alone."""
    given = [
        t if t.dtype == torch.int64 else t.to(dtype, copy=True).nan_to_num()
        for t in inputs.values()
    ]
    return reference(*given, 0.1, window)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "heads", "key_heads", "D", "slots", "slot"), CASES)
def test_is_what_it_is_defined_as(
    rows: int, heads: int, key_heads: int, D: int, slots: int, slot: int, dtype: torch.dtype,
    window: int | None,
) -> None:  # fmt: skip
    assert backends.explain("cached_attention")[0] == "triton"
    inputs = make_inputs(rows, heads, key_heads, D, slots, slot, dtype)
    exact = by_definition(inputs, torch.float64, window)
    # sums in fp32, of values in dtype, then rounded
    same = by_definition(inputs, dtype, window)
    out = cached_attention_(**inputs, scale=0.1, window=window)
    rounding = torch.finfo(dtype).eps * exact.abs().max().item()
    assert_within_error_budget(out, same, exact, floor=4 * rounding)
    assert torch.equal(inputs["keys"][:, slot], inputs["k"])
    assert torch.equal(inputs["values"][:, slot], inputs["v"])


def test_a_graph_goes_on_from_step_to_step() -> None:
    """Slot and cache are read on the device: the same graph is each next step."""
    inputs = make_inputs(3, 8, 2, 64, 256, 40, torch.bfloat16)
    eager = {name: tensor.clone() for name, tensor in inputs.items()}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        cached_attention_(**inputs, scale=0.1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = cached_attention_(**inputs, scale=0.1)
        inputs["slot"] += 1
    for _ in range(100):
        graph.replay()
        expected = cached_attention_(**eager, scale=0.1)
        eager["slot"] += 1
        assert torch.equal(out, expected)
