import pytest

from tli_engine.align.collapse import CollapseDetector

MARGIN = 0.4
Step = tuple[float, float, float]


def path(start: Step, end: Step, steps: int = 100) -> list[Step]:
    """(loss, true, random) moving evenly from one to the other."""
    return [
        tuple(a + (b - a) * i / (steps - 1) for a, b in zip(start, end, strict=True))  # type: ignore[misc]
        for i in range(steps)
    ]


def warnings(steps: list[Step], margin: float | None = MARGIN) -> list[tuple[int, str]]:
    detector = CollapseDetector(margin)
    found = [(i, detector.update(*step)) for i, step in enumerate(steps)]
    fired = [(i, line) for i, line in found if line is not None]
    assert detector.warning == (fired[0][1] if fired else None)
    return fired


# both cosines rise to 1 and the loss settles at the margin
COLLAPSE = path((0.42, 0.32, 0.30), (0.40, 0.995, 0.99))
LEARNING = path((0.42, 0.32, 0.30), (0.05, 0.90, 0.20))


def test_a_collapse_is_reported_once() -> None:
    fired = warnings([*COLLAPSE, *[COLLAPSE[-1]] * 100])
    assert len(fired) == 1
    step, line = fired[0]
    # not before random pairs have come half the way to 1
    assert 40 < step < 100
    assert "\n" not in line
    assert "collapse: random pairs' cosine rose from 0.3" in line
    assert "every word becomes alike" in line


def test_the_margin_is_named_where_the_loss_sits_at_it() -> None:
    assert warnings(COLLAPSE)[0][1].endswith("; the loss sits at its margin, 0.4")
    off = [(loss + 0.3, true, random) for loss, true, random in COLLAPSE]
    assert "margin" not in warnings(off)[0][1]
    assert "margin" not in warnings(COLLAPSE, margin=None)[0][1]


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(LEARNING, id="learning"),
        pytest.param([LEARNING[0]] * 200, id="nothing-moves"),
        pytest.param(path((0.4, 0.30, 0.30), (0.1, 0.99, 0.80)), id="alike-but-apart"),
        pytest.param(path((0.4, 0.995, 0.99), (0.1, 0.9, 0.3)), id="artefact-undone"),
        pytest.param([(0.4, 0.995, 0.99)] * 200, id="alike-from-the-start"),
        pytest.param(path((0.4, 0.32, 0.30), (0.4, 0.45, 0.44)), id="a-little-way"),
        pytest.param(path((0.4, 0.32, 0.30), (0.4, -0.5, -0.5)), id="falling-together"),
        pytest.param(COLLAPSE[:19], id="too-early-to-tell"),
    ],
)
def test_what_is_no_collapse_is_not_reported(steps: list[Step]) -> None:
    assert warnings(steps) == []


def test_one_odd_batch_is_no_collapse() -> None:
    steps = [*LEARNING[:50], (0.4, 0.99, 0.99), *LEARNING[50:]]
    assert warnings(steps) == []


def test_a_batch_without_negatives_does_not_raise() -> None:
    """Its random cosine is NaN, the mean of nothing."""
    nan = float("nan")
    assert warnings([(0.0, 0.9, nan)] * 50) == []
    # nor does it hide a collapse
    assert warnings([(0.0, 0.9, nan), *COLLAPSE[:50], (0.0, 0.9, nan), *COLLAPSE[50:]])
