"""Tiny models as users have them: transformers', quantised by bitsandbytes, with PEFT's adapters."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from tli_engine.testing import save_tiny_model

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")

Load = Callable[..., Any]
MODULES = ["q_proj", "v_proj"]
# what the oldest versions that docs/drop-in.md names do otherwise, and the tests that see it
_OLD = {
    ("transformers", "5", "it leaves a forward on blocks that it called, so they are launched"): (
        "test_every_weight_may_be_trained",
        "test_recordings_are_of_what_runs",
    ),
    ("transformers", "5", "its models launch other operations than those that are counted"): (
        "test_a_replayed_step_asks_for_few_operations",
    ),
    ("transformers", "5", "in training an eager Gemma 3 has no key past_key_values"): (
        "test_values_are_the_eager_ones_bit_for_bit[train-dense-gemma3_text]",
        "test_values_are_the_eager_ones_bit_for_bit[train-nf4-gemma3_text]",
    ),
    ("bitsandbytes", "0.47", "its layers note a dtype at their first call"): (
        "test_a_weight_written_to_before_the_way_back_is_an_error",
        "test_inputs_are_given_up_with_what_was_saved",
        "test_calls_in_use_keep_their_recordings",
        "test_statistics_of_4bit_weights_are_seen",
    ),
    ("bitsandbytes", "0.47", "on a CPU it has no DoRA over 4 bits, and no fp4"): (
        "test_nf4_equals_bitsandbytes_and_peft[dora-",
        "test_a_changed_weight_is_still_one",
        "test_layers_that_stay_as_they_are_are_named",
    ),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what an old version of a library cannot do."""
    for (library, since, reason), names in _OLD.items():
        if Version(version(library)) >= Version(since):
            continue
        for item in items:
            if item.path.parent == Path(__file__).parent and item.name.startswith(names):
                item.add_marker(pytest.mark.skip(f"{library} before {since}: {reason}"))


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For all tests here."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a tiny model; not to be written to."""
    made: dict[str, Path] = {}

    def find(family: str = "llama", **overrides: Any) -> Path:
        key = f"{family} {sorted(overrides.items())}"
        if key not in made:
            sizes = {"hidden_size": 64, "intermediate_size": 128} | overrides
            made[key] = save_tiny_model(tmp_path_factory.mktemp(family), family, **sizes)
        return made[key]

    return find


@pytest.fixture
def load(folder: Callable[..., Path]) -> Load:
    """Load a tiny model in bitsandbytes' NF4, or dense, new at each call; train mode."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    def find(
        family: str = "llama",
        *,
        nf4: bool = True,
        double_quant: bool = False,
        dtype: torch.dtype = torch.float32,
        auto: Any = AutoModelForCausalLM,
        quant_type: str = "nf4",
        **overrides: Any,
    ) -> Any:
        options: dict[str, Any] = {"dtype": dtype}
        if nf4:
            options["device_map"] = {"": "cpu"}
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=quant_type,
                bnb_4bit_use_double_quant=double_quant,
                bnb_4bit_compute_dtype=dtype,
            )
        # bitsandbytes infers in bf16 on some CPUs, whatever dtype it is told; it trains in its own
        return auto.from_pretrained(folder(family, **overrides), **options).train()

    return find


def adapt(model: Any, name: str = "default", seed: int = 0, **options: Any) -> Any:
    """Put LoRA on a model, or one more adapter on an adapted one; B is not zero."""
    from peft import LoraConfig, PeftModel, get_peft_model

    lora = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": MODULES, "lora_dropout": 0.0} | options
    )
    if isinstance(model, PeftModel):
        model.add_adapter(name, lora)
    else:
        model = get_peft_model(model, lora, adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if f"lora_B.{name}." in path or f"lora_A.{name}." in path:
                parameter.normal_(0, 0.1, generator=generator)
    return model.train()


@pytest.fixture
def tokens() -> dict[str, Tensor]:
    """Three texts, the second and third padded on the right."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 2 + [0] * 5])
    ids = torch.randint(0, 256, (3, 7), generator=generator)
    return {"input_ids": ids * mask + 258 * (1 - mask), "attention_mask": mask}


def gradients(model: Any) -> dict[str, Tensor]:
    """Every parameter's gradient, and none left behind."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_close(actual: Any, expected: Any, tolerance: float = 2e-5) -> None:
    """Equal up to the order of fp32 sums."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
