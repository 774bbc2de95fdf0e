"""Small trainers for checks on several ranks: the same on all of them, or on one alone."""

from pathlib import Path
from typing import Any

import torch

from tli_engine.align.space import fit_space
from tli_engine.config import RunConfig
from tli_engine.data.examples import Example
from tli_engine.data.pairs import PairList
from tli_engine.data.splits import Split
from tli_engine.distributed.fully_sharded import whole
from tli_engine.distributed.sharded_nf4 import ShardedNF4
from tli_engine.distributed.world import ALONE, World
from tli_engine.models.adapters import adapter_tensors, add_lora
from tli_engine.models.causal import CausalModel, load_causal
from tli_engine.models.early import load_early
from tli_engine.models.files import open_model
from tli_engine.testing import example_store, random_words
from tli_engine.train.loop import StepMetrics, Trainer
from tli_engine.train.prepare import fit_loss_space
from tli_engine.train.sft_distribute import shard_base, shard_weights
from tli_engine.train.sft_loop import SftMetrics, SftTrainer, Validation
from tli_engine.train.sft_order import SftOrder
from tli_engine.train.sft_prepare import fuse_for_texts
from tli_engine.train.sft_step import Pairs, SftStep

CPU = torch.device("cpu")
# losses of the same batches on one rank and on several, in fp32
TOLERANCE = 1e-5
LENGTHS = [(9, 5), (14, 8), (7, 6), (20, 3), (11, 10), (16, 9), (13, 4), (8, 1), (10, 5)]


def examples() -> list[Example]:
    """Random tokens; the second number is where the answer begins."""
    made = []
    for length, prompt in LENGTHS:
        ids = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(length))
        made.append(Example(tuple(ids.tolist()), prompt))
    return made


def pairs() -> Split:
    """Thirteen pairs, two of which share a source."""
    source, target = random_words(13, 5, seed=1), random_words(13, 5, seed=2)
    source[1] = source[0]
    texts = [tuple(str(w.input_ids) for w in side) for side in (source, target)]
    return Split("train", PairList(("sw", "en"), *texts), source, target)


def config_of(objective: str, **changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "model": "m", "objective": objective, "device": "cpu", "dtype": "float32",
        "lora": {"layers": "0-1", "modules": ("q_proj", "down_proj"), "r": 4, "alpha": 8},
        "align": {"layer": 2},
        "sft": {"context": 32, "evaluate_steps": 2},
        "train": {"steps": 4, "batch_size": 5, "learning_rate": 1e-2},
    }  # fmt: skip
    if objective != "align":
        values |= {"data": "a.jsonl", "lora": values["lora"] | {"layers": "0-3"}}
        values["train"] = values["train"] | {"batch_size": 1, "accumulate": 3}
    for section, change in changes.items():
        old = values.get(section)
        values[section] = old | change if isinstance(old, dict) else change
    return RunConfig.model_validate(values)


def aligner(folder: Path, config: RunConfig, world: World) -> tuple[Trainer, list[StepMetrics]]:
    model = load_early(open_model(str(folder)), 2, dtype=torch.float32, device=CPU)
    split = pairs()
    space = fit_loss_space(model, split, config)
    add_lora(model, config.lora, 2, config.seed)
    steps: list[StepMetrics] = []
    return Trainer(model, config, split, space, steps.append, world=world), steps


class Tuner:
    """A trainer of fine-tuning, its steps, and where its weights lie."""

    def __init__(self, folder: Path, config: RunConfig, world: World = ALONE) -> None:
        self.steps: list[SftMetrics] = []
        self.said: list[str] = []
        self.shards: ShardedNF4 | None = None
        self.model = self._load(folder, config, world)
        tensors = self.model.trainable()
        if config.method == "full" and world.size > 1:
            tensors = shard_weights(self.model, config, world, self.said.append)
        elif config.distributed.weights == "sharded" and world.size > 1:
            self.shards = shard_base(self.model, world)
        store = example_store(examples())
        order = SftOrder(store.lengths, config)
        aligned = Pairs(pairs(), fit_space("raw", torch.empty(0), torch.empty(0)))
        engine = SftStep(
            self.model, tensors, store, order, config,
            aligned if config.objective == "joint" else None, world=world,
        )  # fmt: skip
        unseen = Validation(example_store(examples()[:3]), [[[0, 1]], [[2]]])
        self.trainer = SftTrainer(
            config, self.model, engine, order, unseen, self.steps.append, world=world
        )

    def _load(self, folder: Path, config: RunConfig, world: World) -> CausalModel:
        files = open_model(str(folder))
        options: dict[str, Any] = {"quantize": config.quantize, "double_quant": config.double_quant}
        model = load_causal(files, dtype=torch.float32, device=CPU, **options)
        if config.method == "full":
            model.train_all()
        else:
            add_lora(model.early, config.lora, model.early.depth, config.seed)
            assert adapter_tensors(model.early)
        sharded = config.method == "full" and world.size > 1
        fuse_for_texts(model, config, moves_to=CPU if sharded else None)
        return model

    def run(self) -> "Tuner":
        self.trainer.run()
        return self


def figures(steps: list[Any]) -> list[float]:
    """What must not depend on how many ranks there are, of all steps."""
    names = {
        "loss",
        "grad_norm",
        "validation_loss",
        "align_loss",
        "cosine_true",
        "tokens",
        "labels",
    }
    return [v for step in steps for k, v in step.to_json().items() if k in names]


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(
        torch.tensor(actual), torch.tensor(expected), rtol=TOLERANCE, atol=TOLERANCE
    )


def same_tuning(folder: Path, world: World, **changes: Any) -> Tuner:
    config = config_of(**({"objective": "sft"} | changes))
    one, several = Tuner(folder, config).run(), Tuner(folder, config, world).run()
    close(figures(several.steps), figures(one.steps))
    for name, tensor in one.model.trainable().items():
        other = whole(several.model.trainable()[name].detach())
        torch.testing.assert_close(other, tensor.detach(), rtol=1e-4, atol=TOLERANCE)
    return several
