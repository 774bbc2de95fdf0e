"""The align objective's part of ``tli-engine train``."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tli_engine.cli._evaluate import report_alignment
from tli_engine.cli.console import say
from tli_engine.config import RunConfig
from tli_engine.distributed.world import World
from tli_engine.errors import TrainingError
from tli_engine.evaluate.plots import plot_training
from tli_engine.models.adapters import adapter_parameters
from tli_engine.models.peft_format import save_adapter
from tli_engine.train.card import model_card
from tli_engine.train.loop import Trainer
from tli_engine.train.manifest import write_manifest
from tli_engine.train.prepare import Prepared, prepare
from tli_engine.train.sft_distribute import check_distributed

ADAPTER = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/README.md")


@dataclass(frozen=True)
class AlignJob:
    """A prepared run of the align objective."""

    run: Prepared
    world: World
    # a step may take less than a word between processes
    steps_between_words = 16

    @classmethod
    def prepare(cls, config: RunConfig, world: World) -> "AlignJob":
        """Read and check everything."""
        check_distributed(config, world)
        return cls(prepare(config, say), world)

    def introduction(self) -> str:
        """A line on what is about to be trained."""
        run = self.run
        return (
            f"{run.config.model}: {run.model.depth} of {run.files.config.num_hidden_layers} blocks, "
            f"{adapter_parameters(run.model):,} trainable parameters, {len(run.splits[0].pairs)} pairs, on "
            f"{run.config.device}"
        )

    def make_trainer(self, folder: Path, on_warning: Callable[[str], None]) -> Trainer:
        """A trainer at its first step."""
        run = self.run
        pairs, space = run.splits[0], run.space
        return Trainer(run.model, run.config, pairs, space, on_warning=on_warning, world=self.world)

    def finish(
        self, trainer: Trainer, folder: Path, steps: list[dict[str, Any]], warnings: list[str]
    ) -> None:
        """Save the adapter and measure it."""
        if not self.world.is_first:
            return
        run = self.run
        if run.model.base_digest() != run.provenance["base_sha256"]:
            raise TrainingError("the frozen weights are not what they were before training")
        unseen = len(run.splits) > 1
        card = model_card(run.model, run.config, run.files, unseen=unseen, notes=warnings)
        save_adapter(run.model, folder / "adapter", run.config.lora, run.files.hub_id, card)
        plot_training(steps, folder / "training.png")
        write_manifest(folder, ("config.yaml", "metrics.jsonl", *ADAPTER))
        report_alignment(run.model, run.config, run.splits, folder, warnings)
