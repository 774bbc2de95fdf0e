"""The folder of a run: what is written where, and never half."""

import json
import math
import os
import shutil
import tempfile
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tli_engine.errors import UserError

# the first file of a run
_CONFIG = "config.yaml"


def default_folder(recipe: str) -> Path:
    """``runs/<recipe>-<UTC time>``."""
    return Path("runs") / f"{recipe}-{datetime.now(UTC):%Y%m%d-%H%M%S}"


def check_free(folder: Path, overwrite: bool, option: str = ", or --overwrite") -> None:
    """Refuse a folder that holds something, unless it may be overwritten, or cannot be written.

    Args:
        folder: To be written to.
        overwrite: Whether an earlier run there may go.
        option: How the message names the option that lets it go; empty if there is none.

    Raises:
        UserError: It is a file, not empty, or not writable.
    """
    check_writable(folder)
    # of a run that was killed as it began
    begun = folder / part_of(_CONFIG)
    if folder.is_dir() and any(path != begun for path in folder.iterdir()):
        if not overwrite:
            raise UserError(f"{folder}: is not empty; choose another folder{option}")
        if not _is_run(folder):
            raise UserError(f"{folder}: is not a run folder; --overwrite leaves it alone")


def check_writable(folder: Path) -> None:
    """Refuse a folder that is a file, or that cannot be made or written to.

    Raises:
        UserError: It is so.
    """
    probe = folder
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: is a file; choose another folder")
        probe = next(p for p in (folder, *folder.parents) if p.exists())
        # asks the file system: a privileged user passes os.access on a read-only mount
        with tempfile.TemporaryFile(dir=probe):
            pass
    except OSError as e:
        raise UserError(
            f"{probe}: cannot be written: {e.strerror}; choose another folder"
        ) from None


def _is_run(folder: Path) -> bool:
    """Whether :func:`create` and a run made it: any project may have a ``config.yaml``."""
    config = folder / _CONFIG
    return config.is_file() and b"\nprovenance:" in config.read_bytes()


def create(folder: Path, overwrite: bool, option: str = ", or --overwrite") -> None:
    """Make the folder, empty.

    Raises:
        UserError: As :func:`check_free`.
    """
    check_free(folder, overwrite, option)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # the folder itself stays: it may be a link, a mount or the current one
        for entry in folder.iterdir() if overwrite else ():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
    except OSError as e:
        raise UserError(f"{folder}: cannot be made: {e.strerror}; choose another folder") from None


def part_of(name: str) -> str:
    """What a file is called until it is whole."""
    return f".{name}.part"


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(part_of(path.name))
    try:
        with part.open("w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    except OSError as e:
        raise UserError(f"{path}: cannot be written: {e.strerror}") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all; NaN and infinity become null."""
    write_text(path, json.dumps(plain_json(value), indent=1, ensure_ascii=False) + "\n")


def plain_json(value: Any) -> Any:
    """The value with NaN and infinity, which JSON lacks, as null."""
    if isinstance(value, dict):
        return {k: plain_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
