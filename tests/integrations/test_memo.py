"""Words found again: values, what runs, and that nothing old is ever given."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.integrations.conftest import adapt
from tli_engine import accelerate
from tli_engine.errors import UserError
from tli_engine.integrations.lazy_model import settings_of
from tli_engine.integrations.memo import Memo
from tli_engine.integrations.replay import Replays
from tli_engine.integrations.weight_writes import watched, writes

Load = Callable[..., Any]
WORD = {
    "input_ids": torch.tensor([[256, 7, 8, 9]]),
    "attention_mask": torch.ones(1, 4, dtype=torch.int64),
    "token_type_ids": torch.zeros(1, 4, dtype=torch.int64),
}


def remember(model: Any, limit: int = 1 << 20) -> Memo:
    """Accelerate a model, with a memo as scripts have it."""
    accelerate(model)
    memo = Memo(limit)
    for module in model.modules():
        settings = settings_of(module)
        if settings is not None:
            settings.memo = memo
            settings.counts.clear()
    return memo


def counts(model: Any) -> dict[str, int]:
    settings = settings_of(model)
    assert settings is not None
    return dict(settings.counts)


@pytest.fixture(autouse=True)
def _watched() -> Iterator[None]:
    with watched():
        yield


@pytest.fixture
def model(load: Load) -> Any:
    return load(nf4=False).eval()


@torch.no_grad()
def states(model: Any, word: dict[str, Tensor] = WORD, **options: Any) -> Any:
    return model(**word, output_hidden_states=True, **options).hidden_states


@pytest.mark.parametrize("order", [range(5), range(4, -1, -1), [2, 2, 0, 4, 3, 1]])
@pytest.mark.parametrize("limit", [1 << 20, 1500])
def test_a_scan_layer_by_layer(model: Any, order: Any, limit: int) -> None:
    expected = states(model)
    words = [WORD, {n: t[:, :3] for n, t in WORD.items()}]
    others = states(model, words[1])
    remember(model, limit)
    for k in order:
        assert torch.equal(states(model)[k], expected[k])
        assert torch.equal(states(model, words[1])[k], others[k])
    if limit > 1500:
        assert counts(model)["blocks"] == 8
        assert counts(model)["words"] == 2 * (len(order) - 1)


def test_what_is_given_may_be_written_to(model: Any) -> None:
    expected = states(model)[2]
    remember(model)
    for _ in range(3):
        given = states(model)[2]
        assert torch.equal(given, expected)
        given.zero_()
    ids = WORD["input_ids"].clone()
    first = states(model, WORD | {"input_ids": ids})
    ids.fill_(3)
    assert torch.equal(first[2], expected)
    # and the word's next call still goes on from where it was
    assert torch.equal(states(model)[4], states(model, WORD | {"use_cache": True})[4])


def test_one_output_gives_one_tensor(model: Any) -> None:
    remember(model)
    found = states(model)
    assert found[2] is found[2]
    assert found[2] is found[-3]
    with torch.no_grad():
        out = model(**WORD, output_hidden_states=True)
        eager = model(**WORD)
    assert torch.equal(out.logits, eager.logits)


@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.mul_(2),
        lambda p: p.data.mul_(2),
        lambda p: setattr(p, "data", p * 2),
        lambda p: p.copy_(p * 2),
        lambda p: p.detach().mul_(2),
        lambda p: torch.utils.swap_tensors(p, nn.Parameter(p * 2)),
    ],
    ids=["in place", "data in place", "data", "copy", "detached", "swapped"],
)
def test_changed_weights_are_seen(model: Any, write: Callable[[nn.Parameter], object]) -> None:
    remember(model)
    before = states(model)[2]
    with torch.no_grad():
        write(model.model.layers[1].mlp.down_proj.weight)
    after = states(model)[2]
    assert not torch.equal(after, before)
    assert torch.equal(after, states(model, use_cache=True)[2])


def test_a_step_of_an_optimizer_is_seen(model: Any) -> None:
    remember(model)
    before = states(model)[2]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(**WORD, labels=WORD["input_ids"]).loss.backward()
    seen = writes()
    optimizer.step()
    assert writes() > seen
    assert not torch.equal(states(model)[2], before)


def test_a_changed_scaling_is_seen(load: Load) -> None:
    model = adapt(load(nf4=False)).eval()
    remember(model)
    before = states(model)[2]
    out = states(model)
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    layer.scale_layer(3.0)
    after = states(model)[2]
    assert not torch.equal(after, before)
    assert torch.equal(after, states(model, use_cache=True)[2])
    with pytest.raises(UserError, match="was not read before the model's weights changed"):
        out[3]


def test_another_attention_is_seen(model: Any) -> None:
    remember(model)
    found = []
    for implementation in ("sdpa", "eager", "sdpa"):
        model.set_attn_implementation(implementation)
        found.append(states(model)[3])
        assert torch.equal(found[-1], states(model, use_cache=True)[3])
    assert not torch.equal(found[0], found[1])
    unread = states(model, {"input_ids": WORD["input_ids"] + 1})
    model.set_attn_implementation("eager")
    with pytest.raises(UserError, match="attention was changed from sdpa to eager"):
        unread[2]


def test_replaced_modules_and_merged_adapters_are_seen(load: Load) -> None:
    model = adapt(load(nf4=False)).eval()
    base = model.get_base_model()
    remember(model)
    adapted = states(model)[2]
    with model.disable_adapter():
        bare = states(model)[2]
    assert not torch.equal(adapted, bare)
    assert torch.equal(states(model)[2], adapted)
    model.merge_adapter()
    merged = states(model)[2]
    assert torch.equal(merged, states(model, use_cache=True)[2])
    model.unmerge_adapter()
    whole = model.merge_and_unload()
    assert whole is base
    torch.testing.assert_close(states(whole)[2], merged)
    other = copy.deepcopy(whole.model.layers[1])
    other.self_attn.layer_idx = 0
    whole.model.layers[0] = other
    assert not torch.allclose(states(whole)[2], merged)
    assert torch.equal(states(whole)[2], states(whole, use_cache=True)[2])


def test_only_words_without_gradients_are_held(model: Any) -> None:
    memo = remember(model)
    model(**WORD, output_hidden_states=True).hidden_states[2].sum().backward()
    states(model, {"input_ids": WORD["input_ids"].repeat(2, 1)})[2]
    states(model, {"input_ids": WORD["input_ids"].repeat(1, 20)})[2]
    states(model, position_ids=torch.arange(4)[None])[2]
    model.train()
    states(model)[2]
    assert len(memo) == 0
    model.eval()
    states(model)[2]
    assert len(memo) == 1
    # padding, another mask's dtype and inference mode are calls of their own
    padded = WORD | {"attention_mask": torch.tensor([[1, 1, 1, 0]])}
    assert not torch.equal(states(model, padded)[2][:, 3], states(model)[2][:, 3])
    assert torch.equal(states(model, padded)[2], states(model, padded, use_cache=True)[2])
    with torch.inference_mode():
        inferred = model(**WORD, output_hidden_states=True).hidden_states[2]
    assert torch.equal(inferred, states(model)[2])
    assert not states(model)[2].is_inference()


def test_what_is_given_is_of_the_mode_of_its_call(model: Any) -> None:
    remember(model)
    first = states(model)
    with torch.inference_mode():
        assert not first[2].is_inference()
        second = model(**WORD, output_hidden_states=True).hidden_states
    # once served, once from memory
    assert second[2].is_inference()
    with torch.inference_mode():
        third = model(**WORD, output_hidden_states=True).hidden_states
    assert third[2].is_inference()
    scale = torch.ones((), requires_grad=True)
    (first[2] * scale).sum().backward()
    assert scale.grad is not None


def test_weights_of_inference_mode_are_not_remembered(model: Any) -> None:
    """Their writes are not counted."""
    with torch.inference_mode():
        layer = model.model.layers[1].mlp.down_proj
        layer.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
    memo = remember(model)
    eagerly = {"output_hidden_states": True, "use_cache": True}
    with torch.inference_mode():
        before = model(**WORD, output_hidden_states=True).hidden_states[3]
        layer.weight.mul_(2)
        after = model(**WORD, output_hidden_states=True).hidden_states[3]
        assert not torch.equal(after, before)
        assert torch.equal(after, model(**WORD, **eagerly).hidden_states[3])
    assert len(memo) == 0
    assert counts(model)["not remembered: it has weights or buffers of inference mode"] == 2


def test_memory_is_bounded(model: Any) -> None:
    # of 4 tokens a state takes 1024 bytes
    memo = remember(model, limit=4096)
    for first in range(20):
        ids = torch.tensor([[256, first, 8, 9]])
        assert torch.equal(
            states(model, {"input_ids": ids})[3], states(model, {"input_ids": ids})[3]
        )
    assert 1 <= len(memo) <= 4


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"])
def test_blocks_are_replayed_from_what_was_captured(
    load: Load, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for CUDA graphs: static input and output, and what is read at capture is kept."""
    captured = []

    class Fake:
        def __init__(self, run: Callable[[Tensor], Tensor], x: Tensor) -> None:
            self.x, self.run, self.y = x.clone(), run, run(x)
            captured.append(x.shape)

        def __call__(self, x: Tensor) -> Tensor:
            self.x.copy_(x)
            self.y.copy_(self.run(self.x))
            return self.y

    monkeypatch.setattr(Replays, "on", classmethod(lambda cls, device: cls(Fake)))
    model = adapt(load(family)).eval()
    words = [{"input_ids": torch.tensor([[256, i, 8, 9]])} for i in range(8)]
    accelerate(model)
    expected = [states(model, word) for word in words]
    expected = [[state.clone() for state in word] for word in expected]
    remember(model)
    for k in range(5):
        for word, theirs in zip(words, expected, strict=True):
            assert torch.equal(states(model, word)[k], theirs[k])
    # the first word notes how blocks are called, three run as they are, the fifth is captured
    assert captured == [(1, 4, 64)] * 4


def test_a_failed_capture_is_said_once() -> None:
    def fail(run: Any, x: Tensor) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    replays = Replays(fail)
    x = torch.ones(2)
    for _ in range(3):
        replays("key", torch.neg, x)
    with pytest.warns(UserWarning, match="no CUDA graphs of blocks: operation not permitted"):
        assert torch.equal(replays("key", torch.neg, x), -x)
    assert torch.equal(replays("key", torch.neg, x), -x)


def test_tensors_have_their_own_data_again() -> None:
    parameter = nn.Parameter(torch.ones(2))
    seen = writes()
    assert not parameter.data.requires_grad
    assert writes() == seen + 1
    with watched():
        assert torch.ones(2).data.shape == (2,)
    assert writes() == seen + 1
    assert parameter.data.shape == (2,)
    assert writes() == seen + 2
