"""Which keys of a run go together: what does not is refused before anything is read."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tli_engine.config import RunConfig


def check_combination(run: "RunConfig") -> None:
    """Refuse values that are allowed each on its own, and not together.

    Raises:
        ValueError: One line: the key, why not, and what to choose.
    """
    train, aligns = run.train, run.objective == "align"
    wrong = [
        (aligns and train.batch_size < 2,
            "train.batch_size must be at least 2: a pair alone has no negative"),
        (aligns and run.method == "full", "method full goes with objective sft or joint"),
        (not aligns and run.data.texts is None,
            f"objective {run.objective} needs data.texts, e.g. xlsum:swahili"),
        (run.method == "full" and run.quantize == "nf4",
            "method full trains the weights: it needs quantize none"),
        # the second would be of weights that the first has updated, and an update of its own
        (run.objective == "joint" and train.in_backward,
            "train.in_backward updates weights in the backward pass, and a step of objective joint has "
            "two: set train.in_backward: false, or objective: sft"),
    ]  # fmt: skip
    for holds, reason in wrong:
        if holds:
            raise ValueError(reason)
