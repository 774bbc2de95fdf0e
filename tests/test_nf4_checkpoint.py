import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from tli_engine.errors import UserError
from tli_engine.nf4 import DTYPES, quantize
from tli_engine.nf4_checkpoint import from_state_dict, nf4_state_dict

NAME = "model.layers.0.mlp.up_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="session")
def bnb() -> Any:
    return pytest.importorskip("bitsandbytes.functional")


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=0, msg=name)


def bnb_state_dict(bnb: Any, weight: Tensor, **options: Any) -> tuple[dict[str, Tensor], Any]:
    """What bitsandbytes saves of a weight, and its quantisation state."""
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", **options)
    rest = {f"{NAME}.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {NAME: packed, **rest}, state


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_writes_what_bitsandbytes_writes(dtype: torch.dtype, block_size: int, bnb: Any) -> None:
    weight = (torch.randn(96, 130) * 0.02).to(dtype)
    expected, _ = bnb_state_dict(bnb, weight, blocksize=block_size)
    assert_same_tensors(nf4_state_dict(quantize(weight, block_size=block_size), NAME), expected)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_and_rewrites_what_bitsandbytes_writes(
    dtype: torch.dtype, double_quant: bool, bnb: Any
) -> None:
    tensors, state = bnb_state_dict(
        bnb, (torch.randn(300, 128) * 0.02).to(dtype), compress_statistics=double_quant
    )

    weight = from_state_dict(tensors, NAME)

    expected = bnb.dequantize_4bit(tensors[NAME], state)
    assert weight.dequantize().dtype == dtype
    torch.testing.assert_close(weight.dequantize(), expected, rtol=0, atol=0)
    assert_same_tensors(nf4_state_dict(weight, NAME), tensors)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_reads_bytes_stored_as_another_dtype(storage: torch.dtype, bnb: Any) -> None:
    weight = torch.randn(64, 128)
    tensors, _ = bnb_state_dict(bnb, weight, quant_storage=storage)
    assert tensors[NAME].dtype == storage
    assert_same_tensors(
        nf4_state_dict(from_state_dict(tensors, NAME), NAME),
        nf4_state_dict(quantize(weight), NAME),
    )


def test_known_state() -> None:
    """The JSON of bitsandbytes 0.50.2; stands where it is not installed."""
    weight = quantize(torch.ones(4, 64, dtype=torch.bfloat16), double_quant=True)
    tensors = nf4_state_dict(weight, NAME)
    assert list(tensors) == [
        NAME,
        f"{NAME}.absmax",
        f"{NAME}.quant_map",
        f"{NAME}.nested_absmax",
        f"{NAME}.nested_quant_map",
        STATE,
    ]
    assert bytes(tensors[STATE].tolist()).decode() == (
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 64], '
        '"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 1.0}'
    )


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(64, 128), (7, 129), (3, 4, 96), (100,)], ids=str)
def test_safetensors_round_trip(shape: tuple[int, ...], double_quant: bool, tmp_path: Path) -> None:
    weights = {
        name: quantize(torch.randn(shape), double_quant=double_quant) for name in ("a.w", "b.w")
    }
    tensors = {k: v for name, w in weights.items() for k, v in nf4_state_dict(w, name).items()}
    save_file(tensors, tmp_path / "model.safetensors")

    loaded = load_file(tmp_path / "model.safetensors")

    for name, weight in weights.items():
        again = from_state_dict(loaded, name)
        assert (again.shape, again.dtype, again.block_size) == (shape, torch.float32, 64)
        assert_same_tensors(nf4_state_dict(again, name), nf4_state_dict(weight, name))


def test_device_is_kept(device: torch.device) -> None:
    weight = quantize(torch.randn(8, 64, device=device), double_quant=True)
    tensors = nf4_state_dict(weight, NAME)
    assert {t.device for t in tensors.values()} == {weight.device}
    assert from_state_dict(tensors, NAME).dequantize().device == weight.device


def quantised_names(model: torch.nn.Module) -> list[str]:
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]


@pytest.fixture(scope="module")
def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        dtype="float32",
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("double_quant", [False, True])
def test_transformers_loads_what_is_written(
    double_quant: bool, llama: Any, bnb: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    tensors = dict(llama.state_dict())
    names = quantised_names(llama)
    weights = {name: quantize(tensors.pop(name), double_quant=double_quant) for name in names}
    for name, weight in weights.items():
        tensors |= nf4_state_dict(weight, name)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    quantization = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
    }
    config = llama.config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": quantization,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")

    dense = LlamaForCausalLM(llama.config)
    dense.load_state_dict(llama.state_dict())
    for name, weight in weights.items():
        parameter = loaded.get_parameter(name)
        assert torch.equal(parameter.data, weight.packed)
        dequantised = bnb.dequantize_4bit(parameter.data, parameter.quant_state)
        assert torch.equal(dequantised, weight.dequantize())
        dense.get_parameter(name).data = weight.dequantize()
    tokens = torch.randint(0, 96, (2, 9))
    # in eval mode bitsandbytes rounds absmax to bf16 on CPUs with AVX512-BF16
    with torch.no_grad():
        assert torch.equal(loaded.train()(tokens).logits, dense.train()(tokens).logits)


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_reads_what_transformers_writes(
    double_quant: bool, storage: str, llama: Any, bnb: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    llama.save_pretrained(tmp_path / "dense")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_storage=storage,
    )
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", device_map="cpu", dtype="bfloat16", quantization_config=quantization
    )
    quantised.save_pretrained(tmp_path / "nf4")

    tensors = load_file(tmp_path / "nf4" / "model.safetensors")

    for name in quantised_names(llama):
        weight = from_state_dict(tensors, name)
        assert weight.dtype == torch.bfloat16
        expected = quantize(llama.get_parameter(name).bfloat16(), double_quant=double_quant)
        assert torch.equal(weight.packed, expected.packed)
        if not double_quant:
            assert torch.equal(weight.absmax, expected.absmax)
        parameter = quantised.get_parameter(name)
        dequantised = bnb.dequantize_4bit(parameter.data, parameter.quant_state)
        assert torch.equal(weight.dequantize(), dequantised)


def valid(double_quant: bool = False) -> dict[str, Tensor]:
    weight = torch.linspace(-1, 2, 520).view(4, 130)
    return nf4_state_dict(quantize(weight, double_quant=double_quant), NAME)


def with_state(**changes: Any) -> Callable[[dict[str, Tensor]], None]:
    """Change keys of the JSON; a change to None takes the key away."""

    def change(tensors: dict[str, Tensor]) -> None:
        state = json.loads(bytes(tensors[STATE].tolist())) | changes
        text = json.dumps({key: value for key, value in state.items() if value is not None})
        tensors[STATE] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return change


def with_tensor(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def fp4(tensors: dict[str, Tensor]) -> None:
    tensors[f"{NAME}.quant_state.bitsandbytes__fp4"] = tensors.pop(STATE)


def poisoned(name: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors[name].__setitem__(0, value)


nan, inf = float("nan"), float("inf")
ERRORS = [  # double_quant, damage, message
    (False, fp4, f"{NAME}: is FP4; only NF4 is read"),
    (False, with_state(quant_type="fp4"), f"{STATE}: quant_type: input should be 'nf4'"),
    (False, with_state(quant_type="af4"), f"{STATE}: quant_type: input should be 'nf4'"),
    (False, without(NAME), f"{NAME}: missing"),
    (False, without(f"{NAME}.absmax"), f"{NAME}.absmax: missing"),
    (False, without(f"{NAME}.quant_map"), f"{NAME}.quant_map: missing"),
    (False, without(STATE), f"{STATE}: missing"),
    (True, without(f"{NAME}.nested_absmax"), f"{NAME}.nested_absmax: missing"),
    (True, without(f"{NAME}.nested_quant_map"), f"{NAME}.nested_quant_map: missing"),
    (False, with_tensor(NAME, torch.zeros(259, 1, dtype=torch.uint8)), f"{NAME}: must be 260 byt"),
    (False, with_tensor(NAME, torch.zeros(1, 260, dtype=torch.uint8)), f"{NAME}: must be 260 byt"),
    (False, with_tensor(NAME, torch.zeros(4, 130)), f"{NAME}: must be 260 bytes in one column"),
    (False, with_tensor(f"{NAME}.absmax", torch.ones(8)), r"absmax: must be torch.float32 [9]"),
    (False, with_tensor(f"{NAME}.absmax", torch.ones(9).half()), "got torch.float16 [9]"),
    (True, with_tensor(f"{NAME}.absmax", torch.ones(9)), "absmax: must be torch.uint8 [9]"),
    (True, with_tensor(f"{NAME}.nested_absmax", torch.ones(2)), "must be torch.float32 [1]"),
    (True, with_tensor(f"{NAME}.nested_quant_map", torch.ones(16)), "must be torch.float32 [256]"),
    (False, poisoned(f"{NAME}.absmax", nan), f"{NAME}.absmax: holds NaN or infinity"),
    (False, poisoned(f"{NAME}.absmax", inf), f"{NAME}.absmax: holds NaN or infinity"),
    (True, poisoned(f"{NAME}.nested_absmax", -inf), f"{NAME}.nested_absmax: holds NaN"),
    (True, poisoned(f"{NAME}.nested_quant_map", nan), f"{NAME}.nested_quant_map: holds NaN"),
    (True, with_state(nested_offset=nan), f"{STATE}: nested_offset: input should be a finite"),
    (True, with_state(nested_offset=1e39), f"{STATE}: nested_offset: input should be less"),
    (True, with_state(nested_offset=None), "nested_offset go together"),
    (True, with_state(nested_dtype="float16"), f"{STATE}: nested_dtype: input should be 'float32"),
    (True, with_state(nested_blocksize=0), f"{STATE}: nested_blocksize: input should be greater"),
    (False, poisoned(f"{NAME}.quant_map", -0.99), f"{NAME}.quant_map: not the 16 values of NF4"),
    (False, with_state(blocksize=96), f"{STATE}: blocksize: input should be 32, 64"),
    (False, with_state(blocksize=128), f"{NAME}.absmax: must be torch.float32 [5]"),
    (False, with_state(blocksize=None), f"{STATE}: blocksize: is required"),
    (False, with_state(dtype="float64"), f"{STATE}: dtype: input should be 'float32', 'float16'"),
    (False, with_state(shape=[4, 131]), f"{NAME}: must be 262 bytes in one column"),
    (False, with_state(shape=[-4, -130]), f"{STATE}: shape.0: input should be greater"),
    (False, with_state(shape=[]), f"{STATE}: shape: list should have at least 1"),
    (False, with_state(shape=[4, True]), f"{STATE}: shape.1: input should be a valid integer"),
    (False, with_state(shape=[10**30, 10**30]), f"{NAME}.absmax: must be torch.float32 ["),
    (False, with_state(extra=1), f"{STATE}: extra: extra inputs are not permitted"),
    (False, with_tensor(STATE, torch.tensor(list(b"{"), dtype=torch.uint8)), "is not JSON"),
    (False, with_tensor(STATE, torch.tensor([255, 0], dtype=torch.uint8)), "is not JSON"),
    (False, with_tensor(STATE, torch.zeros(0, dtype=torch.uint8)), "is not JSON"),
    (False, with_tensor(STATE, torch.zeros(4)), f"{STATE}: must be JSON in a torch.uint8 tensor"),
]


@pytest.mark.parametrize(("double_quant", "damage", "message"), ERRORS)
def test_damage_is_named(
    double_quant: bool, damage: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    tensors = valid(double_quant)
    damage(tensors)
    with pytest.raises(UserError) as e:
        from_state_dict(tensors, NAME)
    assert str(e.value).startswith(NAME)
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_absent_weight_is_named() -> None:
    with pytest.raises(UserError, match=r"^lm_head\.weight\..*: missing; not a weight that"):
        from_state_dict(valid() | {"lm_head.weight": torch.ones(4, 64)}, "lm_head.weight")


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_damaged_state_is_refused_or_read(data: st.DataObject) -> None:
    tensors = valid(data.draw(st.booleans()))
    state = tensors[STATE]
    for _ in range(data.draw(st.integers(1, 4))):
        state[data.draw(st.integers(0, state.numel() - 1))] = data.draw(st.integers(0, 255))
    try:
        # 519 and 520 elements take as many bytes and blocks
        assert from_state_dict(tensors, NAME).dequantize().numel() in (519, 520)
    except UserError as e:
        message = str(e)
    else:
        message = NAME
    assert message.startswith(NAME)
    assert "\n" not in message
