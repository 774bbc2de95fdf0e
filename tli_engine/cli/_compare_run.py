"""One part of a comparison: the base model, or one arm with one seed. Train, measure, keep figures."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tli_engine.cli._compare_lock import LOCKS, held
from tli_engine.cli._compare_made import (
    Present,
    check_begun,
    check_made,
    held_in_nf4,
    made_from,
    made_from_base,
    pair_digests,
    read_made,
)
from tli_engine.cli._summaries import Summariser, stages
from tli_engine.cli._train import resume_training, run_training
from tli_engine.cli.console import progress, say
from tli_engine.config import RunConfig, read_yaml, resolve_config
from tli_engine.data.splits import read_run_pairs, tokenize_splits
from tli_engine.data.texts import Texts, has_articles, read_texts
from tli_engine.errors import UserError
from tli_engine.evaluate.compare.alignment import alignment_figures, encode_splits
from tli_engine.evaluate.compare.config import ALIGN, CompareConfig, arm_config
from tli_engine.evaluate.compare.figures import Figures, OfTraining, RunFigures
from tli_engine.evaluate.compare.gather import MADE_FROM
from tli_engine.evaluate.records import read_record
from tli_engine.evaluate.summaries import PREDICTIONS, predictions_record, predictions_text
from tli_engine.models.device import choose_device, choose_dtype
from tli_engine.models.files import ModelFiles, open_model
from tli_engine.train.energy import energy_joules
from tli_engine.train.manifest import problems
from tli_engine.train.metrics import read_metrics
from tli_engine.train.provenance import versions
from tli_engine.train.run_folder import write_json, write_text
from tli_engine.train.sft_prepare import fuse_for_texts, load_whole

# the part that trains nothing
BASE = "base"
# written last: a part that has it is done
RESULT = "result.json"


@dataclass(frozen=True)
class Comparison:
    """What is compared, and where.

    Attributes:
        shared: What all runs share.
        settings: The ``compare`` section.
        out: Folder of the comparison; each part has one in it.
        side_by_side: Parts that may run at the same time, this one among them.
    """

    shared: RunConfig
    settings: CompareConfig
    out: Path
    side_by_side: int = 1

    @property
    def parts(self) -> list[str]:
        """``base``, then ``ARM:SEED``, all arms of a seed together."""
        settings = self.settings
        return [BASE, *(f"{arm}:{seed}" for seed in settings.seeds for arm in settings.arms)]

    def folder(self, part: str) -> Path:
        """Of a part."""
        return self.out / part.replace(":", "-")

    def lock(self, part: str) -> Path:
        """The file that a process holds while it makes a part."""
        return self.out / LOCKS / self.folder(part).name

    def config(self, name: str, seed: int, spent: float = 0.0) -> RunConfig:
        """Of a run, for whose arm there were ``spent`` seconds of training before."""
        config = arm_config(self.shared, self.settings, name, seed, self.out)
        if self.settings.seconds is None:
            return config
        # a run has one step at least
        left = max(self.settings.seconds - spent, 1e-3)
        return config.model_copy(
            update={"train": config.train.model_copy(update={"seconds": left})}
        )

    def runs(self, part: str) -> list[str]:
        """Names of the runs of a part, each trained on from the one before; none of the base."""
        arm = part.rpartition(":")[0]
        return [ALIGN, arm] if arm == "tli-then-lora-early" else [arm] if arm else []

    def folders(self, part: str) -> list[Path]:
        """Of the runs of a part; the last one is the part's own."""
        seed = part.rpartition(":")[2]
        return [self.folder(f"{name}:{seed}") for name in self.runs(part)]

    def configs(self, part: str) -> list[RunConfig]:
        """Of the runs of a part; of the base, what all share."""
        seed = part.rpartition(":")[2]
        return [self.config(name, int(seed)) for name in self.runs(part)] or [self.shared]

    @cached_property
    def present(self) -> Present:
        """The files that there are now."""
        return Present(self.shared)

    @cached_property
    def test_digest(self) -> str:
        """SHA-256 of the articles that are summarised."""
        return self.test_texts().digest()

    def is_done(self, part: str) -> bool:
        """Whether a part has its figures."""
        return (self.folder(part) / RESULT).is_file()

    def test_texts(self) -> Texts:
        """The articles that are summarised.

        Raises:
            UserError: The configuration names none.
        """
        split = "test" if has_articles(self.shared.data, "test") else "validation"
        texts = read_texts(self.shared.data, split)  # type: ignore[arg-type]
        if texts is None:
            raise UserError("data.test: a comparison needs articles that no run is trained on")
        return texts.first(self.settings.articles)


def check_part(comparison: Comparison, part: str) -> dict[str, Any]:
    """The figures of a part that is done.

    Raises:
        UserError: They cannot be read, or it was not made and tested as it would be now.
    """
    folder = comparison.folder(part)
    kind = Figures if part == BASE else RunFigures
    result = read_record(folder / RESULT, kind, mend(part))
    written = result.get("predictions", {}).get("decoding", {})
    if result["test"]["sha256"] != comparison.test_digest:
        name = comparison.test_texts().name
        raise UserError(f"{folder}: was tested on other articles than {name} holds now")
    for key in ("max_new_tokens", "beams"):
        if written.get(key) not in (None, getattr(comparison.settings, key)):
            raise UserError(f"{folder}: was written with {key} {written[key]}; make it again")
    configs = comparison.configs(part)
    made = read_made(folder / RESULT, result, len(configs), mend(part))
    if made is not None:
        check_made(folder, made, configs, comparison.present)
    return result


def mend(part: str) -> str:
    """What to do about damaged figures of a part."""
    return f"delete it and make {part} again, by compare --only {part}"


def run_part(comparison: Comparison, part: str) -> int:
    """Make a part's figures, unless they are there; return an exit status."""
    if comparison.is_done(part):
        return _look_at(comparison, part)
    with held(comparison.lock(part), str(comparison.folder(part))):
        # another process may have made it since
        done = comparison.is_done(part)
        return (_look_at if done else _make)(comparison, part)


def _look_at(comparison: Comparison, part: str) -> int:
    """Hold a part that is done against what is there now."""
    check_part(comparison, part)
    # it may have been killed before that
    _drop_weights(comparison, part)
    say(f"{comparison.folder(part)}: is done")
    return 0


def _make(comparison: Comparison, part: str) -> int:
    # a missing file, or one that is not what the others had, is found before hours of training
    texts = comparison.test_texts()
    for other in filter(comparison.is_done, comparison.parts):
        check_part(comparison, other)
    if part == BASE:
        _measure_base(comparison, texts)
        return 0
    return _run_arm(comparison, part, texts)


def _measure_base(comparison: Comparison, texts: Texts) -> None:
    config, folder = comparison.shared, comparison.folder(BASE)
    files = open_model(config.model)
    summariser = _summariser(comparison, config, files, texts)
    model = load_whole(files, config)
    dtype = str(choose_dtype(config.dtype, model.early.device)).removeprefix("torch.")
    nf4 = held_in_nf4(config, files)
    made = made_from_base(config, dtype, model.early.base_digest(), nf4=nf4)
    fuse_for_texts(model, config)
    written = summariser.write(model, "base model")
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"test": texts.identity(), "generation": written.to_json(), "versions": versions()}
    figures["predictions"] = _keep_predictions(folder, written.summaries, texts, summariser)
    figures[MADE_FROM] = made
    write_json(folder / RESULT, figures)


def _run_arm(comparison: Comparison, part: str, texts: Texts) -> int:
    arm, seed = part.split(":")
    folders = comparison.folders(part)
    # what leaves no room for an article is found before hours of training, too
    last = comparison.configs(part)[-1]
    files = open_model(last.model)
    summariser = _summariser(comparison, last, files, texts)
    whole = not any((folder / "config.yaml").exists() for folder in folders)
    device = choose_device(comparison.shared.device)
    energy = energy_joules(device)
    spent = 0.0
    for name, folder in zip(comparison.runs(part), folders, strict=True):
        config = comparison.config(name, int(seed), spent)
        if status := _train(config, folder):
            return status
        spent += sum(step["seconds"] for step in read_metrics(folder))
    after = energy_joules(device)
    # a run that went on was not watched from its beginning, and a device's energy is not of one alone
    own = whole and comparison.side_by_side == 1
    joules = after - energy if own and after is not None and energy is not None else None
    figures = {"arm": arm, "seed": int(seed), "energy_joules": joules}
    figures["side_by_side"] = comparison.side_by_side
    nf4 = held_in_nf4(config, files)
    figures[MADE_FROM] = made_from(folders, pair_digests(config), nf4=nf4)
    figures |= _training_figures(folders, part) | _measure(config, folders[-1], texts, summariser)
    write_json(folders[-1] / RESULT, figures)
    _drop_weights(comparison, part)
    return 0


def _drop_weights(comparison: Comparison, part: str) -> None:
    """Remove what a part that is done was measured by, unless it is to stay."""
    if comparison.settings.keep_weights:
        return
    for folder in comparison.folders(part):
        for name in ("adapter", "model", "checkpoints", "best"):
            shutil.rmtree(folder / name, ignore_errors=True)


def _train(config: RunConfig, folder: Path) -> int:
    path = folder / "config.yaml"
    if not path.is_file():
        return run_training(config, folder.name, folder, overwrite=False)
    recorded = read_yaml(path)
    check_begun(folder, recorded, config)
    if problems(folder):
        begun = resolve_config(recorded, str(path))
        # files may lie elsewhere than where the run was begun
        here = {name: getattr(config, name) for name in ("model", "data", "lora")}
        return resume_training(begun.model_copy(update=here), folder)
    return 0


def _training_figures(folders: list[Path], part: str) -> dict[str, Any]:
    """What the runs of an arm recorded of their training; the last one's where they cannot be added."""
    steps = [read_metrics(folder) for folder in folders]
    # without it the run is no longer what it was, and is not trained further
    again = f"move {folders[-1]} away and make {part} again, by compare --only {part}"
    evaluation = read_record(folders[-1] / "evaluation.json", OfTraining, again)
    peaks = [step["peak_mib"] for run in steps for step in run]
    return {
        "steps": len(steps[-1]),
        "tokens": sum(step["tokens"] for step in steps[-1]),
        "tokens_per_s": evaluation["throughput"]["tokens_per_s"],
        "peak_mib": max(peaks),
        "wall_seconds": sum(step["seconds"] for run in steps for step in run),
        "loss": evaluation["loss"]["validation"],
        "warnings": evaluation["warnings"],
    }


def _measure(
    config: RunConfig, folder: Path, texts: Texts, summariser: Summariser
) -> dict[str, Any]:
    files = open_model(config.model)
    splits = tokenize_splits(read_run_pairs(config.data), files.tokenizer, config.words)
    vectors = {}
    # holds the base against what the part was trained on
    recorded = resolve_config(read_yaml(folder / "config.yaml"), str(folder / "config.yaml"))
    trained_on = config.model_copy(update={"provenance": recorded.provenance})
    for stage, model in stages(folder, trained_on, files):
        words = sum(len(set(split.words)) for split in splits)
        with progress(f"word pairs {stage}", words) as advance:

            def told(words: int, advance: Any = advance) -> None:
                advance(words, "")

            vectors[stage] = encode_splits(model.early, splits, config, told)
        if stage == "after":
            written = summariser.write(model, folder.name)
            trained = model.trained_parameters
            device = model.early.device
        # the next stage may be another model
        del model
    both = vectors["before"], vectors["after"]
    return {
        "method": config.method,
        "objective": config.objective,
        "layers": config.lora.layers if config.method == "lora" else "all",
        "trainable_parameters": trained,
        "device": device.type,
        "device_name": _name(device),
        "base_model": files.hub_id,
        "test": texts.identity(),
        "generation": written.to_json(),
        "predictions": _keep_predictions(folder, written.summaries, texts, summariser),
        "alignment": alignment_figures(splits, *both, config, device),
        "versions": versions(),
    }


def _keep_predictions(
    folder: Path, summaries: Sequence[str], texts: Texts, summariser: Summariser
) -> dict[str, Any]:
    """Write a part's summaries; return what says later that they are these."""
    text = predictions_text(summaries)
    write_text(folder / PREDICTIONS, text)
    return predictions_record(text, texts, summariser.options)


def _summariser(
    comparison: Comparison, config: RunConfig, files: ModelFiles, texts: Texts
) -> Summariser:
    settings = comparison.settings
    articles = [texts[i] for i in range(len(texts))]
    how = {"batch_size": settings.batch_size, "beams": settings.beams}
    return Summariser.prepare(articles, files, config, settings.max_new_tokens, **how)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
