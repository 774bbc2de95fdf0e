"""What is seen of a block and of a model between calls, and how a block is given its inputs."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.integrations.conftest import adapt
from tests.integrations.fake_graphs import FakeRecorder
from tli_engine import accelerate
from tli_engine.integrations.block_weights import BlockWeights, NotStaticError
from tli_engine.integrations.lazy_run import Step
from tli_engine.integrations.model_parts import ModelParts
from tli_engine.integrations.recording import Recording
from tli_engine.integrations.static_block import take_apart

Load = Callable[..., Any]
_CPU = torch.device("cpu")


def _adapter(block: Any) -> Any:
    return block.self_attn.q_proj


def _factor(block: Any) -> Any:
    return _adapter(block).lora_A["default"]


def _hook(block: Any) -> None:
    block.mlp.register_forward_hook(lambda *_: None)


def _exchange_parameter(block: Any) -> None:
    _factor(block).weight = nn.Parameter(_factor(block).weight.detach().clone())


def _exchange_data(block: Any) -> None:
    _factor(block).weight.data = _factor(block).weight.data.clone()


def _resize(block: Any) -> None:
    weight = _factor(block).weight
    weight.data = weight.data.view(-1, 2)


def _exchange_statistics(block: Any) -> None:
    state = block.mlp.up_proj.weight.quant_state
    state.absmax = state.absmax.clone()


CHANGES = {
    "mode": lambda b: _adapter(b).eval(),
    "number": lambda b: setattr(b.input_layernorm, "variance_epsilon", 0.5),
    "new attribute": lambda b: setattr(b.mlp, "note", "new"),
    "class": lambda b: setattr(b.mlp, "__class__", type("Mine", (type(b.mlp),), {})),
    "scaling": lambda b: _adapter(b).scaling.update(default=3.0),
    "adapters on": lambda b: _adapter(b).enable_adapters(False),
    "active list": lambda b: setattr(_adapter(b), "_active_adapter", ["default"]),
    "merged": lambda b: _adapter(b).merged_adapters.append("default"),
    "flag in a dictionary": lambda b: _adapter(b).use_dora.update(default=True),
    "hook": _hook,
    "child": lambda b: setattr(b.mlp, "act_fn", nn.GELU()),
    "buffer": lambda b: b.mlp.register_buffer("scale", torch.ones(1)),
    "parameter": _exchange_parameter,
    "data": _exchange_data,
    "shape": _resize,
    "gradient": lambda b: _factor(b).weight.requires_grad_(False),
    "4-bit data": lambda b: b.mlp.up_proj.weight.detach().fill_(0x37),
    "4-bit statistics": _exchange_statistics,
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_is_seen(load: Load, change: str) -> None:
    model = adapt(load())
    accelerate(model)
    block = model.get_base_model().model.layers[0]

    def call() -> Tensor:
        return block(torch.randn(1, 2, 64), position_embeddings=(torch.ones(1, 2, 16),) * 2)[0]

    # 4-bit layers may note at their first call what they compute in
    call()
    weights = BlockWeights(block.modules())
    first = weights.on(_CPU)
    assert weights.on(_CPU) is first
    optimizer = torch.optim.SGD(first.trained, lr=0.1)
    call().sum().backward()
    optimizer.step()
    # values of what is trained are no part of a recording
    assert weights.on(_CPU) is first
    if not hasattr(_adapter(block), "use_dora") and "dictionary" in change:
        pytest.skip("this PEFT has no such dictionary")
    CHANGES[change](block)
    found = []
    for _ in range(2):
        # that it cannot be recorded any more is seen, too
        with suppress(NotStaticError):
            found.append(weights.on(_CPU))
    assert not any(one is first for one in found)
    assert not found or found[0] is found[1]


def test_what_moves_from_one_list_to_another_is_seen() -> None:
    layer: Any = nn.Identity()
    layer.some, layer.others = ["first", "second"], ["third"]
    weights = BlockWeights([layer])
    first = weights.on(_CPU)
    layer.others.insert(0, layer.some.pop())
    assert weights.on(_CPU) is not first


def test_what_came_back_has_its_recordings(load: Load) -> None:
    model = adapt(load())
    accelerate(model)
    block = model.get_base_model().model.layers[0]
    weights = BlockWeights(block.modules())
    first = weights.on(_CPU)
    block.eval()
    other = weights.on(_CPU)
    block.train()
    again = weights.on(_CPU)
    assert again is not first
    assert again.key == first.key != other.key
    assert hash(again.key) == hash(first.key)
    assert len({first.key, again.key, other.key}) == 2


@pytest.mark.parametrize("kind", ["plain", "negated", "expanded", "turned", "scalar mask"])
def test_what_a_block_is_given_is_copied_as_it_is(kind: str) -> None:
    """Bytes of tensors of any dtype in one launch; of some layouts they are no tensor."""
    layer = nn.Bilinear(4, 4, 4)
    masks = [torch.tensor([[[True, False, True, True]]]), torch.rand(2, 3, 4) > 0.5]
    if kind == "scalar mask":
        masks = [torch.tensor(i > 0) for i in range(2)]
    calls = []
    for mask in masks:
        hidden = torch.randn(2, 3, 4)
        if kind == "negated":
            hidden = torch._neg_view(hidden)
        elif kind == "turned":
            hidden = torch.randn(2, 4, 3).mT
        elif kind == "expanded":
            hidden = torch.randn(2, 1, 4).expand(2, 3, 4)
        calls.append((hidden, mask.expand(2, 3, 4)))

    def step(mask: Tensor) -> Step:
        return Step(lambda h, m: layer(h, h * m), (mask,), {})

    block, tensors = take_apart(step(calls[0][1]), calls[0][0], BlockWeights([layer]))
    recording = Recording(block, tensors, list(layer.parameters()), FakeRecorder())
    with torch.no_grad():
        for hidden, mask in (calls[0], calls[1], calls[0]):
            assert torch.equal(recording.forward([hidden, mask]), step(mask)(hidden))


def test_a_hidden_state_depends_on_the_blocks_below(load: Load) -> None:
    model = load(nf4=False)
    parts, layers = ModelParts(model, model.model), model.model.layers
    names = {id(m): name for name, m in model.named_modules()}
    for k in range(1, len(layers)):
        below = parts.below(k)
        modules = [m for m in model.modules() if any(m.__dict__ is d for d in below._dicts)]
        blocks = {names[id(m)].split(".")[2] for m in modules if ".layers." in names[id(m)]}
        assert blocks == {str(i) for i in range(k)}
        assert below.parameters() == parts.parameters()[: len(below.parameters())]
    assert parts.below(len(layers)) is parts
    two, three = parts.below(2), parts.below(3)
    layers[2].mlp.act_fn = nn.GELU()
    assert two.are_same()
    assert not three.are_same()
    assert not parts.are_same()
    # a block that comes twice does not end where it comes next
    layers[1] = layers[0]
    parts = ModelParts(model, model.model)
    assert all(parts.below(k) is parts for k in range(1, len(layers)))


def test_a_parameter_put_where_there_was_none_is_seen(load: Load) -> None:
    model = load(nf4=False)
    parts = ModelParts(model, model.model)
    model.model.layers[1].mlp.up_proj.register_parameter("other", nn.Parameter(torch.ones(1)))
    assert not parts.are_same()
    assert parts.below(1).are_same()
    assert not parts.below(2).are_same()
