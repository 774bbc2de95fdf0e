"""XL-Sum by name: what is asked of the Hub, and what comes of it."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from tli_engine.config import DataConfig
from tli_engine.data.texts import read_texts
from tli_engine.errors import UserError

REPO = "csebuetnlp/xlsum"
SWAHILI = DataConfig(texts="xlsum:swahili")
# conftest.py's
FakeHub = Any


def write(path: Path, first: int, count: int, **altered: Any) -> None:
    numbers = range(first, first + count)
    columns = {
        "id": [str(i) for i in numbers],
        "title": [f"Kichwa {i}" for i in numbers],
        "summary": [f"Muhtasari {i}" for i in numbers],
        "text": [f"Habari {i}" for i in numbers],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns | altered), path, row_group_size=2)


@pytest.fixture
def xlsum(hub: FakeHub, tmp_path: Path) -> FakeHub:
    folder = tmp_path / "xlsum"
    write(folder / "swahili/train/0000.parquet", 0, 5)
    # a null, an empty text and one of spaces
    holes = {"text": [None, "Habari 6", "Habari 7"], "summary": ["a", "", " \n"]}
    write(folder / "swahili/train/0001.parquet", 5, 3, **holes)
    write(folder / "swahili/train/0002.parquet", 8, 2)
    write(folder / "swahili/validation/0000.parquet", 100, 300)
    write(folder / "swahili/test/0000.parquet", 500, 3)
    write(folder / "somali/validation/0000.parquet", 0, 1)
    hub.repos[REPO] = {"refs/convert/parquet": folder}
    return hub


def texts(data: DataConfig, split: Any) -> Any:
    found = read_texts(data, split)
    assert found is not None
    return found


def test_all_files_of_a_split_are_read(xlsum: FakeHub) -> None:
    train = texts(SWAHILI, "train")
    kept = [0, 1, 2, 3, 4, 8, 9]
    assert [train[i].text for i in range(len(train))] == [f"Habari {i}" for i in kept]
    assert train[6] == ("Habari 9", "Muhtasari 9", "xlsum:swahili, train: row 10")
    assert (train.skipped, train.licence) == (3, "CC-BY-NC-SA-4.0")
    assert train.first(2).skipped == 3
    files = [f"{i:04}.parquet" for i in range(3)]
    assert xlsum.asked("GET") == files
    # what the library asks for itself, once a process, is no file
    paths = [r.path for r in xlsum.log if "/resolve/" in r.path]
    assert {path.split("/resolve/")[0] for path in paths} == {f"/datasets/{REPO}"}
    # once the first file has come, its commit is what the others are asked of
    assert xlsum.commit(REPO, "refs/convert/parquet") in xlsum.log[-1].path


def test_the_preset_has_its_own_validation(xlsum: FakeHub) -> None:
    validation = texts(SWAHILI, "validation")
    assert len(validation) == 256
    assert validation[0].text == "Habari 100"
    other = DataConfig(texts="news.jsonl", validation="xlsum:somali", validation_limit=1000)
    assert texts(other, "validation")[0].where == "xlsum:somali, validation: row 1"


def test_other_columns(xlsum: FakeHub) -> None:
    headlines = DataConfig(texts="xlsum:swahili", columns=("text", "title"), texts_limit=6)
    train = texts(headlines, "train")
    assert len(train) == 6
    assert train[5].summary == "Kichwa 6"
    with pytest.raises(UserError, match=r"no column 'body'; the columns are: id, title, summary, "):
        read_texts(DataConfig(texts="xlsum:swahili", columns=("body", "summary")), "train")


def test_offline_what_was_downloaded_is_enough(
    xlsum: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = texts(SWAHILI, "train").digest()
    xlsum.log.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert texts(SWAHILI, "train").digest() == expected
    assert xlsum.log == []
    with pytest.raises(UserError, match=r"validation/0000\.parquet: not in the local cache, and"):
        read_texts(SWAHILI, "validation")


def test_an_unknown_language_is_not_asked_for(xlsum: FakeHub) -> None:
    with pytest.raises(UserError, match=r"xlsum:klingon: XL-Sum has no such .*, swahili, tamil, "):
        read_texts(DataConfig(texts="xlsum:klingon"), "train")
    assert xlsum.log == []


def test_a_language_that_the_hub_does_not_have(xlsum: FakeHub) -> None:
    with pytest.raises(UserError, match=r"xlsum:somali: .* no somali/train/0000\.parquet; give"):
        read_texts(DataConfig(texts="xlsum:somali"), "train")


def test_a_file_that_arrives_altered(xlsum: FakeHub) -> None:
    folder = xlsum.repos[REPO]["refs/convert/parquet"]
    content = bytearray((folder / "swahili/train/0000.parquet").read_bytes())
    content[9] ^= 1
    xlsum.altered["0000.parquet"] = bytes(content)
    with pytest.raises(UserError, match=r"xlsum: 0000\.parquet arrived with a wrong SHA-256 and"):
        read_texts(SWAHILI, "train")


def test_the_data_set_is_gone(hub: FakeHub) -> None:
    with pytest.raises(
        UserError, match=r"csebuetnlp/xlsum: swahili/train/0000\.parquet: no such dataset"
    ):
        read_texts(SWAHILI, "train")
