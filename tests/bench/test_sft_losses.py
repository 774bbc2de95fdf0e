"""The bench of loss curves: its rows, its peer's optimizer, and the engine's losses beside it."""

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench import bench_sft_losses
from bench.bench_sft_losses import (
    PROVIDERS,
    MasterAdamW,
    Task,
    curves,
    distances,
    packed_rows,
    padded,
    peer_losses,
    plot,
)
from bench.models import Subject
from tli_engine.config import resolve_config
from tli_engine.models.files import open_model
from tli_engine.testing import save_tiny_model

pytest.importorskip("peft")

Make = Callable[..., Subject]
TEXTS = [((256, 5, 6, 7), 2), ((256, 8, 9), 1), ((256, 10, 11, 12, 13, 14), 4), ((256, 15), 1)]


@pytest.fixture
def task() -> Task:
    return Task(TEXTS, [[0, 1], [2], [3, 0, 1]])


def test_rows_hold_every_text_once_and_no_more_than_the_limit() -> None:
    texts = [(tuple(range(n)), 1) for n in (5, 3, 8, 2, 9, 4, 1)]
    rows = packed_rows(texts, 8)
    # the one of 9 fits no row
    assert sorted(i for row in rows for i in row) == [0, 1, 2, 3, 5, 6]
    assert all(0 < sum(len(texts[i][0]) for i in row) <= 8 for row in rows)


def test_padded_batch_labels_the_answers() -> None:
    batch = padded(TEXTS[:2], torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[256, 5, 6, 7], [256, 8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 6, 7], [-100, 8, 9, -100]]


def test_master_weights_keep_what_bf16_would_lose() -> None:
    """100 updates of 1e-5 at 1.0, a hundredth of bf16's step: together they count."""
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    plain = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight], 1e-4)
    rounded = torch.optim.AdamW([plain], lr=1e-4, weight_decay=0.01)
    for _ in range(100):
        weight.grad, plain.grad = torch.ones_like(weight), torch.ones_like(plain)
        optimizer.step()
        rounded.step()
        assert weight.grad is None
    assert torch.equal(plain, torch.ones_like(plain))
    assert weight.detach().float().mean().item() == pytest.approx(0.99, abs=4e-3)


def test_norms_do_not_decay() -> None:
    norm, matrix = (nn.Parameter(torch.ones(shape)) for shape in ((3,), (3, 3)))
    optimizer = MasterAdamW([norm, matrix], 0.1)
    norm.grad, matrix.grad = torch.zeros(3), torch.zeros(3, 3)
    optimizer.step()
    assert torch.equal(norm, torch.ones(3))
    assert (matrix < 1).all()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_engine_has_the_losses_of_transformers(tiny_subject: Make, task: Task, method: str) -> None:
    found = curves(tiny_subject(), task, method, steps=8)
    assert list(found) == list(PROVIDERS)
    apart = distances(found)
    # in fp32 on a CPU
    assert apart["transformers"]["most"] == 0
    assert apart["transformers:eager"]["most"] < 1e-4
    assert apart["tli-engine"]["most"] < 1e-4
    # a curve that stands still would prove nothing of the updates
    assert abs(found["tli-engine"][6] - found["tli-engine"][0]) > 1e-3


def test_what_losses_are_judged_by_is_computed_in_fp32(
    tiny_subject: Make, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}

    def losses(subject: Subject, *_: Any) -> list[float]:
        found[name] = subject.dtype
        return [1.0]

    monkeypatch.setattr(bench_sft_losses, "peer_losses", losses)
    subject = replace(tiny_subject(), dtype=torch.bfloat16)
    for name in ("transformers:fp32", "transformers"):
        bench_sft_losses.curve(subject, task, "lora", 1, name)
    assert found == {"transformers:fp32": torch.float32, "transformers": torch.bfloat16}


def test_distances_are_to_fp32() -> None:
    base = [4.0, 3.0, 2.0, 1.0]
    apart = distances({"x": [4.0, 3.5, 2.0, 0.0], "transformers:fp32": base})
    assert apart == {
        "x": {"first": 0.0, "mean": 0.375, "most": 1.0, "mean_of_second_half": 0.5},
    }


@pytest.mark.parametrize("jobs", ["1", "3"])
def test_curves_are_written_and_drawn(
    tiny_subject: Make, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: str
) -> None:
    def losses(subject: Any, task: Any, method: str, steps: int, *_: str) -> list[float]:
        return [3.0 - 0.1 * i + (0.01 if _ == ("eager",) else 0.0) for i in range(steps)]

    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(bench_sft_losses, "find", lambda *_: tiny_subject())
    monkeypatch.setattr(bench_sft_losses, "translations", lambda _: task)
    monkeypatch.setattr(bench_sft_losses, "peer_losses", losses)
    monkeypatch.setattr(bench_sft_losses, "engine_losses", losses)
    # what is put in place of others here is not so in other processes
    pool = lambda jobs, mp_context: ThreadPoolExecutor(jobs)  # noqa: E731
    monkeypatch.setattr(bench_sft_losses, "ProcessPoolExecutor", pool)
    monkeypatch.setattr(sys, "argv", ["x", "--steps", "5", "--jobs", jobs])
    bench_sft_losses.main()
    folder = next(tmp_path.iterdir())
    found = json.loads((folder / "sft_losses.json").read_text())
    assert found["apart"]["full"]["transformers:eager"]["mean"] == pytest.approx(0.01)
    assert len(found["losses"]["lora"]["tli-engine"]) == 5
    assert (folder / "sft_losses.png").read_bytes().startswith(b"\x89PNG")


def test_peer_pads_without_changing_the_loss(tiny_subject: Make) -> None:
    """The sum over both texts, by itself each: padding and its mask change nothing."""
    subject = tiny_subject()
    both, *single = (
        peer_losses(subject, Task(TEXTS, [row]), "lora", 1, "sdpa")[0] for row in ([0, 1], [0], [1])
    )
    # two labels each
    assert both == pytest.approx(sum(single) / 2, abs=1e-5)


def test_training_a_peer_leaves_the_files_tensors_alone(tmp_path: Path, task: Task) -> None:
    """An open file's tensors are the same memory at each read."""
    config = resolve_config({"model": str(tmp_path)}, "test")
    save_tiny_model(tmp_path, "llama")
    files = open_model(str(tmp_path))
    before = files.source.read("norm.weight").clone()
    subject = Subject("tiny", files, config, [], torch.float32, torch.device("cpu"))
    losses = [peer_losses(subject, task, "full", 2, "sdpa") for _ in range(2)]
    assert losses[0] == losses[1]
    assert torch.equal(files.source.read("norm.weight"), before)


def test_picture_takes_equal_curves(tmp_path: Path) -> None:
    same = {name: [2.0, 1.0] for name in PROVIDERS}
    plot({"lora": same}, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 0
