"""Adapters travel to PEFT and back unchanged, and what cannot be understood is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tli_engine.config import LoraConfig
from tli_engine.data.words import Word, pack
from tli_engine.errors import UserError
from tli_engine.models.adapters import adapter_tensors, adapters, add_lora
from tli_engine.models.early import EarlyModel
from tli_engine.models.files import FAMILIES
from tli_engine.models.peft_format import load_adapter, save_adapter
from tli_engine.testing import random_words

Early = Callable[..., EarlyModel]
Full = Callable[..., Any]
WORDS = random_words(4, 9, seed=5)
PREFIX = "base_model.model.model."
Q0 = "layers.0.self_attn.q_proj"


def theirs(model: Any, words: list[Word], layer: int) -> Tensor:
    with torch.no_grad():
        states = [
            model(torch.tensor([w.input_ids]), output_hidden_states=True).hidden_states[layer][0]
            for w in words
        ]
    return torch.cat(states)


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def randomise(tensors: dict[str, Any]) -> None:
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.copy_(0.2 * torch.randn(tensor.shape))


def save(model: EarlyModel, folder: Path, lora: LoraConfig) -> Path:
    save_adapter(model, folder, lora, "someone/base", "a card")
    return folder


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_saved_here_is_the_same_in_peft(
    family: str, rslora: bool, early: Early, full: Full, tmp_path: Path
) -> None:
    from peft import PeftModel

    lora = LoraConfig(
        layers="0,2", modules=("q_proj", "v_proj", "up_proj"), r=4, alpha=6, rslora=rslora
    )
    model = early(family, 3)
    add_lora(model, lora, 3, seed=0)
    randomise(adapter_tensors(model))
    save(model, tmp_path / "adapter", lora)

    base = full(family)
    before = theirs(base, WORDS, 3)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    expected = theirs(adapted, WORDS, 3)
    with torch.no_grad():
        actual = model(pack(WORDS), 3)
    assert relative(actual, expected) <= 1e-5
    assert relative(before, expected) > 1e-2
    # nothing else was adapted there, which B = 0 would hide
    assert sum("lora_A" in n for n, _ in adapted.named_parameters()) == len(adapters(model))


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_made_by_peft_is_the_same_here(
    family: str, rslora: bool, early: Early, full: Full, tmp_path: Path
) -> None:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    config = PeftConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], use_rslora=rslora, lora_dropout=0.1
    )
    adapted = get_peft_model(full(family), config).eval()
    randomise({n: p for n, p in adapted.named_parameters() if "lora_" in n})
    adapted.save_pretrained(tmp_path)

    for depth in (2, 4):
        model = early(family, depth)
        loaded = load_adapter(model, tmp_path)
        assert len(loaded.adapted) == 2 * depth
        assert len(loaded.above) == 2 * (4 - depth)
        assert not set(loaded.adapted) & set(loaded.above)
        with torch.no_grad():
            for layer in range(depth + 1):
                expected = theirs(adapted, WORDS, layer)
                assert relative(model(pack(WORDS), layer), expected) <= 1e-5


@pytest.fixture
def adapter(early: Early, tmp_path: Path) -> Path:
    """An adapter on both blocks of a tiny llama, to be spoilt."""
    lora = LoraConfig(layers="0-1", r=4, alpha=6)
    model = early("llama", 2)
    add_lora(model, lora, 2, seed=0)
    randomise(adapter_tensors(model))
    return save(model, tmp_path / "adapter", lora)


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_saving_and_loading_returns_the_same_bits(
    adapter: Path, early: Early, tmp_path: Path
) -> None:
    model = early("llama", 2)
    loaded = load_adapter(model, adapter)
    assert loaded.above == []
    save(model, tmp_path / "again", LoraConfig(layers="0-1", r=4, alpha=6))
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (adapter / name).read_bytes()
    assert (adapter / "README.md").read_text() == "a card"


def test_what_is_recorded_is_what_the_adapters_are(
    adapter: Path, early: Early, tmp_path: Path
) -> None:
    """Training that goes on from an adapter keeps that one's rank and alpha, whatever was asked."""
    model = early("llama", 2)
    load_adapter(model, adapter)
    asked = LoraConfig(layers="0", modules=("up_proj",), r=16, alpha=32, rslora=True)
    save(model, tmp_path / "on", asked)
    config = json.loads((tmp_path / "on" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 6, False)
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["layers_to_transform"] == [0, 1]
    assert config["base_model_name_or_path"] == "someone/base"


def test_a_bf16_adapter_is_read_as_fp32(adapter: Path, early: Early) -> None:
    change_tensors(adapter, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    model = early("llama", 2)
    load_adapter(model, adapter)
    assert {t.dtype for t in adapter_tensors(model).values()} == {torch.float32}


@pytest.mark.parametrize("prefix", [PREFIX, "base_model.model.", "model.", ""])
def test_tensors_may_be_spelt_as_from_the_bare_decoder(
    prefix: str, adapter: Path, early: Early
) -> None:
    def respell(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[prefix + name.removeprefix(PREFIX)] = tensors.pop(name)

    change_tensors(adapter, respell)
    assert len(load_adapter(early("llama", 2), adapter).adapted) == 4


def test_dropout_is_the_callers(adapter: Path, early: Early) -> None:
    model = early("llama", 2)
    load_adapter(model, adapter, dropout=0.25)
    assert {m.dropout.p for m in adapters(model).values()} == {0.25}
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; only LORA is understood"),
        ({"use_dora": True}, "use_dora = True is not understood; only plain LoRA is"),
        ({"bias": "all"}, "bias = 'all' is not understood"),
        ({"bias": "lora_only"}, "bias = 'lora_only' is not understood"),
        ({"lora_bias": True}, "lora_bias = True is not understood"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\] is not"),
        ({"rank_pattern": {"q_proj": 8}}, r"rank_pattern = {'q_proj': 8} is not understood"),
        ({"alpha_pattern": {"q_proj": 8}}, r"alpha_pattern = {'q_proj': 8} is not"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = True is not understood"),
        ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens = \[1, 2\] is not"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices = \[3\] is not"),
        ({"layer_replication": [[0, 2]]}, "layer_replication = .* is not understood"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not understood"),
        ({"lora_alpha": None}, "lora_alpha is None; must be a positive number"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'; must be a positive number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan; must be a positive number"),
        ({"r": 0}, "r is 0; must be a positive number"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_kind_that_is_not_plain_lora_is_refused(
    values: dict[str, Any], message: str, adapter: Path, early: Early
) -> None:
    change_config(adapter, **values)
    model = early("llama", 2)
    with pytest.raises(UserError, match=message) as caught:
        load_adapter(model, adapter)
    assert "\n" not in str(caught.value)
    assert str(adapter) in str(caught.value)
    assert not adapters(model)


def test_refused_options_are_those_that_peft_has(full: Full) -> None:
    """A renamed option would be a check that never fires."""
    from peft import LoraConfig as PeftConfig

    from tli_engine.models.peft_format import _PLAIN

    assert _PLAIN.keys() <= PeftConfig.__dataclass_fields__.keys()
    plain = PeftConfig(r=4, target_modules=["q_proj"]).to_dict()
    assert [k for k, values in _PLAIN.items() if plain[k] not in values] == []


SPOILT: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no-B": (
        lambda t: t.pop(f"{PREFIX}{Q0}.lora_B.weight"),
        f"{Q0} has lora_A without its other half",
    ),
    "no-A": (
        lambda t: t.pop(f"{PREFIX}{Q0}.lora_A.weight"),
        f"{Q0} has lora_B without its other half",
    ),
    "nan": (
        lambda t: t[f"{PREFIX}{Q0}.lora_A.weight"].__setitem__((1, 2), torch.nan),
        f"{PREFIX}{Q0}.lora_A.weight holds NaN or inf; the adapter is damaged",
    ),
    "inf": (
        lambda t: t[f"{PREFIX}{Q0}.lora_B.weight"].__setitem__((0, 0), -torch.inf),
        f"{PREFIX}{Q0}.lora_B.weight holds NaN or inf",
    ),
    "wider-model": (
        lambda t: t.update({f"{PREFIX}{Q0}.lora_A.weight": torch.zeros(4, 64)}),
        f"{Q0} has lora_A and lora_B of [[4, 64], [32, 4]], this model needs [[4, 32], [32, 4]]; "
        f"is it the right base model?",
    ),
    "other-rank": (
        lambda t: t.update({f"{PREFIX}{Q0}.lora_B.weight": torch.zeros(32, 5)}),
        f"{Q0} has lora_A and lora_B of [[4, 32], [32, 5]]",
    ),
    "not-a-matrix": (
        lambda t: t.update({f"{PREFIX}{Q0}.lora_A.weight": torch.zeros(4)}),
        f"{Q0} has lora_A and lora_B of [[4], [32, 4]]",
    ),
    "no-such-module": (
        lambda t: t.update(
            {f"{PREFIX}layers.0.attn.query.lora_{h}.weight": torch.zeros(4, 4) for h in "AB"}
        ),
        "adapts layers.0.attn.query, which is no linear layer of this model",
    ),
    "not-linear": (
        lambda t: t.update(
            {f"{PREFIX}layers.0.self_attn.lora_{h}.weight": torch.zeros(4, 4) for h in "AB"}
        ),
        "adapts layers.0.self_attn, which is no linear layer",
    ),
    "more-blocks": (
        lambda t: t.update(
            {f"{PREFIX}layers.31.self_attn.q_proj.lora_{h}.weight": torch.zeros(4, 4) for h in "AB"}
        ),
        "adapts layers.31.self_attn.q_proj, which is no linear layer of this model",
    ),
    "head": (
        lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)}),
        "base_model.model.lm_head.lora_A.weight is not a LoRA tensor of a decoder block",
    ),
    "dora": (
        lambda t: t.update({f"{PREFIX}{Q0}.lora_magnitude_vector.weight": torch.zeros(32)}),
        "lora_magnitude_vector.weight is not a LoRA tensor",
    ),
    "empty": (
        dict.clear,
        "adapts nothing below block 2, all that is built here; its lowest is none",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_tensors_that_do_not_fit_are_refused(case: str, adapter: Path, early: Early) -> None:
    change, message = SPOILT[case]
    change_tensors(adapter, change)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_adapter(early("llama", 2), adapter)
    assert "\n" not in str(caught.value)


def test_the_rank_in_the_config_must_be_that_of_the_tensors(adapter: Path, early: Early) -> None:
    """The scaling alpha / r hangs on it; PEFT refuses this too."""
    change_config(adapter, r=8)
    with pytest.raises(UserError, match=r"needs \[\[8, 32\], \[32, 8\]\]"):
        load_adapter(early("llama", 2), adapter)


def test_an_adapter_of_another_model_is_refused(adapter: Path, early: Early) -> None:
    with pytest.raises(UserError, match="is it the right base model"):
        load_adapter(early("llama", 2, hidden_size=64), adapter)


def test_an_adapter_above_the_blocks_that_are_built_is_named(early: Early, tmp_path: Path) -> None:
    lora = LoraConfig(layers="1-2", r=4)
    model = early("llama", 3)
    add_lora(model, lora, 3, seed=0)
    save(model, tmp_path, lora)
    message = "adapts nothing below block 1, .* its lowest is layers.1.self_attn.q_proj"
    with pytest.raises(UserError, match=message):
        load_adapter(early("llama", 1), tmp_path)
    assert [n.split(".")[1] for n in load_adapter(early("llama", 2), tmp_path).above] == ["2", "2"]


def test_the_lowest_block_is_found_by_number(early: Early, tmp_path: Path) -> None:
    lora = LoraConfig(layers="9-10", r=4)
    model = early("llama", 11, num_hidden_layers=12)
    add_lora(model, lora, 11, seed=0)
    save(model, tmp_path, lora)
    with pytest.raises(UserError, match=r"its lowest is layers\.9\."):
        load_adapter(early("llama", 1, num_hidden_layers=12), tmp_path)


def spoil_files(folder: Path, case: str) -> None:
    config, tensors = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    match case:
        case "pickled":
            tensors.rename(folder / "adapter_model.bin")
        case "no-tensors":
            tensors.unlink()
        case "truncated":
            tensors.write_bytes(tensors.read_bytes()[:-100])
        case "no-config":
            config.unlink()
        case "not-json":
            config.write_text("{")
        case "list":
            config.write_text("[1]")
        case "not-utf-8":
            config.write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("pickled", "only a pickled adapter_model.bin, which is never read"),
        ("no-tensors", "adapter_model.safetensors: cannot be read"),
        ("truncated", "adapter_model.safetensors: cannot be read"),
        ("no-config", "no adapter_config.json; not a PEFT adapter"),
        ("not-json", "adapter_config.json: not JSON"),
        ("list", r"adapter_config.json: peft_type is \[1\]; only LORA is understood"),
        ("not-utf-8", "adapter_config.json: not JSON"),
    ],
)
def test_files_that_are_missing_or_broken_are_named(
    case: str, message: str, adapter: Path, early: Early
) -> None:
    spoil_files(adapter, case)
    with pytest.raises(UserError, match=message) as caught:
        load_adapter(early("llama", 2), adapter)
    assert "\n" not in str(caught.value)
