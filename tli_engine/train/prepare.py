"""Everything a run needs, read and checked before anything is written."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tli_engine.align.encode import encode
from tli_engine.align.space import PairSpace, fit_space
from tli_engine.config import RunConfig
from tli_engine.data.check import leaks
from tli_engine.data.splits import Split, read_run_pairs, tokenize_splits, tokens_of
from tli_engine.models.adapters import add_lora, add_transposed_copies
from tli_engine.models.device import choose_device, choose_dtype
from tli_engine.models.early import EarlyModel, load_early
from tli_engine.models.files import ModelFiles, open_model
from tli_engine.models.peft_format import load_adapter
from tli_engine.models.projection import NotFusedError
from tli_engine.train.checks import check_model, check_run, not_fused, uncut, wants_fused
from tli_engine.train.manifest import sha256
from tli_engine.train.provenance import provenance


@dataclass(frozen=True)
class Prepared:
    """A run ready to train.

    Attributes:
        config: As given, with device and dtype chosen.
        files: The opened model.
        splits: Tokenised pairs, the training ones first.
        model: Early blocks with adapters.
        space: Where the loss compares vectors, fp32.
        provenance: What the run is made from.
        warnings: Lines that the user should read, now and in the report.
    """

    config: RunConfig
    files: ModelFiles
    splits: list[Split]
    model: EarlyModel
    space: PairSpace
    provenance: dict[str, Any]
    warnings: list[str]


def prepare(
    config: RunConfig, say: Callable[[str], None], files: ModelFiles | None = None
) -> Prepared:
    """Read pairs and model, fit the loss space, put the adapters on.

    Args:
        config: The run.
        say: Called with a line that the user may want to know.
        files: Of the model, if they are opened already.

    Raises:
        UserError: Anything in the configuration, the pairs or the model that cannot work.
    """
    device = choose_device(config.device)
    check_run(config, device)
    pairs = read_run_pairs(config.data)
    dtype = choose_dtype(config.dtype, device)
    files = files or open_model(config.model)
    check_model(config, files.name, files.config)
    splits = tokenize_splits(pairs, files.tokenizer, config.words)
    model = load_early(
        files,
        config.align.layer,
        dtype=dtype,
        device=device,
        quantize=config.quantize,
        double_quant=config.double_quant,
        numerics=config.numerics,
        weight_residency=config.weight_residency,
        token_ids=tokens_of(splits),
    )
    record = provenance(pairs, files, model)
    space = fit_loss_space(model, splits[0], config)
    _adapt(model, config, record, say)
    chosen = {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    return Prepared(
        config.model_copy(update=chosen),
        files,
        splits,
        model,
        space,
        record,
        leak_warnings(splits),
    )


def _adapt(
    model: EarlyModel, config: RunConfig, record: dict[str, Any], say: Callable[[str], None]
) -> None:
    """Put the adapters on, and the blocks on what runs them here."""
    if config.lora.init is None:
        add_lora(model, config.lora, config.align.layer, config.seed)
    else:
        record["lora_init_sha256"] = go_on_from(model, config, say)
    if wants_fused(config, model.device):
        try:
            model.fuse()
        except NotFusedError as reason:
            say(not_fused(config, reason))
    for line in uncut(config, model.fused is not None):
        say(line)
    nbytes, copies = add_transposed_copies(model)
    if copies:
        say(f"NF4 weights take {nbytes / 1e6:.0f} MB, {copies / 1e6:.0f} MB of it for the way back")


def leak_warnings(splits: list[Split]) -> list[str]:
    """A line for each language whose control words are not all unseen."""
    control = splits[1].pairs if len(splits) > 1 else None
    return [
        f"{len(words)} {language} control words are in training: these pairs are not unseen"
        for language, words in leaks(splits[0].pairs, control).items()
        if words
    ]


def fit_loss_space(model: EarlyModel, train: Split, config: RunConfig) -> PairSpace:
    """The loss space, fitted on the base model's vectors of the distinct training words."""
    if config.align.space == "raw":
        # nothing is fitted
        return fit_space("raw", torch.empty(0), torch.empty(0))
    sides = (
        encode(model, list(dict.fromkeys(words)), [config.align.layer], config.align.pooling)[0]
        for words in (train.source, train.target)
    )
    return fit_space(config.align.space, *sides).to(torch.float32)


def go_on_from(model: EarlyModel, config: RunConfig, say: Callable[[str], None]) -> str:
    """Put the adapter of ``lora.init`` on; return its digest."""
    folder = Path(config.lora.init or "")
    loaded = load_adapter(model, folder, config.lora.dropout)
    say(
        f"lora.init: going on from {folder}; its blocks, modules, r and alpha stand, not the recipe's"
    )
    if loaded.above:
        say(f"lora.init: {len(loaded.above)} adapters above the loss are left out")
    return sha256(folder / "adapter_model.safetensors")
