"""The part of ``tli-engine train`` that fine-tunes on summaries."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tli_engine.cli._train_align import ADAPTER
from tli_engine.cli.console import progress, say, warn
from tli_engine.config import RunConfig
from tli_engine.distributed.world import World
from tli_engine.errors import TrainingError
from tli_engine.evaluate.plots import plot_losses
from tli_engine.models.device import peak_mib
from tli_engine.models.merged import write_model
from tli_engine.models.peft_format import save_adapter
from tli_engine.train.card import summary_card
from tli_engine.train.checkpoint import load_best, save_best
from tli_engine.train.manifest import write_manifest
from tli_engine.train.run_folder import write_json
from tli_engine.train.sft_loop import SftTrainer
from tli_engine.train.sft_order import SftOrder
from tli_engine.train.sft_prepare import SftPrepared, prepare_sft
from tli_engine.train.sft_step import SftStep


@dataclass(frozen=True)
class SftJob:
    """A prepared run of the objective ``sft`` or ``joint``."""

    run: SftPrepared
    world: World
    steps_between_words = 1

    @classmethod
    def prepare(cls, config: RunConfig, world: World) -> "SftJob":
        """Read and check everything."""
        return cls(prepare_sft(config, say, progress), world)

    def introduction(self) -> str:
        """A line on what is about to be trained."""
        run, config = self.run, self.run.config
        trainable = sum(t.numel() for t in run.tensors.values())
        beside = "" if run.pairs is None else f" and {len(run.pairs.train.pairs)} pairs"
        return (
            f"{config.model}: {run.model.early.depth} blocks, {config.method} training of "
            f"{trainable:,} parameters on {len(run.examples)} articles{beside}, on {config.device}"
        )

    def make_trainer(self, folder: Path, on_warning: Callable[[str], None]) -> SftTrainer:
        """A trainer at its first step."""
        run = self.run
        order = SftOrder(run.examples.lengths, run.config)
        engine = SftStep(
            run.model, run.tensors, run.examples, order, run.config, run.pairs, self.world
        )
        trainer = SftTrainer(
            run.config,
            run.model,
            engine,
            order,
            run.validation,
            on_warning=on_warning,
            world=self.world,
        )
        if self.world.is_first:
            trainer.on_best = partial(save_best, folder, trainer)
        return trainer

    def finish(
        self, trainer: SftTrainer, folder: Path, steps: list[dict[str, Any]], warnings: list[str]
    ) -> None:
        """Save the best adapter, or weights, and what they were measured to be worth."""
        if not self.world.is_first:
            return
        run, best = self.run, trainer.best
        if trainer.stopped_early:
            say(
                f"stopped early: no lower loss in {best.since} measurements, best after step {best.step}"
            )
        tensors = load_best(folder) if run.validation is not None else None
        if tensors is not None:
            trainer.set_tensors(tensors)
        if run.validation is not None and not best.loss < best.before:
            line = "the loss on unseen articles never fell below the base model's"
            warnings.append(line)
            warn(line)
        results = self._save(folder, warnings)
        plot_losses(steps, best.before, folder / "training.png")
        write_json(folder / "evaluation.json", self._evaluation(trainer, steps, warnings))
        write_manifest(folder, ("config.yaml", "metrics.jsonl", *results))
        if run.validation is not None:
            print(
                f"loss on {len(run.validation.examples)} unseen articles: {best.before:.4f} → "
                f"{best.loss:.4f} nats a token, best after step {best.step}"
            )
        say(f"run folder: {folder}")

    def _save(self, folder: Path, warnings: list[str]) -> list[str]:
        run, config = self.run, self.run.config
        card = summary_card(
            config, run.files, sum(t.numel() for t in run.tensors.values()), warnings
        )
        if config.method == "full":
            write_model(run.files, run.model.weights(), folder / "model")
            (folder / "model" / "README.md").write_text(card, encoding="utf-8")
            return sorted(f"model/{p.name}" for p in (folder / "model").iterdir())
        if run.model.early.base_digest() != run.provenance["base_sha256"]:
            raise TrainingError("the frozen weights are not what they were before training")
        save_adapter(run.model.early, folder / "adapter", config.lora, run.files.hub_id, card)
        return list(ADAPTER)

    def _evaluation(
        self, trainer: SftTrainer, steps: list[dict[str, Any]], warnings: list[str]
    ) -> dict[str, Any]:
        best, busy = trainer.best, sum(s["seconds"] for s in steps)
        measured = {"before": best.before, "after": best.loss, "best_step": best.step}
        return {
            "loss": {"validation": measured if self.run.validation is not None else None},
            "throughput": {"tokens_per_s": sum(s["tokens"] for s in steps) / max(busy, 1e-9)},
            "memory": {"peak_mib": peak_mib(self.run.model.early.device)},
            "warnings": warnings,
        }
