"""Trains alone and then together, on the same batches in bf16, and compares the steps.

``python as_one.py DEVICE REPORTS``, a process a rank as torchrun starts them: each writes what came of
every case.
"""

import json
import os
import random
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tli_engine.cli._train_sft import SftJob
from tli_engine.config import RunConfig
from tli_engine.distributed.fully_sharded import whole
from tli_engine.distributed.launch import joined
from tli_engine.distributed.world import ALONE, World
from tli_engine.testing import save_tiny_model
from tli_engine.train.sft_loop import SftMetrics

LORA: dict[str, Any] = {"train": {"learning_rate": 1e-2}}
NF4: dict[str, Any] = LORA | {"quantize": "nf4"}
FULL: dict[str, Any] = {"method": "full", "train": {"learning_rate": 1e-3}}
MODULES: dict[str, Any] = FULL | {"train": FULL["train"] | {"engine": "modules"}}
OFFLOADED: dict[str, Any] = {"distributed": {"offload": True}}
CLIPPED = {"max_grad_norm": 1.0}
LAUNCHED = {"cuda_graph": False}
CASES: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "nf4": NF4,
    "sharded-nf4": NF4 | {"distributed": {"weights": "sharded"}},
    "full": MODULES,
    "full-offloaded": MODULES | OFFLOADED | {"train": MODULES["train"] | CLIPPED},
    "full-fused": FULL,
    "full-fused-offloaded": FULL | OFFLOADED | {"train": FULL["train"] | CLIPPED},
    "full-fused-recomputed": FULL | {"sft": {"activations": "recompute"}},
    # of which graphs write the first, and add the second
    "full-fused-accumulated": FULL | {"train": FULL["train"] | {"batch_size": 1, "accumulate": 4}},
    # whose packs are launched, where the others' are replayed from the second of a shape on
    "lora-launched": LORA | {"train": LORA["train"] | LAUNCHED},
    "full-fused-launched": FULL | {"train": FULL["train"] | LAUNCHED},
}
# on a GPU: graphs at least
REPLAYED = {
    "lora": 1, "nf4": 1, "full-fused": 1, "full-fused-recomputed": 1, "full-fused-accumulated": 2
}  # fmt: skip
# Of bf16. On a CPU, over four models, ranks differ from one process by 2.0e-3, 5.4e-3 and 1.1e-2, and
# one process by as much from one that adds up two halves of a batch. AdamW does not see the scale of
# gradients: that they are summed, of all ranks, norms and gradients alone tell.
LOSS, NORM, GRADIENT = 1e-2, 2e-2, 5e-2
# of the model: at four times as much a few steps are another run after any rounding, 64 % apart
INITIALIZER_RANGE = 0.05


@dataclass
class Trained:
    """Steps of a run, the gradients of the first one before they are clipped, on the CPU, and graphs."""

    steps: list[SftMetrics] = field(default_factory=list)
    captured: int = 0
    gradients: dict[str, Tensor] = field(default_factory=dict)


def write_inputs(folder: Path) -> None:
    """A model, and articles: nine, so that the third step has a row for one rank alone."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    save_tiny_model(folder / "model", "llama", **sizes, initializer_range=INITIALIZER_RANGE)
    drawn = random.Random(0)

    def words(length: int) -> str:
        return "".join(drawn.choices("abcdefghijklmnopqrstuvwxyz ", k=length))

    articles = [{"text": words(5 + 3 * i), "summary": words(4 + i % 5)} for i in range(9)]
    lines = "".join(json.dumps(article) + "\n" for article in articles)
    (folder / "articles.jsonl").write_text(lines)


def config_of(case: str, folder: Path, device: str, world: World) -> RunConfig:
    values: dict[str, Any] = {
        "model": str(folder / "model"), "objective": "sft", "data": str(folder / "articles.jsonl"),
        "device": device, "dtype": "bfloat16", "prompt": {"instruction": "F: {text}"},
        "lora": {"layers": "0-3", "r": 16}, "sft": {"context": 64, "packing": False},
        "train": {"steps": 5, "batch_size": 4, "engine": "fused"},
    }  # fmt: skip
    for section, change in CASES[case].items():
        if section != "distributed" or world.size > 1:
            old = values.get(section)
            values[section] = old | change if isinstance(old, dict) else change
    return RunConfig.model_validate(values)


def train(case: str, folder: Path, device: str, world: World = ALONE) -> Trained:
    """Run a case as the command does."""
    job = SftJob.prepare(config_of(case, folder, device, world), world)
    trainer, found = job.make_trainer(folder, print), Trained()

    def note(step: SftMetrics) -> None:
        found.steps.append(step)
        graphs = trainer.engine.graphs
        # those of several are given up at the end
        found.captured = max(found.captured, 0 if graphs is None else graphs.captured)

    trainer.on_step = note
    updates = trainer.engine.updates
    clip = updates.clip

    def keep_and_clip() -> Tensor:
        if not found.gradients:
            grads = {n: t.grad for n, t in trainer.engine.tensors.items() if t.grad is not None}
            # a copy: graphs write to the same gradients in the next step
            found.gradients = {
                n: whole(g).to("cpu", torch.float32, copy=True) for n, g in grads.items()
            }
        return clip()

    updates.clip = keep_and_clip  # type: ignore[method-assign]
    trainer.run()
    return found


def compare(together: Trained, alone: Trained) -> None:
    """Raise ``AssertionError`` unless both are the same but for rounding."""
    steps = list(zip(together.steps, alone.steps, strict=True))
    assert len(steps) == 5
    assert [(t.tokens, t.labels) for t, _ in steps] == [(a.tokens, a.labels) for _, a in steps]
    assert together.gradients.keys() == alone.gradients.keys() != set()
    for name, gradient in alone.gradients.items():
        error = (together.gradients[name] - gradient).norm()
        assert error <= GRADIENT * gradient.norm(), f"{name}: {error} of {gradient.norm()}"
    # summed in fp32
    sums = together.gradients.values()
    assert not all(torch.equal(g, g.to(torch.bfloat16).float()) for g in sums)
    for key, tolerance in (("grad_norm", NORM), ("loss", LOSS)):
        found, expected = (
            torch.tensor([getattr(s, key) for s in t.steps]) for t in (together, alone)
        )
        torch.testing.assert_close(
            found, expected, rtol=tolerance, atol=0, msg=f"{key}: {{}}".format
        )
    # or there would be nothing to compare
    assert alone.steps[-1].loss < 0.9 * alone.steps[0].loss


def check_replayed(case: str, together: Trained) -> None:
    """Raise ``AssertionError`` unless steps on GPUs were replayed where they should."""
    least = REPLAYED.get(case, 0)
    enough = together.captured >= least if least else together.captured == 0
    assert enough, f"{together.captured} graphs"


def main() -> None:
    device, reports = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    own = f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device
    # each rank its own, which are alike
    folder = reports / os.environ["RANK"]
    folder.mkdir()
    write_inputs(folder)
    # before NCCL has threads, whose calls a capture into a CUDA graph could meet
    alone = {case: train(case, folder, own) for case in CASES}
    found: dict[str, str] = {}
    with joined(device, timeout=60) as (world, own):
        for case, expected in alone.items():
            together = train(case, folder, own, world)
            try:
                compare(together, expected)
                if device == "cuda":
                    check_replayed(case, together)
                found[case] = ""
            except AssertionError:
                found[case] = traceback.format_exc()
            (reports / f"{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
