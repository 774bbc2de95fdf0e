import pytest
import torch
from torch import Tensor

from tli_engine.nf4 import CODE, quantize
from tli_engine.reference.nf4_records import RECORD_BYTES, from_records, to_records

SHAPES = [  # N, K
    pytest.param(64, 64, id="half-a-stage"),
    pytest.param(128, 256, id="even"),
    pytest.param(192, 320, id="odd-multiples"),
    pytest.param(64, 448, id="one-row-block"),
]


def decode(records: Tensor, contraction: int, transposed: bool) -> Tensor:
    """Read records as the kernel's threads do: registers of lane ``4 r + c`` of each warp."""
    blocks, columns, _ = records.shape
    dense = torch.zeros(blocks * 64, columns * 64)
    scales = records[..., 2048:].contiguous().view(torch.float32)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for step in range(4):
            for register in range(4):
                byte = records[..., 16 * thread + 4 * step + register].int()
                row = 16 * warp + lane // 4 + 8 * (register % 2)
                for e, code in enumerate((byte >> 4, byte & 15)):
                    column = 16 * step + 8 * (register // 2) + 2 * (lane % 4) + e
                    index = 16 * warp + 2 * (lane // 4) + register % 2
                    if transposed:
                        index = 16 * step + 4 * (lane % 4) + 2 * (register // 2) + e
                    dense[row::64, column::64] = CODE[code] * scales[..., index]
    assert (dense[:, contraction:] == 0).all(), "what fills up the contraction must be zero"
    return dense[:, :contraction]


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "dx"])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_threads_find_the_weight(N: int, K: int, transposed: bool) -> None:
    weight = quantize(torch.randn(N, K))
    records = to_records(weight.packed, weight.absmax, N, K, transposed)
    rows, contraction = (K, N) if transposed else (N, K)
    assert records.shape == (rows // 64, -(-contraction // 128) * 2, RECORD_BYTES)
    assert records.is_contiguous()
    dense = weight.dequantize()
    expected = dense.T if transposed else dense
    assert torch.equal(decode(records, contraction, transposed), expected)


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "dx"])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_round_trip_is_bitsandbytes_own_bytes(
    N: int, K: int, transposed: bool, device: torch.device
) -> None:
    # every byte and every scale, those that quantising would not yield too
    packed = torch.randint(0, 256, (N * K // 2, 1), dtype=torch.uint8, device=device)
    absmax = torch.randn(N * K // 64, device=device)
    records = to_records(packed, absmax, N, K, transposed)
    assert records.device == packed.device
    back = from_records(records, N, K, transposed)
    assert torch.equal(back[0], packed)
    assert torch.equal(back[1], absmax)
    assert all(t.is_contiguous() for t in back)
