"""What a run was made from: versions, data hashes, the digest of the frozen weights."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tli_engine import __version__
from tli_engine.data.pairs import PairList
from tli_engine.models.early import EarlyModel
from tli_engine.models.files import ModelFiles

_PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Versions of what computes, those that are installed."""
    found = {"tli-engine": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def provenance(pairs: dict[str, PairList], files: ModelFiles, model: EarlyModel) -> dict[str, Any]:
    """The ``provenance`` section of a run's ``config.yaml``."""
    return {
        "versions": versions(),
        "base_model": files.hub_id,
        "base_revision": files.revision,
        "base_sha256": model.base_digest(),
        "pairs": {name: {"count": len(p), "sha256": p.digest()} for name, p in pairs.items()},
    }
