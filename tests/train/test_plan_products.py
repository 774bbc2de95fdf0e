"""A plan's rules of products with adapters are what the launchers do, and its bytes follow from them."""

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.models import config_of
from tli_engine.config import RunConfig, resolve_config
from tli_engine.models.survey import Survey
from tli_engine.train.plan import make_plan
from tli_engine.train.plan_blocks import BlockMemory
from tli_engine.train.plan_devices import find_target
from tli_engine.train.plan_outline import outline
from tli_engine.train.plan_products import Product

pytest.importorskip("triton")
from tli_engine.kernels import nf4_linear_records_sm90, nf4_lora_linear

HIDDEN, QKV, FFN = 4096, 6144, 14336
PRODUCTS = [
    pytest.param(Product(HIDDEN, [4096, 1024, 1024], 16), id="q-k-v"),
    pytest.param(Product(HIDDEN, [4096, 1024, 1024], 22), id="q-k-v-of-66-ranks"),
    pytest.param(Product(HIDDEN, [FFN, FFN], 32), id="gate-up"),
    pytest.param(Product(HIDDEN, [FFN, FFN], 33), id="gate-up-of-66-ranks"),
    pytest.param(Product(FFN, [HIDDEN], 64), id="down"),
    pytest.param(Product(HIDDEN, [HIDDEN], 12), id="ranks-no-multiple-of-8"),
    pytest.param(Product(HIDDEN, [96, 32], 8), id="rows-no-multiple-of-64"),
]


def watch(kernel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace what computes by notes of which ran; tensors are on the meta device."""
    ways: list[str] = []

    def note(name: str, way: str) -> None:
        def run(x: Tensor, *args: Any) -> Tensor:
            ways.append(way)
            return x.new_empty(0)

        monkeypatch.setattr(kernel, name, run, raising=False)

    for name in ("adapted", "appended"):
        note(name, name)
    for name in ("launch", "fused_forward"):
        note(name, "fused")
    empty = torch.empty(0, 0, device="meta")
    for name in ("dequantize_records", "dequantize_tiles"):
        monkeypatch.setattr(kernel, name, lambda *args: empty, raising=False)
    monkeypatch.setattr(kernel, "up", lambda *args: empty.view(0), raising=False)
    monkeypatch.setattr(kernel, "down", lambda x, A, *args: x.new_empty(len(x), len(A)))
    return ways


def adapter(product: Product) -> tuple[Tensor, Tensor]:
    ranks = len(product.sizes) * product.rank
    A = torch.empty(ranks, product.columns, device="meta")
    return A, torch.empty(product.rows, product.rank, device="meta")


@pytest.mark.parametrize("M", [64, 128, 129, 2047, 2048, 6144, 6145])
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(
    ("hopper", "fast"),
    [(True, False), (True, True), (False, False)],
    ids=["exact", "fast", "triton"],
)
def test_rules_are_the_launchers(
    hopper: bool, fast: bool, product: Product, M: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = nf4_linear_records_sm90 if hopper else nf4_lora_linear
    ways = watch(kernel, monkeypatch)
    # what the fused products take of shapes that no one has measured
    tile = () if fast or (6144 if hopper else 64) >= M else None
    monkeypatch.setattr(kernel, "choose_tile", lambda *args: tile)
    x = torch.empty(M, product.columns, dtype=torch.float16, device="meta")
    (A, B), stored = adapter(product), torch.empty(0, device="meta")
    options = (None, product.sizes, 1.0, 0.0)
    if hopper:
        kernel.nf4_linear_records(x, stored, None, None, A, B, *options, product.rows, fast)
    else:
        kernel.nf4_lora_linear(x, stored, stored, None, A, B, *options, 64, True, False)
    (way,) = ways
    assert product.sums_in_fp32(M, nf4=True, hopper=hopper, fast=fast) == (way == "adapted")
    if hopper:
        assert product.decodes(M, hopper, fast) == (way != "fused")


def run_of(rank: int, tokens: int, **changes: Any) -> RunConfig:
    """Adapters on all projections of Llama-3-8B's shape in NF4."""
    names = ("q", "k", "v", "o", "gate", "up", "down")
    values = {
        "model": "llama-3-8b",
        "objective": "sft",
        "quantize": "nf4",
        "data": {"texts": "none.jsonl"},
        "lora": {"layers": "0-7", "modules": [f"{n}_proj" for n in names], "r": rank},
        "sft": {"context": tokens},
        "train": {"steps": 9, "batch_size": 1},
    }
    return resolve_config(values | changes, "test")


SHAPE = config_of("llama-3-8b")
# as many blocks as show it
SHAPE.num_hidden_layers = 8
MODEL = Survey("llama-3-8b", SHAPE, None)
H100 = find_target("h100", "auto")


def blocks_of(rank: int, tokens: int, **changes: Any) -> BlockMemory:
    return BlockMemory(outline(run_of(rank, tokens, **changes), MODEL, H100), tokens)


def decoded(blocks: BlockMemory, keeps: tuple[bool, ...] = (False, False)) -> int:
    """Bytes of weights decoded for a second run of block 5."""
    parts = blocks.parts(5)
    return blocks.run_again(5, keeps) - sum(
        part.kept for part, keep in zip(parts, keeps, strict=True) if not keep
    )


def test_many_ranks_are_decoded_from_129_rows_on() -> None:
    qkv, gate_up, o = (2 * HIDDEN * n for n in (QKV, 2 * FFN, HIDDEN))
    between = 4096
    # what a second run as a whole keeps beyond: the second half's input
    assert decoded(blocks_of(16, between)) == between * HIDDEN * 2
    # of o and of down 64 ranks ride along
    assert decoded(blocks_of(64, between)) == between * HIDDEN * 2 + qkv + gate_up
    assert decoded(blocks_of(64, 128)) == 128 * HIDDEN * 2
    assert decoded(blocks_of(64, between), (True, False)) == gate_up
    for rank in (16, 64):
        assert decoded(blocks_of(rank, 8192)) == 8192 * HIDDEN * 2 + qkv + gate_up + o


def test_sums_in_fp32_are_counted() -> None:
    tokens = 8192
    gate_up, down = (2 * HIDDEN * n * FFN for n in (2, 1))
    # at 16 ranks gate and up are appended: down, whose input is wide, writes sums
    few, many = blocks_of(16, tokens), blocks_of(64, tokens)
    assert few.running(5, again=False) == 6 * HIDDEN * tokens + down
    assert few.running(5, again=False) < few.working(5)
    # what down reads comes later
    assert many.running(5, again=False) == (8 - 2) * FFN * tokens + gate_up
    assert many.running(5, again=False) > many.working(5)
    # a gradient is there, and the weight counted with what runs again
    assert many.running(5, again=True) == (8 - 2) * FFN * tokens + 2 * HIDDEN * tokens
    assert blocks_of(64, 128).running(5, again=False) == 0
    # of one layer the update is as long as the sums, before they are rounded
    alone = run_of(96, tokens, lora={"layers": "0-7", "modules": ["down_proj"], "r": 96})
    wide = BlockMemory(outline(alone, MODEL, H100), tokens)
    assert wide.running(5, again=False) == 8 * HIDDEN * tokens + down
    # a dense weight has them at any rank
    dense = blocks_of(16, tokens, quantize="none")
    assert dense.running(5, again=False) == (8 - 2) * FFN * tokens
    assert blocks_of(64, tokens, dtype="float32").running(5, again=False) == 0


def test_the_peak_has_the_sums_of_many_ranks() -> None:
    def changes(rank: int) -> dict[str, Any]:
        lora = {"layers": "0-7", "modules": ["gate_proj", "up_proj"], "r": rank}
        return {"lora": lora, "sft": {"context": 8192, "activations": "save"}}

    few, many = (
        make_plan(run_of(rank, 8192, **changes(rank)), MODEL, H100).gpu_bytes["working"]
        for rank in (16, 64)
    )
    blocks = blocks_of(64, 8192, **changes(64))
    assert many - few == blocks.running(5, again=False) - blocks.working(5)
    assert many > few
