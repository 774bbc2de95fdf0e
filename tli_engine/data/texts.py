"""Articles and their summaries: XL-Sum or built-in ones by name, or a JSON Lines, CSV or Parquet file."""

import json
import reprlib
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b, sha256
from importlib.resources import files
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, NamedTuple

from tli_engine.config import PRESETS, DataConfig
from tli_engine.data.downloads import download
from tli_engine.data.pairs import is_text
from tli_engine.data.rows import Parquet, Rows, open_rows
from tli_engine.errors import UserError

_XLSUM = "csebuetnlp/xlsum"
# the Hub's own conversion: the main branch holds a script, which is not run
_XLSUM_REVISION = "refs/convert/parquet"
_XLSUM_LICENCE = "CC-BY-NC-SA-4.0"
_XLSUM_LANGUAGES = (
    *("amharic", "arabic", "azerbaijani", "bengali", "burmese", "chinese_simplified"),
    *("chinese_traditional", "english", "french", "gujarati", "hausa", "hindi", "igbo"),
    *("indonesian", "japanese", "kirundi", "korean", "kyrgyz", "marathi", "nepali", "oromo"),
    *("pashto", "persian", "pidgin", "portuguese", "punjabi", "russian", "scottish_gaelic"),
    *("serbian_cyrillic", "serbian_latin", "sinhala", "somali", "spanish", "swahili", "tamil"),
    *("telugu", "thai", "tigrinya", "turkish", "ukrainian", "urdu", "uzbek", "vietnamese"),
    *("welsh", "yoruba"),
)


SplitName = Literal["train", "validation", "test"]


class Article(NamedTuple):
    """An article, its summary, and where they stand, such as ``news.jsonl: line 3``."""

    text: str
    summary: str
    where: str


class Texts:
    """Articles with summaries, read one by one.

    Args:
        name: Of the file or preset.
        rows: The rows, at least one.
        columns: That hold an article and its summary.
        kept: The rows to be used; ``None`` for all.
        licence: Under which they may be used, if that is known.

    Attributes:
        skipped: Rows that were left out because they have no article or no summary.
    """

    def __init__(
        self,
        name: str,
        rows: Rows,
        columns: tuple[str, str],
        *,
        kept: Sequence[int] | None = None,
        licence: str | None = None,
        skipped: int = 0,
    ) -> None:
        self.name = name
        self.licence = licence
        self.skipped = skipped
        self._rows = rows
        self._columns = columns
        self._kept = range(len(rows)) if kept is None else kept
        if rows.columns is not None:
            for column in columns:
                self._require(column, rows.columns, name)
                if rows.columns.count(column) > 1:
                    raise UserError(
                        f"{name}: has several columns {column!r}; rename those that are not to be "
                        f"read, or name others with data.columns"
                    )
        if not len(self._kept):
            raise UserError(f"{name}: no articles; add rows with {' and '.join(columns)}")

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Article:
        """An article.

        Raises:
            UserError: The row is malformed, or has no article or no summary; it is named.
        """
        place, row = self._rows[self._kept[index]]
        where = f"{self.name}: {place}"
        if not isinstance(row, dict):
            columns = " and ".join(map(repr, self._columns))
            raise UserError(f"{where}: must be an object with {columns}, got {type(row).__name__}")
        text, summary = (self._cell(row, column, where) for column in self._columns)
        return Article(text, summary, where)

    def digest(self) -> str:
        """SHA-256 over both columns; reads every article."""
        digest = sha256()
        for i in range(len(self)):
            article = self[i]
            digest.update(json.dumps([article.text, article.summary]).encode() + b"\n")
        return digest.hexdigest()

    def identity(self) -> dict[str, str | int]:
        """Name, count and :meth:`digest`, for JSON."""
        return {"name": self.name, "count": len(self), "sha256": self.digest()}

    def first(self, count: int | None) -> "Texts":
        """The first ``count`` of them, all if there are not as many or it is ``None``."""
        return Texts(
            self.name,
            self._rows,
            self._columns,
            kept=self._kept[:count],
            licence=self.licence,
            skipped=self.skipped,
        )

    def _cell(self, row: dict[str, Any], column: str, where: str) -> str:
        self._require(column, list(row), where)
        value = row[column]
        if not is_text(value):
            raise UserError(
                f"{where}: {column!r} is {reprlib.repr(value)}; every row needs a non-empty "
                f"{' and '.join(self._columns)}"
            )
        return str(value)

    @staticmethod
    def _require(column: str, there: list[str], where: str) -> None:
        if column not in there:
            have = shorten(", ".join(there), 200, placeholder=" …") or "none"
            raise UserError(
                f"{where}: no column {column!r}; the columns are: {have}; name the article's and "
                f"the summary's with data.columns"
            )


def read_texts(data: DataConfig, split: SplitName) -> Texts | None:
    """Open the articles of a split; ``None`` if the configuration names none.

    Training is on ``data.texts``; validation and test on ``data.validation`` and ``data.test`` or,
    where that is not set, a preset's own.

    Raises:
        UserError: No such file, language or column, a file without articles, a failed download.
    """
    source = _source(data, split)
    if source is None:
        return None
    limits = {"train": data.texts_limit, "validation": data.validation_limit, "test": None}
    if source.startswith("xlsum:"):
        return _xlsum(source, split, data.columns).first(limits[split])
    if source.startswith("builtin:"):
        return _builtin(source, split).first(limits[split])
    return Texts(source, open_rows(Path(source), data.columns), data.columns).first(limits[split])


def count_seen(texts: Texts, training: Texts) -> int:
    """How many articles are trained on, too, letter by letter; both are read one by one."""
    # of those that are to be unseen, which are the fewer
    counts = Counter(_hash(texts[i]) for i in range(len(texts)))
    seen = {digest for i in range(len(training)) if (digest := _hash(training[i])) in counts}
    return sum(counts[digest] for digest in seen)


def _hash(article: Article) -> bytes:
    return blake2b(article.text.strip().encode(), digest_size=16).digest()


def has_articles(data: DataConfig, split: SplitName = "validation") -> bool:
    """Whether a configuration names articles of a split."""
    return _source(data, split) is not None


def _source(data: DataConfig, split: SplitName) -> str | None:
    named = {"train": data.texts, "validation": data.validation, "test": data.test}
    if named[split] is None and (data.texts or "").startswith(PRESETS):
        return data.texts
    return named[split]


def _builtin(source: str, split: SplitName) -> Texts:
    """Articles that the package ships, which name their split."""
    resource = files("tli_engine") / "data" / "summaries" / f"{source[len('builtin:') :]}.jsonl"
    if not resource.is_file():
        raise UserError(f"{source}: no such built-in articles; there is builtin:sw-demo")
    rows = open_rows(Path(str(resource)), ("text", "summary"))
    kept = [i for i in range(len(rows)) if rows[i][1].get("split") == split]
    return Texts(f"{source}, {split}", rows, ("text", "summary"), kept=kept)


def _xlsum(source: str, split: str, columns: tuple[str, str]) -> Texts:
    language = source.removeprefix("xlsum:")
    if language not in _XLSUM_LANGUAGES:
        raise UserError(
            f"{source}: XL-Sum has no such language; it has: {', '.join(_XLSUM_LANGUAGES)}"
        )
    paths: list[Path] = []
    revision = _XLSUM_REVISION
    while True:
        file = f"{language}/{split}/{len(paths):04}.parquet"
        path = download(_XLSUM, _XLSUM, file, revision, "dataset")
        if path is None:
            break
        # the other files are of the first one's commit: snapshots/COMMIT/LANGUAGE/SPLIT/FILE
        revision = path.parents[2].name
        paths.append(path)
    if not paths:
        raise UserError(f"{source}: {_XLSUM} on the Hub has no {file}; give a file of articles")
    rows = Parquet(paths, columns)
    name = f"{source}, {split}"
    kept = _not_empty(rows, columns)
    return Texts(
        name, rows, columns, kept=kept, licence=_XLSUM_LICENCE, skipped=len(rows) - len(kept)
    )


def _not_empty(rows: Parquet, columns: tuple[str, str]) -> list[int]:
    """Rows with an article and a summary; all, if a column is not there."""
    from pyarrow import compute

    if not {*columns} <= {*(rows.columns or ())}:
        return list(range(len(rows)))
    kept: list[int] = []
    for start, batch in rows.batches():
        full = [
            compute.fill_null(compute.not_equal(compute.utf8_trim_whitespace(batch[c]), ""), False)
            for c in columns
        ]
        both = compute.and_(*full).to_pylist()
        kept += [start + i for i, is_full in enumerate(both) if is_full]
    return kept
