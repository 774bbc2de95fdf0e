"""Where a GPU's memory goes in training, said when there is none left."""

import torch

from tli_engine.distributed.fully_sharded import own_part
from tli_engine.models.causal import CausalModel
from tli_engine.nn import NF4Linear
from tli_engine.train.plan_devices import GIB
from tli_engine.train.updates import Updates


def out_of_memory(model: CausalModel, updates: Updates, error: Exception) -> str:
    """One line: what could not be had, what holds the memory, what to change."""
    spread = model.spread
    placed = None if spread is None else spread.placed
    # gradients stay where they are for graphs, or have a place; graphs have memory of their own, too
    is_replayed = updates.keeps_gradients or placed is not None
    graphs = ", train.cuda_graph=false" if is_replayed else ""
    # several GPUs take no other optimizer
    smaller = _smaller_optimizer(updates) if spread is None else "distributed.offload=true"
    ways = [f"sft.activations=recompute{graphs}", *([smaller] if smaller else [])]
    device = model.early.device
    gradients, statistics = updates.nbytes()
    gradients = max(gradients, placed or 0)
    held = {"weights": _nbytes(model), "gradients": gradients, "optimizer": statistics}
    if device.type == "cuda":
        others = torch.cuda.max_memory_allocated(device) - sum(held.values())
        held["activations and buffers"] = max(0, others)
    parts = ", ".join(f"{name} {nbytes / GIB:.1f} GiB" for name, nbytes in held.items())
    wanted = str(error).partition(". GPU")[0].strip()
    return (
        f"out of memory on {device}: {wanted}; held at the peak: {parts}; lower train.batch_size (and "
        f"raise train.accumulate) or sft.context, {'' if smaller else 'or '}set {', or '.join(ways)}"
    )


def _smaller_optimizer(updates: Updates) -> str | None:
    """What takes less than the optimizer of a run, if anything does that the rest of it goes with."""
    train = updates.settings
    if train.rounding == "stochastic":
        # half of AdamW's already, and no other optimizer rounds so
        return None
    smaller = {
        "adamw": "adamw-8bit",
        "adamw-8bit": "adamw-paged-8bit",
        "adamw-paged": "adamw-paged-8bit",
    }
    name = smaller.get(train.optimizer)
    return None if name is None else f"train.optimizer={name}"


def _nbytes(model: CausalModel) -> int:
    """Bytes of the weights, adapters included, as they are held."""
    nf4 = model.fetched_nbytes
    if nf4 is None:
        nf4 = sum(m.nbytes for m in model.modules() if isinstance(m, NF4Linear))
    return nf4 + sum(own_part(p).nbytes for p in model.parameters())
