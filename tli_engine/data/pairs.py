"""Word pairs in two languages, from JSON, JSONL, CSV, TSV or Parquet."""

import csv
import io
import json
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from tli_engine.errors import UserError

Row = dict[str, Any]


@dataclass(frozen=True)
class PairList:
    """Translations: ``source[i]`` in ``languages[0]`` means ``target[i]`` in ``languages[1]``."""

    languages: tuple[str, str]
    source: tuple[str, ...]
    target: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, rows: slice) -> "PairList":
        return PairList(self.languages, self.source[rows], self.target[rows])

    def digest(self) -> str:
        """SHA-256 over both columns."""
        return sha256(json.dumps([self.source, self.target]).encode()).hexdigest()


def normalise(word: str) -> str:
    """The form in which words are compared: NFC, one space between words, case folded."""
    return " ".join(unicodedata.normalize("NFC", word).split()).casefold()


def _decode(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data[: e.start].count(b"\n") + 1
        raise UserError(f"{path}: line {line}: not UTF-8; save the file as UTF-8") from None


def _read_json(data: bytes, path: Path) -> list[Row]:
    try:
        value = json.loads(_decode(data, path))
    except json.JSONDecodeError as e:
        raise UserError(f"{path}: line {e.lineno}: not JSON: {e.msg}") from None
    if not isinstance(value, list):
        raise UserError(f"{path}: must be a list of objects such as {{'swahili': …, 'english': …}}")
    return value


def _read_jsonl(data: bytes, path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(_decode(data, path).splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as e:
                raise UserError(f"{path}: line {number}: not JSON: {e.msg}") from None
    return rows


def _read_delimited(data: bytes, path: Path, delimiter: str) -> list[Row]:
    text = io.StringIO(_decode(data, path), newline="")
    try:
        return list(csv.DictReader(text, delimiter=delimiter, strict=True))
    except csv.Error as e:
        raise UserError(f"{path}: not {path.suffix[1:].upper()}: {e}") from None


def _read_parquet(data: bytes, path: Path) -> list[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    try:
        rows: list[Row] = read_table(io.BytesIO(data)).to_pylist()
    except ArrowException as e:
        raise UserError(f"{path}: not a Parquet file: {e}") from None
    return rows


_READERS: dict[str, Callable[[bytes, Path], list[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": lambda data, path: _read_delimited(data, path, ","),
    ".tsv": lambda data, path: _read_delimited(data, path, "\t"),
    ".parquet": _read_parquet,
}


def read_rows(file: str) -> tuple[Path, list[Row]]:
    """Return the path and the rows of a file of word pairs, or of ``builtin:sw-en``.

    Raises:
        UserError: No such file, an unknown suffix, or a malformed line, which is named.
    """
    if file.startswith("builtin:"):
        resource = (
            files("tli_engine") / "data" / "lexicons" / f"{file.removeprefix('builtin:')}.csv"
        )
        if not resource.is_file():
            raise UserError(f"{file}: no such built-in lexicon; there is builtin:sw-en")
        with as_file(resource) as path:
            return Path(file), _READERS[".csv"](path.read_bytes(), path)
    path = Path(file)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(_READERS)
        raise UserError(f"{path}: unknown kind of file {path.suffix!r}; known are {known}")
    try:
        data = path.read_bytes()
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from None
    return path, reader(data, path)


def _cell(row: Any, column: str, where: str) -> str:
    if not isinstance(row, dict):
        raise UserError(f"{where}: must be an object with {column!r}, got {type(row).__name__}")
    if column not in row:
        have = ", ".join(str(k) for k in row if k is not None)
        raise UserError(f"{where}: no column {column!r}; the columns are: {have}")
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {column!r} is {value!r}; every pair needs two non-empty words")
    return " ".join(unicodedata.normalize("NFC", value).split())


def _in_split(row: Any, split: str | None) -> bool:
    return split is None or not isinstance(row, dict) or row.get("split") in (None, split)


def read_pairs(file: str, languages: tuple[str, str], split: str | None = None) -> PairList:
    """Read word pairs.

    Args:
        file: Path of a JSON, JSONL, CSV, TSV or Parquet file, or ``builtin:sw-en``.
        languages: The columns of the two languages.
        split: Keep only the rows whose ``split`` column says so; rows without one are kept.

    Raises:
        UserError: A missing file, column or word, a malformed line, or no pair at all.
    """
    path, rows = read_rows(file)
    # line numbers of a CSV or TSV count its header
    first = 2 if path.suffix.lower() in (".csv", ".tsv") or file.startswith("builtin:") else 1
    cells: list[tuple[str, str]] = []
    for number, row in enumerate(rows, first):
        if _in_split(row, split):
            where = f"{path}: row {number}"
            cells.append((_cell(row, languages[0], where), _cell(row, languages[1], where)))
    if not cells:
        which = f" of split {split!r}" if split else ""
        raise UserError(f"{path}: no word pairs{which}; add rows with {' and '.join(languages)}")
    source, target = zip(*cells, strict=True)
    return PairList(languages, source, target)


def has_split(file: str, split: str) -> bool:
    """Whether a row of the file is marked as belonging to ``split``."""
    return any(isinstance(row, dict) and row.get("split") == split for row in read_rows(file)[1])


def read_splits(
    file: str, control: str | None, languages: tuple[str, str]
) -> tuple[PairList, PairList | None]:
    """Return training and control pairs; control rows may live in ``file`` itself, by ``split``."""
    train = read_pairs(file, languages, "train")
    if control is not None:
        return train, read_pairs(control, languages, "control")
    return train, read_pairs(file, languages, "control") if has_split(file, "control") else None


def group_ids(words: Iterable[str]) -> list[int]:
    """Number the distinct words, compared by :func:`normalise`, in order of appearance."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(normalise(w), len(numbers)) for w in words]


def parse_languages(text: str) -> tuple[str, str]:
    """Two column names from ``swahili,english``."""
    names = [name.strip() for name in text.split(",")]
    if len(names) != 2 or not all(names) or names[0] == names[1]:
        raise UserError(f"--languages {text}: must be two column names, e.g. swahili,english")
    return names[0], names[1]
