"""One part of a comparison: the base model, or one arm with one seed. Train, measure, keep figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tli_engine.cli._compare_lock import held
from tli_engine.cli._compare_made import (
    check_made,
    held_in_nf4,
    made_from,
    made_from_base,
    pair_digests,
    read_made,
)
from tli_engine.cli._compare_training import drop_weights, train_run, training_figures
from tli_engine.cli._comparison import BASE, Comparison, mend
from tli_engine.cli._summaries import Summariser, stages
from tli_engine.cli.console import progress, say, warn
from tli_engine.config import RunConfig, read_yaml, resolve_config
from tli_engine.data.splits import read_run_pairs, tokenize_splits
from tli_engine.data.texts import Texts
from tli_engine.errors import NotFiniteError, UserError
from tli_engine.evaluate.compare.alignment import alignment_figures, encode_splits
from tli_engine.evaluate.compare.figures import RESULT, Figures, RunFigures
from tli_engine.evaluate.compare.gather import MADE_FROM
from tli_engine.evaluate.compare.rates import TRIED
from tli_engine.evaluate.records import read_record
from tli_engine.evaluate.summaries import PREDICTIONS, predictions_record, predictions_text
from tli_engine.models.device import choose_device, choose_dtype
from tli_engine.models.files import ModelFiles, open_model
from tli_engine.train.energy import energy_joules
from tli_engine.train.metrics import read_metrics
from tli_engine.train.provenance import versions
from tli_engine.train.run_folder import write_json, write_text
from tli_engine.train.sft_prepare import fuse_for_texts, load_whole


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


def run_part(comparison: Comparison, part: str) -> int:
    """Make a part's or a trial's figures, unless they are there; return an exit status."""
    if comparison.is_done(part):
        return _look_at(comparison, part)
    with held(comparison.lock(part), str(comparison.folder(part))):
        # another process may have made it since
        done = comparison.is_done(part)
        return (_look_at if done else _make)(comparison, part)


def _look_at(comparison: Comparison, part: str) -> int:
    """Hold what is done against what is there now."""
    if part in comparison.trials:
        comparison.check_trial(part)
    else:
        check_part(comparison, part)
    # it may have been killed before that
    _let_go(comparison, part)
    say(f"{comparison.folder(part)}: is done")
    return 0


def _make(comparison: Comparison, part: str) -> int:
    # a missing file, or one that is not what the others had, is found before hours of training
    texts = comparison.test_texts()
    if part in comparison.trials:
        return _try_rate(comparison, part)
    for other in filter(comparison.is_done, comparison.parts):
        check_part(comparison, other)
    if part == BASE:
        _measure_base(comparison, texts)
        return 0
    return _run_arm(comparison, part, texts)


def _try_rate(comparison: Comparison, name: str) -> int:
    """Train for the loss on unseen articles, and keep that alone."""
    config, folder = comparison.trial_config(name), comparison.folder(name)
    try:
        if status := train_run(config, folder):
            return status
        found = training_figures([folder], name)["loss"]
    except NotFiniteError as reason:
        # which is an answer, too
        warn(f"{name}: is not taken: {reason}")
        found = {"after": None, "best_step": None}
    nf4 = held_in_nf4(config, open_model(config.model))
    tried = {"arm": comparison.trials[name].arm, "learning_rate": config.train.learning_rate}
    tried |= {"seed": config.seed, "loss": found["after"], "step": found["best_step"]}
    tried[MADE_FROM] = made_from([folder], pair_digests(config), nf4=nf4)
    write_json(folder / TRIED, tried)
    _let_go(comparison, name)
    return 0


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
        if status := train_run(config, folder):
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
    figures |= training_figures(folders, part) | _measure(config, folders[-1], texts, summariser)
    write_json(folders[-1] / RESULT, figures)
    _let_go(comparison, part)
    return 0


def _let_go(comparison: Comparison, part: str) -> None:
    """Remove what a part that is done was measured by, unless it is to stay; a trial's does not."""
    if part in comparison.trials:
        drop_weights([comparison.folder(part)])
    elif not comparison.settings.keep_weights:
        drop_weights(comparison.folders(part))


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
