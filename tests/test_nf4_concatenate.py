import pytest
import torch

from tli_engine.nf4 import concatenate, quantize


@pytest.mark.parametrize("double_quant", [False, True])
def test_concatenated_weights_hold_the_same_values(double_quant: bool) -> None:
    parts = [quantize(torch.randn(n, 96), double_quant=double_quant) for n in (4, 2, 6)]
    whole = concatenate(parts)
    assert whole.shape == (12, 96)
    assert torch.equal(whole.dequantize(), torch.cat([p.dequantize() for p in parts]))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        pytest.param([], "weights must not be empty", id="none"),
        pytest.param([(2, 64), (2, 128)], "must share all but their first size", id="widths"),
        pytest.param(
            [(1, 96), (2, 96)], r"a multiple of the block size 64, got \[1, 96\]", id="block"
        ),
    ],
)
def test_weights_that_do_not_fit_together_are_refused(
    shapes: list[tuple[int, int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        concatenate([quantize(torch.randn(shape)) for shape in shapes])
