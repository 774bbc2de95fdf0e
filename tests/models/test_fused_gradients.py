"""In bf16 gradients of fused blocks, q, k and v in one product, err no more than those of the modules."""

from collections.abc import Callable

import pytest
import torch

from tests.block_gradients import Trained, assert_gradients_err_no_more
from tli_engine.models.files import FAMILIES, ModelFiles

# widths of which every row of a weight is whole blocks of 64; weights that neither shrink nor blow up
# what is rounded on the way
SIZES = {
    "hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "initializer_range": 0.1,
}  # fmt: skip
MODELS = [
    *(pytest.param(family, {}, id=family) for family in FAMILIES),
    pytest.param("llama", {"attention_bias": True, "mlp_bias": True}, id="llama-biases"),
]


@pytest.mark.parametrize(
    ("trained", "quantize"), [("adapters", "none"), ("adapters", "nf4"), ("weights", "none")]
)
@pytest.mark.parametrize(("family", "overrides"), MODELS)
def test_gradients_err_no_more_than_the_modules(
    family: str,
    overrides: dict[str, bool],
    trained: Trained,
    quantize: str,
    tiny: Callable[..., ModelFiles],
) -> None:
    files = tiny(family, **SIZES, **overrides)
    assert_gradients_err_no_more(files, trained, quantize, device=torch.device("cpu"), factor=1.5)
