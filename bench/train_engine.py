"""tli-engine's side of the benches of fine-tuning: its own step, on tokens given."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from torch import Tensor, nn

from bench.models import Subject
from bench.train_cases import (
    ALPHA,
    LEARNING_RATE,
    MODULES,
    RANK,
    Case,
    Provider,
    Step,
    draw_adapters,
    optimizer_of,
)
from tli_engine.config import RunConfig, resolve_config
from tli_engine.data.examples import Example
from tli_engine.models.adapters import adapter_tensors, add_lora
from tli_engine.models.causal import CausalModel, load_causal
from tli_engine.train.sft_prepare import fuse_for_texts
from tli_engine.train.sft_step import SftStep


@dataclass(frozen=True)
class InTurns:
    """An order of batches that begins anew at its end.

    Attributes:
        steps: For each step the numbers of the examples of each of its rows.
        total_steps: Of the schedule, more than are run.
        accumulate: Batches into which a step's rows are cut.
    """

    steps: Sequence[list[list[int]]]
    total_steps: int = 10_000
    accumulate: int = 1

    def batches(self, step: int) -> list[list[list[int]]]:
        """The batches of a step: their rows, each some examples."""
        rows = self.steps[step % len(self.steps)]
        size = -(-len(rows) // self.accumulate)
        return [rows[i : i + size] for i in range(0, len(rows), size)]


def sft_config(subject: Subject, method: str, layers: str, **sections: dict[str, Any]) -> RunConfig:
    """A run of fine-tuning as the benches have it; ``sections`` are ``sft`` and ``train``."""
    train = {"schedule": "constant", "learning_rate": LEARNING_RATE, "steps": InTurns.total_steps}
    values: dict[str, Any] = {
        "model": subject.name,
        "objective": "sft",
        "method": method,
        "quantize": "nf4" if subject.nf4 else "none",
        # no file is read
        "data": {"texts": "random.jsonl"},
        "lora": {"layers": layers, "modules": list(MODULES), "r": RANK, "alpha": ALPHA},
        "sft": sections.get("sft", {}),
        "train": train | sections.get("train", {}),
    }
    return resolve_config(values, "bench")


def load_for_training(
    subject: Subject, config: RunConfig
) -> tuple[CausalModel, dict[str, nn.Parameter]]:
    """The engine's model as ``tli-engine train`` sets it up, and what is trained."""
    model = load_causal(
        subject.files,
        dtype=subject.dtype,
        device=subject.device,
        quantize=config.quantize,
        double_quant=config.double_quant,
        numerics=config.numerics,
        weight_residency=config.weight_residency,
    )
    if config.method == "full":
        model.train_all()
    else:
        add_lora(model.early, config.lora, model.early.depth, config.seed)
        draw_adapters(iter(adapter_tensors(model.early).items()))
    fuse_for_texts(model, config, print)
    return model, model.trainable()


def engine_train_step(
    subject: Subject, case: Case, provider: Provider, batches: list[Tensor]
) -> Step:
    """Steps of the engine on ``batches`` in turns, packing and the gradients' norm included."""
    rows = len(batches[0])
    sections = {
        "sft": {"context": batches[0].shape[1], "activations": provider.activations},
        "train": {
            "batch_size": -(-rows // provider.accumulate),
            "accumulate": provider.accumulate,
            "optimizer": optimizer_of(case, subject.name, provider),
            "rounding": provider.rounding,
            "in_backward": provider.in_backward,
            "cuda_graph": "auto" if provider.graphs is None else provider.graphs,
        },
    }
    config = sft_config(subject, case.method, case.layers, **sections)
    model, tensors = load_for_training(subject, config)
    # every token but a row's first is a label
    examples = [Example(tuple(row), 1) for ids in batches for row in ids.tolist()]
    rows_of = [[[i * rows + j] for j in range(rows)] for i in range(len(batches))]
    order = InTurns(rows_of, accumulate=provider.accumulate)
    step, number = SftStep(model, tensors, examples, order, config, None, print), count()
    model.train()
    return Step(lambda: step.run(next(number)).loss, model.trained_parameters)
