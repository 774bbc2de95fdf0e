"""A base is recognised wherever its weights are quantised: a run of a GPU is exported on a CPU."""

from pathlib import Path

import pytest
import torch

from tli_engine.models.blockwise import Held, base_digest_of
from tli_engine.models.early import load_early
from tli_engine.models.files import open_model
from tli_engine.testing import save_tiny_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_digests_of_either_device_are_equal(
    quantize: str, double_quant: bool, tmp_path: Path
) -> None:
    files = open_model(
        str(save_tiny_model(tmp_path, "llama", hidden_size=512, intermediate_size=1408))
    )
    depth = files.config.num_hidden_layers
    held = Held(torch.bfloat16, quantize, double_quant)  # type: ignore[arg-type]
    whole = load_early(
        files,
        depth,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
        quantize=quantize,  # type: ignore[arg-type]
        double_quant=double_quant,
    )
    for device in ("cpu", "cuda"):
        found = base_digest_of(files, depth, held, device=torch.device(device))
        assert found == whole.base_digest(), device
