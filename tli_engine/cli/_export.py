"""The work of ``tli-engine export``."""

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from tli_engine.cli._evaluate import open_run
from tli_engine.cli.console import say
from tli_engine.errors import UserError
from tli_engine.train.run_folder import create

_WEIGHTS = "adapter_model.safetensors"


def export_peft(run: Path, strength: float, out: Path) -> None:
    """Copy the adapter, its B matrices times ``strength``."""
    open_run(run)
    tensors = load_file(run / "adapter" / _WEIGHTS)
    scaled = {
        name: tensor * strength if ".lora_B." in name else tensor
        for name, tensor in tensors.items()
    }
    create(out, overwrite=False)
    try:
        for name in ("README.md", "adapter_config.json"):
            shutil.copy(run / "adapter" / name, out / name)
        if strength != 1:
            with (out / "README.md").open("a", encoding="utf-8") as card:
                card.write(f"\nExported at strength {strength:g}: lora_B is scaled by it.\n")
        save_file(scaled, out / _WEIGHTS, metadata={"format": "pt"})
    except OSError as e:
        shutil.rmtree(out)
        raise UserError(f"{out}: cannot be written: {e.strerror}; nothing was kept") from None
    say(f"written: {out} ({len(scaled)} tensors, strength {strength:g})")
