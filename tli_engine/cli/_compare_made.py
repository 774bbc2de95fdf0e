"""What each part of a comparison was made from; parts that were made otherwise are not compared."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tli_engine.config import RunConfig, explain, read_yaml, resolve_config
from tli_engine.data.splits import read_run_pairs
from tli_engine.data.texts import Texts, read_texts
from tli_engine.errors import ConfigError, UserError
from tli_engine.evaluate.compare.gather import MADE_FROM
from tli_engine.evaluate.records import unreadable
from tli_engine.models.files import ModelFiles, open_config

# where a run was made, and what of its configuration follows from that
_PLACE = ("device", "dtype", "provenance")
# what is left of compare.seconds; how summaries are scored; both are the comparison's to say
_GIVEN = ("train.seconds", "data.language")
_WHAT = {"train": "trained on other articles", "validation": "chosen by other articles"}
_BEGINNING = {
    "base_sha256": "base model's weights",
    "tokens_sha256": "tokenizer",
    "lora_init_sha256": "adapter (lora.init)",
}


class MadeFrom(BaseModel):
    """What ``result.json`` says of a part's making.

    Attributes:
        configs: Of its runs, each trained on from the one before, without where they were made.
        dtype: That they were computed in.
        nf4: Whether the base model's weights were held in NF4.
        base_sha256: Of the base model's weights, as they were held.
        tokens_sha256: By split, of the articles' tokens; None of the part that trains nothing.
        lora_init_sha256: Of the adapter that the first run went on from, if it did.
        texts: SHA-256 by split of the articles that it was trained on and chosen by.
        pairs: SHA-256 by split of the word pairs that it was measured on, if it was.
    """

    model_config = ConfigDict(frozen=True)

    configs: Annotated[list[dict[str, Any]], Field(min_length=1)]
    dtype: str
    nf4: bool
    base_sha256: str
    # earlier versions, which may have trained it, did not record it
    tokens_sha256: dict[str, str] | None = None
    lora_init_sha256: str | None = None
    texts: dict[Literal["train", "validation"], str] = {}
    pairs: dict[str, str] | None = None


def made_from(folders: Sequence[Path], pairs: Mapping[str, str], *, nf4: bool) -> dict[str, Any]:
    """Of a part's runs, the last one the part's own: what ``result.json`` says of their making.

    Args:
        folders: Of the runs.
        pairs: Digests of the word pairs that the part was measured on.
        nf4: As :func:`held_in_nf4`.

    Raises:
        UserError: A run was trained on other pairs.
    """
    recorded = [read_yaml(folder / "config.yaml") for folder in folders]
    for folder, values in zip(folders, recorded, strict=True):
        trained = {name: p["sha256"] for name, p in values["provenance"]["pairs"].items()}
        if trained and trained != dict(pairs):
            raise UserError(f"{folder}: was trained on other word pairs than there are now")
    last = recorded[-1]["provenance"]
    made = MadeFrom(
        configs=[_without_place(values) for values in recorded],
        dtype=recorded[-1]["dtype"],
        nf4=nf4,
        base_sha256=last["base_sha256"],
        tokens_sha256=last.get("tokens_sha256"),
        # a later run's is the one before's adapter
        lora_init_sha256=recorded[0]["provenance"].get("lora_init_sha256"),
        texts={split: t["sha256"] for split, t in last["texts"].items()},
        pairs=dict(pairs),
    )
    return made.model_dump(mode="json")


def made_from_base(config: RunConfig, dtype: str, base_sha256: str, *, nf4: bool) -> dict[str, Any]:
    """Of the part that trains nothing."""
    configs = [_without_place(config.model_dump(mode="json"))]
    made = MadeFrom(configs=configs, dtype=dtype, nf4=nf4, base_sha256=base_sha256)
    return made.model_dump(mode="json")


def held_in_nf4(config: RunConfig, files: ModelFiles) -> bool:
    """Whether a run holds the weights of its base model, which is opened, in NF4."""
    if config.quantize != "auto" or files.gguf_file is not None:
        return config.quantize == "nf4"
    _, stored = open_config(files.name, files.folder)
    return stored is not None


def read_made(path: Path, result: Mapping[str, Any], runs: int, mend: str) -> MadeFrom | None:
    """What a part's figures say of its making; ``None`` if an earlier version made it.

    Args:
        path: Of the figures.
        result: The figures.
        runs: That the part is made of.
        mend: What to do about damaged ones.

    Raises:
        UserError: They are damaged.
    """
    if MADE_FROM not in result:
        return None
    try:
        made = MadeFrom.model_validate(result[MADE_FROM])
        if len(made.configs) != runs:
            raise ConfigError(f"{MADE_FROM}: {len(made.configs)} of {runs} configs")
        for number, recorded in enumerate(made.configs):
            resolve_config(recorded | {"dtype": made.dtype}, f"{MADE_FROM}.configs.{number}")
    except ValidationError as e:
        line = explain(e.errors()[0], MadeFrom)
        raise unreadable(path, f"{MADE_FROM}: {line}", mend) from None
    except ConfigError as e:
        raise unreadable(path, str(e), mend) from None
    return made


def pair_digests(config: RunConfig) -> dict[str, str]:
    """SHA-256 of the word pairs of each split."""
    return {name: pairs.digest() for name, pairs in read_run_pairs(config.data).items()}


class Present:
    """What there is now: the files that the comparison's configuration names."""

    def __init__(self, shared: RunConfig) -> None:
        self._shared = shared

    @cached_property
    def articles(self) -> dict[str, Texts]:
        """The articles of each split that is trained on or chosen by, opened.

        Raises:
            UserError: They cannot be read.
        """
        opened = {split: read_texts(self._shared.data, split) for split in ("train", "validation")}
        return {split: texts for split, texts in opened.items() if texts}

    @cached_property
    def texts(self) -> dict[str, str]:
        """SHA-256 of the articles of each split."""
        return {split: texts.digest() for split, texts in self.articles.items()}

    @cached_property
    def pairs(self) -> dict[str, str]:
        """As :func:`pair_digests`."""
        return pair_digests(self._shared)


def check_made(
    folder: Path, made: MadeFrom, configs: Sequence[RunConfig], present: Present
) -> None:
    """Refuse a part that was made with another configuration, or of other articles or pairs.

    Args:
        folder: Of the part.
        made: What its figures say of that.
        configs: Of its runs, as they would be now.
        present: The files that there are now.

    Raises:
        UserError: It was; the key or the file is named.
    """
    for recorded, config in zip(made.configs, configs, strict=True):
        check_begun(folder, recorded | {"dtype": made.dtype}, config)
    for split, digest in made.texts.items():
        if present.texts.get(split) != digest:
            raise UserError(f"{folder}: was {_WHAT[split]} than there are now")
    if made.pairs is not None and made.pairs != present.pairs:
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


def check_alike(parts: Mapping[Path, tuple[MadeFrom, Sequence[RunConfig]]]) -> None:
    """Refuse parts that began with other weights, tokens or adapters although configured alike.

    Args:
        parts: By a part's folder what its figures say, and its runs' configurations as they would be
            now: in two places one adapter's path is two, and two adapters' may end alike.

    Raises:
        UserError: Two did; they are named.
    """
    first: dict[str, tuple[Path, Any]] = {}
    for folder, (made, configs) in parts.items():
        config = configs[-1]
        alike = {
            "base_sha256": [made.dtype, config.quantize, config.double_quant],
            "tokens_sha256": [config.prompt.model_dump(mode="json"), config.sft.context],
            "lora_init_sha256": [configs[0].lora.init],
        }
        for what, like in alike.items():
            digest = getattr(made, what)
            if digest is None:
                continue
            other, expected = first.setdefault(json.dumps([what, like]), (folder, digest))
            if digest != expected:
                raise UserError(
                    f"{folder} and {other} were made from another {_BEGINNING[what]}; make both "
                    "again from one"
                )


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
