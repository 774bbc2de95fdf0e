"""Steps that are to be captured: static shapes, memory used again, nothing that waits for the device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tli_engine.models import decoder
from tli_engine.models.causal import CausalModel
from tli_engine.models.decoder import Decoder
from tli_engine.models.files import FAMILIES

Load = Callable[..., CausalModel]
PROMPTS = [(5, 200, 3) * 10, (7,), (1, 2, 3, 4)]


class Replay:
    """A stand-in for a CUDA graph: the same tensors at each call, and Python as it was at the first."""

    made = 0

    def __init__(self, run: Any, tokens: Tensor) -> None:
        Replay.made += 1
        self._tokens, self._run = tokens.clone(), run
        # as the run that warms up
        run(self._tokens)

    def __call__(self, tokens: Tensor) -> Tensor:
        self._tokens.copy_(tokens)
        logits: Tensor = self._run(self._tokens)
        return logits


class NoWaiting(TorchDispatchMode):
    """Fails where a value, or a shape that depends on one, would be fetched from the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waiting = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2")
        assert func.overloadpacket.__name__ not in waiting, func
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[CausalModel], Decoder]:
    """A decoder that takes the way of CUDA graphs, on a CPU."""
    monkeypatch.setattr(decoder, "_CapturedStep", Replay)
    monkeypatch.setattr(decoder, "_GRAPH_SLOTS", 16)
    monkeypatch.setattr(Replay, "made", 0)

    def make(model: CausalModel) -> Decoder:
        made = Decoder(model)
        made._graphs = True
        return made

    return make


def run(decoder: Decoder, prompts: Any, steps: int) -> Tensor:
    """Logits of given tokens, step by step."""
    logits = [decoder.begin(prompts, steps)]
    for step in range(steps):
        tokens = torch.tensor([(17 * step + 31 * row) % 256 for row in range(len(prompts))])
        logits.append(decoder.step(tokens).clone())
    return torch.stack(logits)


@pytest.mark.parametrize("fused", [False, True], ids=["modules", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_replayed_step_is_an_eager_one(
    family: str, fused: bool, causal: Load, as_on_gpu: Any
) -> None:
    model = causal(family)
    if fused:
        model.fuse()
    eager, replayed = Decoder(model), as_on_gpu(model)
    # 44, 35, 18 and 44 slots, of 3, 3, 2 and 3 rows: 48 and 32 once they are whole sixteens
    for prompts in (PROMPTS, [PROMPTS[0][:21], *PROMPTS[1:]], PROMPTS[1:], PROMPTS):
        found = run(replayed, prompts, 14)
        torch.testing.assert_close(found, run(eager, prompts, 14), rtol=1e-4, atol=1e-4)
    assert Replay.made == 2


@pytest.mark.parametrize("fused", [False, True], ids=["modules", "fused"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_step_waits_for_nothing(family: str, fused: bool, causal: Load, as_on_gpu: Any) -> None:
    model = causal(family)
    if fused:
        model.fuse()
    replayed = as_on_gpu(model)
    replayed.begin(PROMPTS, 4)
    with NoWaiting():
        replayed.step(torch.tensor([1, 2, 3]))


def test_a_later_batch_takes_no_more_memory(causal: Load) -> None:
    model = causal("llama")
    one = Decoder(model)
    run(one, PROMPTS, 4)
    held = one._memory
    # nothing of a text may reach those that come later
    assert held is not None
    held.fill_(torch.nan)
    found = run(one, PROMPTS[1:], 4)
    assert one._memory is held
    torch.testing.assert_close(found, run(Decoder(model), PROMPTS[1:], 4))


def test_rotary_embeddings_that_ask_for_lengths_are_not_captured(causal: Load) -> None:
    kinds = {"type": "dynamic", "rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert not decoder.waits_for_lengths(causal("llama"))
    assert not decoder.waits_for_lengths(causal("gemma3_text"))
    assert decoder.waits_for_lengths(causal("llama", rope_parameters=kinds))
