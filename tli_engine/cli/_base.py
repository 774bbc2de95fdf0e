"""Is the base model that a finished run is held beside the one that it was trained on?"""

from collections.abc import Callable
from pathlib import Path

from tli_engine.cli.console import warn
from tli_engine.config import RunConfig
from tli_engine.data.splits import read_run_pairs, tokenize_splits, tokens_of
from tli_engine.errors import UserError
from tli_engine.models.blockwise import Held, base_digest_of
from tli_engine.models.device import choose_device, choose_dtype
from tli_engine.models.files import ModelFiles


def check_base(folder: Path, config: RunConfig, digest: Callable[[], str]) -> None:
    """Refuse a base model whose weights are not those that a run began with.

    Args:
        folder: Of the run.
        config: Of the run.
        digest: Makes the base's digest, as the run has recorded it.

    Raises:
        UserError: It is another.
    """
    recorded = (config.provenance or {}).get("base_sha256")
    if recorded is None:
        warn(f"{folder}: has no digest of its base; {config.model} is taken as it is")
        return
    found = digest()
    if found != recorded:
        raise UserError(
            f"{config.model}: its weights are not those that {folder} was trained on (SHA-256 "
            f"{found[:12]}…, not {recorded[:12]}…); put those back, or say in the run's config.yaml "
            f"where they are (model)"
        )


def check_base_files(
    folder: Path, config: RunConfig, files: ModelFiles, device: str | None = None
) -> None:
    """:func:`check_base` of a model that is not loaded: it is read, one block in memory at a time.

    Args:
        folder: Of the run.
        config: Of the run.
        files: The base model, opened.
        device: Where NF4 weights are quantised; by default on what is there.

    Raises:
        UserError: It is another.
    """
    depth, tokens = files.config.num_hidden_layers, None
    if config.objective == "align":
        # what such a run holds, and records: early blocks, and the rows of its words' tokens
        pairs = read_run_pairs(config.data)
        recorded = (config.provenance or {}).get("pairs", {})
        if {n: p.digest() for n, p in pairs.items()} != {
            n: p["sha256"] for n, p in recorded.items()
        }:
            warn(f"{config.model}: cannot be held against the run's record, whose pairs are others")
            return
        depth = config.align.layer
        tokens = tokens_of(tokenize_splits(pairs, files.tokenizer, config.words))
    where = choose_device(device or "auto")
    held = Held(choose_dtype(config.dtype, where), config.quantize, config.double_quant)

    def digest() -> str:
        return base_digest_of(files, depth, held, device=where, token_ids=tokens)

    check_base(folder, config, digest)
