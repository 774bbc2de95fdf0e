"""Which keys of a run go together: what does not is refused before anything is read."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tli_engine.config import RunConfig

# keys of ``train`` that the align objective has no use for
OF_TEXTS = ("accumulate", "optimizer", "lora_plus", "rounding", "in_backward")

ROUNDING_OF_FP32 = (
    "train.rounding: stochastic is of weights in bf16, and float32 needs no rounding: set rounding: master, or "
    "dtype: bfloat16"
)
# what has articles of its own for each split
PRESETS = ("xlsum:", "builtin:")


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
    else:
        _check_texts(run)


def _check_texts(run: "RunConfig") -> None:
    """Refuse what would be ignored where summaries are learnt."""
    train, full = run.train, run.method == "full"
    measured = run.data.validation or (run.data.texts or "").startswith(PRESETS)
    ignored = [
        (run.sft.patience is not None and not measured,
            "sft.patience counts measurements of the loss on data.validation, which is not set: name it, or "
            "leave sft.patience out"),
        (full and run.lora.init is not None,
            "lora.init is an adapter to go on from, and method full trains none: leave it out, or set method: "
            "lora"),
        (full and train.lora_plus != 1,
            "train.lora_plus is of adapters, and method full trains none: leave it out, or set method: lora"),
        (not full and train.rounding == "stochastic",
            "train.rounding: stochastic is of weights in bf16, and adapters are held in fp32: leave it out, or "
            "set method: full (of a comparison's arm: compare.set.full)"),
        (full and train.rounding == "stochastic" and run.dtype == "float32",
            ROUNDING_OF_FP32),
    ]  # fmt: skip
    for holds, reason in ignored:
        if holds:
            raise ValueError(reason)


def _check_align(run: "RunConfig") -> None:
    usual = type(run.train)()
    for key in OF_TEXTS:
        if getattr(run.train, key) != getattr(usual, key):
            raise ValueError(
                f"train.{key} goes with objective sft or joint: the align objective updates adapters by "
                f"AdamW in fp32, a batch a step"
            )
