"""The work of ``tli-engine export``."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tli_engine.cli._base import check_base_files
from tli_engine.cli._evaluate import open_run
from tli_engine.cli.console import progress, say, warn
from tli_engine.config import RunConfig
from tli_engine.errors import UserError
from tli_engine.evaluate.logit_drift import SAMPLE, LogitDrift, measure_drift, sample_words
from tli_engine.models.blockwise import Held, logits_of
from tli_engine.models.device import choose_device, choose_dtype
from tli_engine.models.files import ModelFiles, open_model
from tli_engine.models.merged import MergedSource, write_dense, write_nf4
from tli_engine.models.model_folder import Written, is_stored_in_nf4, layout_of
from tli_engine.models.peft_format import StoredAdapter, read_adapter
from tli_engine.train.manifest import problems
from tli_engine.train.provenance import versions
from tli_engine.train.run_folder import check_free, create, write_json

_WEIGHTS = "adapter_model.safetensors"


def export_peft(run: Path, strength: float, out: Path) -> None:
    """Copy the adapter, its B matrices times ``strength``; what fails leaves nothing behind."""
    if open_run(run).method == "full":
        raise UserError(f"{run}: trained all weights, no adapter; use --format merged or nf4")
    _check_whole(run, "adapter")
    scaled = _scaled(run / "adapter" / _WEIGHTS, strength)
    with _whole(out):
        for name in ("README.md", "adapter_config.json"):
            shutil.copy(run / "adapter" / name, out / name)
        if strength != 1:
            with (out / "README.md").open("a", encoding="utf-8") as card:
                card.write(f"\nExported at strength {strength:g}: lora_B is scaled by it.\n")
        save_file(scaled, out / _WEIGHTS, metadata={"format": "pt"})
    say(f"written: {out} ({len(scaled)} tensors, strength {strength:g})")


def export_model(run: Path, kind: str, strength: float, out: Path) -> None:
    """Write the run's whole model, ``merged`` or ``nf4``, and how far its logits lie from the run's."""
    config = open_run(run)
    check_free(out, overwrite=False, option="")
    files, adapter = _result(run, config, strength)
    source = MergedSource(files, adapter, strength)
    words = sample_words(files)
    note = _note(files, config) if adapter else None
    if note:
        say(note)
    with _whole(out):
        written = _write(files, source, kind, config.double_quant, out)
        blocks = files.config.num_hidden_layers
        with progress("measure", 2 * blocks) as advance:

            def told(blocks: int) -> None:
                advance(blocks, "blocks")

            expected = logits_of(files, words, adapter, strength, told, held=_held(config))
            actual = logits_of(open_model(str(out)), words, advance=told)
        drift = measure_drift(expected, actual)
        write_json(out / "export.json", _record(files, config, kind, strength, note, drift))
    size = f"{written.nbytes / 1e9:.2f} GB, files of weights: {written.files}"
    say(f"written: {out} ({written.tensors} tensors, {size}, strength {strength:g})")
    print(drift)


def _result(
    run: Path, config: RunConfig, strength: float
) -> tuple[ModelFiles, StoredAdapter | None]:
    """The model that a run's result goes on, and the adapter; all weights are trained without one."""
    if config.method == "lora":
        _check_whole(run, "adapter")
        files = open_model(config.model)
        recorded = (config.provenance or {}).get("base_revision")
        if recorded != files.revision:
            warn(f"{config.model}: is at revision {files.revision}, the run was at {recorded}")
        check_base_files(run, config, files)
        return files, read_adapter(run / "adapter")
    if strength != 1:
        raise UserError(f"{run}: trained all weights; --strength is for an adapter")
    _check_whole(run, "model")
    return open_model(str(run / "model")), None


def _check_whole(run: Path, result: str) -> None:
    """Refuse a result that is not what training wrote, by the run's manifest."""
    for line in problems(run, result):
        raise UserError(f"{line}; restore it, or train anew")


def _held(config: RunConfig) -> Held:
    """The values that the weights had beside which the run trained its adapter."""
    if config.method == "full":
        return Held()
    # a run's folder names the dtype that was chosen
    dtype = choose_dtype(config.dtype, torch.device("cpu"))
    return Held(dtype, config.quantize, config.double_quant)


def _note(files: ModelFiles, config: RunConfig) -> str | None:
    """What the user must know of the weights that the adapter is merged into."""
    stored = "GGUF" if files.gguf_file else "NF4" if is_stored_in_nf4(files) else None
    if stored:
        return f"{files.name}: is {stored}; the adapter is merged into its dequantised values"
    if config.quantize == "nf4":
        return (
            f"{files.name}: was trained beside in NF4 (quantize: nf4); the adapter is merged into "
            f"its own values, and the drift is from NF4's"
        )
    return None


def _write(
    files: ModelFiles, source: MergedSource, kind: str, double_quant: bool, out: Path
) -> Written:
    with progress(kind, len(layout_of(files.config).shapes)) as advance:

        def done(weights: int) -> None:
            advance(weights, "weights")

        if kind == "merged":
            return write_dense(files, source.read, out, advance=done)
        device = choose_device("auto")
        return write_nf4(files, source, out, double_quant=double_quant, device=device, advance=done)


def _record(
    files: ModelFiles,
    config: RunConfig,
    kind: str,
    strength: float,
    note: str | None,
    drift: LogitDrift,
) -> dict[str, Any]:
    """``export.json``."""
    recorded = config.provenance or {}
    quantised = " in NF4" if config.quantize == "nf4" else ""
    against = f"base model{quantised} and adapter" if config.method == "lora" else "trained model"
    return {
        "format": kind,
        "strength": strength,
        "base_model": recorded.get("base_model", config.model),
        "base_revision": files.revision or recorded.get("base_revision"),
        "method": config.method,
        "note": note,
        "logit_drift": {
            **asdict(drift),
            "against": against,
            "sentences": len(SAMPLE),
            "computed_in": "float32 on cpu",
        },
        "versions": versions(),
    }


@contextmanager
def _whole(out: Path) -> Iterator[None]:
    """Make a folder to write to; what fails inside leaves nothing of it behind."""
    there = out.exists()
    create(out, overwrite=False, option="")
    try:
        yield
    except BaseException as e:
        for path in out.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        # a folder that was there, and empty, stays: it may be a link or a mount
        if not there:
            out.rmdir()
        # safetensors' own error: a full disk is not an OSError to it
        if isinstance(e, OSError | SafetensorError):
            raise UserError(f"{out}: cannot be written: {e}; nothing was kept") from None
        raise


def _scaled(path: Path, strength: float) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path}: cannot be read: {e}") from None
    return {
        name: tensor * strength if ".lora_B." in name else tensor
        for name, tensor in tensors.items()
    }
