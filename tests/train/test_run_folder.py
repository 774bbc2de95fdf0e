import json
import os
import re
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tli_engine.errors import UserError
from tli_engine.train.run_folder import (
    check_free,
    create,
    default_folder,
    write_json,
    write_text,
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What an earlier run left."""
    folder = tmp_path / "run"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "README.md").write_text("card")
    (folder / "config.yaml").write_text("model: m\nprovenance:\n  versions: {}\n")
    return folder


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


def test_default_folder_is_named_by_recipe_and_utc_time() -> None:
    folder = default_folder("demo")
    assert folder.parent == Path("runs")
    assert folder.name.startswith("demo-")
    named = datetime.strptime(folder.name, "demo-%Y%m%d-%H%M%S").replace(tzinfo=UTC)
    assert abs(datetime.now(UTC) - named) < timedelta(seconds=5)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["new", "new/deep/er", "empty", "."])
def test_free_folders(name: str, overwrite: bool, tmp_path: Path) -> None:
    folder = tmp_path / name
    if name == "empty":
        folder.mkdir()
    before = tree(tmp_path)
    check_free(folder, overwrite)
    # looking leaves no trace
    assert tree(tmp_path) == before
    create(folder, overwrite)
    assert folder.is_dir()
    assert list(folder.iterdir()) == []


def test_a_folder_whose_run_was_killed_as_it_began_is_free(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.part").write_text("model:")
    create(tmp_path, overwrite=False)
    write_text(tmp_path / "config.yaml", "model: m\n")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("act", [check_free, create])
def test_a_folder_that_holds_something_is_refused(act: object, run: Path) -> None:
    before = tree(run)
    with pytest.raises(UserError, match=r"run: is not empty; choose another folder, or --overw"):
        act(run, False)  # type: ignore[operator]
    assert tree(run) == before


def test_overwrite_empties_a_run(run: Path) -> None:
    create(run, overwrite=True)
    assert list(run.iterdir()) == []


@pytest.mark.parametrize("config", [None, "model: m\n", "# provenance:\nlearning_rate: 1\n"])
def test_overwrite_leaves_what_is_not_a_run(config: str | None, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    if config is not None:
        (tmp_path / "config.yaml").write_text(config)
    before = tree(tmp_path)
    with pytest.raises(UserError, match="is not a run folder; --overwrite leaves it alone"):
        create(tmp_path, overwrite=True)
    assert tree(tmp_path) == before


def test_overwrite_through_a_link_keeps_the_link(run: Path, tmp_path: Path) -> None:
    link = tmp_path / "latest"
    link.symlink_to(run)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept.txt").write_text("kept")
    (run / "link-to-outside").symlink_to(outside)
    create(link, overwrite=True)
    assert link.is_symlink()
    assert list(run.iterdir()) == []
    assert (outside / "kept.txt").read_text() == "kept"


def test_overwrite_of_the_current_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    create(Path(), overwrite=True)
    assert run.is_dir()
    assert list(run.iterdir()) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_refused(overwrite: bool, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("content")
    with pytest.raises(UserError, match=r"file: is a file; choose another folder"):
        check_free(file, overwrite)
    assert file.read_text() == "content"


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("file/run", id="below-a-file"),
        pytest.param("file/a/run", id="deep-below-a-file"),
        pytest.param("x" * 300, id="name-too-long"),
        pytest.param("/proc/run", id="file-system-that-takes-no-files"),
    ],
)
def test_a_place_that_cannot_be_written_is_found_out_before(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    before = tree(tmp_path)
    for act in (check_free, create):
        with pytest.raises(UserError, match=r": cannot be written: .*; choose another folder$"):
            act(tmp_path / path, False)
    assert tree(tmp_path) == before


def test_a_link_to_nothing_cannot_be_made_a_folder(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="link: cannot be made: "):
        create(link, overwrite=False)


def test_write_text_replaces_the_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "first\n")
    write_text(path, "maji → water\n")
    assert path.read_bytes() == "maji → water\n".encode()
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o400


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(file: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as raised:
        write_text(path, "new")
    if expected is UserError:
        assert str(raised.value) == f"{path}: cannot be written: No space left on device"
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_write_into_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none" / "a.txt", tmp_path / "file" / "a.txt"):
        with pytest.raises(UserError, match=re.escape(f"{path}: cannot be written: ")):
            write_text(path, "x")


def test_write_json_is_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    numbers = {"nan": float("nan"), "inf": [float("inf"), (-float("inf"), 1.5)], "text": "é"}
    write_json(path, numbers)
    text = path.read_text(encoding="utf-8")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    values = json.loads(text, parse_constant=refuse)
    assert values == {"nan": None, "inf": [None, [None, 1.5]], "text": "é"}
    assert "é" in text
    assert text.endswith("}\n")
