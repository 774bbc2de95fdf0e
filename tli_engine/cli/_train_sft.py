"""The part of ``tli-engine train`` that fine-tunes on summaries."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tli_engine.cli._train_align import ADAPTER
from tli_engine.cli.console import progress, say, warn
from tli_engine.config import RunConfig
from tli_engine.distributed.fully_sharded import whole
from tli_engine.distributed.sharded_nf4 import ShardedNF4
from tli_engine.distributed.world import World
from tli_engine.errors import TrainingError
from tli_engine.evaluate.plots import plot_losses
from tli_engine.models.device import choose_dtype, peak_mib
from tli_engine.models.merged import write_model
from tli_engine.models.peft_format import save_adapter
from tli_engine.train.card import summary_card
from tli_engine.train.checkpoint import load_best, save_best
from tli_engine.train.manifest import write_manifest
from tli_engine.train.run_folder import write_json
from tli_engine.train.sft_distribute import check_base, shard_base, shard_weights
from tli_engine.train.sft_loop import SftTrainer
from tli_engine.train.sft_order import SftOrder
from tli_engine.train.sft_prepare import SftPrepared, prepare_sft
from tli_engine.train.sft_step import SftStep


@dataclass
class SftJob:
    """A prepared run of the objective ``sft`` or ``joint``."""

    run: SftPrepared
    world: World
    steps_between_words = 1
    # where the frozen weights lie, if ranks hold shares of them
    _shards: ShardedNF4 | None = None

    @classmethod
    def prepare(cls, config: RunConfig, world: World) -> "SftJob":
        """Read and check everything."""
        run = prepare_sft(config, say, progress, world)
        check_base(run.model, run.config)
        return cls(run, world)

    def introduction(self) -> str:
        """A line on what is about to be trained."""
        run, config = self.run, self.run.config
        beside = "" if run.pairs is None else f" and {len(run.pairs.train.pairs)} pairs"
        return (
            f"{config.model}: {run.model.early.depth} blocks, {config.method} training of "
            f"{run.model.trained_parameters:,} parameters on {len(run.examples)} articles{beside}, "
            f"on {config.device}"
        )

    def make_trainer(self, folder: Path, on_warning: Callable[[str], None]) -> SftTrainer:
        """A trainer at its first step."""
        run = self.run
        tensors, order = self._distribute(), SftOrder(run.examples.lengths, run.config)
        what = (run.model, tensors, run.examples, order, run.config, run.pairs)
        engine = SftStep(*what, say=say, world=self.world)
        trainer = SftTrainer(
            run.config,
            run.model,
            engine,
            order,
            run.validation,
            on_warning=on_warning,
            world=self.world,
        )
        trainer.on_best = partial(save_best, folder, trainer, self.world)
        return trainer

    def _distribute(self) -> dict[str, nn.Parameter]:
        """Spread the weights over the ranks, as far as the run asks for it; return what is trained."""
        run, world = self.run, self.world
        if run.config.method == "full" and world.size > 1:
            # what holds a parameter holds all of it
            run.tensors.clear()
            tensors = shard_weights(run.model, run.config, world, say)
            self.run = replace(run, tensors=tensors)
            return tensors
        if run.config.distributed.weights == "sharded":
            self._shards = shard_base(run.model, world)
            say(
                f"NF4 weights take {self._shards.nbytes / 1e6:.0f} MB of each rank, buffers included"
            )
        return run.tensors

    def finish(
        self, trainer: SftTrainer, folder: Path, steps: list[dict[str, Any]], warnings: list[str]
    ) -> None:
        """Save the best adapter, or weights, and what they were measured to be worth."""
        run, best = self.run, trainer.best
        if run.validation is not None:
            self._check_measured(best.loss)
        if trainer.stopped_early:
            say(
                f"stopped early: no lower loss in {best.since} measurements, best after step {best.step}"
            )
        tensors = None
        if run.validation is not None:
            tensors = load_best(folder, trainer, self.world)
        if tensors is not None:
            trainer.set_tensors(tensors)
        weights = self._weights()
        self._check_frozen()
        if not self.world.is_first:
            return
        if run.validation is not None and not best.loss < best.before:
            line = "the loss on unseen articles never fell below the base model's"
            warnings.append(line)
            warn(line)
        results = self._save(folder, warnings, weights)
        plot_losses(steps, best.before, folder / "training.png")
        write_json(folder / "evaluation.json", self._evaluation(trainer, steps, warnings))
        write_manifest(folder, ("config.yaml", "metrics.jsonl", *results))
        if run.validation is not None:
            print(
                f"loss on {len(run.validation.examples)} unseen articles: {best.before:.4f} → "
                f"{best.loss:.4f} nats a token, best after step {best.step}"
            )
        say(f"run folder: {folder}")

    def _weights(self) -> dict[str, Tensor]:
        """What is to be written of full fine-tuning: on the first rank, whole."""
        run, dtype = self.run, choose_dtype(self.run.config.dtype, self.run.model.early.device)
        if run.config.method != "full":
            return {}
        if self.world.size == 1:
            return dict(run.model.weights())
        found: dict[str, Tensor] = {}
        for name, tensor in run.model.weights().items():
            all_of_it = whole(tensor.detach())
            if self.world.is_first:
                found |= run.model.apart(name, all_of_it.to("cpu", dtype))
        return found

    def _check_measured(self, loss: float) -> None:
        """Refuse weights of a run that went on although no measurement gave a number."""
        with self.world.speaking_once():
            if not math.isfinite(loss):
                raise TrainingError(
                    "no loss on unseen articles was a finite number, so there is no best step to "
                    "save; train anew with a lower train.learning_rate"
                )

    def _check_frozen(self) -> None:
        run = self.run
        if run.config.method == "full":
            return
        if self._shards is not None:
            changed = self.world.any(not self._shards.unchanged())
        else:
            changed = run.model.early.base_digest() != run.provenance["base_sha256"]
        if changed:
            raise TrainingError("the frozen weights are not what they were before training")

    def _save(self, folder: Path, warnings: list[str], weights: dict[str, Tensor]) -> list[str]:
        run, config = self.run, self.run.config
        card = summary_card(config, run.files, run.model.trained_parameters, warnings)
        if config.method == "full":
            write_model(run.files, weights, folder / "model")
            (folder / "model" / "README.md").write_text(card, encoding="utf-8")
            return sorted(f"model/{p.name}" for p in (folder / "model").iterdir())
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
