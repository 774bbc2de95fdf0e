"""NF4 on the CPU: quantised while loading, or read from a checkpoint of bitsandbytes."""

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tli_engine import nf4
from tli_engine.config import LoraConfig
from tli_engine.data.words import pack
from tli_engine.models.adapters import adapter_tensors, add_lora
from tli_engine.models.early import EarlyModel, load_early
from tli_engine.models.files import FAMILIES, ModelFiles, open_model
from tli_engine.models.sources import SafetensorsSource
from tli_engine.nf4 import NF4Weight
from tli_engine.nf4_checkpoint import nf4_state_dict
from tli_engine.nn import NF4Linear
from tli_engine.testing import random_words

Tiny = Callable[..., ModelFiles]
SINGLE = "model.safetensors"
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
# with biases, which stay as they are
MODELS = [*((family, {}) for family in FAMILIES), ("llama", {"attention_bias": True})]


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


def projections(tensors: dict[str, Tensor]) -> list[str]:
    return [name for name in tensors if name.endswith("_proj.weight")]


def dequantised(
    folder: Path, out: Path, double_quant: bool = False, dtype: torch.dtype = torch.float32
) -> Path:
    """The dense model that holds what NF4 makes of the weights."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in projections(tensors):
            quantised = nf4.quantize(tensors[name].to(dtype), double_quant=double_quant)
            tensors[name] = quantised.dequantize()

    return rewrite(folder, out, change)


def bnb_checkpoint(
    folder: Path, out: Path, double_quant: bool = False, dtype: torch.dtype = torch.float32
) -> Path:
    """The model as bitsandbytes would save it, written by this package."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in projections(tensors):
            weight = nf4.quantize(tensors.pop(name).to(dtype), double_quant=double_quant)
            tensors |= nf4_state_dict(weight, name)

    return rewrite(folder, out, change, quantization_config=NF4)


# with AVX-512, bitsandbytes 0.50 misreads rows that are not whole blocks
WHOLE_BLOCKS = {"hidden_size": 64, "intermediate_size": 128}


def states(model: EarlyModel, count: int = 1) -> list[Tensor]:
    with torch.no_grad():
        return [h for _, h in model.hidden_states(pack(random_words(count, 9)))]


def nf4_linears(model: EarlyModel) -> dict[str, NF4Linear]:
    return {n: m for n, m in model.decoder.named_modules() if isinstance(m, NF4Linear)}


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for k, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert (a - e).abs().max().item() == 0.0, k


def assert_same_bytes(actual: NF4Weight, expected: NF4Weight) -> None:
    """All that is kept of a weight, shape, dtype and block size included."""
    a, e = (nf4_state_dict(weight, "weight") for weight in (actual, expected))
    assert a.keys() == e.keys()
    assert all(torch.equal(a[name], tensor) for name, tensor in e.items())


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double-quant"])
@pytest.mark.parametrize(("family", "overrides"), MODELS)
def test_hidden_states_are_those_of_the_dequantised_weights(
    family: str, overrides: dict[str, Any], double_quant: bool, tiny: Tiny, tmp_path: Path
) -> None:
    folder = tiny(family, **overrides).folder
    model = load(folder, quantize="nf4", double_quant=double_quant)
    dense = load(dequantised(folder, tmp_path / "dense", double_quant))
    assert len(nf4_linears(model)) == 4 * 7
    assert nf4_linears(dense) == {}
    assert_equal(states(model), states(dense))
    for a, e in zip(states(model, 5), states(dense, 5), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
    # quantising is seen
    assert (states(model)[1] - states(load(folder))[1]).abs().max() > 1e-3


def test_in_bf16_the_bf16_weights_are_quantised(tiny: Tiny, tmp_path: Path) -> None:
    folder, dtype = tiny("llama").folder, torch.bfloat16
    model = load(folder, dtype=dtype, quantize="nf4")
    dense = load(dequantised(folder, tmp_path / "dense", dtype=dtype), dtype=dtype)
    assert {m.weight.dtype for m in nf4_linears(model).values()} == {dtype}
    assert_equal(states(model), states(dense))


@pytest.mark.parametrize(("family", "overrides"), MODELS)
def test_embeddings_norms_and_biases_stay_as_they_are(
    family: str, overrides: dict[str, Any], tiny: Tiny
) -> None:
    folder = tiny(family, **overrides).folder
    model, dense = load(folder, quantize="nf4"), load(folder)
    adopted = nf4_linears(model)
    linear = {n for n, m in dense.decoder.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(adopted) == linear
    kept = {n: p for n, p in dense.state_dict().items() if not n.endswith("_proj.weight")}
    assert {n.rpartition(".")[2] for n in kept} >= {"weight"}
    assert model.state_dict().keys() == kept.keys()
    for name, tensor in kept.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    biases = [n for n in kept if n.endswith(".bias")]
    assert bool(biases) == (family == "qwen2" or bool(overrides))


def test_nothing_is_quantised_unless_asked_for(tiny: Tiny) -> None:
    folder = tiny("llama").folder
    expected = load(folder).state_dict()
    for quantize in ("auto", "none"):
        model = load(folder, quantize=quantize)
        assert nf4_linears(model) == {}
        assert all(torch.equal(model.state_dict()[n], t) for n, t in expected.items())


@pytest.mark.parametrize("dtype", nf4.DTYPES, ids=str)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double-quant"])
def test_a_checkpoint_keeps_its_bytes(
    double_quant: bool, dtype: torch.dtype, tiny: Tiny, tmp_path: Path
) -> None:
    dense = tiny("qwen2").folder
    folder = bnb_checkpoint(dense, tmp_path / "nf4", double_quant, dtype)
    stored = {
        name: nf4.quantize(tensor.to(dtype), double_quant=double_quant)
        for name, tensor in load_file(dense / SINGLE).items()
        if name.endswith("_proj.weight")
    }
    # asked for NF4 or not, of one kind or the other: what is NF4 is not quantised again
    for options in ({}, {"quantize": "nf4"}, {"quantize": "nf4", "double_quant": True}):
        adopted = nf4_linears(load(folder, **options))
        assert {f"model.{name}.weight" for name in adopted} == set(stored)
        for name, module in adopted.items():
            assert_same_bytes(module.weight, stored[f"model.{name}.weight"])


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double-quant"])
def test_none_dequantises_a_checkpoint(double_quant: bool, tiny: Tiny, tmp_path: Path) -> None:
    folder = bnb_checkpoint(tiny("llama").folder, tmp_path / "nf4", double_quant)
    dense = dequantised(tiny("llama").folder, tmp_path / "dense", double_quant)
    actual, expected = load(folder, quantize="none"), load(dense)
    assert nf4_linears(actual) == {}
    assert actual.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(actual.state_dict()[name], tensor), name
    assert_equal(states(load(folder)), states(expected))


def test_modules_that_a_checkpoint_left_out_stay_dense(tiny: Tiny, tmp_path: Path) -> None:
    skipped = "model.layers.1.mlp.down_proj.weight"
    original = load_file(tiny("llama").folder / SINGLE)[skipped]

    def restore(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.startswith(skipped)]:
            del tensors[name]
        tensors[skipped] = original

    whole = bnb_checkpoint(tiny("llama").folder, tmp_path / "nf4")
    folder = rewrite(whole, tmp_path / "partly", restore)
    kept = load(folder).decoder.get_submodule("layers.1.mlp.down_proj")
    assert torch.equal(kept.weight, original)
    # asked for NF4, it is quantised as it is read
    asked = load(folder, quantize="nf4").decoder.get_submodule("layers.1.mlp.down_proj")
    assert_same_bytes(asked.weight, nf4.quantize(original))


def test_the_parts_of_a_weight_may_lie_in_several_shards(tiny: Tiny, tmp_path: Path) -> None:
    folder = bnb_checkpoint(tiny("llama").folder, tmp_path / "nf4", double_quant=True)
    expected = nf4_linears(load(folder))
    tensors = load_file(folder / SINGLE)
    shards: dict[str, dict[str, Tensor]] = {}
    weight_map = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        weight_map[name] = f"model-0000{i % 3 + 1}-of-00003.safetensors"
        shards.setdefault(weight_map[name], {})[name] = tensor
    for file, part in shards.items():
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / SINGLE).unlink()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{SINGLE}.index.json").write_text(json.dumps(index))
    for name, module in nf4_linears(load(folder)).items():
        assert_same_bytes(module.weight, expected[name].weight)


@pytest.fixture(scope="session", params=[False, True], ids=["plain", "double-quant"])
def saved_by_bnb(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny: Tiny
) -> Path:
    """A folder that transformers saved of a model that bitsandbytes quantised."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=request.param,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        tiny("qwen2", **WHOLE_BLOCKS).folder, quantization_config=config, dtype=torch.float32
    )
    folder = tmp_path_factory.mktemp("bnb")
    model.save_pretrained(folder)
    return folder


def bnb_weights(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """What bitsandbytes itself makes of a folder: by module, packed bytes and the dense weight."""
    functional = pytest.importorskip("bitsandbytes.functional")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = {}
    for name, module in model.model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            dense = functional.dequantize_4bit(module.weight.data, state)
            found[name] = (module.weight.data, dense)
    return found


def assert_same_weights(model: EarlyModel, theirs: dict[str, tuple[Tensor, Tensor]]) -> None:
    ours = nf4_linears(model)
    assert set(ours) == set(theirs)
    assert len(ours) == 4 * 7
    for name, (packed, dense) in theirs.items():
        assert torch.equal(ours[name].weight.packed, packed), name
        assert torch.equal(ours[name].weight.dequantize(), dense), name


def test_reads_what_transformers_and_bitsandbytes_saved(saved_by_bnb: Path, tmp_path: Path) -> None:
    theirs = bnb_weights(saved_by_bnb)
    model = load(saved_by_bnb)
    assert_same_weights(model, theirs)

    def decode(tensors: dict[str, Tensor]) -> None:
        for name, (_, dense) in theirs.items():
            for part in [n for n in tensors if n.startswith(f"model.{name}.weight")]:
                del tensors[part]
            tensors[f"model.{name}.weight"] = dense

    folder = rewrite(saved_by_bnb, tmp_path / "dense", decode, quantization_config=None)
    assert_equal(states(model), states(load(folder)))
    # and with transformers' own run of the dense weights
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    (word,) = random_words(1, 9)
    with torch.no_grad():
        output = reference(torch.tensor([word.input_ids]), output_hidden_states=True)
    assert_equal(states(model), [h[0] for h in output.hidden_states])


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double-quant"])
def test_transformers_and_bitsandbytes_read_what_is_written_here(
    double_quant: bool, tiny: Tiny, tmp_path: Path
) -> None:
    folder = bnb_checkpoint(tiny("qwen2", **WHOLE_BLOCKS).folder, tmp_path / "nf4", double_quant)
    assert_same_weights(load(folder), bnb_weights(folder))


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double-quant"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_has_the_gradients_of_the_dequantised_model(
    family: str, double_quant: bool, tiny: Tiny, tmp_path: Path
) -> None:
    folder, layer = tiny(family).folder, 3
    modules = ("q_proj", "v_proj", "o_proj", "down_proj")
    models = (
        load(folder, layer, quantize="nf4", double_quant=double_quant),
        load(dequantised(folder, tmp_path / "dense", double_quant), layer),
    )
    words = pack(random_words(6, 12))
    torch.manual_seed(1)
    target = torch.randn(len(words.input_ids), models[0].config.hidden_size)
    for model in models:
        add_lora(model, LoraConfig(layers="0-1", modules=modules, r=4, alpha=8), layer, seed=1)
        generator = torch.Generator().manual_seed(2)
        for tensor in adapter_tensors(model).values():
            # B is zero at first, and then A has no gradient
            tensor.data += 0.05 * torch.randn(tensor.shape, generator=generator)
        (model(words, layer) * target).sum().backward()
    actual, expected = (adapter_tensors(model) for model in models)
    assert len(actual) == 2 * 2 * len(modules)
    for name, tensor in expected.items():
        assert tensor.grad is not None
        assert actual[name].grad is not None
        scale = tensor.grad.abs().max()
        assert scale > 0, name
        assert (actual[name].grad - tensor.grad).abs().max() <= 1e-5 * scale, name
    assert not any(p.requires_grad for n, p in models[0].named_parameters() if ".lora_" not in n)


def test_lora_learns_on_nf4(tiny: Tiny) -> None:
    model = load(tiny("llama").folder, 2, quantize="nf4")
    packed = {n: m.weight.packed.clone() for n, m in nf4_linears(model).items()}
    add_lora(model, LoraConfig(r=4, alpha=8), 2, seed=0)
    words = pack(random_words(4, 6))
    target = torch.randn(len(words.input_ids), model.config.hidden_size)
    optimizer = torch.optim.Adam(adapter_tensors(model).values(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(words, 2) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    kept = {n.replace(".base_layer", ""): m.weight.packed for n, m in nf4_linears(model).items()}
    assert all(torch.equal(kept[name], tensor) for name, tensor in packed.items())


def test_memory_while_loading_is_the_result_and_one_tensor(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight read in full is given up before the next is read, in either dtype."""
    folder = tiny("llama").folder
    original = SafetensorsSource.read
    live: dict[str, int] = {}
    most: list[int] = []

    def tracked(source: SafetensorsSource, name: str) -> Tensor:
        if name.endswith("_proj.weight"):
            most.append(len(live))
        # memory of its own, where a memory-mapped file would lend the same to all
        tensor = original(source, name).clone()
        if name.endswith("_proj.weight"):
            live[name] = tensor.nbytes
            weakref.finalize(tensor.untyped_storage(), live.pop, name)
        return tensor

    monkeypatch.setattr(SafetensorsSource, "read", tracked)
    for dtype in (torch.float32, torch.bfloat16):
        most.clear()
        model = load(folder, dtype=dtype, quantize="nf4")
        assert most == [0] * 28
        assert live == {}
        held = sum(m.weight.nbytes for m in nf4_linears(model).values())
        assert held < 0.15 * 4 * sum(
            m.in_features * m.out_features for m in nf4_linears(model).values()
        )
    # the test can fail: as they are, all are held
    model = load(folder)
    assert len(live) == 28
