"""export writes an adapter that PEFT reads, or nothing; verify finds what has changed."""

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tli_engine.data.words import Word, pack
from tli_engine.models.adapters import adapter_strength
from tli_engine.models.early import load_early
from tli_engine.models.files import open_model
from tli_engine.models.peft_format import load_adapter
from tli_engine.train.manifest import write_manifest

Cli = Callable[..., Any]
Tree = Callable[[Path], dict[str, bytes | None]]

WEIGHTS = "adapter_model.safetensors"
WORD = Word((0, 40, 50, 60, 70), (False, True, True, True, True))


def ours(model: Path, adapter: Path, strength: float = 1.0) -> list[Tensor]:
    """Hidden states of the whole model with an adapter."""
    early = load_early(open_model(str(model)), 3, dtype=torch.float32, device=torch.device("cpu"))
    load_adapter(early, adapter)
    with adapter_strength(early, strength), torch.no_grad():
        return [hidden for _, hidden in early.hidden_states(pack([WORD]))]


def by_peft(model: Path, adapter: Path) -> list[Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(adapter)).eval()
    with torch.no_grad():
        output = adapted(torch.tensor([WORD.input_ids]), output_hidden_states=True)
    return [hidden[0] for hidden in output.hidden_states]


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def refused(cli: Cli, *args: object) -> str:
    """The one line on stderr of a command that ends with status 2."""
    status, out, err = cli(*args)
    assert (status, out) == (2, ""), err
    (line,) = err.splitlines()
    assert line.startswith("tli-engine: error: ")
    return str(line)


def test_exported_adapter_loads_in_peft(
    trained: Path, tiny_model: Path, cli: Cli, tmp_path: Path, tree: Tree
) -> None:
    before = tree(trained)
    result = cli("export", trained, "--format", "peft", "--out", "new/out")
    assert result.status == 0, result.err
    assert "written: new/out (8 tensors, strength 1)" in result.err
    out = tmp_path / "new/out"
    assert {p.name for p in out.iterdir()} == {WEIGHTS, "adapter_config.json", "README.md"}
    expected = ours(tiny_model, trained / "adapter")
    assert_close(by_peft(tiny_model, out), expected)
    assert_close(ours(tiny_model, out), expected)
    # it does something, and the run is left alone
    assert (expected[2] - ours(tiny_model, trained / "adapter", 0.0)[2]).abs().max() > 1e-3
    assert tree(trained) == before


def test_at_full_strength_the_tensors_are_the_runs(trained: Path, cli: Cli, tmp_path: Path) -> None:
    assert cli("export", trained, "--out", "out").status == 0
    exported, run = (load_file(p / WEIGHTS) for p in (tmp_path / "out", trained / "adapter"))
    assert exported.keys() == run.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in run.items())
    for name in ("README.md", "adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (trained / "adapter" / name).read_bytes()


@pytest.mark.parametrize("strength", [0.5, 1.75])
def test_strength_scales_what_the_adapter_adds(
    strength: float, trained: Path, tiny_model: Path, cli: Cli, tmp_path: Path
) -> None:
    assert cli("export", trained, "--strength", strength, "--out", "out").status == 0
    out = tmp_path / "out"
    exported, run = (load_file(p / WEIGHTS) for p in (out, trained / "adapter"))
    for name, tensor in run.items():
        scale = strength if ".lora_B." in name else 1
        assert torch.equal(exported[name], scale * tensor), name
    expected = ours(tiny_model, trained / "adapter", strength)
    assert_close(ours(tiny_model, out), expected)
    assert_close(by_peft(tiny_model, out), expected)
    assert f"Exported at strength {strength:g}" in (out / "README.md").read_text(encoding="utf-8")


def test_export_of_what_is_no_finished_run(cli: Cli, run: Path, tmp_path: Path) -> None:
    assert "none: not a run folder; it has no config.yaml" in refused(
        cli, "export", "none", "--out", "out"
    )
    shutil.rmtree(run / "adapter")
    line = refused(cli, "export", run, "--out", "out")
    assert "has no adapter yet; finish it with tli-engine train --resume --run" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("strength", ["0", "-1", "nan", "inf", "-inf"])
def test_strength_must_be_positive(strength: str, trained: Path, cli: Cli, tmp_path: Path) -> None:
    line = refused(cli, "export", trained, f"--strength={strength}", "--out", "out")
    assert f"--strength {float(strength)}: must be a positive number" in line
    assert not (tmp_path / "out").exists()


def test_export_into_a_folder_that_holds_something(
    trained: Path, cli: Cli, tmp_path: Path, tree: Tree
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    assert "out: is not empty" in refused(cli, "export", trained, "--out", "out")
    (tmp_path / "file").write_text("mine")
    assert "file: is a file" in refused(cli, "export", trained, "--out", "file")
    assert tree(tmp_path) == {"out": None, "out/mine.txt": b"mine", "file": b"mine"}


def test_export_into_an_empty_folder(trained: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert cli("export", trained, "--out", "out").status == 0
    assert (tmp_path / "out" / WEIGHTS).is_file()


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        # what safetensors makes of the same
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ],
    ids=["os", "safetensors"],
)
def test_a_full_disk_leaves_nothing(
    error: Exception,
    there: bool,
    trained: Path,
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tree: Tree,
) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise error

    if there:
        (tmp_path / "out").mkdir()
    monkeypatch.setattr("tli_engine.cli._export.save_file", full)
    line = refused(cli, "export", trained, "--out", "out")
    assert "out: cannot be written: " in line
    assert "No space left on device" in line
    assert line.endswith("nothing was kept")
    assert tree(tmp_path) == ({"out": None} if there else {})


def test_a_limit_on_file_size_leaves_nothing(
    trained: Path, cli: Cli, tmp_path: Path, tree: Tree
) -> None:
    """The file system itself refuses: no file may pass 4000 bytes, the adapter has more."""
    assert (trained / "adapter" / WEIGHTS).stat().st_size > 4000
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        line = refused(cli, "export", trained, "--out", "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "out: cannot be written: " in line
    assert "File too large" in line
    assert tree(tmp_path) == {}


def test_interrupted_export_leaves_nothing(
    trained: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tree: Tree
) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tli_engine.cli._export.save_file", interrupt)
    assert cli("export", trained, "--out", "out").status == 130
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (WEIGHTS, None, f"{WEIGHTS}: is missing"),
        (WEIGHTS, b"short", f"{WEIGHTS}: has 5 bytes, not "),
        ("adapter_config.json", None, "adapter_config.json"),
        ("README.md", None, "README.md"),
    ],
    ids=["no-weights", "broken-weights", "no-config", "no-card"],
)
def test_export_of_a_damaged_adapter(
    name: str, content: bytes | None, message: str, run: Path, cli: Cli, tmp_path: Path
) -> None:
    (run / "adapter" / name).unlink()
    if content is not None:
        (run / "adapter" / name).write_bytes(content)
    assert message in refused(cli, "export", run, "--out", "out")
    assert not (tmp_path / "out").exists()


def test_only_known_formats(trained: Path, cli: Cli) -> None:
    status, _, err = cli("export", trained, "--format", "onnx", "--out", "out")
    assert status == 2
    assert "peft" in err.splitlines()[-1]


@pytest.fixture
def checkpointed(run: Path) -> Path:
    """A run with a checkpoint, as a longer one would have."""
    folder = run / "checkpoints/step-000200"
    folder.mkdir(parents=True)
    for name in (WEIGHTS, "optimizer.safetensors", "state.json"):
        (folder / name).write_bytes(name.encode() * 10)
    write_manifest(folder, (WEIGHTS, "optimizer.safetensors", "state.json"))
    return run


CHECKPOINT = "checkpoints/step-000200"
FILES = [
    "config.yaml",
    "metrics.jsonl",
    "adapter/adapter_config.json",
    f"adapter/{WEIGHTS}",
    "adapter/README.md",
    f"{CHECKPOINT}/{WEIGHTS}",
    f"{CHECKPOINT}/optimizer.safetensors",
    f"{CHECKPOINT}/state.json",
]


def test_a_whole_run_is_said_to_be_whole(cli: Cli, checkpointed: Path, tree: Tree) -> None:
    before = tree(checkpointed)
    manifests = 1 + len(list(checkpointed.glob("checkpoints/step-*")))
    status, out, err = cli("verify", checkpointed)
    assert (status, out, err) == (0, f"{checkpointed}: whole ({manifests} manifests checked)\n", "")
    assert tree(checkpointed) == before


def test_a_run_and_its_last_checkpoint_are_whole(cli: Cli, trained: Path) -> None:
    assert cli("verify", trained).out == f"{trained}: whole (2 manifests checked)\n"


def test_a_checkpoint_can_be_checked_by_itself(cli: Cli, checkpointed: Path) -> None:
    folder = checkpointed / CHECKPOINT
    assert cli("verify", folder).out == f"{folder}: whole (1 manifest checked)\n"
    # what is wrong with the run is not the checkpoint's
    (checkpointed / "config.yaml").write_text("changed")
    assert cli("verify", folder).status == 0
    assert cli("verify", checkpointed).status == 1


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_is_found(name: str, cli: Cli, checkpointed: Path) -> None:
    path = checkpointed / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    status, out, _ = cli("verify", checkpointed)
    assert (status, out) == (1, f"{path}: its SHA-256 is not the manifest's\n")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(name: str, cli: Cli, checkpointed: Path) -> None:
    path = checkpointed / name
    path.unlink()
    status, out, _ = cli("verify", checkpointed)
    assert (status, out) == (1, f"{path}: is missing\n")


def test_a_file_cut_short_is_found(cli: Cli, checkpointed: Path) -> None:
    path = checkpointed / "adapter" / WEIGHTS
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    status, out, _ = cli("verify", checkpointed)
    assert (status, out) == (1, f"{path}: has {size - 1} bytes, not {size}\n")


def test_everything_wrong_is_listed(cli: Cli, checkpointed: Path) -> None:
    for name in FILES[::2]:
        (checkpointed / name).unlink()
    status, out, _ = cli("verify", checkpointed)
    assert status == 1
    assert sorted(out.splitlines()) == sorted(f"{checkpointed / n}: is missing" for n in FILES[::2])


def test_a_missing_manifest_is_found(cli: Cli, checkpointed: Path) -> None:
    for folder in (checkpointed / CHECKPOINT, checkpointed):
        (folder / "manifest.json").unlink()
        status, out, _ = cli("verify", checkpointed)
        assert status == 1
        assert f"{folder}: no manifest.json; it was not finished" in out.splitlines()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"files": []}', '{"files": {"a": {}}}', '{"files": {"a": 3}}']
)
def test_a_broken_manifest_is_found(text: str, cli: Cli, checkpointed: Path) -> None:
    path = checkpointed / "manifest.json"
    path.write_text(text)
    status, out, _ = cli("verify", checkpointed)
    (line,) = out.splitlines()
    assert (status, line.startswith(f"{path}: cannot be read")) == (1, True)


def test_measuring_a_run_again_leaves_it_whole(
    cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tli_engine.evaluate.linear_head._STEPS", 2)
    assert cli("evaluate", run, "--no-final-layer").status == 0
    assert cli("verify", run).status == 0


def test_what_is_no_folder_is_the_users_mistake(cli: Cli, trained: Path, tmp_path: Path) -> None:
    assert "none: no such run folder or checkpoint" in refused(cli, "verify", "none")
    path = trained / "config.yaml"
    assert f"{path}: no such run folder or checkpoint" in refused(cli, "verify", path)


def test_a_folder_that_is_no_run_is_not_whole(cli: Cli, tmp_path: Path) -> None:
    status, out, _ = cli("verify", tmp_path)
    assert (status, out) == (1, f"{tmp_path}: no manifest.json; it was not finished\n")


def test_the_manifest_covers_what_makes_the_run(trained: Path) -> None:
    manifest = json.loads((trained / "manifest.json").read_text())
    assert set(manifest["files"]) == {name for name in FILES if not name.startswith("checkpoints")}
