"""Which keys of a run go together: what does not is refused before anything is read."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tli_engine.config import RunConfig

# keys of ``train`` that the align objective has no use for
OF_TEXTS = ("accumulate", "optimizer", "lora_plus", "rounding", "in_backward")


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
        (train.chunk_tokens is not None and not aligns,
            "train.chunk_tokens cuts batches of word pairs and goes with objective align; for articles "
            "there are train.batch_size and train.accumulate"),
        (train.chunk_tokens is not None and train.engine == "modules",
            "train.chunk_tokens is of the engine's ops: transformers' modules encode a batch whole; "
            "lower train.batch_size, or set train.engine: fused"),
    ]  # fmt: skip
    for holds, reason in wrong:
        if holds:
            raise ValueError(reason)
    if aligns:
        _check_align(run)


def _check_align(run: "RunConfig") -> None:
    usual = type(run.train)()
    for key in OF_TEXTS:
        if getattr(run.train, key) != getattr(usual, key):
            raise ValueError(
                f"train.{key} goes with objective sft or joint: the align objective updates adapters by "
                f"AdamW in fp32, a batch a step"
            )
