"""Manifests: which files make up a folder, with their SHA-256; written last, checked on reading."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from tli_engine.errors import UserError

MANIFEST = "manifest.json"


def write_manifest(folder: Path, files: Iterable[str]) -> None:
    """Write ``manifest.json`` over the named files, whole or not at all."""
    entries = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        for name in sorted(files)
    }
    part = folder / f".{MANIFEST}.part"
    with part.open("w", encoding="utf-8") as f:
        json.dump({"files": entries}, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    part.replace(folder / MANIFEST)


def problems(folder: Path, within: str = "") -> list[str]:
    """What is wrong with a folder, held against its manifest; empty if it is whole.

    Only files in the folder ``within`` it are looked at, if one is named.

    Raises:
        UserError: A file that the manifest names cannot be read.
    """
    path = folder / MANIFEST
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        expected = {str(name): (e["bytes"], e["sha256"]) for name, e in files.items()}
    except FileNotFoundError:
        return [f"{folder}: no {MANIFEST}; it was not finished"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        return [f"{path}: cannot be read: {e!r}"]
    found = []
    for name, (size, digest) in expected.items():
        if within and not name.startswith(f"{within}/"):
            continue
        try:
            found += _unlike(folder / name, size, digest)
        except OSError as e:
            raise UserError(f"{folder / name}: cannot be read: {e.strerror or e}") from None
    return found


def _unlike(file: Path, size: int, digest: str) -> list[str]:
    if not file.is_file():
        return [f"{file}: is missing"]
    if file.stat().st_size != size:
        return [f"{file}: has {file.stat().st_size} bytes, not {size}"]
    return [] if sha256(file) == digest else [f"{file}: its SHA-256 is not the manifest's"]


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
