import csv
import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tli_engine.config import DataConfig
from tli_engine.data.texts import Texts, count_seen, read_texts
from tli_engine.errors import UserError

ROWS = [
    {"id": "a", "url": "", "title": "T", "summary": 'Moja, "mbili"', "text": "Habari\nya kwanza"},
    {"id": "b", "url": "", "title": "T", "summary": "Mbili\u2028", "text": "é日本 " * 50_000},
    {"id": "c", "url": "", "title": "T", "summary": "Tatu", "text": " Habari, tatu"},
]


def write_jsonl(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")


def write_csv(path: Path, rows: list[Any]) -> None:
    with path.open("w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]), quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[Any]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)


WRITERS: dict[str, Callable[[Path, list[Any]], None]] = {
    ".jsonl": write_jsonl,
    ".csv": write_csv,
    ".parquet": write_parquet,
}
# where the three rows stand; the first text of the CSV file takes two lines
PLACES = {
    ".jsonl": ["line 1", "line 2", "line 3"],
    ".csv": ["line 2", "line 4", "line 5"],
    ".parquet": ["row 1", "row 2", "row 3"],
}


def read(path: Path, **options: Any) -> Texts:
    found = read_texts(DataConfig(texts=str(path), **options), "train")
    assert found is not None
    return found


def pairs(texts: Texts) -> list[tuple[str, str]]:
    return [(texts[i].text, texts[i].summary) for i in range(len(texts))]


def refuses(path: Path, match: str, **options: Any) -> None:
    """Opening and reading the file raises one line, which begins with its path."""
    with pytest.raises(UserError, match=match) as caught:
        pairs(read(path, **options))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.fixture(params=list(WRITERS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_kind_of_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"news{kind}"
    WRITERS[kind](path, ROWS)
    texts = read(path)
    assert pairs(texts) == [(r["text"], r["summary"]) for r in ROWS]
    assert [texts[i].where for i in range(3)] == [f"{path}: {place}" for place in PLACES[kind]]
    # in any order
    assert texts[2] == texts[2]
    assert (texts[0].summary, texts[2].summary) == (ROWS[0]["summary"], "Tatu")
    assert (texts.name, texts.licence, texts.skipped) == (str(path), None, 0)


def test_named_columns(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"news{kind.upper()}"
    WRITERS[kind](path, [{"body": "Habari", "head": "Kichwa"}])
    assert pairs(read(path, columns="body,head")) == [("Habari", "Kichwa")]
    refuses(path, "no column 'text'; the columns are: body, head; name .* with data.columns")


def test_the_first_articles_only(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"news{kind}"
    WRITERS[kind](path, ROWS)
    assert pairs(read(path, texts_limit=2)) == pairs(read(path))[:2]
    assert len(read(path, texts_limit=100)) == 3
    data = DataConfig(texts="other.jsonl", validation=str(path), validation_limit=1)
    validation = read_texts(data, "validation")
    assert validation is not None
    assert len(validation) == 1


def test_no_articles_are_named(tmp_path: Path) -> None:
    assert read_texts(DataConfig(), "train") is None
    assert read_texts(DataConfig(), "validation") is None
    assert read_texts(DataConfig(texts=str(tmp_path / "news.jsonl")), "validation") is None


def test_digest_is_of_the_columns_in_use(tmp_path: Path) -> None:
    digests = []
    for kind, write in WRITERS.items():
        write(tmp_path / f"news{kind}", ROWS[:1])
        digests.append(read(tmp_path / f"news{kind}").digest())
    assert len(set(digests)) == 1
    path = tmp_path / "news.jsonl"
    write_jsonl(path, [ROWS[0] | {"url": "other"}])
    assert read(path).digest() == digests[0]
    write_jsonl(path, [ROWS[0] | {"summary": "other"}])
    assert read(path).digest() != digests[0]
    write_jsonl(path, ROWS)
    assert read(path, texts_limit=1).digest() == digests[0] != read(path).digest()


# any letters, quotes, line ends and separators; half a surrogate pair is no text
some_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@given(st.lists(st.tuples(some_text, some_text), min_size=1, max_size=10))
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, content: list[tuple[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("news")
    rows = [{"text": text, "summary": summary} for text, summary in content]
    for kind, write in WRITERS.items():
        write(folder / f"news{kind}", rows)
        assert pairs(read(folder / f"news{kind}")) == content


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_jsonl_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "news.jsonl"
    path.write_bytes(content)
    if content.startswith(b"\xef"):
        refuses(path, "line 1: not JSON")
    else:
        refuses(path, "news.jsonl: no articles; add rows with text and summary$")


def test_an_empty_csv_or_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "news.csv"
    for content in (b"", b"\n\n", b"\xef\xbb\xbf"):
        path.write_bytes(content)
        refuses(path, "news.csv: is empty; its first line has to name the columns$")
    path.write_text("text,summary\n\n")
    refuses(path, "no articles; add rows with text and summary$")
    path = tmp_path / "news.parquet"
    write_parquet(path, ROWS)
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    refuses(path, "no articles; add rows with text and summary$")


@pytest.mark.parametrize(
    ("line", "match"),
    [
        pytest.param('{"text": "a"', "line 3: not JSON: Expecting", id="cut-off"),
        pytest.param('["a", "b"]', "line 3: must be an object with 'text' and", id="a-list"),
        pytest.param('{"text": "a"}', "line 3: no column 'summary'; .* are: text;", id="no-column"),
        pytest.param("{}", "line 3: no column 'text'; the columns are: none;", id="no-columns"),
        pytest.param('{"text": " ", "summary": "b"}', "line 3: 'text' is ' '; every", id="spaces"),
        pytest.param('{"text": "a", "summary": ""}', "line 3: 'summary' is '';", id="no-summary"),
        pytest.param('{"text": null, "summary": "b"}', "line 3: 'text' is None;", id="null"),
        pytest.param('{"text": 5, "summary": "b"}', "line 3: 'text' is 5;", id="a-number"),
        pytest.param(r'{"text": "\ud800", "summary": "b"}', "line 3: 'text' is", id="surrogate"),
        pytest.param(f"[{'[' * 100_000}", "line 3: JSON that cannot be read", id="nested"),
    ],
)
def test_a_malformed_line_of_jsonl(line: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "news.jsonl"
    path.write_text(f'{{"text": "a", "summary": "b"}}\n\n{line}\n')
    refuses(path, match)
    assert pairs(read(path, texts_limit=1)) == [("a", "b")]


@pytest.mark.parametrize(
    ("content", "shown", "delimiter"),
    [
        pytest.param("text;summary\nHabari;Moja\n", "text;summary", "';'", id="semicolon"),
        # more commas in an article than in the header
        pytest.param("text;summary\nHabari, tatu;Moja\n", "text;summary", "';'", id="commas"),
        pytest.param('\n"text";"summary"\n"a";"b"\n', '"text";"summary"', "';'", id="quotes"),
        pytest.param("text\tsummary\r\na\tb\r\n", r"text\tsummary", "tabs", id="tabs"),
        pytest.param("text|summary\na|b\n", "text|summary", "'|'", id="bars"),
        pytest.param("a;" * 999, "a;" * 40 + "…", "';'", id="long"),
    ],
)
def test_another_delimiter_is_named(
    content: str, shown: str, delimiter: str, tmp_path: Path
) -> None:
    path = tmp_path / "news.csv"
    path.write_text(content, newline="")
    line = 2 if content.startswith("\n") else 1
    header = (
        f"line {line}: its header is '{shown}': is it delimited by {delimiter}? commas are read"
    )
    refuses(path, re.escape(header) + "; save the file with commas$")


@pytest.mark.parametrize(
    ("record", "match"),
    [
        pytest.param('a,"b', "line 4: not CSV: unexpected end of data; mind", id="open-quote"),
        pytest.param("a,b,c", "line 4: has 3 fields, the header has 2; quote", id="too-many"),
        pytest.param("a", "line 4: 'summary' is '';", id="too-few"),
        pytest.param("a\rb,c", "line 4: not CSV: new-line character", id="carriage-return"),
    ],
)
def test_a_malformed_record_of_csv(record: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "news.csv"
    # the first record takes two lines
    path.write_bytes(f'text,summary\r\n"a\r\na",b\r\n{record}\r\n'.encode())
    refuses(path, match)


@pytest.mark.parametrize("kind", [".jsonl", ".csv"])
def test_text_that_is_not_utf8(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"news{kind}"
    WRITERS[kind](path, ROWS)
    last = path.read_bytes().count(b"\n")
    path.write_bytes(path.read_bytes().replace(b"Tatu", b"Tat\xff"))
    refuses(path, f"line {last}: not UTF-8; save the file as UTF-8")


def test_a_byte_order_mark(tmp_path: Path) -> None:
    for kind in (".jsonl", ".csv"):
        path = tmp_path / f"news{kind}"
        WRITERS[kind](path, ROWS)
        expected = pairs(read(path))
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert pairs(read(path)) == expected


def test_a_damaged_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "news.parquet"
    path.write_bytes(b"PAR1 but no more")
    refuses(path, "not a Parquet file that can be read: ")
    write_parquet(path, ROWS)
    content = bytearray(path.read_bytes())
    content[8:200] = bytes(192)
    path.write_bytes(content)
    refuses(path, "not a Parquet file that can be read: ")


def test_a_parquet_column_that_holds_no_text(tmp_path: Path) -> None:
    path = tmp_path / "news.parquet"
    write_parquet(path, [{"text": "a", "summary": "b"}, {"text": "c", "summary": None}])
    refuses(path, "row 2: 'summary' is None; every row needs a non-empty text and summary")


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    refuses(tmp_path / "none.jsonl", "cannot be read: No such file .*; give a file of articles, or")
    refuses(tmp_path / "news.txt", r"unknown kind of file '\.txt'; known are \.jsonl, \.csv, \.par")
    (tmp_path / "folder.csv").mkdir()
    refuses(tmp_path / "folder.csv", "cannot be read: Is a directory")


def test_rows_are_decoded_once_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row group of Parquet is begun once while its rows are asked for in order; other columns never."""
    path = tmp_path / "news.parquet"
    write_parquet(path, [{"text": str(i), "summary": "b", "other": i} for i in range(7)])
    asked: list[Any] = []
    original = pq.ParquetFile.iter_batches

    def recording(self: Any, **options: Any) -> Any:
        asked.append((options["row_groups"], options["columns"]))
        return original(self, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", recording)
    texts = read(path)
    assert asked == []
    assert [text for text, _ in pairs(texts)] == [str(i) for i in range(7)]
    assert asked == [([group], ["text", "summary"]) for group in range(4)]
    assert texts[1].text == "1"
    assert len(asked) == 5


def test_a_parquet_file_of_one_row_group_is_not_held(tmp_path: Path) -> None:
    path = tmp_path / "news.parquet"
    texts = [f"{i} {'a' * 2000}" for i in range(20_000)]
    pq.write_table(pa.table({"text": texts, "summary": ["b"] * len(texts)}), path)
    assert pq.ParquetFile(path).num_row_groups == 1
    before, peak = pa.total_allocated_bytes(), 0
    found = read(path)
    for i in range(0, len(found), 50):
        assert found[i].text == texts[i]
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert peak < 12_000_000 < sum(map(len, texts))
    # in any order
    for i in (1999, 0, 700, 699, 255, 256, 1500):
        assert found[i].text == texts[i]


def test_articles_that_are_trained_on_too_are_counted(tmp_path: Path) -> None:
    def texts(name: str, *articles: str) -> Texts:
        rows = [{"text": text, "summary": str(i)} for i, text in enumerate(articles)]
        write_jsonl(tmp_path / name, rows)
        return read(tmp_path / name)

    training = texts("train.jsonl", "a", "b", "b", "c d")
    assert count_seen(texts("all.jsonl", "b", " a\n", "b", "x"), training) == 3
    assert count_seen(texts("none.jsonl", "A", "c  d", "ab"), training) == 0
    assert count_seen(training, training) == 4


@pytest.mark.parametrize("kind", [".csv", ".parquet"])
def test_a_column_that_occurs_twice(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"news{kind}"
    if kind == ".csv":
        path.write_text("text,summary,text,other,other\na,b,c,d,e\n")
    else:
        names = ["text", "summary", "text", "other", "other"]
        pq.write_table(pa.Table.from_arrays([pa.array([v]) for v in "abcde"], names), path)
    refuses(
        path, "has several columns 'text'; rename those that are not to be read, or name others"
    )
    if kind == ".csv":
        # those that are not read may be called as they like
        path.write_text("text,summary,other,other\na,b,d,e\n")
        assert pairs(read(path)) == [("a", "b")]


def test_the_index_of_a_file_is_small(tmp_path: Path) -> None:
    """Lines are read when they are asked for: what a file holds is not held."""
    path = tmp_path / "news.jsonl"
    write_jsonl(path, [{"text": "a" * 100_000, "summary": "b"}] * 200)
    tracemalloc.start()
    texts = read(path)
    sizes = [len(texts[i].text) for i in range(len(texts))]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sizes == [100_000] * 200
    assert peak < 2_000_000 < path.stat().st_size
