"""Two processes in which accelerated models train as unaccelerated ones do.

``ddp_on_ranks.py MODEL_FOLDER STORE``; the processes meet in the file STORE. What they import takes most of
the time, and is imported once, before the second is split off.
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.integrations.conftest import adapt, assert_close, gradients
from tli_engine import accelerate

# what the loss is of, options of DDP, and of checkpointing
CASES: list[tuple[str, dict[str, bool], dict[str, bool] | None]] = [
    ("state", {}, None),
    ("loss", {}, None),
    ("state", {"find_unused_parameters": True}, None),
    ("loss", {}, {"use_reentrant": False}),
    ("loss", {"static_graph": True}, {"use_reentrant": True}),
]


def load(folder: str, layers: list[int] | None, checkpoints: dict[str, bool] | None) -> Any:
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    options = {"device_map": {"": "cpu"}, "quantization_config": nf4, "dtype": torch.float32}
    model = adapt(
        AutoModelForCausalLM.from_pretrained(folder, **options), layers_to_transform=layers
    )
    if checkpoints is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpoints)
    return model


def steps(model: Any, tokens: dict[str, Tensor], read: str, **options: bool) -> list[Any]:
    """Gradients of two steps."""
    wrapped, found = DistributedDataParallel(model, **options), []
    for _ in range(2):
        out = wrapped(**tokens, output_hidden_states=True, labels=tokens["input_ids"])
        (out.loss if read == "loss" else out.hidden_states[2].square().mean()).backward()
        found.append(gradients(model))
    return found


def on_rank(rank: int, folder: str, store: str) -> None:
    """All cases, and that both texts have a part in gradients."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    # a text of its own on each
    ids = torch.randint(0, 256, (2, 7), generator=torch.Generator().manual_seed(rank))
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for read, options, checkpoints in CASES:
        # blocks without a gradient are an error of DDP unless it looks for them
        layers = [0, 1] if read == "state" and not options else None
        found = []
        for accelerated in (False, True):
            model = load(folder, layers, checkpoints)
            if accelerated:
                accelerate(model)
            found.append(steps(model, tokens, read, **options))
        assert found[0][0]
        assert_close(found[1], found[0], 1e-4)
        mine = next(iter(found[1][1].values()))
        everyones = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(everyones, mine)
        assert torch.equal(everyones[0], everyones[1])
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.start_processes(on_rank, args=tuple(sys.argv[1:]), nprocs=2, start_method="fork")
