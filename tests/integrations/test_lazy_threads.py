"""One lazy model called from several threads."""

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.conftest import adapt
from tli_engine import accelerate
from tli_engine.integrations.lazy_model import settings_of
from tli_engine.integrations.memo import Memo

Load = Callable[..., Any]


@pytest.fixture(autouse=True)
def _switched_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def in_threads(works: list[Callable[[], None]]) -> None:
    """Do all at once, and raise what one of them raises."""
    errors: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "deadlock"
    if errors:
        raise errors[0]


@pytest.mark.parametrize("remembers", [False, True], ids=["no memo", "memo"])
@torch.no_grad()
def test_calls_from_several_threads(load: Load, remembers: bool) -> None:
    model = adapt(load(nf4=False)).eval()
    texts = [{"input_ids": torch.arange(n)[None] + n} for n in range(3, 7)]
    expected = [model(**text, output_hidden_states=True) for text in texts]
    accelerate(model)
    base = model.get_base_model()
    if remembers:
        for part in (base, base.model):
            settings = settings_of(part)
            assert settings is not None
            settings.memo = Memo()

    def work(i: int) -> Callable[[], None]:
        theirs = expected[i]

        @torch.no_grad()
        def call() -> None:
            for turn in range(12):
                k = (i + turn) % 5
                out = model(**texts[i], output_hidden_states=True)
                torch.testing.assert_close(out.hidden_states[k], theirs.hidden_states[k])
                torch.testing.assert_close(out.logits, theirs.logits)
                # at once, beside those that are not
                torch.testing.assert_close(model(**texts[i]).logits, theirs.logits)
                decoded = base.model(**texts[i], output_hidden_states=True)
                torch.testing.assert_close(decoded.last_hidden_state, theirs.hidden_states[-1])

        return call

    in_threads([work(i) for i in range(4)])


@torch.no_grad()
def test_one_output_read_by_several_threads(load: Load, tokens: dict[str, Tensor]) -> None:
    model = load(nf4=False).eval()
    expected = model(**tokens, output_hidden_states=True)
    accelerate(model)
    for _ in range(10):
        out = model(**tokens, output_hidden_states=True)

        def read(out: Any = out) -> None:
            for k in range(5):
                assert torch.equal(out.hidden_states[k], expected.hidden_states[k])
            assert torch.equal(out.logits, expected.logits)

        in_threads([read] * 4)


@torch.no_grad()
def test_a_call_within_a_call(load: Load, tokens: dict[str, Tensor]) -> None:
    """And one at once in another thread, which does not wait."""
    model = load(nf4=False).eval()
    expected = model(**tokens, output_hidden_states=True)
    accelerate(model)
    inside = []

    def other() -> None:
        with torch.no_grad():
            inside.append(model(**tokens).logits)

    def hook(*_: Any) -> None:
        handle.remove()
        inside.append(model(**tokens, output_hidden_states=True).hidden_states[-1])
        in_threads([other])

    handle = model.model.embed_tokens.register_forward_hook(hook)
    out = model(**tokens, output_hidden_states=True)
    assert torch.equal(out.hidden_states[3], expected.hidden_states[3])
    assert torch.equal(inside[0], expected.hidden_states[-1])
    assert torch.equal(inside[1], expected.logits)
