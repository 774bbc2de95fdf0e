"""What training refuses before it reads articles or weights; a plan refuses it in the same words."""

from typing import Any

import torch

from tli_engine.config import ROUNDING_OF_FP32, RunConfig
from tli_engine.errors import UserError
from tli_engine.models.adapters import adapters
from tli_engine.models.device import choose_dtype
from tli_engine.models.early import EarlyModel
from tli_engine.models.projection import NotFusedError
from tli_engine.train.metrics import check_tensorboard
from tli_engine.train.updates import bitsandbytes_optimizer, check_optimizer


def check_run(run: RunConfig, device: torch.device, *, here: bool = True) -> None:
    """Refuse what cannot run on a kind of device; ``here``: or lacks a library of this machine.

    Raises:
        UserError: It names the key, and what to choose or to install.
    """
    if here and run.train.tensorboard:
        check_tensorboard()
    if run.objective == "align":
        # it has an optimizer of its own
        return
    check_optimizer(run.train, device)
    if run.train.rounding == "stochastic" and choose_dtype(run.dtype, device) == torch.float32:
        raise UserError(ROUNDING_OF_FP32)
    if here and run.train.optimizer != "adamw":
        bitsandbytes_optimizer(run.train.optimizer)


def check_model(run: RunConfig, name: str, model: Any) -> None:
    """Refuse what a model does not have.

    Args:
        run: The run.
        name: Of the model.
        model: Its transformers configuration.

    Raises:
        UserError: Rows longer than its texts, or hidden states above its blocks.
    """
    total = model.num_hidden_layers
    if run.objective != "sft" and run.align.layer > total:
        layer = run.align.layer
        raise UserError(f"{name}: hidden_states[{layer}] does not exist; it has 0 … {total}")
    if run.objective != "align" and run.sft.context > (most := model.max_position_embeddings):
        raise UserError(f"sft.context: {run.sft.context} is more than the model's {most} tokens")


def check_alignment(run: RunConfig, model: EarlyModel) -> None:
    """Raise ``UserError`` if joint training's alignment loss reaches none of a model's adapters."""
    if run.objective != "joint" or run.method == "full":
        return
    lowest = min(int(name.split(".")[1]) for name in adapters(model))
    if lowest >= (layer := run.align.layer):
        raise UserError(
            f"lora.layers: the alignment loss reads hidden_states[{layer}], the output of block "
            f"{layer - 1}, and the lowest adapted block is {lowest}; adapt a block within "
            f"0-{layer - 1}, or choose a higher align.layer"
        )


def wants_fused(run: RunConfig, device: torch.device) -> bool:
    """Whether the engine's ops are to run the blocks on a kind of device, if they can.

    Raises:
        UserError: An attention that they alone have.
    """
    engine, attention = run.train.engine, run.sft.attention
    if engine == "fused" or (engine == "auto" and device.type == "cuda"):
        return True
    if run.objective != "align" and attention not in ("auto", "sdpa"):
        raise UserError(f"sft.attention: {attention} needs train.engine: fused, on a GPU")
    return False


def rows_asked_for(run: RunConfig) -> int:
    """Rows, or pairs, of a step as the configuration has it; the data may have fewer."""
    train = run.train
    return train.batch_size * (1 if run.objective == "align" else train.accumulate)


def idle(run: RunConfig, rows: int, processes: int) -> list[str]:
    """A line on processes that a step has no row for, if there are any.

    Args:
        run: The run.
        rows: Or pairs, of a full step.
        processes: That share them.
    """
    if rows >= processes:
        return []
    align = run.objective == "align"
    what = "pairs" if align else "rows"
    keys = "train.batch_size" if align else "train.batch_size times train.accumulate"
    if rows_asked_for(run) < processes:
        remedy = f"make {keys} {processes} or more, or start {rows}"
    else:
        remedy = f"start {rows}: the data has no more"
    return [
        f"too few {what} for {processes} processes: a step has {rows}, which leaves {processes - rows} of them "
        f"idle; {remedy}"
    ]


def uncut(run: RunConfig, fused: bool) -> list[str]:
    """A line on parts of a batch that nothing makes."""
    if run.train.chunk_tokens is None or fused:
        return []
    return ["train.chunk_tokens has no part in this: transformers' modules encode each batch whole"]


def not_fused(run: RunConfig, reason: NotFusedError) -> str:
    """A line on blocks that transformers' modules run since the engine's ops do not.

    Raises:
        UserError: The run asks for the ops.
    """
    if run.train.engine == "fused":
        raise UserError(f"train.engine: fused cannot run this: {reason}") from None
    return f"training through transformers' modules: {reason}"
