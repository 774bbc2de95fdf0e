"""What a training step of the published kind asks of the device."""

from pathlib import Path

import pytest
import torch

from bench.bench_drop_in import tiny_subject, write_model
from bench.bench_drop_in_launches import count, print_counts


@pytest.mark.slow
def test_a_replayed_step_asks_for_few_operations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tiny_subject(4, torch.bfloat16, nf4=True), tmp_path / "model")
    ways = ("plain", "launched", "replayed")
    found = {way: count(tmp_path, way) for way in ways}
    totals = [found[way].total() for way in ways]
    # of 4 blocks; the plain step's grow with them, the others' do not
    assert totals[0] > 900
    assert totals[1] < 550
    assert totals[2] < 180
    for direction in ("forward", "backward"):
        # what the script and its optimizer do themselves stays
        script = [found[way]["script", direction] for way in ways]
        assert script[0] == script[1] == script[2] > 20
        assert found["replayed"]["PEFT", direction] == found["launched"]["PEFT", direction] == 0
    assert found["replayed"]["transformers", "backward"] == 0
    assert found["replayed"]["tli-engine", "forward"] <= 14
    print_counts(found)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split() == ["all", *(f"{total:,}" for total in totals)]
