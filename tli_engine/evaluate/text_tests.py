"""One system's summaries against another's, metric by metric."""

from collections.abc import Iterable

from tli_engine.evaluate.significance import approximate_randomization, holm, paired_bootstrap
from tli_engine.evaluate.text_metrics import Score


def text_tests(system: Iterable[Score], baseline: Iterable[Score]) -> dict[str, dict[str, object]]:
    """Differences of all figures, by metric.

    Returns:
        ``difference`` with ``ci95`` by the paired bootstrap, ``p`` by approximate randomisation, and
        ``p_holm``, that corrected for the number of figures.
    """
    tests: dict[str, dict[str, object]] = {}
    for ours, theirs in zip(system, baseline, strict=True):
        bootstrap = paired_bootstrap(ours, theirs)
        tests[ours.metric] = {
            "difference": bootstrap.difference,
            "ci95": list(bootstrap.ci95),
            "p": approximate_randomization(ours, theirs),
        }
    corrected = holm([test["p"] for test in tests.values()])  # type: ignore[misc]
    for test, p in zip(tests.values(), corrected, strict=True):
        test["p_holm"] = p
    return tests
