"""Rows of files that may be larger than memory: where each stands is held, its content is read."""

import csv
import io
import mmap
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from tli_engine.data.pairs import Row, check_delimiter, parse_json
from tli_engine.errors import UserError

# rows of a Parquet file that are decoded at once, and those of none
_ROWS_AT_ONCE = 256
_NOTHING: Any = ()


class Rows(ABC):
    """Rows by number; a row is where it stands in the file, such as ``line 3``, and its content.

    Attributes:
        columns: The names of all rows' columns, if the file says them once.
    """

    columns: list[str] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Row: ...


class _Lines(Rows):
    """Rows that lie between two bytes of a text file each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # of each row: its first byte, the byte after it, the number of its first line
        self._starts, self._ends, self._numbers = array("q"), array("q"), array("q")
        with path.open("rb") as f:
            # nothing, which an empty file is, cannot be mapped
            empty = not f.read(1)
            self._bytes = None if empty else mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._starts)

    def _lines(self) -> Iterator[bytes]:
        return iter(self._bytes.readline, b"") if self._bytes is not None else iter(())

    def _append(self, start: int, end: int, number: int) -> None:
        self._starts.append(start)
        self._ends.append(end)
        self._numbers.append(number)

    def _text(self, index: int) -> str:
        assert self._bytes is not None
        content = self._bytes[self._starts[index] : self._ends[index]]
        return self._decode(content, self._numbers[index])

    def _decode(self, content: bytes, number: int) -> str:
        try:
            # the first line may begin with a byte-order mark
            return content.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as e:
            number += content[: e.start].count(b"\n")
            raise UserError(
                f"{self._path}: line {number}: not UTF-8; save the file as UTF-8"
            ) from None


class _JsonLines(_Lines):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        end = 0
        for number, line in enumerate(self._lines(), 1):
            start, end = end, end + len(line)
            if line.strip():
                self._append(start, end, number)

    def __getitem__(self, index: int) -> Row:
        number = self._numbers[index]
        return f"line {number}", parse_json(self._text(index).rstrip(), self._path, number)


class _Csv(_Lines):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        # an article may be longer than the module's 131,072 letters a field
        csv.field_size_limit(2**31 - 1)
        self._read = 0
        self.columns = []
        number = 1
        records = csv.reader(self._decoded(), strict=True, skipinitialspace=True)
        try:
            # the reader takes no more lines than its record has
            start = 0
            for fields in records:
                if self.columns and len(fields) > len(self.columns):
                    raise UserError(
                        f"{path}: line {number}: has {len(fields)} fields, the header has "
                        f"{len(self.columns)}; quote a field that holds ','"
                    )
                if self.columns and fields:
                    self._append(start, self._read, number)
                if len(fields) == 1 and not self.columns:
                    check_delimiter(fields[0], ",", f"{path}: line {number}")
                self.columns = self.columns or [field.strip() for field in fields]
                start, number = self._read, records.line_num + 1
        except csv.Error as e:
            if not self.columns:
                # of another delimiter quotes stand where they may not
                assert self._bytes is not None
                first = self._decode(self._bytes[start : self._read], number).splitlines()[0]
                check_delimiter(first, ",", f"{path}: line {number}")
            raise UserError(f"{path}: line {number}: not CSV: {e}; mind its quotes") from None
        if not self.columns:
            raise UserError(f"{path}: is empty; its first line has to name the columns")

    def _decoded(self) -> Iterator[str]:
        for number, line in enumerate(self._lines(), 1):
            self._read += len(line)
            yield self._decode(line, number)

    def __getitem__(self, index: int) -> Row:
        record = io.StringIO(self._text(index), newline="")
        fields = next(csv.reader(record, strict=True, skipinitialspace=True))
        columns = self.columns or []
        # a record may leave out its last fields
        values = [*fields, *[""] * (len(columns) - len(fields))]
        return f"line {self._numbers[index]}", dict(zip(columns, values, strict=True))


class Parquet(Rows):
    """Rows of one or several Parquet files of the same columns, a batch of them in memory.

    A file may be one row group: its rows are decoded in order, and a row before those that are held is
    come to anew from the beginning of its group.

    Args:
        paths: The files.
        wanted: The columns to read; those that are not there are left out.

    Raises:
        UserError: A file that is damaged, or that is none.
    """

    def __init__(self, paths: Sequence[Path], wanted: Sequence[str]) -> None:
        from pyarrow.parquet import ParquetFile

        self._paths = paths
        self._groups: list[tuple[int, int]] = []
        # the group that is being decoded, what is left of it, and the batch that is held with its first row
        self._group, self._rest = -1, iter(())
        self._start, self._batch = 0, _NOTHING
        self._files = [self._explaining(path, ParquetFile, path, memory_map=True) for path in paths]
        self.columns = list(self._files[0].schema_arrow.names)
        self._wanted = [name for name in wanted if name in self.columns]
        sizes: list[int] = []
        for file, content in enumerate(self._files):
            for group in range(content.num_row_groups):
                self._groups.append((file, group))
                sizes.append(content.metadata.row_group(group).num_rows)
        self._starts: list[int] = [0, *accumulate(sizes)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Row:
        group = bisect_right(self._starts, index) - 1
        if group != self._group or index < self._start:
            self._begin(group)
        while index >= self._start + len(self._batch):
            self._decode()
        path = self._paths[self._groups[group][0]]
        held, row = self._batch, index - self._start
        (content,) = self._explaining(path, lambda: held.slice(row, 1).to_pylist())
        return f"row {index + 1}", content

    def batches(self) -> Iterator[tuple[int, Any]]:
        """All rows, in batches of pyarrow: the number of its first row, and the batch."""
        for group, end in enumerate(self._starts[1:]):
            self._begin(group)
            while self._start + len(self._batch) < end:
                self._decode()
                yield self._start, self._batch

    def _begin(self, group: int) -> None:
        """Decode a row group from its beginning; nothing is held yet."""
        file, number = self._groups[group]
        options = {"row_groups": [number], "columns": self._wanted, "batch_size": _ROWS_AT_ONCE}
        self._start, self._batch = self._starts[group], _NOTHING
        self._rest = self._explaining(self._paths[file], self._files[file].iter_batches, **options)
        self._group = group

    def _decode(self) -> None:
        """Hold the batch after the one that is held, which goes first."""
        path = self._paths[self._groups[self._group][0]]
        self._start, self._batch = self._start + len(self._batch), _NOTHING
        batch = self._explaining(path, next, self._rest, None)
        if batch is None:
            row = self._start + 1
            raise UserError(
                f"{path}: not a Parquet file that can be read: it ends before row {row}"
            )
        self._batch = batch

    @staticmethod
    def _explaining(path: Path, read: Any, *args: Any, **options: Any) -> Any:
        from pyarrow import ArrowException

        try:
            return read(*args, **options)
        except (ArrowException, OSError, ValueError, OverflowError) as e:
            # a damaged file shows in the bytes, in a text that is not UTF-8
            reason = next(iter(str(e).splitlines()), type(e).__name__)
            raise UserError(f"{path}: not a Parquet file that can be read: {reason}") from None


def open_rows(path: Path, wanted: Sequence[str]) -> Rows:
    """Open a JSON Lines, CSV or Parquet file, by its suffix.

    Args:
        path: The file.
        wanted: Columns that will be read.

    Raises:
        UserError: No such file, an unknown suffix, a malformed CSV or Parquet file.
    """
    readers: dict[str, Callable[[], Rows]] = {
        ".jsonl": lambda: _JsonLines(path),
        ".csv": lambda: _Csv(path),
        ".parquet": lambda: Parquet([path], wanted),
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(readers)
        raise UserError(f"{path}: unknown kind of file {path.suffix!r}; known are {known}")
    try:
        with path.open("rb"):
            pass
        return reader()
    except UserError:
        raise
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(
            f"{path}: cannot be read: {reason}; give a file of articles, or xlsum:LANGUAGE"
        ) from None
