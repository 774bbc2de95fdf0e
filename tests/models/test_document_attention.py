"""Attention within documents: the definition, windows, and what can run where."""

import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tli_engine.data.words import pack
from tli_engine.errors import UserError
from tli_engine.models import document_attention
from tli_engine.models.document_attention import Documents, choose_attention
from tli_engine.testing import random_words

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def make(lengths: list[int], key_heads: int) -> tuple[Documents, list[Tensor]]:
    documents = Documents.of(pack([random_words(1, n, prefix=0)[0] for n in lengths]), "sdpa")
    qkv = [torch.randn(sum(lengths), h, 8, dtype=torch.float64) for h in (4, key_heads, key_heads)]
    return documents, qkv


def naive(
    documents: Documents, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
) -> Tensor:
    group, out = q.shape[1] // k.shape[1], torch.empty_like(q)
    for start, end in pairwise(documents.offsets.tolist()):
        for t in range(start, end):
            seen = slice(start if window is None else max(start, t + 1 - window), t + 1)
            for h in range(q.shape[1]):
                p = (k[seen, h // group] @ q[t, h] * scale).softmax(0)
                out[t, h] = p @ v[seen, h // group]
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 9, 40])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", [[9], [1], [9, 1, 6], [3, 3]], ids=str)
def test_equals_the_definition(lengths: list[int], key_heads: int, window: int | None) -> None:
    documents, qkv = make(lengths, key_heads)
    out = documents.attend(*qkv, 0.7, window)
    assert out.shape == qkv[0].shape
    torch.testing.assert_close(out, naive(documents, *qkv, 0.7, window), rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, 3])
def test_documents_without_tokens_change_nothing(window: int | None) -> None:
    documents, qkv = make([9, 1, 6], 2)
    offsets = torch.tensor([0, 0, 9, 10, 16, 16, 16], dtype=torch.int32)
    some = Documents(offsets, 64, 16, "sdpa")
    assert not some.alike
    assert torch.equal(some.attend(*qkv, 0.7, window), documents.attend(*qkv, 0.7, window))


@pytest.mark.parametrize("window", [None, 2])
def test_gradient(window: int | None) -> None:
    documents, qkv = make([4, 2], 2)
    inputs = tuple(x.requires_grad_() for x in qkv)
    assert torch.autograd.gradcheck(lambda *x: documents.attend(*x, 0.3, window), inputs)


def test_auto_on_a_cpu_is_sdpa() -> None:
    assert choose_attention("auto", CPU, torch.bfloat16, 64) == "sdpa"


@pytest.mark.parametrize("name", ["varlen", "flash-attn"])
@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "message"),
    [
        (CPU, torch.bfloat16, 64, "it needs a GPU, the model is on cpu"),
        (GPU, torch.float32, 64, "it needs bfloat16 or float16, the model is in float32"),
        (GPU, torch.bfloat16, 320, "it needs heads of at most 256"),
        (GPU, torch.bfloat16, 60, "a multiple of 8, these are of 60"),
    ],
)
def test_what_cannot_run_is_refused_with_its_reason(
    name: Any, device: torch.device, dtype: torch.dtype, head_dim: int, message: str
) -> None:
    with pytest.raises(UserError, match=rf"sft\.attention: {name} cannot run here: .*{message}"):
        choose_attention(name, device, dtype, head_dim)


def pretend_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (8, 0)
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    document_attention._function.cache_clear()


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_capability(monkeypatch)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(UserError, match=r"flash-attn cannot run here: .*flash_attn.*; use auto"):
        choose_attention("flash-attn", GPU, torch.bfloat16, 64)


def test_auto_on_a_gpu_is_varlen_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_capability(monkeypatch)
    assert choose_attention("auto", GPU, torch.bfloat16, 64) == "varlen"
    assert choose_attention("varlen", GPU, torch.float16, 256) == "varlen"
    assert choose_attention("auto", GPU, torch.float32, 64) == "sdpa"
    pretend_capability(monkeypatch, (7, 5))
    assert choose_attention("auto", GPU, torch.bfloat16, 64) == "sdpa"
    with pytest.raises(UserError, match=r"compute capability 8\.0, Old GPU has less"):
        choose_attention("varlen", GPU, torch.bfloat16, 64)


@pytest.mark.parametrize(("window", "left"), [(None, -1), (3, 2)])
def test_flash_functions_get_the_window_and_the_scale(
    window: int | None, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents, qkv = make([9, 4], 2)
    seen: list[dict[str, Any]] = []

    def recorded(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *args: Any,
        scale: float,
        window_size: Any,
        enable_gqa: bool,
    ) -> Tensor:
        assert [a.tolist() if isinstance(a, Tensor) else a for a in args] == [
            *([0, 9, 13],) * 2,
            *(9,) * 2,
        ]
        seen.append({"scale": scale, "window_size": window_size, "enable_gqa": enable_gqa})
        return q

    monkeypatch.setattr(document_attention, "_function", lambda name: recorded)
    Documents(documents.offsets, 9, documents.tokens, "varlen").attend(*qkv, 0.7, window)
    assert seen == [{"scale": 0.7, "window_size": (left, 0), "enable_gqa": True}]

    def older(q: Tensor, k: Tensor, v: Tensor, *args: Any, window_size: Any) -> Tensor:
        assert window_size == (left, 0)
        return q

    monkeypatch.setattr(document_attention, "_function", lambda name: older)
    q = Documents(documents.offsets, 9, documents.tokens, "varlen").attend(*qkv, 0.7, window)
    # the kernel's own scale is D ** -0.5
    torch.testing.assert_close(q * 8**-0.5, qkv[0] * 0.7)
