"""What each part of a comparison was made from; parts that were made otherwise are not compared."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tli_engine.cli.console import warn
from tli_engine.config import RunConfig, read_yaml, resolve_config
from tli_engine.data.splits import read_run_pairs
from tli_engine.data.texts import read_texts
from tli_engine.errors import UserError

# in a part's figures
MADE_FROM = "made_from"
# where a run was made, and what of its configuration follows from that
_PLACE = ("device", "dtype", "provenance")
_WHAT = {"train": "trained on other articles", "validation": "chosen by other articles"}


def made_from(folders: Sequence[Path], pairs: Mapping[str, str]) -> dict[str, Any]:
    """Of a part's runs, the last one the part's own: what ``result.json`` says of their making.

    Args:
        folders: Of the runs.
        pairs: Digests of the word pairs that the part was measured on.

    Raises:
        UserError: A run was trained on other pairs.
    """
    recorded = [read_yaml(folder / "config.yaml") for folder in folders]
    for folder, values in zip(folders, recorded, strict=True):
        trained = {name: p["sha256"] for name, p in values["provenance"]["pairs"].items()}
        if trained and trained != dict(pairs):
            raise UserError(f"{folder}: was trained on other word pairs than there are now")
    last = recorded[-1]["provenance"]
    return {
        "configs": [_without_place(values) for values in recorded],
        "dtype": recorded[-1]["dtype"],
        "base_sha256": last["base_sha256"],
        # earlier versions, which may have trained it, did not record it
        "tokens_sha256": last.get("tokens_sha256"),
        "texts": {split: t["sha256"] for split, t in last["texts"].items()},
        "pairs": dict(pairs),
    }


def made_from_base(config: RunConfig, dtype: str, base_sha256: str) -> dict[str, Any]:
    """Of the part that trains nothing."""
    configs = [_without_place(config.model_dump(mode="json"))]
    return {"configs": configs, "dtype": dtype, "base_sha256": base_sha256}


def pair_digests(config: RunConfig) -> dict[str, str]:
    """SHA-256 of the word pairs of each split."""
    return {name: pairs.digest() for name, pairs in read_run_pairs(config.data).items()}


class Present:
    """What there is now: the files that the comparison's configuration names."""

    def __init__(self, shared: RunConfig) -> None:
        self._shared = shared

    @cached_property
    def texts(self) -> dict[str, str]:
        """SHA-256 of the articles of each split that is trained on or chosen by."""
        splits = {split: read_texts(self._shared.data, split) for split in ("train", "validation")}
        return {split: texts.digest() for split, texts in splits.items() if texts}

    @cached_property
    def pairs(self) -> dict[str, str]:
        """As :func:`pair_digests`."""
        return pair_digests(self._shared)


def check_made(
    folder: Path, result: Mapping[str, Any], configs: Sequence[RunConfig], present: Present
) -> None:
    """Refuse a part that was made with another configuration, or of other articles or pairs.

    Args:
        folder: Of the part.
        result: Its figures.
        configs: Of its runs, as they would be now.
        present: The files that there are now.

    Raises:
        UserError: It was; the key or the file is named.
    """
    made = result.get(MADE_FROM)
    if made is None:
        warn(f"{folder}: an earlier version made it, which did not record from what")
        return
    for recorded, config in zip(made["configs"], configs, strict=True):
        check_begun(folder, recorded | {"dtype": made["dtype"]}, config)
    for split, digest in made.get("texts", {}).items():
        if present.texts.get(split) != digest:
            raise UserError(f"{folder}: was {_WHAT[split]} than there are now")
    if made.get("pairs", present.pairs) != present.pairs:
        raise UserError(f"{folder}: was measured on other word pairs than there are now")


def check_begun(folder: Path, recorded: Mapping[str, Any], config: RunConfig) -> None:
    """Refuse a run that was begun with another configuration than it would be now.

    Raises:
        UserError: It was; the key is named.
    """
    begun = resolve_config(dict(recorded), str(folder))
    now, then = (_without_place(c.model_dump(mode="json")) for c in (config, begun))
    key = difference(now, then, growing=_GIVEN)
    if key is None and config.dtype not in ("auto", begun.dtype):
        key = "dtype"
    if key is not None:
        raise UserError(f"{folder}: was made with another {key}; move it away to make it again")


# what is left of compare.seconds; how summaries are scored; both are the comparison's to say
_GIVEN = ("train.seconds", "data.language")


def check_alike(made: Mapping[Path, Mapping[str, Any]]) -> None:
    """Refuse parts that began with other weights or tokens although they were configured alike.

    Args:
        made: What each part's figures say, by its folder.

    Raises:
        UserError: Two did; they are named.
    """
    first: dict[str, tuple[Path, Any]] = {}
    for folder, found in made.items():
        config = found["configs"][-1]
        held = [found["dtype"], config["quantize"], config["double_quant"]]
        read = [config["prompt"], config["sft"]["context"]]
        for what, like in (("base", held), ("tokens", read)):
            digest = found.get(f"{what}_sha256")
            if digest is None:
                continue
            other, expected = first.setdefault(json.dumps([what, like]), (folder, digest))
            if digest != expected:
                raise UserError(
                    f"{folder} and {other} were made from another {_MODEL[what]}; make both again "
                    "from one"
                )


_MODEL = {"base": "base model's weights", "tokens": "tokenizer"}


def difference(
    values: Any, recorded: Any, key: str = "", growing: Sequence[str] = ()
) -> str | None:
    """The first key whose values differ, if one does that is not among ``growing``."""
    if not isinstance(values, dict) or not isinstance(recorded, dict):
        return None if key in growing or _is_same(values, recorded) else key
    for name in sorted(values.keys() | recorded.keys()):
        inner = f"{key}.{name}" if key else name
        found = difference(values.get(name), recorded.get(name), inner, growing)
        if found is not None:
            return found
    return None


def _is_same(value: Any, recorded: Any) -> bool:
    """Whether two values are equal, or name a file that lies elsewhere on another machine."""
    if isinstance(value, str) and isinstance(recorded, str):
        paths = Path(value), Path(recorded)
        # of a model that is not here the name is as it was given
        if any(path.is_absolute() for path in paths):
            return paths[0].name == paths[1].name
    return bool(value == recorded)


def _without_place(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in _PLACE}
