"""The bench of fine-tuning steps, from jobs to rows, on a tiny model."""

import argparse
import json
import math
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from bench import bench_train_step, train_worker
from bench.bench_train_step import chosen_jobs, compared, kept_rows, row_of
from bench.harness import Row
from bench.train_cases import CASES, Absent, Step
from bench.train_worker import WARM_UP, Job, Report, measure, run_apart, run_job, timed

JOB = Job("tiny", "lora_early", "peft+bitsandbytes", 2, 16, steps=3, limit_s=300)
REPORT = Report([0.2, 0.1, 0.3], [5.0, 4.9, 4.8], trained=7, build_s=1.0, first_s=0.9)


def row(provider: str, loss: float = 5.0, seconds: float = 0.2, case: str = "lora_early") -> Row:
    job = replace(JOB, provider=provider, case=case)
    report = replace(REPORT, losses=[loss], seconds=[seconds])
    return row_of(job, CASES[case], report, None)


def chosen(**given: Any) -> list[Job]:
    usual = {"cases": None, "models": ["tiny"], "providers": None, "rows": None, "length": 16}
    more = {"steps": 3, "limit": 9.0, "fp32_absmax": False}
    return chosen_jobs(argparse.Namespace(**{**usual, **more, **given}))


def test_a_row_has_tokens_a_second_and_the_share_of_the_floor() -> None:
    found = row_of(JOB, CASES["lora_early"], REPORT, rate=1e9)
    assert (found.case, found.model, found.provider) == (JOB.case, JOB.model, JOB.provider)
    assert found.shape == {"rows": 2, "length": 16}
    assert found.ms == pytest.approx(200)
    assert found.notes["tokens_per_s"] == pytest.approx(2 * 16 / 0.2)
    assert found.flops is not None
    assert found.roofline == pytest.approx(found.flops / 1e9 / 0.2)
    # what is written can be read again
    assert Row(**json.loads(json.dumps(asdict(found)))) == found


def test_ratios_are_to_the_first_of_a_case_and_a_loss_that_is_off_is_noted() -> None:
    rows = compared(
        [
            row("peft+bitsandbytes"),
            row("tli-engine", 5.001, 0.1),
            row("tli-engine:save", 5.1),
            row("tli-engine:bf16", 5.1),
            row("transformers", 7.0, 0.4, "full"),
            row("tli-engine", float("nan"), 0.4, "full"),
        ]
    )
    assert [r.ratio_to_baseline for r in rows] == [1.0, 2.0, 1.0, 1.0, 1.0, 1.0]
    off = [r.notes.get("loss_off_by") for r in rows]
    assert off[:5] == [None, None, 0.1, None, None]
    # not a number is off too
    assert off[5] != off[5]


def test_losses_that_part_after_updates_are_noted() -> None:
    losses = {
        "peft+bitsandbytes": [5.0, 4.9, 4.8],
        "tli-engine": [5.0, 4.9, 4.81],
        "tli-engine:12-gib-in-4": [5.0, 4.9, 4.7],
        "tli-engine:stochastic": [5.0, 4.9, 4.7],
    }
    rows = [row(name) for name in losses]
    for one, of in zip(rows, losses.values(), strict=True):
        one.notes["losses"] = of
    # a run of fewer steps is compared as far as it goes
    rows[1].notes["losses"] = rows[1].notes["losses"][:2]
    found = [r.notes.get("losses_apart") for r in compared(rows)]
    assert found == [None, None, 0.1, None]


def test_losses_are_judged_by_those_in_fp32() -> None:
    rows = [row(n) for n in ("peft+bitsandbytes", "tli-engine", "tli-engine:fp32")]
    for one, second in zip(rows, (4.9, 4.8, 4.81), strict=True):
        one.notes["losses"] = [5.0, second]
    found = compared(rows)
    assert [r.notes.get("losses_apart") for r in found] == [0.09, None, None]
    # what it takes is compared with the first all the same
    assert [r.ratio_to_baseline for r in found] == [1.0, 1.0, 1.0]


def test_jobs_are_those_asked_for() -> None:
    assert [(j.case, j.provider) for j in chosen(providers=["tli-engine", "transformers"])] == [
        ("lora_early", "tli-engine"),
        ("lora_all", "tli-engine"),
        ("full", "transformers"),
        ("full", "tli-engine"),
    ]
    large = chosen(models=["qwen2-72b"])
    assert {(j.case, j.rows) for j in large} == {("lora_early", 2)}
    assert {j.rows for j in chosen(models=["llama-3-8b"])} == {4}
    assert {j.rows for j in chosen(rows=1)} == {1}
    assert all(j.double_quant for j in large)


def test_earlier_rows_of_other_cases_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "train_step.json"
    assert kept_rows(path, []) == []
    rows = [row("peft+bitsandbytes"), row("transformers", case="full")]
    path.write_text(json.dumps({"rows": [asdict(r) for r in rows]}))
    assert kept_rows(path, [("tiny", "lora_early")]) == rows[1:]
    assert kept_rows(path, [("llama-3-8b", "lora_early")]) == rows


def test_steps_are_dropped_timed_and_cut_by_the_limit() -> None:
    calls: list[int] = []

    def build() -> Step:
        return Step(lambda: float(len(calls)) if calls.append(0) is None else 0.0, trained=3)

    found = measure(build, steps=5, limit_s=60)
    assert len(found.seconds) == 5
    assert found.losses == [float(i + 1) for i in range(WARM_UP + 5)]
    assert (found.trained, found.peak_mib) == (3, None)
    # late from the start: as few steps as a median takes
    assert len(measure(build, steps=50, limit_s=0).seconds) == 3


def test_a_loss_is_read_when_the_next_step_is_launched() -> None:
    said: list[str] = []

    class Loss:
        def __init__(self, number: int) -> None:
            self.number = number

        def __float__(self) -> float:
            said.append(f"read {self.number}")
            return float(self.number)

    def call() -> Any:
        number = sum("launch" in line for line in said)
        said.append(f"launch {number}")
        return Loss(number)

    seconds, losses = timed(Step(call, trained=1), 1, math.inf)
    assert said[:4] == ["launch 0", "launch 1", "read 0", "launch 2"]
    assert said[-2:] == [f"read {WARM_UP - 1}", f"read {WARM_UP}"]
    assert losses == list(range(WARM_UP + 1))
    assert len(seconds) == WARM_UP + 1


@pytest.mark.parametrize("provider", ["peft+bitsandbytes", "peft+bitsandbytes:save"])
def test_a_peer_is_measured(provider: str) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    report = run_job(replace(JOB, provider=provider))
    assert len(report.seconds) == 3
    # adapters of three blocks of width 64: q and o, k and v, gate and up, down
    assert report.trained == 3 * 16 * (2 * 128 + 2 * 96 + 3 * 192)
    assert report.losses[4] < report.losses[0]


@pytest.mark.parametrize("case", CASES)
def test_the_engine_is_measured_and_learns_what_a_peer_does(case: str) -> None:
    pytest.importorskip("peft")
    names = (
        ("transformers", "tli-engine") if case == "full" else ("peft+bitsandbytes", "tli-engine")
    )
    job = replace(JOB, case=case, steps=4)
    losses = [run_job(replace(job, provider=name)).losses for name in names]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert losses[1][4] < losses[1][0]


def test_memory_is_limited_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(Absent, match="on a GPU alone"):
        run_job(replace(JOB, provider="tli-engine:12-gib"))


def fake_worker(tmp_path: Path, body: str) -> tuple[str, ...]:
    script = tmp_path / "worker.py"
    script.write_text(
        f"import json, sys, time\njob, path = json.loads(sys.argv[1]), sys.argv[2]\n{body}"
    )
    return (str(script),)


def test_unsloth_is_imported_before_transformers_and_absent_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tmp_path / "order"
    (tmp_path / "unsloth.py").write_text(
        "import sys\n"
        f"with open({str(note)!r}, 'a') as f: print('transformers' in sys.modules, file=f)\n"
        "raise ImportError('No module named trl')"
    )
    root = Path(train_worker.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(root)]))
    reason = run_apart(replace(JOB, provider="unsloth"))
    assert reason == "unsloth cannot be imported: ImportError: No module named trl"
    assert note.read_text().split() == ["False", "True"]


def test_a_report_comes_back_from_a_process(tmp_path: Path) -> None:
    body = f"open(path, 'w').write(json.dumps({{**{asdict(REPORT)!r}, 'trained': job['rows']}}))"
    assert run_apart(JOB, fake_worker(tmp_path, body)) == replace(REPORT, trained=2)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("open(path, 'w').write(json.dumps({'absent': 'no GPU'}))", "no GPU"),
        ("print('a last word'); sys.exit(3)", "exit status 3"),
        ("time.sleep(60)", "took over 1 s"),
    ],
)
def test_a_process_without_a_report_is_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], body: str, reason: str
) -> None:
    job = replace(JOB, limit_s=1.0 if "sleep" in body else 60)
    assert run_apart(job, fake_worker(tmp_path, body)) == reason
    assert ("    | a last word" in capsys.readouterr().out) == ("last word" in body)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Absent("liger-kernel is not there"), "liger-kernel is not there"),
        (MemoryError("none\nleft"), "MemoryError: none"),
    ],
)
def test_the_process_writes_why_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fail(job: Job) -> Report:
        raise error

    path = tmp_path / "report.json"
    monkeypatch.setattr(train_worker, "run_job", fail)
    monkeypatch.setattr(sys, "argv", ["worker", json.dumps(asdict(JOB)), str(path)])
    if isinstance(error, Absent):
        train_worker.main()
    else:
        with pytest.raises(type(error)):
            train_worker.main()
    assert json.loads(path.read_text()) == {"absent": reason}


def test_no_provider_is_begun_after_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(bench_train_step, "run_apart", lambda job: REPORT)
    monkeypatch.setattr(bench_train_step.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["x", "--cases", "full", "--budget", "0"])
    bench_train_step.main()
    found = json.loads((tmp_path / "cpu" / "train_step.json").read_text())
    assert found["rows"] == []
    assert {a["reason"] for a in found["absent"]} == {"no time left"}


def test_early_adapters_are_set_against_full_fine_tuning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [
        row("tli-engine:save", seconds=0.2),
        row("tli-engine:save", seconds=0.3, case="full"),
        row("tli-engine:recompute", case="full"),
    ]
    bench_train_step.print_summary(rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["lora_early against full on tiny, tli-engine:save: 1.50 x the tokens/s"]


def test_results_are_written_after_every_provider(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[dict[str, Any]] = []

    def measured(job: Job) -> Report | str:
        path = tmp_path / "cpu" / "train_step.json"
        written.append(
            json.loads(path.read_text()) if path.exists() else {"rows": [], "absent": []}
        )
        return "no GPU" if job.provider == "unsloth" else REPORT

    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(bench_train_step, "run_apart", measured)
    monkeypatch.setattr(bench_train_step.torch.cuda, "is_available", lambda: False)
    names = ["peft+bitsandbytes", "unsloth", "tli-engine"]
    monkeypatch.setattr(sys, "argv", ["x", "--cases", "lora_all", "--providers", *names])
    bench_train_step.main()
    # in the order of the case, not of the command line: ours before Unsloth
    assert [len(w["rows"]) for w in written] == [0, 1, 2]
    final = json.loads((tmp_path / "cpu" / "train_step.json").read_text())
    assert [r["provider"] for r in final["rows"]] == ["peft+bitsandbytes", "tli-engine"]
    assert final["absent"] == [
        {"case": "lora_all", "model": "tiny", "provider": "unsloth", "reason": "no GPU"}
    ]
    out = capsys.readouterr().out
    assert "unsloth" in out
    assert "the fastest peer is peft+bitsandbytes" in out
