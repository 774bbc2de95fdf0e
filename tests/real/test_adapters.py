"""SmolLM2's weights: adapters to and from PEFT, base weights untouched, one seed one adapter."""

import hashlib
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from tli_engine.cli import main
from tli_engine.config import resolve_config
from tli_engine.models.adapters import adapter_tensors
from tli_engine.models.early import load_early
from tli_engine.models.peft_format import load_adapter
from tli_engine.train.loop import Trainer
from tli_engine.train.prepare import prepare

CPU = torch.device("cpu")


def train(folder: Path, *settings: str) -> Path:
    options = [part for s in settings for part in ("--set", s)]
    base = ["--recipe", "demo", "--set", "train.steps=3", "--set", "device=cpu"]
    base += ["--set", "data.limit=48", "--set", "train.batch_size=24"]
    assert main(["train", *base, "--run", str(folder), *options]) == 0
    return folder / "adapter"


def test_adapter_in_peft_gives_equal_hidden_states(smollm2: Any, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = train(tmp_path / "run")
    layer = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["align"]["layer"]
    base = AutoModelForCausalLM.from_pretrained(smollm2.folder, dtype=torch.float32)
    tokens = smollm2.tokenizer("Maji ni uhai, walisema wazee.", return_tensors="pt")
    with torch.no_grad():
        before = base(**tokens, output_hidden_states=True).hidden_states[layer]
        adapted = PeftModel.from_pretrained(base, adapter)
        expected = adapted(**tokens, output_hidden_states=True).hidden_states[layer][0]

        early = load_early(smollm2, layer, dtype=torch.float32, device=CPU)
        load_adapter(early, adapter)
        actual = early(_pack_of(tokens), layer)

    scale = expected.abs().max()
    assert (actual - expected).abs().max() / scale <= 1e-5
    # the adapter does something
    assert (expected - before[0]).abs().max() / scale > 1e-4


def _pack_of(tokens: Any) -> Any:
    from tli_engine.data.words import Word, pack

    ids = tuple(tokens["input_ids"][0].tolist())
    return pack([Word(ids, (True,) * len(ids))])


def test_one_seed_gives_one_adapter_and_leaves_the_base_alone(smollm2: Any, tmp_path: Path) -> None:
    runs = [train(tmp_path / name, "seed=5", "lora.dropout=0.1") for name in ("a", "b")]
    other = train(tmp_path / "c", "seed=6", "lora.dropout=0.1")

    digests = [
        hashlib.sha256((a / "adapter_model.safetensors").read_bytes()).hexdigest()
        for a in (*runs, other)
    ]
    assert digests[0] == digests[1] != digests[2]

    values = yaml.safe_load((tmp_path / "a/config.yaml").read_text())
    prepared = prepare(resolve_config(values, "a"), print)
    before = prepared.model.base_digest()
    assert before == values["provenance"]["base_sha256"]
    Trainer(prepared.model, prepared.config, prepared.splits[0], prepared.space).run()
    assert prepared.model.base_digest() == before
    stored = load_file(runs[0] / "adapter_model.safetensors")
    for name, tensor in adapter_tensors(prepared.model).items():
        assert torch.equal(tensor, stored[f"base_model.model.model.{name}"])
