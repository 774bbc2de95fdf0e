"""The bench of plans: configurations that can be planned with no GPU, run on a tiny model, compared."""

from dataclasses import replace
from pathlib import Path

import pytest

from bench.bench_plan import planned_mib, print_row, run_case, summary
from bench.plan_cases import CASES, TINY, PlanCase, plan_config, survey_of
from bench.train_engine import InTurns
from tli_engine.train.plan import Plan, limited, make_plan
from tli_engine.train.plan_devices import find_target


def plan_of(case: PlanCase, folder: Path, device: str = "h100") -> Plan:
    target = limited(find_target(device, "auto"), case.gib)
    return make_plan(plan_config(case), survey_of(case, folder), target)


def test_twenty_configurations_of_every_kind() -> None:
    assert len(CASES) >= 20
    assert len({(case.model, case.name) for case in CASES}) == len(CASES)
    runs = [plan_config(case) for case in CASES]
    assert {(run.objective, run.method) for run in runs} >= {
        ("align", "lora"), ("sft", "lora"), ("sft", "full"), ("joint", "lora"), ("joint", "full"),
    }  # fmt: skip
    assert {run.train.optimizer for run in runs} >= {"adamw", "adamw-8bit"}
    assert {run.sft.activations for run in runs} == {"auto", "save", "recompute"}
    assert len({run.sft.context for run in runs if run.objective != "align"}) >= 3
    assert any(case.gib for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model}-{case.name}")
def test_each_fits_the_gpu_that_it_is_for(case: PlanCase, tmp_path: Path) -> None:
    plan = plan_of(case, tmp_path)
    assert any(note.startswith("fits: ") for note in plan.notes), plan.notes
    assert not any("no tokenizer" in note for note in plan.notes)
    total = sum(planned_mib(plan).values())
    assert total * 2**20 == pytest.approx(
        sum(plan.gpu_bytes.values()) - plan.gpu_bytes["cuda_context"], rel=1e-3
    )
    if case.gib is not None:
        assert total < case.gib * 1024
        assert plan.recomputed > 0


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_a_case_runs_and_gives_a_row(case: PlanCase, capsys: pytest.CaptureFixture[str]) -> None:
    row = run_case(case, 2)
    assert (row.case, row.model, row.peak_mib) == (case.name, "tiny", None)
    assert row.ms > 0
    print_row(row)
    assert case.name in capsys.readouterr().out


def test_errors_are_of_the_peak_and_the_worst_is_named() -> None:
    row = run_case(TINY[1], 1)
    planned = {"weights": 60.0, "activations": 40.0}
    rows = [
        replace(row, case=name, peak_mib=peak, notes={"planned_mib": planned, "error": error})
        for name, peak, error in (("a", 100.0, 0.0), ("b", 80.0, 0.25), ("c", 101.0, -0.01))
    ]
    found = summary(rows)
    assert found["configurations"] == 3
    assert (found["median_error"], found["worst_error"]) == (0.01, 0.25)
    assert found["worst"] == "tiny b"
    assert summary([row]) == {}


def test_accumulated_rows_are_divided() -> None:
    order = InTurns([[[0], [1], [2], [3]], [[4], [5], [6], [7]]], accumulate=2)
    assert order.batches(1) == [[[4], [5]], [[6], [7]]]
    assert InTurns([[[0], [1]]]).batches(3) == [[[0], [1]]]
