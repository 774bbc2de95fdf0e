import csv
import io
import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow.parquet import write_table

from tli_engine.data.pairs import (
    PairList,
    group_ids,
    normalise,
    parse_languages,
    read_pairs,
    read_splits,
)
from tli_engine.errors import UserError

SW_EN = ("swahili", "english")
WORDS = [("ng'ombe", "cow"), ("nyumba kubwa", "large house"), ("é", 'a "quoted", word')]
SUFFIXES = ["json", "jsonl", "csv", "tsv", "parquet"]

Write = Callable[[str, bytes | str], str]


def parquet(**columns: Any) -> bytes:
    file = io.BytesIO()
    write_table(pa.table(columns), file)
    return file.getvalue()


def delimited(rows: list[list[str]], delimiter: str, end: str = "\n") -> str:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator=end).writerows(rows)
    return text.getvalue()


def objects(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [dict(zip(SW_EN, pair, strict=True)) for pair in pairs]


def encode(pairs: list[tuple[str, str]], suffix: str) -> bytes:
    """A file of one kind."""
    if suffix == "parquet":
        return parquet(swahili=[s for s, _ in pairs], english=[t for _, t in pairs])
    if suffix == "json":
        return json.dumps(objects(pairs)).encode()
    if suffix == "jsonl":
        return "".join(json.dumps(o, ensure_ascii=False) + "\n" for o in objects(pairs)).encode()
    return delimited([list(SW_EN), *map(list, pairs)], {"csv": ",", "tsv": "\t"}[suffix]).encode()


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, content: bytes | str) -> str:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a property test, which has no folder per example, writes over one file."""
    return tmp_path_factory.mktemp("fuzz")


def as_tuples(pairs: PairList) -> list[tuple[str, str]]:
    return list(zip(pairs.source, pairs.target, strict=True))


@pytest.mark.parametrize("suffix", [*SUFFIXES, "JSON", "Csv"])
def test_every_kind_of_file_gives_the_same_pairs(suffix: str, write: Write) -> None:
    pairs = read_pairs(write(f"words.{suffix}", encode(WORDS, suffix.lower())), SW_EN)
    assert pairs.languages == SW_EN
    assert as_tuples(pairs) == WORDS
    assert len(pairs) == len(pairs[:]) == 3
    assert as_tuples(pairs[1:2]) == WORDS[1:2]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("a.json", '[{"swahili":"maji","english":"water"}]', id="published-form"),
        pytest.param("a.json", '\ufeff[{"swahili":"maji","english":"water"}]', id="json-bom"),
        pytest.param("a.jsonl", '\ufeff\n{"swahili":"maji","english":"water"}\r\n\n', id="jsonl"),
        pytest.param("a.csv", "\ufeffswahili,english\r\nmaji,water\r\n", id="excel"),
        pytest.param("a.csv", "swahili,english\rmaji,water\r", id="old-mac-lines"),
        pytest.param("a.csv", "\n\nswahili,english\n\nmaji,water\n\n", id="blank-lines"),
        pytest.param("a.csv", 'swahili , english \nmaji ,  "water"\n', id="spaced-out"),
        pytest.param("a.csv", '"swahili","english"\n"maji","water"', id="quoted"),
        pytest.param("a.csv", 'swahili,english\n"maji","\nwater\n"\n', id="quoted-line-break"),
        pytest.param("a.csv", "id,english,swahili,note\n1,water,maji,\n", id="other-columns"),
        pytest.param("a.csv", "swahili,english,note\nmaji,water\n", id="last-field-left-out"),
        pytest.param("a.tsv", "swahili\tenglish\nmaji\twater\n", id="tsv"),
        pytest.param(
            "a.parquet",
            parquet(n=[1], english=["water"], swahili=pa.array(["maji"]).dictionary_encode()),
            id="parquet-dictionary",
        ),
    ],
)
def test_forms_found_in_the_wild(name: str, content: bytes | str, write: Write) -> None:
    assert as_tuples(read_pairs(write(name, content), SW_EN)) == [("maji", "water")]


def test_any_language_pair_by_column_name(write: Write) -> None:
    file = write("a.csv", "english,swahili,日本語\nwater,maji,水\n")
    assert as_tuples(read_pairs(file, ("日本語", "swahili"))) == [("水", "maji")]
    assert as_tuples(read_pairs(file, ("swahili", "english"))) == [("maji", "water")]


def test_words_are_nfc_with_single_spaces_and_keep_their_case(write: Write) -> None:
    decomposed = unicodedata.normalize("NFD", "Café")
    file = write("a.json", json.dumps(objects([(f"  {decomposed}\tau \n lait ", "x")])))
    assert read_pairs(file, SW_EN).source == ("Café au lait",)


def test_jsonl_line_separators_within_a_string_do_not_end_the_line(write: Write) -> None:
    file = write("a.jsonl", '{"swahili":"ma\u2028ji\x85","english":"water"}\n')
    assert read_pairs(file, SW_EN).source == ("ma ji",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("a.txt", "maji water", r"unknown kind of file '\.txt'; known are \.json, "),
        pytest.param("words", "", r"unknown kind of file ''; known"),
        pytest.param("a.json", "", r"line 1: not JSON"),
        pytest.param("a.json", '[{"swahili":\n"maji",\n]', r"line 3: not JSON"),
        pytest.param("a.json", "[]", r"no word pairs; add rows with swahili and english"),
        pytest.param("a.json", "{}", r"must be a list of objects such as \{'swahili'"),
        pytest.param("a.json", "null", r"must be a list of objects"),
        pytest.param("a.json", '["maji"]', r"row 1: must be an object with 'swahili', got str"),
        pytest.param("a.json", "[" * 9999, r"line 1: JSON that cannot be read: .*recursion"),
        pytest.param("a.json", "[" + "1" * 9999 + "]", r"line 1: JSON that cannot be read"),
        pytest.param("a.jsonl", "", r"no word pairs"),
        pytest.param("a.jsonl", "\n\n{]", r"line 3: not JSON"),
        pytest.param(
            "a.jsonl", '\n{"swahili":"maji"}', r"line 2: no column 'english'; .*: swahili"
        ),
        pytest.param("a.jsonl", "[1]", r"line 1: must be an object with 'swahili', got list"),
        pytest.param("a.csv", "", r"no word pairs"),
        pytest.param("a.csv", "swahili,english\n", r"no word pairs"),
        pytest.param("a.csv", "maji,water\nmoto,fire", r"line 2: no column 'swahili'; .*maji, wat"),
        pytest.param("a.csv", "swahili;english\na;b, c\n", r"line 1: .*by ';'\? commas are read"),
        pytest.param("a.csv", '\n"swahili";"english"\n', r"line 2: .*by ';'\? commas are read"),
        pytest.param("a.tsv", "swahili,english\n", r"by commas\? tabs are read; save .* with tabs"),
        pytest.param("a.csv", 'a,"b\nc"\n1,2\n', r"line 3: no column 'swahili'; .* a, b c"),
        pytest.param("a.csv", "swahili,english\n\nmaji\n", r"line 3: 'english' is ''; every pair"),
        pytest.param("a.csv", "swahili,english\n,water\n", r"line 2: 'swahili' is ''; every pair"),
        pytest.param(
            "a.csv",
            'swahili,english\n"x\ny",a\nchai,tea, milk\n',
            r"line 4: has 3 fields, the header has 2; quote a field that holds ','",
        ),
        pytest.param("a.tsv", "swahili\tenglish\na\tb\tc\n", r"line 2: has 3 fields.*'\\t'"),
        pytest.param("a.csv", 'swahili,english\nx,y\n"maji,water\n', r"line 3: not CSV.*quotes"),
        pytest.param("a.csv", 'swahili,english\n"ma"ji,water\n', r"line 2: not CSV.*quotes"),
        pytest.param("a.csv", "swahili,english\nx," + "y" * 200_000, r"line 2: not CSV: field lar"),
        pytest.param("a.csv", b"swahili,english\nmaji,water\n\xff,x\n", r"line 3: not UTF-8; save"),
        pytest.param("a.json", '[{"swahili":"é"}]'.encode("latin-1"), r"line 1: not UTF-8; save"),
        pytest.param("a.tsv", "swahili\tenglish".encode("utf-16"), r"line 1: not UTF-8; save"),
        pytest.param("a.parquet", b"", r"not a Parquet file"),
        pytest.param("a.parquet", b"PAR1PAR1", r"not a Parquet file"),
        pytest.param("a.parquet", parquet(swahili=["maji"]), r"row 1: no column 'english'"),
        pytest.param("a.parquet", parquet(swahili=["a"], english=[b"b"]), r"row 1: .* is b'b'"),
        pytest.param("a.parquet", parquet(swahili=["a"], english=[None]), r"row 1: .* is None"),
        pytest.param("a.parquet", parquet(swahili=[], english=[]), r"no word pairs"),
    ],
)
def test_error_names_file_place_and_remedy(
    name: str, content: bytes | str, message: str, write: Write
) -> None:
    file = write(name, content)
    with pytest.raises(UserError, match=message) as raised:
        read_pairs(file, SW_EN)
    assert_one_clear_line(str(raised.value), file)


@pytest.mark.parametrize(
    "value",
    [1, 2.5, True, None, [], ["maji"], {}, "", " \t\u3000", "\ud800", float("nan")],
    ids=repr,
)
def test_a_value_that_is_no_word_is_refused(value: object, write: Write) -> None:
    file = write("a.json", json.dumps([*objects(WORDS), {"swahili": "maji", "english": value}]))
    with pytest.raises(UserError, match=r"row 4: 'english' is .*; every pair needs two non-empty"):
        read_pairs(file, SW_EN)


def test_a_long_value_or_header_does_not_flood_the_message(write: Write) -> None:
    long = write("a.json", json.dumps([{"swahili": ["x" * 9999] * 99, "english": "x"}]))
    wide = write("a.csv", ",".join(f"column{i}" for i in range(5000)) + "\nx")
    for file in (long, wide):
        with pytest.raises(UserError) as raised:
            read_pairs(file, SW_EN)
        assert len(str(raised.value)) < len(file) + 400


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_missing_file(suffix: str, tmp_path: Path) -> None:
    file = str(tmp_path / f"nowhere.{suffix}")
    with pytest.raises(UserError, match=r"No such file.*give a file of word pairs") as raised:
        read_pairs(file, SW_EN)
    assert_one_clear_line(str(raised.value), file)


@pytest.mark.parametrize("name", ["folder.csv", "folder"])
def test_folder_given_as_a_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"directory|unknown kind of file"):
        read_pairs(str(tmp_path / name), SW_EN)


def test_path_that_no_file_can_have(tmp_path: Path) -> None:
    for name in ("a\0.csv", "a" * 300 + ".csv"):
        with pytest.raises(UserError, match="cannot be read"):
            read_pairs(str(tmp_path / name), SW_EN)


def test_unknown_built_in_lexicon() -> None:
    for name in ("builtin:xx-yy", "builtin:", "builtin:../pairs", "builtin:sw-en.csv"):
        with pytest.raises(UserError, match="no such built-in lexicon; there is builtin:sw-en"):
            read_pairs(name, SW_EN)


SPLITS = """swahili,english,split
moja,one,train
mbili,two,control
tatu,three,
nne,four, Train
sita,six
"""


def test_split_column(write: Write) -> None:
    file = write("a.csv", SPLITS)
    train, control = read_splits(file, None, SW_EN)
    # rows without a split are training pairs, and those alone
    assert train.target == ("one", "three", "four", "six")
    assert control is not None
    assert control.target == ("two",)
    assert len(read_pairs(file, SW_EN)) == 5
    other = write("b.csv", SPLITS + "tano,five,test\n")
    assert read_pairs(other, SW_EN, "test").target == ("three", "six", "five")
    with pytest.raises(UserError, match="line 7: split 'test' is neither train nor control"):
        read_splits(other, None, SW_EN)


def test_no_split_column_is_all_training(write: Write) -> None:
    train, control = read_splits(write("a.jsonl", encode(WORDS, "jsonl")), None, SW_EN)
    assert as_tuples(train) == WORDS
    assert control is None


def test_only_control_rows_are_not_training_pairs(write: Write) -> None:
    file = write("a.csv", "swahili,english,split\nmoja,one,control\n")
    with pytest.raises(UserError, match="no word pairs of split 'train'; add rows"):
        read_splits(file, None, SW_EN)


def test_control_file(write: Write) -> None:
    pairs = write("pairs.csv", SPLITS)
    plain = write("control.json", json.dumps(objects([("saba", "seven")])))
    marked = write("marked.csv", "swahili,english,split\na,b,train\nc,d,control\ne,f,\n")
    _, control = read_splits(pairs, plain, SW_EN)
    assert control is not None
    # the file given for control pairs takes the place of the rows marked so
    assert control.target == ("seven",)
    _, control = read_splits(pairs, marked, SW_EN)
    assert control is not None
    assert control.target == ("d", "f")
    with pytest.raises(UserError, match=r"nowhere\.csv: cannot be read"):
        read_splits(pairs, "nowhere.csv", SW_EN)
    with pytest.raises(UserError, match=r"empty\.csv: no word pairs of split 'control'"):
        read_splits(pairs, write("empty.csv", ""), SW_EN)


def test_a_row_of_another_split_is_not_judged(write: Write) -> None:
    file = write("a.jsonl", '{"split":"test"}\n{"swahili":"a","english":"b","split":7}\n[]')
    with pytest.raises(UserError, match="line 3: must be an object"):
        read_pairs(file, SW_EN, "train")


def assert_one_clear_line(message: str, file: str) -> None:
    assert message.startswith(f"{file}: "), message
    assert not re.search(r"[\n\r]", message), message


def read_or_complain(file: Path, data: bytes) -> None:
    """Any bytes give pairs or one line; nothing else is raised."""
    file.write_bytes(data)
    try:
        pairs = read_pairs(str(file), SW_EN)
    except UserError as e:
        assert_one_clear_line(str(e), str(file))
    else:
        assert len(pairs.source) == len(pairs.target) > 0
        assert all(w == " ".join(w.split()) != "" for w in (*pairs.source, *pairs.target))
        pairs.digest()


fuzz = settings(deadline=None, max_examples=60)


@pytest.mark.parametrize("suffix", SUFFIXES)
@fuzz
@given(data=st.binary(max_size=80))
def test_random_bytes(suffix: str, data: bytes, scratch: Path) -> None:
    read_or_complain(scratch / f"a.{suffix}", data)


@pytest.mark.parametrize("suffix", SUFFIXES)
@fuzz
@given(data=st.data())
def test_damaged_file(suffix: str, data: st.DataObject, scratch: Path) -> None:
    damaged = bytearray(encode(WORDS, suffix))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(damaged)))
        cut = data.draw(st.integers(0, 3))
        damaged[place : place + cut] = data.draw(st.binary(max_size=3))
    read_or_complain(scratch / f"a.{suffix}", bytes(damaged))


texts = st.text(max_size=6) | st.sampled_from(["", " ", "maji", "\ud800", "\x00", "\u2028"])
keys = st.sampled_from([*SW_EN, "split"]) | texts
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)
rows = st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(SW_EN, scalars)) | values)


@fuzz
@given(value=rows | values, suffix=st.sampled_from(["json", "jsonl"]))
def test_random_json(value: object, suffix: str, scratch: Path) -> None:
    lines = value if suffix == "jsonl" and isinstance(value, list) else [value]
    text = "\n".join(json.dumps(line) for line in lines)
    read_or_complain(scratch / f"a.{suffix}", text.encode())


@fuzz
@given(
    body=st.text(alphabet='a é,"\t\n\r\0;\u2028', max_size=40),
    suffix=st.sampled_from(["csv", "tsv"]),
    header=st.sampled_from(["swahili,english\n", "swahili\tenglish\n", ""]),
)
def test_random_delimited(body: str, suffix: str, header: str, scratch: Path) -> None:
    read_or_complain(scratch / f"a.{suffix}", (header + body).encode())


words = st.text(alphabet=st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=8)


@pytest.mark.parametrize("suffix", SUFFIXES)
@fuzz
@given(pairs=st.lists(st.tuples(words, words), min_size=1, max_size=5))
def test_round_trip(suffix: str, pairs: list[tuple[str, str]], scratch: Path) -> None:
    nfc = [tuple(unicodedata.normalize("NFC", w) for w in pair) for pair in pairs]
    file = scratch / f"a.{suffix}"
    file.write_bytes(encode(pairs, suffix))
    assert as_tuples(read_pairs(str(file), SW_EN)) == nfc


def test_digest_tells_lists_apart() -> None:
    pairs = [
        PairList(SW_EN, ("a", "b"), ("c", "d")),
        PairList(SW_EN, ("b", "a"), ("c", "d")),
        PairList(SW_EN, ("c", "d"), ("a", "b")),
        PairList(SW_EN, ("a",), ("c",)),
        PairList(SW_EN, ("a\x00b",), ("cd",)),
    ]
    assert len({p.digest() for p in pairs}) == len(pairs)
    assert pairs[0].digest() == PairList(SW_EN, ("a", "b"), ("c", "d")).digest()


def test_words_are_compared_by_case_spaces_and_composition() -> None:
    assert normalise(" Straße  CAFE\u0301 ") == normalise("STRASSE café")
    assert group_ids(["Maji", "moto", "maji ", "MOTO", "é", "e\u0301"]) == [0, 1, 0, 1, 2, 2]
    assert group_ids([]) == []


def test_languages_of_the_command_line() -> None:
    assert parse_languages(" swahili, english") == SW_EN
    for text in ("", "swahili", "a,b,c", "a,a", "a,", ",b", "a, a"):
        with pytest.raises(UserError, match=re.escape(f"--languages {text}: must be two column")):
            parse_languages(text)
