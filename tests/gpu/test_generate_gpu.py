"""Steps on a GPU: replayed from a CUDA graph as run one by one, and as whole texts are read."""

from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tli_engine.config import LoraConfig
from tli_engine.data.words import Word, pack
from tli_engine.models.adapters import adapter_tensors, add_lora
from tli_engine.models.causal import CausalModel, load_causal
from tli_engine.models.decoder import Decoder
from tli_engine.models.files import open_model
from tli_engine.models.generate import GenerateOptions, generate
from tli_engine.testing import save_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda")
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"]
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SIZES = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}
WINDOWS: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": 96}}
WINDOWS["gemma3_text"] = WINDOWS["mistral"]
# past the window, on the way past it, one token
LENGTHS = (200, 90, 96, 1, 130)
STEPS = 12
Load = Callable[..., CausalModel]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def find(family: str) -> Path:
        if family not in made:
            options = SIZES | {"max_position_embeddings": 512} | WINDOWS.get(family, {})
            made[family] = save_tiny_model(tmp_path_factory.mktemp(family), family, **options)
        return made[family]

    return find


@pytest.fixture
def load(folders: Callable[[str], Path]) -> Load:
    def whole(family: str, dtype: torch.dtype, quantize: Any = "none") -> CausalModel:
        files = open_model(str(folders(family)))
        model = load_causal(files, dtype=dtype, device=CUDA, quantize=quantize)
        add_lora(model.early, LoraConfig(layers="0-2", modules=ALL, r=8), 4, seed=0)
        generator = torch.Generator().manual_seed(1)
        for name, tensor in adapter_tensors(model.early).items():
            if ".lora_B." in name:
                tensor.data.copy_(0.05 * torch.randn(tensor.shape, generator=generator))
        return model

    return whole


def some_prompts(*lengths: int, seed: int = 0) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(0, 256, (n,), generator=generator).tolist()) for n in lengths]


def run(decoder: Decoder, prompts: Sequence[tuple[int, ...]], new: Tensor) -> Tensor:
    """Logits after each of some given tokens, ``[rows, steps + 1, V]``."""
    logits = [decoder.begin(prompts, new.shape[1])]
    logits += [decoder.step(tokens).clone() for tokens in new.unbind(1)]
    return torch.stack(logits, 1)


def read(model: CausalModel, prompts: Sequence[tuple[int, ...]], new: Tensor) -> Tensor:
    """The same, by reading whole texts."""
    rows = []
    for prompt, tokens in zip(prompts, new.tolist(), strict=True):
        ids = (*prompt, *tokens)
        with torch.no_grad():
            hidden = model.hidden_states(pack([Word(ids, (True,) * len(ids))]).to(CUDA))
            rows.append((hidden[len(prompt) - 1 :] @ model.head.T).float())
    return torch.stack(rows)


def assert_near(actual: Tensor, expected: Tensor, share: float) -> None:
    error = ((actual - expected).norm() / expected.norm()).item()
    assert error <= share, f"{error:.2e} of the norm, over {share:.0e}"


@pytest.mark.parametrize("fused", [False, True], ids=["modules", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_what_reading_gives(family: str, fused: bool, load: Load) -> None:
    model = load(family, torch.float32)
    if fused:
        model.fuse()
    graph, eager = Decoder(model), Decoder(model, cuda_graph=False)
    # the second batch goes through the first one's graph and memory
    for seed in (0, 1):
        prompts = some_prompts(*LENGTHS, seed=seed)
        new = torch.randint(0, 256, (len(prompts), STEPS), device=CUDA)
        expected = read(model, prompts, new)
        assert_near(run(eager, prompts, new), expected, 2e-3)
        assert_near(run(graph, prompts, new), expected, 2e-3)
    assert len(graph._steps) == 1
    assert not eager._steps


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_steps_in_bf16(family: str, quantize: str, load: Load) -> None:
    model = load(family, torch.bfloat16, quantize)
    model.fuse()
    prompts = some_prompts(*LENGTHS)
    new = torch.randint(0, 256, (len(prompts), STEPS), device=CUDA)
    expected = read(model, prompts, new)
    assert_near(run(Decoder(model, cuda_graph=False), prompts, new), expected, 5e-2)
    assert_near(run(Decoder(model), prompts, new), expected, 5e-2)


def test_a_replayed_step_waits_for_nothing(load: Load) -> None:
    model = load("gemma3_text", torch.bfloat16, "nf4")
    model.fuse()
    decoder, tokens = Decoder(model), torch.tensor([1, 2], device=CUDA)
    decoder.begin(some_prompts(30, 5), 4)
    decoder.step(tokens)
    torch.cuda.set_sync_debug_mode("error")
    try:
        decoder.step(tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "how",
    [{}, {"beams": 3}, {"temperature": 0.8, "top_p": 0.9}],
    ids=["greedy", "beams", "sampling"],
)
def test_the_same_texts_come_again(how: Any, load: Load) -> None:
    model = load("llama", torch.bfloat16, "nf4")
    model.fuse()
    prompts = some_prompts(*LENGTHS)
    free = generate(model, prompts, GenerateOptions(STEPS, (257,), batch_size=2, **how))
    end, other = (free[i].tokens[STEPS // 2] for i in (0, 1))
    options = GenerateOptions(STEPS, (end, other), batch_size=2, **how)
    found = generate(model, prompts, options)
    assert found == generate(model, prompts, options)
    assert not any({end, other} & {*text.tokens} for text in found)
    if "beams" not in how:
        # cut at the first end of either kind, and no longer
        for text, whole in zip(found[:2], free[:2], strict=True):
            assert text.ended
            cut = takewhile(lambda token: token not in (end, other), whole.tokens)
            assert text.tokens == tuple(cut)
