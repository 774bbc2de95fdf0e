"""Word pairs in two languages, from JSON, JSONL, CSV, TSV or Parquet."""

import csv
import io
import json
import reprlib
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import as_file, files
from pathlib import Path
from textwrap import shorten
from typing import Any

from tli_engine.errors import UserError

# what divides fields, by what it is called
_DELIMITERS = {";": "';'", "\t": "tabs", "|": "'|'", ",": "commas"}
# letters of a header that are shown
_SHOWN = 80

# where a row stands, such as "line 3", and what stands there
Row = tuple[str, Any]


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


def parse_json(text: str, path: Path, line: int = 1) -> Any:
    """Parse JSON that begins at ``line`` of the file.

    Raises:
        UserError: It is not JSON; the line is named.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise UserError(f"{path}: line {line + e.lineno - 1}: not JSON: {e.msg}") from None
    except (ValueError, RecursionError) as e:
        # a number of thousands of digits, brackets thousands deep
        raise UserError(f"{path}: line {line}: JSON that cannot be read: {e}") from None


def _read_json(data: bytes, path: Path) -> list[Row]:
    value = parse_json(_decode(data, path), path)
    if not isinstance(value, list):
        raise UserError(f"{path}: must be a list of objects such as {{'swahili': …, 'english': …}}")
    return [(f"row {number}", row) for number, row in enumerate(value, 1)]


def _read_jsonl(data: bytes, path: Path) -> list[Row]:
    # not splitlines: U+2028 and its like may stand inside a JSON string
    lines = enumerate(_decode(data, path).split("\n"), 1)
    return [
        (f"line {number}", parse_json(line, path, number)) for number, line in lines if line.strip()
    ]


def check_delimiter(header: str, delimiter: str, where: str) -> None:
    """Refuse a header that is one column because the file has another delimiter.

    Args:
        header: The first record, or line, as one string.
        delimiter: That is read.
        where: Its file and line.

    Raises:
        UserError: Another delimiter is in it, and the one that is read is not.
    """
    other = next((d for d in _DELIMITERS if d in header), None)
    if delimiter in header or other is None:
        return
    found, read = (_DELIMITERS[d] for d in (other, delimiter))
    shown = header if len(header) <= _SHOWN else f"{header[:_SHOWN]}…"
    raise UserError(
        f"{where}: its header is {shown!r}: is it delimited by {found}? {read} are read; save the file "
        f"with {read}"
    )


def _read_delimited(data: bytes, path: Path, delimiter: str) -> list[Row]:
    text = io.StringIO(_decode(data, path), newline="")
    records = csv.reader(text, delimiter=delimiter, strict=True, skipinitialspace=True)
    header: list[str] = []
    rows: list[Row] = []
    line = 1
    try:
        for fields in records:
            place, line = f"line {line}", records.line_num + 1
            if header and len(fields) > len(header):
                raise UserError(
                    f"{path}: {place}: has {len(fields)} fields, the header has {len(header)}; "
                    f"quote a field that holds {delimiter!r}"
                )
            if header and fields:
                # a record may leave out its last fields
                missing = [""] * (len(header) - len(fields))
                rows.append((place, dict(zip(header, [*fields, *missing], strict=True))))
            if len(fields) == 1 and not header:
                check_delimiter(fields[0], delimiter, f"{path}: {place}")
            header = header or [field.strip() for field in fields]
    except csv.Error as e:
        if not header:
            # of another delimiter quotes stand where they may not
            first = text.getvalue().splitlines()[line - 1]
            check_delimiter(first, delimiter, f"{path}: line {line}")
        kind = path.suffix[1:].upper()
        raise UserError(f"{path}: line {line}: not {kind}: {e}; mind its quotes") from None
    return rows


def _read_parquet(data: bytes, path: Path) -> list[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    try:
        values = read_table(io.BytesIO(data)).to_pylist()
    except (ArrowException, OSError, ValueError, OverflowError) as e:
        # a damaged file shows in the bytes, in a text that is not UTF-8, in a date out of range
        reason = next(iter(str(e).splitlines()), type(e).__name__)
        raise UserError(f"{path}: not a Parquet file that can be read: {reason}") from None
    return [(f"row {number}", row) for number, row in enumerate(values, 1)]


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
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(
            f"{path}: cannot be read: {reason}; give a file of word pairs, or builtin:sw-en"
        ) from None
    return path, reader(data, path)


def is_text(value: Any) -> bool:
    """Whether a value is a string with more than spaces in it."""
    # half a surrogate pair, which JSON can spell, is no text
    return (
        isinstance(value, str)
        and bool(value.strip())
        and not any("\ud800" <= letter <= "\udfff" for letter in value)
    )


def _cell(row: Any, column: str, where: str) -> str:
    if not isinstance(row, dict):
        raise UserError(f"{where}: must be an object with {column!r}, got {type(row).__name__}")
    if column not in row:
        have = shorten(", ".join(row), 200, placeholder=" …")
        raise UserError(
            f"{where}: no column {column!r}; the columns are: {have}; name the two with --languages "
            f"or data.languages"
        )
    value = row[column]
    if not is_text(value):
        raise UserError(
            f"{where}: {column!r} is {reprlib.repr(value)}; every pair needs two non-empty words"
        )
    return " ".join(unicodedata.normalize("NFC", value).split())


def _split_of(row: Any) -> str | None:
    split = row.get("split") if isinstance(row, dict) else None
    return str(split).strip().casefold() or None if split is not None else None


def _pair_list(
    path: Path, rows: list[Row], languages: tuple[str, str], split: str | None
) -> PairList:
    cells = [
        tuple(_cell(row, language, f"{path}: {place}") for language in languages)
        for place, row in rows
    ]
    if not cells:
        which = f" of split {split!r}" if split else ""
        raise UserError(f"{path}: no word pairs{which}; add rows with {' and '.join(languages)}")
    source, target = zip(*cells, strict=True)
    return PairList(languages, source, target)


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
    kept = [(place, row) for place, row in rows if split is None or _split_of(row) in (None, split)]
    return _pair_list(path, kept, languages, split)


def read_splits(
    file: str, control: str | None, languages: tuple[str, str]
) -> tuple[PairList, PairList | None]:
    """Return training and control pairs; control rows may live in ``file`` itself, by ``split``.

    A row of ``file`` without a split is a training pair.

    Raises:
        UserError: As :func:`read_pairs`, or a split that is neither ``train`` nor ``control``.
    """
    path, rows = read_rows(file)
    splits = [_split_of(row) for _, row in rows]
    for (place, _), split in zip(rows, splits, strict=True):
        if split not in (None, "train", "control"):
            raise UserError(f"{file}: {place}: split {split!r} is neither train nor control")
    marked = [row for row, split in zip(rows, splits, strict=True) if split == "control"]
    others = [row for row, split in zip(rows, splits, strict=True) if split != "control"]
    train = _pair_list(path, others, languages, "train")
    if control is not None:
        return train, read_pairs(control, languages, "control")
    return train, _pair_list(path, marked, languages, "control") if marked else None


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
