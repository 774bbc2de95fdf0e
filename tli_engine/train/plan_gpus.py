"""What a run takes of each of several GPUs, and how many of which kind full fine-tuning takes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tli_engine.config import RunConfig
from tli_engine.distributed.gathered_blocks import bytes_to_come
from tli_engine.distributed.world import World
from tli_engine.errors import UserError
from tli_engine.models.survey import Survey
from tli_engine.train.checks import idle, rows_asked_for
from tli_engine.train.plan import RUN_AGAIN, Plan, make_plan, recomputation
from tli_engine.train.plan_devices import LARGE, Target, find_target
from tli_engine.train.plan_outline import Outline, nf4_bytes, outline
from tli_engine.train.plan_peak import CONTEXT, Step, fits, room_on
from tli_engine.train.sft_distribute import SHARDED_NOT_NF4, check_distributed
from tli_engine.train.sft_order import rows_at_once

# of a weight that is trained: itself, its gradient and AdamW's two moments, all fp32
_SHARE = 16
# GPUs of one machine, and the fewest and the most that are looked at
_OF_A_NODE, _FEWEST, _MOST = 8, 2, 1024


def plan_for(run: RunConfig, model: Survey, target: Target, gpus: int) -> Plan:
    """Plan a run on so many GPUs; the bytes of a GPU are those of each of them.

    Raises:
        UserError: As :func:`make_plan`, or what so many GPUs cannot do.
    """
    # as training refuses it, on one GPU too
    check_distributed(run, World(0, gpus))
    if gpus == 1:
        plan = make_plan(run, model, target)
        # where one holds it, how many do is no question
        held = target.memory is not None and fits(target, sum(plan.gpu_bytes.values()))
        return plan if held or run.method != "full" else _with_counts(plan, run, model)
    # training refuses --gpus where no GPU was found, too: processes on CPUs are asked for
    if target.memory is None and target.here and run.device != "cpu":
        raise UserError(
            f"--gpus {gpus}: no GPU is here; name a kind with plan --device, e.g. h100, or set device=cpu"
        )
    plan = _shared_out(run, rank_config(run, gpus), model, target, gpus)
    notes = plan.notes + idle(run, rows_asked_for(run), gpus)
    if target.memory is None and run.device != "cpu":
        notes.append(
            f"--gpus {gpus} trains on CPUs with device=cpu alone; the run has device={run.device}"
        )
    return replace(plan, notes=notes)


def _shared_out(run: RunConfig, mine: RunConfig, model: Survey, target: Target, gpus: int) -> Plan:
    """The plan of a run on several GPUs, of which each sees it as ``mine``."""
    if run.method == "full":
        return _with_counts(_fully_sharded(run, mine, model, target, gpus), run, model)
    plan = make_plan(mine, model, target, gpus)
    made = outline(mine, model, target, gpus)
    parts = dict(plan.gpu_bytes or plan.host_bytes)
    parts["gradients_of_all"] = sum(t.nbytes for t in made.trained.values())
    if run.distributed.weights == "sharded":
        if not made.nf4:
            raise UserError(SHARDED_NOT_NF4)
        blocks = _block_bytes(made)
        parts["weights_nf4"] = -(-sum(blocks) // gpus)
        parts["gathered_blocks"] = sum(sorted(blocks)[-2:])
    return _of_several(plan, parts, plan.host_bytes, target, gpus)


def rank_config(run: RunConfig, gpus: int) -> RunConfig:
    """The run as one of so many GPUs sees it: its share of a batch, its way of running blocks."""
    train, sft = run.train, run.sft
    share = -(-train.batch_size * train.accumulate // gpus)
    rows = rows_at_once(train, gpus)
    least = 2 if run.objective == "align" else 1
    changed: dict[str, Any] = {"batch_size": max(least, rows), "accumulate": -(-share // rows)}
    if run.distributed.weights == "sharded":
        sft = sft.model_copy(update={"activations": "recompute"})
    return run.model_copy(update={"train": train.model_copy(update=changed), "sft": sft})


def _block_bytes(made: Outline) -> list[int]:
    """Bytes of the NF4 layers of each block, as they are held."""
    found = [0] * made.early.depth
    for name, (rows, columns) in made.linear.items():
        found[int(name.split(".")[1])] += nf4_bytes(
            rows, columns, made.double_quant, made.target.hopper
        )
    return found


@dataclass(frozen=True)
class FullBytes:
    """Bytes of full fine-tuning on each of several GPUs.

    Attributes:
        on_gpu: By component, at the fullest moment.
        on_host: Of shares that the host holds for it.
        step: A step's moments.
        stay: Whether blocks stay gathered until their way back.
    """

    on_gpu: dict[str, int]
    on_host: dict[str, int]
    step: Step
    stay: bool


def full_bytes(made: Outline, gpus: int, offload: bool) -> FullBytes:
    """Count a GPU's share of full fine-tuning, and decide what is kept as the run will.

    Args:
        made: The run as one GPU sees it.
        gpus: How many there are.
        offload: Whether the shares are the host's.
    """
    sizes = [0] * made.early.depth
    rest = 0
    for name, tensor in made.trained.items():
        if name.startswith("layers."):
            sizes[int(name.split(".")[1])] += tensor.numel()
        else:
            rest += tensor.numel()
    count, e = sum(sizes) + rest, made.element
    shares = {
        "weights": -(-4 * count // gpus),
        "gradients": -(-4 * count // gpus),
        "optimizer": -(-(_SHARE - 8) * count // gpus),
    }
    held = {} if offload else shares
    to_come = bytes_to_come(sizes, rest, e, gpus, offload=offload)
    before = held.get("weights", 0) + e * rest
    step = Step(made, made.run.train.batch_size * made.run.sft.context, before, 0, to_come)
    stay = step.left is None or e * sum(sizes) <= step.left
    moments = _moments_of_shares(step, sizes, rest, e, None if offload else gpus, stay)
    if (made.run.train.accumulate > 1 or step.uses_graphs) and not offload:
        # those of the packs before are there, or such as stay for graphs
        moments = (m | {"gradients": shares["gradients"]} for m in moments)
    fullest = held | max(moments, key=lambda moment: sum(moment.values()))
    if offload:
        # what a share of the block in use takes on its way
        fullest["shares_on_their_way"] = -(-8 * (max(sizes) + rest) // gpus)
    return FullBytes(fullest, shares if offload else {}, step, stay)


def _moments_of_shares(
    step: Step, sizes: Sequence[int], rest: int, e: int, gpus: int | None, stay: bool
) -> Iterator[dict[str, int]]:
    """What changes on a GPU from moment to moment, by component.

    Args:
        step: Its activations, and what it works with.
        sizes: Weights of each block.
        rest: Weights that are in no block.
        e: Bytes of a gathered weight, and of its gradient.
        gpus: Over which gradients are summed and shared out; ``None``: they go to the host.
        stay: Whether blocks stay gathered until their way back.
    """

    def moment(done: int, gathered: int, embeddings: int, working: int) -> dict[str, int]:
        share = {} if gpus is None else {"gradients": -(-4 * done // gpus)}
        return share | {
            "gathered_blocks": gathered,
            "gathered_embeddings": embeddings,
            "activations_and_working": working,
        }

    largest = max(sizes)
    # all blocks, or one and the next
    blocks = e * sum(sizes) if stay else 2 * e * largest
    for m in step.of_loss():
        yield moment(0, blocks, e * rest, m.activations + m.working)
    # as they come, the last block first; not the update, at which less is held than before it
    for i, m in zip(reversed(range(len(sizes))), step.of_way_back(), strict=False):
        blocks = e * sum(sizes[: i + 1]) if stay else 2 * e * largest
        # the gradient of one is sent and arrives, that of the rest is there from the loss on
        blocks += (e + 4) * largest
        working = m.activations + m.working + e * rest
        yield moment(sum(sizes[i + 1 :]), blocks, e * rest, working)
    # in the end that is sent and arrives, and nothing is gathered
    yield moment(sum(sizes) + rest, 0, 0, (4 + e) * rest)


def _fully_sharded(
    run: RunConfig, mine: RunConfig, model: Survey, target: Target, gpus: int
) -> Plan:
    # downloads, disk, host and notes; the bytes of a GPU are counted anew
    plan = make_plan(mine, model, target, gpus)
    made = outline(mine, model, target, gpus)
    found = full_bytes(made, gpus, run.distributed.offload)
    parts = found.on_gpu
    notes = [n for n in plan.notes if RUN_AGAIN not in n] + recomputation(made, found.step)
    gathered = "stay gathered until their way back" if found.stay else "are gathered twice"
    notes.append(f"blocks {gathered}")
    plan = replace(plan, notes=notes, recomputed=found.step.recomputed)
    host = {"process": plan.host_bytes["process"]}
    if made.on_gpu:
        parts["cuda_context"] = CONTEXT
        host["reading_or_checkpoint"] = _reading_or_checkpoint(run, made, model, gpus)
    host |= {f"{name}_of_a_share": size for name, size in found.on_host.items()}
    return _of_several(plan, parts, host, target, gpus)


def _reading_or_checkpoint(run: RunConfig, made: Outline, model: Survey, gpus: int) -> int:
    """Bytes of the host's memory that a process takes, never both at the same time."""
    sizes = [tensor.numel() for tensor in made.trained.values()]
    count = sum(sizes)
    # each reads all of the model, a tensor at a time as it is stored
    reading = made.element * count + model.stored_bytes * max(sizes)
    # weights and moments of a share, as a file's bytes, and before it as a copy of the GPU's
    copies = 1 if run.distributed.offload else 2
    return max(reading, copies * (_SHARE - 4) * -(-count // gpus))


def _of_several(
    plan: Plan, parts: Mapping[str, int], host: Mapping[str, int], target: Target, gpus: int
) -> Plan:
    """The plan with the bytes of each GPU, and the host's of all processes of a machine."""
    here = min(gpus, _OF_A_NODE)
    on_gpu = target.memory is not None
    of_one = host if on_gpu else {**host, **parts}
    of_one_gpu = ("fits:", "does not fit:", "no step like")
    notes = [n for n in plan.notes if not n.startswith(of_one_gpu)]
    notes[0] += f", {gpus} of them"
    notes.append(
        f"bytes are those of each of {gpus}; the host's are of {here} processes on one machine"
    )
    if target.memory is not None:
        total = sum(parts.values())
        room = f"{room_on(target, total)} on each {target.name}"
        verdict = "fits" if fits(target, total) else "does not fit"
        notes.append(f"{verdict}: {room}, of which a twentieth is left free")
    notes.append("no step like this was measured: no time is given")
    return replace(
        plan,
        gpu_bytes=dict(parts) if on_gpu else {},
        host_bytes={name: here * size for name, size in of_one.items()},
        step_seconds=None,
        notes=notes,
        gpus=gpus,
    )


def _with_counts(plan: Plan, run: RunConfig, model: Survey) -> Plan:
    """Say how many GPUs of which kind the run takes."""
    counts = ", ".join(f"{count} x {name}" for name, count in gpus_needed(run, model))
    line = (
        "every weight trained, bf16 with fp32 master, nothing offloaded, in shares over several GPUs: "
        f"at least {counts}"
    )
    return replace(plan, notes=[*plan.notes, line])


def gpus_needed(run: RunConfig, model: Survey) -> Iterator[tuple[str, int]]:
    """The fewest GPUs, two or more, that hold full fine-tuning in shares, for each large kind."""
    shared = run.distributed.model_copy(update={"offload": False})
    # a row a GPU, once: what a batch takes is for the user to choose
    plain: dict[str, Any] = {"batch_size": 1, "accumulate": 1}
    plain |= {"optimizer": "adamw", "rounding": "master", "in_backward": False}
    changed = {"distributed": shared, "train": run.train.model_copy(update=plain)}
    if run.sft.activations == "auto":
        changed["sft"] = run.sft.model_copy(update={"activations": "recompute"})
    for name in LARGE:
        target = find_target(name, "cuda")
        made = outline(rank_config(run.model_copy(update=changed), 1), model, target, _FEWEST)

        def holds(gpus: int, made: Outline = made, target: Target = target) -> bool:
            return fits(target, CONTEXT + sum(full_bytes(made, gpus, False).on_gpu.values()))

        if not holds(_MOST):
            continue
        low, high = _FEWEST, _MOST
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(middle) else (middle + 1, high)
        yield name, low
