"""Layers and models that are left as they are, and why; what is refused, and with which words."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.conftest import adapt
from tli_engine import accelerate, restore
from tli_engine.errors import UserError
from tli_engine.integrations import bnb_layers, lora_bnb_layers, lora_layers

Load = Callable[..., Any]


def test_wrong_input_of_a_layer_is_named(load: Load) -> None:
    model = load()
    accelerate(model)
    layer = model.model.layers[0].mlp.up_proj
    assert type(layer) is bnb_layers.Linear4bit
    with pytest.raises(ValueError, match=r"x must be \[..., 64\]"):
        layer(torch.randn(3, 65))
    assert layer(torch.randn(0, 64)).shape == (0, 128)
    assert layer(torch.randn(2, 3, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_layers_that_stay_as_they_are_are_named(load: Load) -> None:
    import bitsandbytes as bnb

    class Mine(bnb.nn.Linear4bit):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    model = load()
    model.model.layers[0].mlp.up_proj.__class__ = Mine
    hooked = model.model.layers[0].mlp.down_proj
    hooked.forward = hooked.forward
    late = bnb.nn.Linear4bit(64, 64, quant_type="nf4")
    model.model.layers[0].self_attn.o_proj = late
    summary = accelerate(model)
    mlp = "model.layers.0.mlp"
    assert summary.kept[f"{mlp}.up_proj"] == "Mine is a subclass with a forward of its own"
    assert summary.kept[f"{mlp}.down_proj"] == "its forward was replaced by another library"
    assert "not quantised yet" in summary.kept["model.layers.0.self_attn.o_proj"]
    assert len(summary.replaced) == 25
    assert "up_proj" in str(summary)
    fp4 = load(quant_type="fp4")
    summary = accelerate(fp4)
    assert set(summary.kept.values()) == {"holds fp4 data; the kernels read nf4"}
    assert summary.replaced == {}


def test_blocks_that_no_kernel_reads(load: Load) -> None:
    model = load()
    layer = model.model.layers[0].mlp.up_proj
    layer.weight.quant_state.blocksize = 48
    damaged = model.model.layers[1].mlp.up_proj.weight.quant_state
    damaged.absmax = damaged.absmax[:-1].clone()
    kept = accelerate(model).kept
    assert "blocks of 48" in kept["model.layers.0.mlp.up_proj"]
    # 64 x 128 weights in blocks of 64
    assert "must be 128 contiguous" in kept["model.layers.1.mlp.up_proj"]


def test_a_layer_packed_for_a_cpu_stays(load: Load, tokens: dict[str, Tensor]) -> None:
    """bitsandbytes packs weights anew when it infers on some CPUs, and does not get all of it back."""
    model = load(dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model.eval()(**tokens).logits
        kept = accelerate(model).kept
        actual = model(**tokens).logits
    layer = model.model.layers[0].mlp.up_proj
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU has no kernels that weights are packed for")
    assert torch.equal(actual, expected)
    assert len(kept) == 28
    assert "accelerate a model before it infers" in kept["model.layers.0.mlp.up_proj"]


def test_an_accelerated_layer_is_never_packed(load: Load, tokens: dict[str, Tensor]) -> None:
    model = load(dtype=torch.bfloat16).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    accelerate(model)
    with torch.no_grad():
        model(**tokens)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_wrong_use() -> None:
    from transformers import AutoModelForCausalLM

    from tli_engine.testing import tiny_config

    with pytest.raises(UserError, match="takes a model, got str"):
        accelerate("model")
    with pytest.raises(UserError, match="takes a model, got str"):
        restore("model")
    with torch.device("meta"):
        on_meta = AutoModelForCausalLM.from_config(tiny_config("llama"))
    with pytest.raises(UserError, match="is on the meta device"):
        accelerate(on_meta)
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    with torch.device("meta"):
        rotary = type(model.model.rotary_emb)(model.config)
    whole, model.model.rotary_emb = model.model.rotary_emb, rotary
    with pytest.raises(UserError, match=r"^model\.rotary_emb\.inv_freq is on the meta device"):
        accelerate(model)
    model.model.rotary_emb = whole
    with pytest.raises(UserError, match="not accelerated"):
        restore(model)
    accelerate(model)
    restore(model)
    with pytest.raises(UserError, match="not accelerated"):
        restore(model)


def test_an_offloaded_model_is_refused(load: Load, tokens: dict[str, Tensor]) -> None:
    from accelerate import cpu_offload

    model = load(nf4=False)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"offloaded by accelerate's hooks"):
        accelerate(model)


@pytest.mark.parametrize("stop_at", ["2", 2.0, True])
def test_stop_at_is_a_whole_number(load: Load, stop_at: Any) -> None:
    model = load(nf4=False)
    with pytest.raises(UserError, match=f"number of a hidden state, such as 2; got {stop_at!r}"):
        accelerate(model, stop_at=stop_at)
    with pytest.raises(UserError, match="not accelerated"):
        restore(model)


def test_a_limit_holds_and_is_said(load: Load, tokens: dict[str, Tensor]) -> None:
    model = load()
    limit = "lazy hidden states: the model, none above hidden_states[2] (stop_at, until restored)"
    assert limit in str(accelerate(model, stop_at=2))
    # as adapters that come later are taken in
    summary = accelerate(model)
    assert limit in str(summary)
    assert summary.limits == {"": 2}
    assert len(summary.replaced) == 14
    assert set(summary.kept.values()) == {"above stop_at=2"}
    out = model(**tokens, output_hidden_states=True)
    with pytest.raises(UserError, match=r"hidden_states\[3\] lies above stop_at=2"):
        out.hidden_states[3]
    assert accelerate(model, stop_at=3).limits == {"": 3}
    restore(model)
    summary = accelerate(model)
    assert summary.limits == {}
    assert "lazy hidden states: the model\n" in f"{summary}\n"
    assert model(**tokens, output_hidden_states=True).hidden_states[3].shape == (3, 7, 64)


def test_stop_at_leaves_the_blocks_above(load: Load) -> None:
    model = adapt(load())
    summary = accelerate(model, stop_at=2)
    assert len(summary.replaced) == 18
    assert set(summary.kept.values()) == {"above stop_at=2"}
    assert type(model.base_model.model.model.layers[2].self_attn.q_proj) not in (
        lora_bnb_layers.Linear4bit,
        lora_layers.Linear,
    )
