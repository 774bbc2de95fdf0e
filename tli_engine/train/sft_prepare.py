"""Everything a run of fine-tuning needs, read and checked before anything is written."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tli_engine.config import RunConfig
from tli_engine.data.examples import ExampleStore, ExampleTokenizer, tokenise
from tli_engine.data.packing import rows_of_epoch
from tli_engine.data.splits import read_run_pairs, tokenize_splits
from tli_engine.data.texts import Texts, count_seen, read_texts
from tli_engine.distributed.world import ALONE, World
from tli_engine.models.adapters import add_lora
from tli_engine.models.causal import CausalModel, load_causal
from tli_engine.models.device import choose_device, choose_dtype
from tli_engine.models.files import ModelFiles, open_model
from tli_engine.models.projection import NotFusedError
from tli_engine.models.recompute import Activations
from tli_engine.train.checks import (
    check_alignment,
    check_model,
    check_run,
    not_fused,
    wants_fused,
)
from tli_engine.train.prepare import fit_loss_space, go_on_from, leak_warnings
from tli_engine.train.provenance import provenance
from tli_engine.train.sft_distribute import check_distributed, loads_on_cpu
from tli_engine.train.sft_loop import Validation
from tli_engine.train.sft_step import Pairs

# called with a title, a total, and what takes the numbers done
Progress = Callable[[str, int], Any]


@dataclass(frozen=True)
class SftPrepared:
    """A run of fine-tuning, ready to train.

    Attributes:
        config: As given, with device and dtype chosen.
        files: The opened model.
        model: All blocks and the head; with adapters, or its weights to be trained.
        tensors: What is trained, by name.
        examples: To train on.
        validation: To measure on, or None.
        pairs: Of joint training, or None.
        provenance: What the run is made from.
        warnings: Lines that the user should read, now and in the report.
    """

    config: RunConfig
    files: ModelFiles
    model: CausalModel
    tensors: dict[str, nn.Parameter]
    examples: ExampleStore
    validation: Validation | None
    pairs: Pairs | None
    provenance: dict[str, Any]
    warnings: list[str]


def prepare_sft(
    config: RunConfig, say: Callable[[str], None], progress: Progress, world: World = ALONE
) -> SftPrepared:
    """Read articles, pairs and model, put the adapters on or free the weights.

    Raises:
        UserError: Anything in the configuration, the articles or the model that cannot work.
    """
    device = choose_device(config.device)
    check_distributed(config, world)
    check_run(config, device)
    texts = {split: read_texts(config.data, split) for split in ("train", "validation")}
    train = texts["train"]
    assert train is not None
    if train.licence:
        say(f"{train.name}: licence {train.licence}")
    chosen = {"device": str(device), "dtype": str(choose_dtype(config.dtype, device))[6:]}
    config = config.model_copy(update=chosen)
    files = open_model(config.model)
    check_model(config, files.name, files.config)
    stores = {split: _tokenise(t, files, config, progress) for split, t in texts.items() if t}
    model = load_whole(files, config, "cpu" if loads_on_cpu(config, world) else None)
    pairs, record, warnings = _pairs(config, files, model)
    record["texts"] = {
        split: {"count": len(t), "sha256": t.digest()} for split, t in texts.items() if t
    }
    record["tokens_sha256"] = {split: store.digest() for split, store in stores.items()}
    tensors = _trained(model, config, record, say, sharded=loads_on_cpu(config, world))
    warnings += _seen_warnings(config, train, texts["validation"])
    unseen = stores.get("validation")
    validation = None if unseen is None else validation_of(unseen, config)
    return SftPrepared(
        config, files, model, tensors, stores["train"], validation, pairs, record, warnings
    )


def _seen_warnings(config: RunConfig, train: Texts, validation: Texts | None) -> list[str]:
    """A line for each split that is not of unseen articles."""
    # a preset's own test articles are for others to fetch
    test = read_texts(config.data, "test") if config.data.test else None
    splits = {"validation": validation, "test": test}
    seen = {name: (count_seen(t, train), len(t)) for name, t in splits.items() if t}
    return [
        f"{count} of {total} {name} articles are in training, too: what is measured on them is not of "
        f"unseen articles"
        for name, (count, total) in seen.items()
        if count
    ]


def load_whole(files: ModelFiles, config: RunConfig, device: str | None = None) -> CausalModel:
    """A whole model, held as a run holds it; ``device`` in place of the run's."""
    where = choose_device(device or config.device)
    return load_causal(
        files,
        dtype=choose_dtype(config.dtype, where),
        device=where,
        quantize=config.quantize,
        double_quant=config.double_quant,
        numerics=config.numerics,
        weight_residency=config.weight_residency,
    )


def _tokenise(
    texts: Texts, files: ModelFiles, config: RunConfig, progress: Progress
) -> ExampleStore:
    tokenizer = ExampleTokenizer(files.tokenizer, config.prompt, config.sft.context)
    with progress(f"tokenise {texts.name}", len(texts)) as advance:
        return tokenise(texts, tokenizer, lambda n: advance(n, ""))


def _pairs(
    config: RunConfig, files: ModelFiles, model: CausalModel
) -> tuple[Pairs | None, dict[str, Any], list[str]]:
    """The word pairs of joint training, and what a run records of pairs and model."""
    if config.objective != "joint":
        return None, provenance({}, files, model.early), []
    pairs = read_run_pairs(config.data)
    splits = tokenize_splits(pairs, files.tokenizer, config.words)
    space = fit_loss_space(model.early, splits[0], config)
    record = provenance(pairs, files, model.early)
    return Pairs(splits[0], space), record, leak_warnings(splits)


def _trained(
    model: CausalModel,
    config: RunConfig,
    record: dict[str, Any],
    say: Callable[[str], None],
    *,
    sharded: bool,
) -> dict[str, nn.Parameter]:
    """Put the adapters on, or free the weights, to be shared out if ``sharded``; what is trained."""
    if config.method == "full":
        model.train_all(own=not sharded)
    elif config.lora.init is None:
        add_lora(model.early, config.lora, model.early.depth, config.seed)
    else:
        record["lora_init_sha256"] = go_on_from(model.early, config, say)
    check_alignment(config, model.early)
    fuse_for_texts(model, config, say, choose_device(config.device) if sharded else None)
    return model.trainable()


def fuse_for_texts(
    model: CausalModel,
    config: RunConfig,
    say: Callable[[str], None] = lambda line: None,
    moves_to: torch.device | None = None,
) -> None:
    """Put the blocks on the engine's ops if the run asks for it, or has a GPU and they can.

    ``moves_to`` is the device to which weights are yet to be shared out, block by block.

    Raises:
        UserError: The run asks for what cannot run here.
    """
    sft = config.sft
    most = config.train.batch_size * sft.context
    model.activations = Activations(sft.activations, largest=most)
    if not wants_fused(config, moves_to or model.early.device):
        return
    try:
        model.fuse(sft.attention, moves_to)
    except NotFusedError as reason:
        say(not_fused(config, reason))


def validation_of(store: ExampleStore, config: RunConfig) -> Validation:
    """Articles that are not trained on, in the batches in which their loss is measured."""
    rows = rows_of_epoch(store.lengths, config.sft.context, 0, 0, config.sft.packing)
    size = config.train.batch_size
    return Validation(store, [rows[i : i + size] for i in range(0, len(rows), size)])
