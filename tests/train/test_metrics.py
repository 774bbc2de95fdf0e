"""metrics.jsonl and TensorBoard."""

import sys
from pathlib import Path

import pytest

from tli_engine.errors import UserError
from tli_engine.train.metrics import MetricsLog, check_tensorboard, read_metrics

STEPS = [{"step": i, "epoch": 1, "loss": 1 / i, "lr": 0.1} for i in range(1, 5)]


def test_a_line_a_step(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, [], tensorboard=False) as log:
        for step in STEPS:
            log.append(step)
            # a crash after this loses nothing
            assert read_metrics(tmp_path)[-1] == step
    assert log.steps == read_metrics(tmp_path) == STEPS


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, STEPS, tensorboard=False):
        pass
    with MetricsLog(tmp_path, STEPS[:2], tensorboard=False) as log:
        log.append(STEPS[3])
    assert read_metrics(tmp_path) == [*STEPS[:2], STEPS[3]]


def test_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, STEPS, tensorboard=False):
        pass
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 5, "lo')
    assert read_metrics(tmp_path) == STEPS


@pytest.mark.parametrize("line", ["[1, 2]", '{"step": 2}', '{"step": 2, "lo'])
def test_a_damaged_line_is_no_end(line: str, tmp_path: Path) -> None:
    with MetricsLog(tmp_path, STEPS, tensorboard=False):
        pass
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[2:]]) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is no step's figures"):
        read_metrics(tmp_path)


def test_tensorboard_has_every_figure(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    check_tensorboard()
    with MetricsLog(tmp_path, [], tensorboard=True) as log:
        for step in STEPS:
            log.append(step)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(e.step, e.value) for e in events.Scalars("loss")]
    assert losses == [(s["step"], pytest.approx(s["loss"])) for s in STEPS]
    assert set(events.Tags()["scalars"]) == {"loss", "lr"}


def test_missing_tensorboard_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"pip install 'tli-engine\[tensorboard\]'"):
        check_tensorboard()
