"""What the bench of plans plans and runs: configurations, and each one's step on random weights."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch

from bench.models import RandomSource, Subject
from bench.train_cases import MODULES, random_batches, train_config
from bench.train_engine import InTurns, load_for_training
from tli_engine.config import RunConfig, resolve_config
from tli_engine.data.examples import Example
from tli_engine.data.splits import read_run_pairs, tokenize_splits
from tli_engine.models.device import choose_dtype
from tli_engine.models.files import ModelFiles
from tli_engine.models.survey import Survey
from tli_engine.testing import byte_tokenizer
from tli_engine.train.loop import Trainer
from tli_engine.train.prepare import fit_loss_space, prepare
from tli_engine.train.sft_step import Pairs, SftStep

Values = dict[str, Any]
STEPS = 10_000


@dataclass(frozen=True)
class PlanCase:
    """A configuration.

    Attributes:
        name: Of the case.
        model: Name of the model.
        values: What differs from adapters of rank 16 on all projections of blocks 0-2.
        gib: Of the GPU's memory that it may take; None: all.
    """

    name: str
    model: str
    values: Values = field(default_factory=dict)
    gib: float | None = None


def _sft(rows: int, context: int, **values: Any) -> Values:
    found = {"objective": "sft"} | values
    found["sft"] = {"context": context} | values.get("sft", {})
    found["train"] = {"batch_size": rows} | values.get("train", {})
    return found


_NF4 = {"quantize": "nf4", "double_quant": True}
_ALL = {"lora": {"layers": "all"}}
_8B, _1B, _SMALL = "llama-3-8b", "qwen2-1.5b", "smollm2-135m"
_PAPER = {"layers": "0-1", "modules": ["q_proj", "v_proj"], "dropout": 0.05}
_WIDE = {"lora": {"layers": "0-3"}, "align": {"layer": 4, "space": "whitened"}}
CASES = [
    PlanCase("align-paper", _8B, {"quantize": "nf4", "lora": _PAPER, "train": {"batch_size": 8}}),
    PlanCase("align-wide", _8B, _NF4 | _WIDE | {"train": {"batch_size": 118}}),
    PlanCase(
        "align-resident",
        _8B,
        _NF4 | _WIDE | {"weight_residency": "bf16", "train": {"batch_size": 64}},
    ),
    PlanCase("early", _8B, _sft(4, 2048, **_NF4)),
    PlanCase("early-12-gib", _8B, _sft(4, 2048, **_NF4), gib=12),
    PlanCase("early-short", _8B, _sft(1, 512, **_NF4)),
    PlanCase("early-recomputed", _8B, _sft(8, 2048, **_NF4, sft={"activations": "recompute"})),
    PlanCase("early-bf16", _8B, _sft(2, 1024)),
    PlanCase("all", _8B, _sft(2, 1024, **_NF4, **_ALL)),
    PlanCase("all-24-gib", _8B, _sft(4, 2048, **_NF4, **_ALL), gib=24),
    PlanCase("joint", _8B, _sft(2, 1024, **_NF4, objective="joint")),
    PlanCase(
        "full-in-backward",
        _8B,
        _sft(1, 1024, method="full", train={"rounding": "stochastic", "in_backward": True}),
    ),
    PlanCase("align", _1B, _WIDE | {"train": {"batch_size": 118}}),
    PlanCase("early", _1B, _sft(8, 1024, **_NF4)),
    PlanCase("all-bf16", _1B, _sft(4, 1024, **_ALL, sft={"activations": "save"})),
    PlanCase("full", _1B, _sft(2, 1024, method="full")),
    PlanCase("full-8-bit", _1B, _sft(2, 1024, method="full", train={"optimizer": "adamw-8bit"})),
    PlanCase(
        "full-stochastic", _1B, _sft(4, 1024, method="full", train={"rounding": "stochastic"})
    ),
    PlanCase("full-in-backward", _1B, _sft(2, 1024, method="full", train={"in_backward": True})),
    PlanCase(
        "full-recomputed", _1B, _sft(8, 2048, method="full", sft={"activations": "recompute"})
    ),
    PlanCase("align", _SMALL, _WIDE | {"train": {"batch_size": 118}}),
    PlanCase("early", _SMALL, _sft(16, 1024)),
    PlanCase("all-accumulated", _SMALL, _sft(4, 512, **_ALL, train={"accumulate": 4})),
    PlanCase("full", _SMALL, _sft(8, 1024, method="full")),
    PlanCase("full-fp32", _SMALL, _sft(2, 1024, method="full", dtype="float32")),
    PlanCase("joint-full", _SMALL, _sft(4, 1024, objective="joint", method="full")),
]
# what a machine without a GPU can run
TINY = [
    PlanCase("align", "tiny", {"train": {"batch_size": 8}}),
    PlanCase("early", "tiny", _sft(2, 32)),
    PlanCase("joint", "tiny", _sft(2, 32, objective="joint")),
    PlanCase("full", "tiny", _sft(2, 32, method="full")),
]


def plan_config(case: PlanCase) -> RunConfig:
    """The run of a case; no file of articles is read."""
    values: Values = {"model": case.model, "quantize": "none", "data": {"texts": "random.jsonl"}}
    values["train"] = {"steps": STEPS, "learning_rate": 1e-4, "schedule": "constant"}
    values["lora"] = {"layers": "0-2", "modules": list(MODULES)}
    # the tokenizer of the words puts this before each
    values["words"] = {"prefix": "<s>"}
    for name, change in case.values.items():
        old = values.get(name)
        values[name] = old | change if isinstance(old, dict) else change
    if values.get("objective", "align") != "sft":
        values["data"] = {"pairs": "builtin:sw-en"} | values["data"]
    if values.get("objective", "align") == "align":
        del values["data"]["texts"]
        if "align" not in values and values["lora"]["layers"] == "0-2":
            values["align"] = {"layer": 3}
    return resolve_config(values, case.name)


def survey_of(case: PlanCase, folder: Path) -> Survey:
    """What is known of a case's model before it is loaded; a tokenizer of bytes goes into ``folder``."""
    byte_tokenizer().save_pretrained(folder)
    return Survey(case.model, train_config(case.model), folder)


def build(
    case: PlanCase, config: RunConfig, device: torch.device, folder: Path
) -> Callable[[], Any]:
    """The run of a case, set up as ``tli-engine train`` does; a call is a step."""
    dtype = choose_dtype(config.dtype, device)
    shape = train_config(case.model)
    # it quantises as it loads, where a run does
    source = RandomSource(shape, dtype, device, nf4=False)
    files = ModelFiles(case.model, case.model, folder, None, shape, source)
    if config.objective == "align":
        return _align_step(config, files)
    subject = Subject(case.model, files, config, [], dtype, device)
    return _sft_step(subject, config)


def _align_step(config: RunConfig, files: ModelFiles) -> Callable[[], Any]:
    prepared = prepare(config, lambda line: None, files)
    trainer = Trainer(prepared.model, prepared.config, prepared.splits[0], prepared.space)
    trainer.model.train()
    number = count()

    def step() -> list[Any]:
        trainer.engine.launch(next(number))
        return list(trainer.engine.collect(wait=True))

    return step


def _sft_step(subject: Subject, config: RunConfig) -> Callable[[], Any]:
    model, tensors = load_for_training(subject, config)
    pairs = None
    if config.objective == "joint":
        found = read_run_pairs(config.data)
        splits = tokenize_splits(found, subject.files.tokenizer, config.words)
        pairs = Pairs(splits[0], fit_loss_space(model.early, splits[0], config))
    rows = config.train.batch_size * config.train.accumulate
    batches = random_batches(subject.files.config, rows, config.sft.context)
    # every token but a row's first is a label
    examples = [Example(tuple(row), 1) for ids in batches for row in ids.tolist()]
    numbers = [[[i * rows + j] for j in range(rows)] for i in range(len(batches))]
    order = InTurns(numbers, accumulate=config.train.accumulate)
    step, number = SftStep(model, tensors, examples, order, config, pairs), count()
    model.train()
    return lambda: step.run(next(number))
