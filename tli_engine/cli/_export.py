"""The work of ``tli-engine export``."""

import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tli_engine.cli._evaluate import open_run
from tli_engine.cli.console import say
from tli_engine.errors import UserError
from tli_engine.train.run_folder import create

_WEIGHTS = "adapter_model.safetensors"


def export_peft(run: Path, strength: float, out: Path) -> None:
    """Copy the adapter, its B matrices times ``strength``; what fails leaves nothing behind."""
    open_run(run)
    scaled = _scaled(run / "adapter" / _WEIGHTS, strength)
    there = out.exists()
    create(out, overwrite=False, option="")
    try:
        for name in ("README.md", "adapter_config.json"):
            shutil.copy(run / "adapter" / name, out / name)
        if strength != 1:
            with (out / "README.md").open("a", encoding="utf-8") as card:
                card.write(f"\nExported at strength {strength:g}: lora_B is scaled by it.\n")
        save_file(scaled, out / _WEIGHTS, metadata={"format": "pt"})
    except BaseException as e:
        for path in out.iterdir():
            path.unlink()
        # a folder that was there, and empty, stays: it may be a link or a mount
        if not there:
            out.rmdir()
        # safetensors' own error: a full disk is not an OSError to it
        if isinstance(e, OSError | SafetensorError):
            raise UserError(f"{out}: cannot be written: {e}; nothing was kept") from None
        raise
    say(f"written: {out} ({len(scaled)} tensors, strength {strength:g})")


def _scaled(path: Path, strength: float) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path}: cannot be read: {e}") from None
    return {
        name: tensor * strength if ".lora_B." in name else tensor
        for name, tensor in tensors.items()
    }
