"""What else than weights a result depends on: changed, nothing old is given, and nothing unread is mixed."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from tests.integrations.conftest import adapt
from tests.integrations.fake_graphs import counts as graph_counts
from tests.integrations.fake_graphs import read, recorded
from tests.integrations.test_memo import WORD, counts, remember, states
from tli_engine.errors import UserError
from tli_engine.integrations.held_state import HeldState
from tli_engine.integrations.weight_writes import watched

Load = Callable[..., Any]
Patch = pytest.MonkeyPatch
_AGAIN = {"input_ids": WORD["input_ids"].clone()}


@pytest.fixture(autouse=True)
def _watched() -> Iterator[None]:
    with watched():
        yield


def _block(model: Any) -> Any:
    return model.model.layers[1]


def _knock_out(module: Any) -> None:
    theirs = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = theirs(*args, **kwargs)
        return (out[0] * 0, *out[1:]) if isinstance(out, tuple) else out * 0

    module.forward = forward


def _patch_class(patch: Patch, owner: Any, name: str) -> None:
    theirs = getattr(owner, name)
    patch.setattr(owner, name, lambda *a, **k: theirs(*a, **k) * 0.5)


def _rotate_otherwise(model: Any) -> None:
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq * 0.5


def _attend_otherwise(patch: Patch) -> None:
    theirs = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(*args: Any, **kwargs: Any) -> Any:
        out, others = theirs(*args, **kwargs)
        return out * 0.5, others

    patch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", attend)


# of a family, and whether a hidden state that was not read yet depends on it
CHANGES: dict[str, tuple[str, bool, Callable[[Any, Patch], object]]] = {
    "block": ("llama", True, lambda m, p: _knock_out(_block(m))),
    "attention": ("llama", True, lambda m, p: _knock_out(_block(m).self_attn)),
    "mlp": ("llama", True, lambda m, p: _knock_out(_block(m).mlp)),
    "projection": ("llama", True, lambda m, p: _knock_out(_block(m).mlp.up_proj)),
    "class": ("llama", True, lambda m, p: _patch_class(p, modeling_llama.LlamaMLP, "forward")),
    "call": ("llama", True, lambda m, p: _patch_class(p, modeling_llama.LlamaMLP, "__call__")),
    "method": ("llama", True, lambda m, p: _patch_class(p, modeling_llama.LlamaRMSNorm, "forward")),
    "linear": ("llama", True, lambda m, p: _patch_class(p, nn.Linear, "forward")),
    "function": ("llama", True, lambda m, p: _patch_class(p, modeling_llama, "rotate_half")),
    "attention function": ("llama", True, lambda m, p: _attend_otherwise(p)),
    "written frequencies": ("llama", False, lambda m, p: m.model.rotary_emb.inv_freq.mul_(0.5)),
    "their data": ("llama", False, lambda m, p: m.model.rotary_emb.inv_freq.data.mul_(0.5)),
    "other frequencies": ("llama", False, lambda m, p: _rotate_otherwise(m)),
    "scaling": ("llama", True, lambda m, p: setattr(_block(m).self_attn, "scaling", 0.01)),
    "epsilon": ("qwen3", True, lambda m, p: setattr(_block(m).input_layernorm, _EPSILON, 10.0)),
    "embeddings": ("gemma3_text", True, lambda m, p: m.model.embed_tokens.embed_scale.mul_(0.5)),
    "window": ("mistral", True, lambda m, p: setattr(m.config, "sliding_window", 2)),
}
_EPSILON = "variance_epsilon"


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_at_the_next_call(
    load: Load, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, _, make = CHANGES[change]
    model = load(family, nf4=False).eval()
    remember(model)
    before = states(model)[3]
    assert torch.equal(states(model)[3], before)
    assert counts(model)["blocks"] == 3
    make(model, monkeypatch)
    after = states(model)[3]
    assert not torch.equal(after, before)
    assert torch.equal(after, states(model, use_cache=True)[3])
    assert torch.equal(states(model)[3], after)


@pytest.mark.parametrize("remembers", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_read_is_of_the_call(
    load: Load, change: str, remembers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or refused: never some blocks of before and some of after."""
    family, is_refused, make = CHANGES[change]
    model = load(family, nf4=False).eval()
    expected = states(model)[3]
    memo = remember(model)
    if not remembers:
        memo.find = lambda call: None  # type: ignore[method-assign]
    unread, partly = states(model), states(model, _AGAIN)
    first = partly[3]
    make(model, monkeypatch)
    if is_refused:
        with pytest.raises(UserError, match=r"hidden_states\[3\] was not read before .* changed"):
            unread[3]
    else:
        assert torch.equal(unread[3], expected)
    # what was computed is there
    assert torch.equal(partly[3], first)


def test_the_change_is_named(load: Load) -> None:
    model = load(nf4=False).eval()
    remember(model)
    for change, named in [
        (lambda: setattr(_block(model).self_attn, "scaling", 0.01), "LlamaAttention's scaling"),
        (lambda: setattr(model.config, "rope_theta", 7.0), "the configuration's rope_theta"),
        (lambda: setattr(_block(model).mlp, "note", 1), "LlamaMLP's note"),
        (lambda: _knock_out(_block(model).mlp), "LlamaMLP's forward"),
    ]:
        unread = states(model)
        change()
        with pytest.raises(UserError, match=rf"was not read before {named} was changed; hidden"):
            unread[2]


def test_what_is_above_or_undone_is_no_change(load: Load) -> None:
    model = load(nf4=False).eval()
    expected = states(model)
    remember(model)
    unread = states(model)
    _knock_out(_block(model).mlp)
    hook = model.model.layers[2].register_forward_hook(lambda *a: None)
    assert torch.equal(unread[1], expected[1])
    hook.remove()
    states(model)[3]
    del _block(model).mlp.forward
    assert torch.equal(unread[3], expected[3])
    # an equal number is the same
    _block(model).self_attn.scaling = float(str(_block(model).self_attn.scaling))
    model.config.use_cache = False
    assert torch.equal(unread[4], expected[4])


def test_a_hook_that_was_not_there_is_a_change(load: Load) -> None:
    model = load(nf4=False).eval()
    remember(model)
    unread = states(model)
    _block(model).mlp.register_forward_hook(lambda m, a, out: out * 0)
    assert unread[1].shape == (1, 4, 64)
    with pytest.raises(UserError, match="was not read before a hook was changed"):
        unread[2]


def test_statistics_of_4bit_weights_are_seen(load: Load) -> None:
    for double_quant in (False, True):
        model = load(double_quant=double_quant).eval()
        remember(model)
        for write in (
            lambda state: state.absmax.fill_(1),
            lambda state: setattr(state, "absmax", state.absmax.clone().fill_(2)),
        ):
            before, unread = states(model)[3], states(model, _AGAIN)
            write(model.model.layers[1].mlp.up_proj.weight.quant_state)
            assert not torch.equal(states(model)[3], before)
            with pytest.raises(UserError, match="a weight's statistics"):
                unread[3]


def test_what_models_note_as_they_run_is_no_change(load: Load) -> None:
    """Of 4-bit layers their first input's dtype, of rotary embeddings the longest text."""
    model = load(dtype=torch.float32).eval()
    for layer in model.modules():
        if hasattr(layer, "compute_type_is_set"):
            layer.compute_type_is_set = False
    remember(model)
    first, second = states(model), states(model, _AGAIN)
    first[3]
    second[4]
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = load(nf4=False, rope_parameters=scaled, max_position_embeddings=8).eval()
    model.config.max_position_embeddings = 8
    remember(model)
    ids = torch.arange(100)[None]
    expected = states(model, {"input_ids": ids}, use_cache=True)[3]
    model.model.rotary_emb.max_seq_len_cached = 8
    assert torch.equal(states(model, {"input_ids": ids})[3], expected)


def test_a_look_is_cheap(load: Load) -> None:
    """As a scan calls the model once a word and layer."""
    model = adapt(load(nf4=False, num_hidden_layers=32)).eval()
    held = HeldState([*model.modules()])
    times = []
    for _ in range(50):
        start = time.perf_counter()
        assert held.is_same()
        times.append(time.perf_counter() - start)
    # 0.14 ms on an idle core
    assert min(times) < 1e-3


def test_scripted_modules_are_looked_at() -> None:
    modules = [torch.jit.script(nn.Linear(2, 2)), nn.Linear(2, 2)]
    held = HeldState(modules)
    assert held.is_same()
    _knock_out(modules[1])
    assert not held.is_same()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m, p: _patch_class(p, modeling_llama.LlamaMLP, "forward"), "forward"),
        (lambda m, p: _patch_class(p, modeling_llama, "rotate_half"), "rotate_half"),
        (lambda m, p: _attend_otherwise(p), "sdpa"),
        (lambda m, p: setattr(m.get_base_model().config, "hidden_act", "relu"), None),
        (lambda m, p: p.setattr(modeling_llama.LlamaMLP, "forward", _doubled()), None),
    ],
    ids=["class", "function", "attention", "configuration", "transformers' own"],
)
def test_recordings_are_of_what_runs(
    load: Load,
    tokens: dict[str, Tensor],
    change: Callable[[Any, Patch], None],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = adapt(load())
    recorder = recorded(model)
    for _ in range(4):
        read(model, tokens)
    assert recorder.recorded == 4
    change(model, monkeypatch)
    for _ in range(4):
        after = read(model, tokens)
        eager = model(**tokens, output_hidden_states=True, use_cache=True).hidden_states[2]
        assert torch.equal(after, eager)
    assert (recorder.recorded > 4) == (reason is None)
    said = [name for name in graph_counts(model) if name.startswith("at once: code runs")]
    assert [name.rpartition(" ")[2] for name in said] == ([] if reason is None else [reason])


def _doubled() -> Any:
    """A forward that comes from transformers' own code."""
    space = {"__name__": "transformers.models.llama.other"}
    code = "def forward(self, x):\n    return self.down_proj(self.up_proj(x))"
    exec(code, space)
    return space["forward"]
