"""What is quantised otherwise, damaged or missing is refused by its name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tli_engine import nf4
from tli_engine.data.words import pack
from tli_engine.errors import UserError
from tli_engine.models.early import EarlyModel, load_early
from tli_engine.models.files import ModelFiles, open_model
from tli_engine.nf4_checkpoint import nf4_state_dict
from tli_engine.nn import NF4Linear
from tli_engine.testing import random_words, save_tiny_model

Tiny = Callable[..., ModelFiles]
SINGLE = "model.safetensors"
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
NF4 = BNB | {"bnb_4bit_quant_type": "nf4"}


def load(
    folder: Path, depth: int = 4, dtype: torch.dtype = torch.float32, **options: Any
) -> EarlyModel:
    files = open_model(str(folder))
    return load_early(files, depth, dtype=dtype, device=torch.device("cpu"), **options)


def rewrite(
    folder: Path, out: Path, change: Callable[[dict[str, Tensor]], None], **config: Any
) -> Path:
    """A copy of a model folder with other tensors, and another configuration if need be."""
    shutil.copytree(folder, out)
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, out / SINGLE, metadata={"format": "pt"})
    values = json.loads((out / "config.json").read_text()) | config
    (out / "config.json").write_text(json.dumps(values))
    return out


def bnb_checkpoint(folder: Path, out: Path) -> Path:
    """The model as bitsandbytes would save it."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("_proj.weight")]:
            tensors |= nf4_state_dict(nf4.quantize(tensors.pop(name)), name)

    return rewrite(folder, out, change, quantization_config=NF4)


REFUSED = [
    pytest.param({"quant_method": "gptq", "bits": 4}, "gptq", id="gptq"),
    pytest.param({"quant_method": "awq", "bits": 4}, "awq", id="awq"),
    pytest.param({"quant_method": "fp8"}, "fp8", id="fp8"),
    pytest.param({"quant_method": "compressed-tensors"}, "compressed-tensors", id="compressed"),
    pytest.param({"bits": 4}, "None", id="nameless"),
    pytest.param(BNB | {"bnb_4bit_quant_type": "fp4"}, "bitsandbytes fp4", id="fp4"),
    pytest.param(BNB, "bitsandbytes", id="4-bit-of-no-type"),
    pytest.param(
        # transformers writes the 4-bit type, its default, beside 8-bit weights too
        BNB | {"load_in_4bit": False, "load_in_8bit": True, "bnb_4bit_quant_type": "fp4"},
        "bitsandbytes int8",
        id="int8",
    ),
]


@pytest.mark.parametrize(("stored", "kind"), REFUSED)
def test_another_quantisation_is_refused_by_its_name(
    stored: dict[str, Any], kind: str, tiny: Tiny, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny("llama").folder, tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": stored}))
    expected = (
        f"{folder}: is quantised by {kind}; only full-precision and bitsandbytes NF4 "
        f"checkpoints are read"
    )
    with pytest.raises(UserError) as caught:
        open_model(str(folder))
    assert str(caught.value) == expected


def multimodal(folder: Path, out: Path, quantization: dict[str, Any] | None) -> Path:
    """As Gemma 3 with images: the text model is a part, and quantisation is noted beside it."""

    def respell(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[f"model.language_model.{name.removeprefix('model.')}"] = tensors.pop(name)

    rewrite(folder, out, respell)
    text = json.loads((out / "config.json").read_text())
    text.pop("quantization_config", None)
    values = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}
    values |= {"text_config": text}
    values |= {} if quantization is None else {"quantization_config": quantization}
    (out / "config.json").write_text(json.dumps(values))
    return out


def test_quantisation_of_a_multimodal_model(tiny: Tiny, tmp_path: Path) -> None:
    dense = tiny("gemma3_text").folder
    stored = bnb_checkpoint(dense, tmp_path / "stored")
    expected = load(stored)
    folder = multimodal(stored, tmp_path / "multimodal", NF4)
    words = pack(random_words(1, 9))
    with torch.no_grad():
        assert torch.equal(load(folder)(words, 4), expected(words, 4))
    assert sum(isinstance(m, NF4Linear) for m in load(folder).modules()) == 28
    for name, quantization in (("gptq", {"quant_method": "gptq"}), ("fp4", BNB)):
        refused = multimodal(dense, tmp_path / name, quantization)
        with pytest.raises(UserError, match=r"is quantised by (gptq|bitsandbytes)"):
            open_model(str(refused))


def test_fp4_tensors_are_refused_whatever_the_config_says(tiny: Tiny, tmp_path: Path) -> None:
    def mislabel(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("bitsandbytes__nf4")]:
            tensors[name.replace("nf4", "fp4")] = tensors.pop(name)

    folder = rewrite(
        bnb_checkpoint(tiny("llama").folder, tmp_path / "nf4"), tmp_path / "m", mislabel
    )
    with pytest.raises(UserError, match=r"q_proj\.weight: is FP4; only NF4 is read"):
        load(folder)


@pytest.mark.parametrize("quantize", ["auto", "none", "nf4"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
def test_weights_that_are_not_plain_numbers_are_refused(
    dtype: torch.dtype, quantize: str, tiny: Tiny, tmp_path: Path
) -> None:
    """Codes of a quantisation that the config does not mention must not pass for weights."""
    name = "layers.1.mlp.up_proj.weight"

    def quantise(tensors: dict[str, Tensor]) -> None:
        tensors[f"model.{name}"] = (tensors[f"model.{name}"] * 10).to(dtype)

    folder = rewrite(tiny("llama").folder, tmp_path / "model", quantise)
    with pytest.raises(UserError, match=r"up_proj\.weight is stored as torch") as caught:
        load(folder, quantize=quantize)
    assert str(caught.value).startswith(f"{folder}: ")
    load(folder, 1)


def test_a_damaged_weight_of_a_checkpoint_is_named(tiny: Tiny, tmp_path: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight.absmax"]

    whole = bnb_checkpoint(tiny("llama").folder, tmp_path / "nf4")
    folder = rewrite(whole, tmp_path / "model", damage)
    load(folder, 1)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight\.absmax: missing"):
        load(folder)


def test_a_weight_of_another_shape_is_named(tiny: Tiny, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def reshape(tensors: dict[str, Tensor]) -> None:
        for part in [n for n in tensors if n.startswith(name)]:
            del tensors[part]
        tensors |= nf4_state_dict(nf4.quantize(torch.randn(48, 31)), name)

    whole = bnb_checkpoint(tiny("llama").folder, tmp_path / "nf4")
    folder = rewrite(whole, tmp_path / "model", reshape)
    for quantize in ("auto", "none", "nf4"):
        with pytest.raises(UserError, match=r"up_proj\.weight is \[48, 31\], its config says"):
            load(folder, quantize=quantize)


def test_upper_shards_need_not_be_there_for_nf4(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", "llama", max_shard_size=40_000)
    index = json.loads((folder / f"{SINGLE}.index.json").read_text())["weight_map"]
    lower = {
        f
        for n, f in index.items()
        if n.startswith(("model.embed", "model.layers.0.", "model.layers.1."))
    }
    missing = sorted(set(index.values()) - lower)
    for file in missing:
        (folder / file).unlink()
    model = load(folder, 2, quantize="nf4")
    assert sum(isinstance(m, NF4Linear) for m in model.modules()) == 14
    with pytest.raises(UserError, match=f"({'|'.join(missing)}) is missing; download this shard"):
        load(folder, 4, quantize="nf4")
