"""How a run of fine-tuning lies on several GPUs: what of it each of them holds."""

from collections.abc import Callable

from torch import nn

from tli_engine.config import RunConfig
from tli_engine.distributed.gathered_blocks import Sharding, shard_fully
from tli_engine.distributed.sharded_nf4 import ShardedNF4
from tli_engine.distributed.world import World
from tli_engine.errors import UserError
from tli_engine.models.adapters import nf4_blocks
from tli_engine.models.causal import CausalModel
from tli_engine.models.device import choose_device, choose_dtype
from tli_engine.models.recompute import Activations

SHARDED_NOT_NF4 = (
    "distributed.weights: sharded is of NF4 weights, and the model's are not; set quantize: nf4"
)


def check_distributed(config: RunConfig, world: World) -> None:
    """Refuse what several processes cannot do.

    Raises:
        UserError: It names the key, and what to choose.
    """
    shared, train, sft = config.distributed, config.train, config.sft
    wrong = []
    if train.in_backward and world.size > 1:
        # adapters would be updated by their own rank's gradients, before these are summed
        raise UserError(
            "train.in_backward: gradients are summed over the GPUs first; set it to false, or take one GPU"
        )
    if shared.weights == "sharded":
        wrong = [
            (config.method == "full", "method: full is sharded anyhow; leave it at replicated"),
            (config.objective != "sft", f"objective {config.objective} runs blocks on their own"),
            (config.weight_residency != "nf4", "it needs weight_residency: nf4"),
            (sft.activations == "save", "blocks are gathered anew on the way back: it needs "
                "sft.activations: recompute, or auto"),
            (world.size == 1, "there is one process; start more, by --gpus or torchrun"),
        ]  # fmt: skip
        _refuse("distributed.weights: sharded", wrong)
    if config.method == "full" and world.size > 1:
        wrong = [
            (train.optimizer != "adamw", f"not train.optimizer: {train.optimizer}, but adamw"),
            (train.rounding != "master", "no train.rounding: stochastic; the shares are fp32"),
            (config.objective == "joint", "no objective joint, which runs blocks on their own"),
        ]
        _refuse("method: full on several GPUs takes", wrong)
    elif shared.offload:
        reason = "goes with method: full on several GPUs"
        raise UserError(f"distributed.offload: {reason}; one GPU has train.optimizer: adamw-paged")


def _refuse(what: str, wrong: list[tuple[bool, str]]) -> None:
    for holds, reason in wrong:
        if holds:
            raise UserError(f"{what}: {reason}" if what.startswith("dist") else f"{what} {reason}")


def loads_on_cpu(config: RunConfig, world: World) -> bool:
    """Whether the weights go to the GPU in shares, block by block."""
    return config.method == "full" and world.size > 1


def shard_weights(
    model: CausalModel,
    config: RunConfig,
    world: World,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, nn.Parameter]:
    """Spread a model whose every weight is trained over the ranks; return what is trained.

    Joined layers of fused blocks are shared out as such. The parameters of before are of no use any
    more; memory that they take is free once nobody holds them.

    Args:
        model: On the CPU, on the engine's ops if it is to be, each block to be joined yet.
        config: The run.
        world: The ranks.
        say: Takes a line on what is decided in the first step.
    """
    device = choose_device(config.device)
    fused = model.early.fused

    def join() -> None:
        if fused is not None:
            for projection in fused.join().projections:
                projection.stand_in()

    options = Sharding(
        device=device,
        dtype=choose_dtype(config.dtype, device),
        offload=config.distributed.offload,
        runs_inside=fused is not None,
    )
    blocks = list(model.early.blocks)
    model.spread = shard_fully(model, blocks, "loss", options, world, join, say)
    model.early.computes_on = device
    return model.trainable()


def check_base(model: CausalModel, config: RunConfig) -> None:
    """Raise ``UserError`` if NF4 weights are to be shared out, and a model has none."""
    if config.distributed.weights == "sharded" and not all(nf4_blocks(model.early)):
        raise UserError(SHARDED_NOT_NF4)


def shard_base(model: CausalModel, world: World) -> ShardedNF4:
    """Spread the frozen NF4 weights under the adapters, which :func:`check_base` saw, over the ranks."""
    shards = ShardedNF4(nf4_blocks(model.early), world)
    model.fetch, model.fetched_nbytes = shards.fetch, shards.nbytes
    model.activations = Activations("recompute")
    return shards
