"""What is read of a model one block at a time is what a whole one holds."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tli_engine.models.blockwise import Held, base_digest_of
from tli_engine.models.early import load_early
from tli_engine.models.files import open_model
from tli_engine.testing import save_tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("family", "depth", "tokens", "held"),
    [
        # block 10 comes before block 2 by name
        ("llama", 11, None, Held()),
        ("llama", 11, None, Held(torch.bfloat16, "nf4", double_quant=True)),
        ("llama", 3, {5, 9}, Held(quantize="nf4")),
        ("gemma3_text", 11, None, Held(torch.bfloat16)),
    ],
)
def test_the_digest_of_blocks_is_the_whole_models(
    family: str, depth: int, tokens: set[int] | None, held: Held, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"num_hidden_layers": 11}
    if family == "gemma3_text":
        options["layer_types"] = ["sliding_attention", "full_attention"] * 5 + ["full_attention"]
    files = open_model(str(save_tiny_model(tmp_path, family, **options)))
    whole = load_early(
        files,
        depth,
        dtype=held.dtype,
        device=CPU,
        quantize=held.quantize,
        double_quant=held.double_quant,
        token_ids=tokens,
    )
    found = base_digest_of(files, depth, held, device=CPU, token_ids=tokens)
    assert found == whole.base_digest()
    other = base_digest_of(files, depth - 1, held, device=CPU, token_ids=tokens)
    assert other != found
