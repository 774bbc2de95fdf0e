"""Accelerated models on a GPU: against bitsandbytes and PEFT, lazy against eager, words from graphs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.second_gradients import second_gradients
from tli_engine import accelerate, restore
from tli_engine.integrations.lazy_model import settings_of
from tli_engine.integrations.memo import Memo
from tli_engine.integrations.replay import Captured
from tli_engine.integrations.training_graphs import TrainingGraphs
from tli_engine.integrations.weight_writes import watched
from tli_engine.testing import assert_within_error_budget, save_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")
SIZES = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}
Load = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama"), "llama", **SIZES)


@pytest.fixture
def load(folder: Path) -> Load:
    """A 4-bit model with LoRA on q and v, B not zero."""

    def find(*, double_quant: bool = False, dtype: torch.dtype = torch.bfloat16) -> Any:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, device_map={"": 0}, dtype=dtype
        )
        lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
        model = get_peft_model(model, lora)
        generator = torch.Generator("cuda").manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.05, generator=generator)
        return model.train()

    return find


@pytest.fixture
def tokens() -> dict[str, Tensor]:
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3], device="cuda")
    generator = torch.Generator("cuda").manual_seed(1)
    ids = torch.randint(0, 256, (2, 7), device="cuda", generator=generator)
    return {"input_ids": ids * mask + 258 * (1 - mask), "attention_mask": mask}


def run(model: Any, tokens: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    out = model(**tokens, labels=tokens["input_ids"])
    out.loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out.logits.detach(), found


@pytest.mark.parametrize("double_quant", [False, True], ids=["nf4", "double"])
def test_errs_no_more_than_bitsandbytes_and_peft(
    load: Load, tokens: dict[str, Tensor], double_quant: bool
) -> None:
    logits, gradients = run(load(double_quant=double_quant, dtype=torch.float32), tokens)
    model = load(double_quant=double_quant)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    places = {n: p.data_ptr() for n, p in model.named_parameters()}
    theirs, their_gradients = run(model, tokens)
    summary = accelerate(model)
    assert len(summary.replaced) == 36
    assert summary.repacked_nbytes > 0
    ours, our_gradients = run(model, tokens)
    assert_within_error_budget(ours, theirs, logits.double(), factor=3)
    for name, gradient in gradients.items():
        exact = gradient.double()
        assert_within_error_budget(our_gradients[name], their_gradients[name], exact, factor=3)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == places
    restore(model)
    again, _ = run(model, tokens)
    assert_within_error_budget(again, theirs, logits.double(), factor=1.1)


def test_gradients_of_gradients(load: Load, tokens: dict[str, Tensor]) -> None:
    theirs, ours = second_gradients(lambda: load(dtype=torch.float32), tokens)
    own = [name for name in theirs if "layers.0" in name]
    assert own
    for name in own:
        assert (ours[name] - theirs[name]).norm() < 1e-2 * theirs[name].norm()


def test_lazy_states_are_the_eager_ones(load: Load, tokens: dict[str, Tensor]) -> None:
    model = load()
    accelerate(model)
    eager = model(**tokens, output_hidden_states=True, use_cache=True)
    lazy = model(**tokens, output_hidden_states=True)
    for mine, theirs in zip(lazy.hidden_states, eager.hidden_states, strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(lazy.logits, eager.logits)


@torch.no_grad()
def test_states_may_be_written_to(load: Load, tokens: dict[str, Tensor]) -> None:
    model = load()
    accelerate(model)
    eager = model(**tokens, output_hidden_states=True, use_cache=True)
    lazy = model(**tokens, output_hidden_states=True)
    for k, theirs in enumerate(eager.hidden_states):
        assert torch.equal(lazy.hidden_states[k], theirs)
        lazy.hidden_states[k].zero_()
    assert torch.equal(lazy.logits, eager.logits)


def test_early_states_need_no_memory_for_the_rest(load: Load, tokens: dict[str, Tensor]) -> None:
    model = load()
    accelerate(model)

    def peak(read: int) -> int:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(**tokens, output_hidden_states=True).hidden_states[read].sum().backward()
        found = torch.cuda.max_memory_allocated() - before
        model.zero_grad(set_to_none=True)
        return found

    # the first pass takes what is never given back: cuBLAS' workspaces, 32 MiB for either way's thread,
    # and counters of the kernels, 4 MiB
    peak(1)
    assert peak(1) < peak(4)


def test_words_from_graphs_are_the_eager_ones(load: Load) -> None:
    model = load().eval()
    words = [
        {
            "input_ids": torch.tensor([[256, i, 8, 9]], device="cuda"),
            "attention_mask": torch.ones(1, 4, dtype=torch.int64, device="cuda"),
        }
        for i in range(8)
    ]
    accelerate(model)
    memo = Memo()
    settings = settings_of(model.get_base_model())
    assert settings is not None
    with torch.no_grad(), watched():
        expected = [model(**word, output_hidden_states=True, use_cache=True) for word in words]
        settings.memo = memo
        for k in range(5):
            for word, eager in zip(words, expected, strict=True):
                actual = model(**word, output_hidden_states=True).hidden_states[k]
                assert torch.equal(actual, eager.hidden_states[k])
        # one of each block, all words being of one length
        (replays,) = memo._replays.values()
        graphs = [graph for graph in replays._graphs.values() if isinstance(graph, Captured)]
        assert len(graphs) == len(replays._graphs) == 4
        # a changed adapter is seen
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        layer.lora_B["default"].weight.data.mul_(-3)
        changed = model(**words[0], output_hidden_states=True).hidden_states[2]
        eager = model(**words[0], output_hidden_states=True, use_cache=True).hidden_states[2]
        assert torch.equal(changed, eager)
        assert not torch.equal(changed, expected[0].hidden_states[2])


def train(model: Any, steps: int) -> list[dict[str, Tensor]]:
    """Losses and gradients of steps of two calls each, of lengths that come again in another order."""
    generator = torch.Generator().manual_seed(2)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    found = []
    for i in range(steps):
        states = []
        for length in (5 + i % 2, 5 + (i + i // 3) % 2):
            ids = torch.randint(0, 256, (4, length), generator=generator).cuda()
            mask = torch.ones_like(ids)
            mask[1:, length - 1 - i % 3 :] = 0
            out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
            states.append(out.hidden_states[2].float().mean(1))
        loss = (1 - torch.cosine_similarity(*states)).mean()
        optimizer.zero_grad()
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach(), **gradients})
        optimizer.step()
    return found


@pytest.mark.parametrize("double_quant", [False, True], ids=["nf4", "double"])
def test_training_from_graphs_is_that_of_launches(load: Load, double_quant: bool) -> None:
    model = load(double_quant=double_quant)
    accelerate(model)
    settings = settings_of(model.get_base_model())
    assert settings is not None
    start = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    # what two runs of launches differ by, if at all: where sums are added in the order in which they come
    runs = []
    for graphs in (None, None, TrainingGraphs()):
        with torch.no_grad():
            own = [p for p in model.parameters() if p.requires_grad]
            for parameter, value in zip(own, start, strict=True):
                parameter.copy_(value)
        settings.graphs = graphs
        runs.append(train(model, 12))
    launched, again, replayed = runs
    assert settings.counts["replayed"] >= 2 * 12
    assert not [name for name in settings.counts if name.startswith("launched")]
    for theirs, other, ours in zip(launched, again, replayed, strict=True):
        assert theirs.keys() == ours.keys()
        for name, value in theirs.items():
            spread = (value - other[name]).abs().max().item()
            assert (value - ours[name]).abs().max().item() <= 4 * spread, name


def test_compiles(load: Load, tokens: dict[str, Tensor]) -> None:
    model = load()
    accelerate(model)
    expected = model(**tokens).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**tokens).logits, expected, rtol=2e-2, atol=2e-2)
