"""Qwen2-72B's shape, random weights: the recipe needs 2 of 80 blocks and little memory."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tli_engine.cli import main
from tli_engine.testing import save_tiny_model

HIDDEN, INTERMEDIATE, VOCAB, KEY_VALUE = 8192, 29568, 152064, 1024
SHAPES = {
    "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.q_proj.bias": (HIDDEN,),
    "self_attn.k_proj.weight": (KEY_VALUE, HIDDEN),
    "self_attn.k_proj.bias": (KEY_VALUE,),
    "self_attn.v_proj.weight": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj.bias": (KEY_VALUE,),
    "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
}


def save_two_blocks_of_80(folder: Path) -> None:
    """A folder whose index names all 80 blocks and whose upper shards are not there."""
    save_tiny_model(folder, "qwen2")
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "vocab_size": VOCAB}
    config |= {"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
    config |= {"layer_types": ["full_attention"] * 80, "max_window_layers": 80, "dtype": "bfloat16"}
    config |= {"head_dim": 128}
    (folder / "config.json").write_text(json.dumps(config))

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        return (0.02 * torch.randn(shape, device="cuda")).bfloat16().cpu()

    weight_map = {}
    for block in range(80):
        norms = dict.fromkeys(("input_layernorm.weight", "post_attention_layernorm.weight"))
        names = [f"model.layers.{block}.{n}" for n in (*SHAPES, *norms)]
        weight_map |= dict.fromkeys(names, f"block-{block}.safetensors")
        if block < 2:
            tensors = {f"model.layers.{block}.{n}": random(s) for n, s in SHAPES.items()}
            ones = {f"model.layers.{block}.{n}": torch.ones(HIDDEN).bfloat16() for n in norms}
            save_file(tensors | ones, folder / f"block-{block}.safetensors")
    weight_map["model.embed_tokens.weight"] = "embeddings.safetensors"
    embeddings = {"model.embed_tokens.weight": random((VOCAB, HIDDEN))}
    save_file(embeddings, folder / "embeddings.safetensors")
    index = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)


@pytest.mark.gpu
def test_recipe_fits_in_6_gb(tmp_path: Path) -> None:
    save_two_blocks_of_80(tmp_path / "model")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run = tmp_path / "run"
    settings = [f"model={tmp_path / 'model'}", "words.prefix=auto"]
    options = [part for s in settings for part in ("--set", s)]

    assert main(["train", "--recipe", "qwen2-72b", "--run", str(run), *options]) == 0

    assert torch.cuda.max_memory_allocated() < 6e9
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["loss"] < steps[0]["loss"]
    print(f"peak {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB, last step {steps[-1]}")
    shutil.rmtree(tmp_path / "model")
