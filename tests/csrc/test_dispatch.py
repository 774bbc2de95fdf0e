"""Which of the CUDA products a shape gets, where no GPU is: the cut for few rows is valid and even."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from bench.tune_sm90 import candidates
from tli_engine.kernels import nf4_sm90_dispatch as dispatch
from tli_engine.kernels.nf4_sm90_dispatch import Gemv, Tile

SHAPES = [(64, 64), (4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (4160, 320)]
SHAPES += [(59136, 8192), (8192, 29568), (8192, 59136), (152064, 8192)]


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict]:
    """An empty table of measurements."""
    table: dict = {}
    monkeypatch.setattr(dispatch, "TUNED", table)
    dispatch._choose.cache_clear()
    yield table
    dispatch._choose.cache_clear()


@pytest.mark.parametrize("processors", [132, 78, 1])
@pytest.mark.parametrize(("rows", "contraction"), SHAPES, ids=str)
def test_default_cut_is_one_that_the_op_takes(rows: int, contraction: int, processors: int) -> None:
    columns = contraction // 64
    cut = dispatch.default_gemv(rows, contraction, processors)
    if columns > 64 * processors:
        assert cut is None
        return
    assert cut is not None
    assert cut.block_rows in (32, 64)
    assert 1 <= cut.groups <= rows // cut.block_rows
    assert -(-columns // 64) <= cut.split <= columns
    assert cut.split * cut.groups <= processors


@pytest.mark.parametrize(("rows", "contraction"), SHAPES[1:], ids=str)
def test_default_cut_keeps_most_processors_busy(rows: int, contraction: int) -> None:
    cut = dispatch.default_gemv(rows, contraction, 132)
    assert cut is not None
    deep = -(-(rows // cut.block_rows) // cut.groups) * cut.block_rows
    columns = -(-contraction // cut.split)
    assert deep * columns < 1.4 * rows * contraction / 132 + 4 * 64**2


def test_untuned_shapes_get_it_for_up_to_eight_rows(tuned: dict) -> None:
    chosen = [dispatch._choose("fwd", m, 4096, 4096, False, 132) for m in (1, 8, 9)]
    assert [type(cut) for cut in chosen] == [Gemv, Gemv, Tile]
    assert dispatch._choose("fwd", 1, 2**20, 2**14, False, 132) is None


@pytest.mark.parametrize("fast", [False, True], ids=["exact", "fast"])
@pytest.mark.parametrize("direction", ["fwd", "dx"])
def test_most_products_of_very_many_rows_decode_for_cublas(
    direction: str, fast: bool, tuned: dict
) -> None:
    tuned[direction, 4096, 4096, 4096, fast] = (256, 1, 2, 1, 0, 1, 0, 1)
    few, many = (dispatch._choose(direction, m, 4096, 4096, fast, 132) for m in (6144, 6145))
    assert few is not None
    assert (many is None) == (direction == "dx" or not fast)


def test_the_table_decides(tuned: dict) -> None:
    tuned["fwd", 4096, 4096, 8, False] = (64, 4, 32)
    tuned["fwd", 4096, 4096, 8, True] = (16, 1, 4, 1, 0, 1, 0)
    tuned["dx", 4096, 4096, 8, True] = None
    assert dispatch._choose("fwd", 3, 4096, 4096, False, 132) == Gemv(64, 4, 32)
    assert dispatch._choose("fwd", 3, 4096, 4096, True, 132) == Tile(16, 1, 4, 1, 0, 1, 0)
    assert dispatch._choose("dx", 3, 4096, 4096, True, 132) is None


def test_a_tile_of_seven_numbers_has_no_cluster(tuned: dict) -> None:
    tuned["fwd", 4096, 4096, 512, False] = (256, 1, 2, 1, 0, 1, 128)
    tuned["fwd", 4096, 4096, 512, True] = (256, 1, 2, 1, 0, 1, 128, 2)
    chosen = [dispatch._choose("fwd", 512, 4096, 4096, fast, 132) for fast in (False, True)]
    assert [tile.cluster for tile in chosen if isinstance(tile, Tile)] == [1, 2]


def test_clusters_that_do_not_fit_are_not_taken(tuned: dict) -> None:
    # 33 row blocks are 17 pairs, so 34 CTAs a part
    tuned["fwd", 33 * 128, 4096, 256, True] = (256, 1, 2, 1, 1, 3, 0, 2)
    fitting, other = (dispatch._choose("fwd", 256, 33 * 128, 4096, True, n) for n in (102, 101))
    assert fitting == Tile(256, 1, 2, 1, 1, 3, 0, 2)
    assert isinstance(other, Tile)
    assert other.cluster == 1


@pytest.mark.parametrize("M", [9, 64, 128, 256, 1024, 4096])
@pytest.mark.parametrize(("rows", "contraction"), SHAPES[1:], ids=str)
def test_rules_choose_no_cluster(rows: int, contraction: int, M: int) -> None:
    assert dispatch.default_tile(M, rows, contraction, 132).cluster == 1


def test_scratch_of_shared_sums() -> None:
    assert dispatch._workspace(4096, 3, Gemv(64, 2, 64), 132) == (2 * 4096 * 3, 64)
    assert dispatch._workspace(4096, 3, Gemv(64, 1, 64), 132) == (0, 0)


@pytest.mark.parametrize("processors", [132, 114, 78])
def test_measured_tiles_fit_on_smaller_gpus_or_are_not_taken(processors: int) -> None:
    for direction, rows, contraction, M, fast in dispatch.TUNED:
        tile = dispatch._choose(direction, M, rows, contraction, fast, processors)
        if isinstance(tile, Tile):
            width = 64 * tile.blocks_per_warpgroup * tile.warpgroups * tile.cluster
            tiles = -(-M // tile.block_m) * -(-rows // width)
            ctas = tile.grid if tile.mode == 0 else tiles * tile.split * tile.cluster
            assert ctas <= processors * tile.ctas_per_sm, (direction, rows, contraction, M, tile)


def test_rows_between_the_measured_buckets(tuned: dict) -> None:
    tuned["dx", 4096, 4096, 1024, False] = (256, 1, 2, 1, 0, 1, 0)
    tuned["dx", 4096, 4096, 4096, False] = None
    chosen = [dispatch._choose("dx", m, 4096, 4096, False, 132) for m in (1025, 2048, 2049, 9000)]
    assert chosen == [Tile(256, 1, 2, 1, 0, 1, 0)] * 2 + [None] * 2
    # an untuned one: on the way back cuBLAS takes many rows
    assert dispatch._choose("dx", 4096, 5120, 5120, False, 132) is None
    assert dispatch._choose("fwd", 4096, 5120, 5120, False, 132) is not None


def test_three_quarters_of_a_power_of_two_may_have_tiles_of_their_own(tuned: dict) -> None:
    two, three = Tile(256, 1, 2, 1, 0, 1, 0), Tile(128, 1, 2, 1, 0, 1, 0)
    tuned["fwd", 4096, 4096, 512, False] = tuple(two)
    rows = (257, 384, 385, 512)
    assert {dispatch._choose("fwd", m, 4096, 4096, False, 132) for m in rows} == {two}
    tuned["fwd", 4096, 4096, 384, False] = tuple(three)
    dispatch._choose.cache_clear()
    chosen = [dispatch._choose("fwd", m, 4096, 4096, False, 132) for m in rows]
    assert chosen == [three, three, two, two]
    # few rows are cut finely enough
    assert dispatch.measured_rows(48) == (64,)
    assert dispatch.measured_rows(65) == (96, 128)
    assert dispatch.measured_rows(97) == (128,)


@pytest.mark.parametrize("M", [16, 64, 96, 128, 256, 384, 1024, 4096])
@pytest.mark.parametrize(("rows", "contraction"), SHAPES[1:], ids=str)
def test_tuning_tries_what_fits_and_clusters_of_tall_tiles(
    rows: int, contraction: int, M: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    tiles = [tile for tile in candidates(rows, contraction, M) if isinstance(tile, Tile)]
    for tile in tiles:
        count = -(-M // tile.block_m) * dispatch._row_tiles(rows, tile)
        ctas = tile.grid if tile.mode == 0 else count * tile.split * tile.cluster
        assert ctas <= 132 * tile.ctas_per_sm, tile
        assert tile.grid % tile.cluster == 0, tile
    assert len(set(tiles)) == len(tiles)
    assert {tile.block_m for tile in tiles if tile.cluster == 2} <= {128, 256}
    assert any(tile.cluster == 2 for tile in tiles) == (M > 64)
