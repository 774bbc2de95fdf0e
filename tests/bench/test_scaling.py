"""The bench of several GPUs, from jobs to rows, on a tiny model and the CPU."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import bench_scaling, readme
from bench.bench_scaling import arguments, chosen_jobs, compared, missing, row_of, run_ranks
from bench.harness import Row
from bench.scaling_worker import Job, config_of
from bench.train_cases import train_subject
from bench.train_worker import Report

JOB = Job("lora", "tiny", "lora", "replicated", 1, rows=2, length=16, steps=3)
REPORT = Report([0.2, 0.1, 0.3], [5.0, 4.9, 4.8], trained=7, build_s=1.0, first_s=0.9)


def test_cases_are_of_as_many_gpus_as_they_take() -> None:
    jobs = chosen_jobs(arguments(["--gpus", "2", "1"]))
    assert [(job.case, job.gpus) for job in jobs] == [
        ("lora", 1), ("lora", 2), ("full", 1), ("full", 2), ("full_8b", 2), ("qlora_sharded", 2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "expected", "provider"),
    [
        ("auto", "auto", "tli-engine"),
        ("true", True, "tli-engine:graphs"),
        ("false", False, "tli-engine:launches"),
    ],
)
def test_whether_steps_are_replayed_is_chosen(
    given: str, expected: bool | str, provider: str
) -> None:
    options = ["--model", "tiny", "--cases", "full", "--gpus", "2", "--cuda-graph", given]
    (job,) = chosen_jobs(arguments(options))
    device = torch.device("cpu")
    subject = train_subject("tiny", device, nf4=False, double_quant=False)
    assert config_of(job, subject, device).train.cuda_graph == expected
    assert row_of(job, REPORT).provider == provider


def test_efficiency_is_that_of_each_gpu() -> None:
    rows = [row_of(JOB, REPORT), row_of(replace(JOB, gpus=2), replace(REPORT, seconds=[0.25]))]
    one, two = compared(rows)
    assert (one.ratio_to_baseline, one.notes["efficiency"]) == (1.0, 1.0)
    # twice the tokens in 1.25 times the time
    assert two.ratio_to_baseline == pytest.approx(1.6)
    assert two.notes["efficiency"] == pytest.approx(0.8)
    assert Row(**json.loads(json.dumps(asdict(two)))) == two


def test_every_case_has_a_row_in_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = chosen_jobs(arguments(["--gpus", "2", "1"]))
    rows = compared([row_of(job, replace(REPORT, peak_mib=1024.0)) for job in jobs])
    text = json.dumps({"rows": [asdict(row) for row in rows]})
    (tmp_path / "scaling.json").write_text(text, encoding="utf-8")
    monkeypatch.setattr(readme, "_H200", tmp_path)
    lines = readme.scaling_table().splitlines()[2:]
    assert len(lines) == len(jobs)
    assert "| adapters on all blocks, NF4 in shares | 64 | 2 |" in lines[-1]


def test_too_few_gpus_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert missing(replace(JOB, gpus=2)) == "needs 2 GPUs, 1 here"
    assert missing(JOB) is None


def test_without_a_gpu_only_the_tiny_shape_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert missing(JOB) is None
    assert "CPU runs --model tiny" in str(missing(replace(JOB, model="qwen2-72b")))


def test_two_ranks_report(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    monkeypatch.setenv("PYTHONPATH", str(root))
    job = replace(JOB, case="qlora_sharded", weights="sharded", gpus=2, steps=2)
    found = run_ranks(job, 100)
    assert isinstance(found, Report), found
    assert len(found.seconds) == 2
    # random tokens of 259: the loss begins near their entropy
    assert found.losses[0] == pytest.approx(5.55, abs=0.3)


def test_what_is_absent_is_written_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def ranks(job: Job, limit_s: float) -> Any:
        return REPORT if job.gpus == 1 else "exit status 1"

    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(bench_scaling, "run_ranks", ranks)
    monkeypatch.setattr(bench_scaling, "arguments", lambda: arguments(["--model", "tiny"]))
    bench_scaling.main()
    (path,) = tmp_path.rglob("scaling.json")
    written = json.loads(path.read_text())
    assert [(row["case"], row["shape"]["gpus"]) for row in written["rows"]] == [
        ("lora", 1), ("full", 1)
    ]  # fmt: skip
    assert {a["case"] for a in written["absent"]} == {"lora", "full", "full_8b", "qlora_sharded"}
    if not torch.cuda.is_available():
        assert all(a["reason"] == "exit status 1" for a in written["absent"])
