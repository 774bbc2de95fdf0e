"""What ``tli-engine evaluate`` measures of a run on summaries: the loss on unseen articles."""

from pathlib import Path
from typing import Any

from tli_engine.cli.console import progress, warn
from tli_engine.config import RunConfig
from tli_engine.data.examples import ExampleTokenizer, tokenise
from tli_engine.data.packing import rows_of_epoch
from tli_engine.data.texts import read_texts
from tli_engine.errors import UserError
from tli_engine.models.adapters import adapters_off
from tli_engine.models.causal import CausalModel, load_causal
from tli_engine.models.device import choose_device, choose_dtype
from tli_engine.models.files import ModelFiles, open_model
from tli_engine.models.peft_format import load_adapter
from tli_engine.train.sft_prepare import fuse_for_texts
from tli_engine.train.sft_step import mean_loss


def validation_loss(folder: Path, config: RunConfig, device: str | None) -> dict[str, Any]:
    """Cross-entropy before and after training, nats a token, on ``data.validation``.

    Raises:
        UserError: The run has no articles to measure on.
    """
    texts = read_texts(config.data, "validation")
    if texts is None:
        raise UserError(f"{folder}: has no data.validation to measure the loss on")
    recorded = (config.provenance or {}).get("texts", {}).get("validation", {})
    if recorded and recorded["sha256"] != texts.digest():
        warn(f"{texts.name}: the validation articles are not those of the run any more")
    base = open_model(config.model)
    tokenizer = ExampleTokenizer(base.tokenizer, config.prompt, config.sft.context)
    with progress(f"tokenise {texts.name}", len(texts)) as advance:
        store = tokenise(texts, tokenizer, lambda n: advance(n, ""))
    rows = rows_of_epoch(store.lengths, config.sft.context, 0, 0, config.sft.packing)
    size = config.train.batch_size
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    model = _load(base, config, device)
    if config.method == "full":
        before = mean_loss(model, store, batches)
        del model
        after = mean_loss(_load(open_model(str(folder / "model")), config, device), store, batches)
    else:
        load_adapter(model.early, folder / "adapter")
        fuse_for_texts(model, config)
        after = mean_loss(model, store, batches)
        with adapters_off(model.early):
            before = mean_loss(model, store, batches)
    print(f"loss on {len(store)} unseen articles: {before:.4f} → {after:.4f} nats a token")
    return {"before": before, "after": after, "articles": len(store)}


def _load(files: ModelFiles, config: RunConfig, device: str | None) -> CausalModel:
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
