"""``tli-engine run``: what it counts, what it refuses, and what a script finds around it."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tli_engine.cli import main
from tli_engine.cli._run import _print_profile
from tli_engine.integrations.script import ScriptRun

ROOT = Path(__file__).resolve().parents[2]
COUNTS = {"calls": 12_345, "lazy": 12_345, "words": 98_765, "blocks": 65_432, "of_blocks": 98_304}


def profile(
    capsys: pytest.CaptureFixture[str], *counts: tuple[str, dict[str, int]]
) -> tuple[list[list[str]], str]:
    """The table's rows word by word, and all that ``--profile`` prints."""
    ran = ScriptRun(lambda line: None)
    ran.counts = [(name, Counter(some)) for name, some in counts]
    _print_profile(ran, 1.5)
    err = capsys.readouterr().err
    return [line.split() for line in err.splitlines() if re.match("  [A-Z]", line)], err


def test_the_profile_fits_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    counts = COUNTS | {"replayed": 43_210}
    (row,), err = profile(capsys, ("MistralForCausalLM", counts))
    assert row == ["MistralForCausalLM", "12,345", "12,345", "98,765", "65,432", "98,304", "43,210"]
    assert max(len(line) for line in err.splitlines() if " host: " not in line) <= 80
    heads = " ".join(err.splitlines()[1:4]).split()
    assert heads == ["words", "blocks", "model", "calls", "lazy", "found", "run", "of", "replayed"]
    # beyond that nothing is left out, either
    (row,), _ = profile(capsys, ("Gemma3ForCausalLM", dict.fromkeys(COUNTS, 1_234_567)))
    assert row == ["Gemma3ForCausalLM", *["1,234,567"] * 5, "0"]


def test_the_profile_tells_models_apart(capsys: pytest.CaptureFixture[str]) -> None:
    models = [("LlamaForCausalLM", {"calls": n}) for n in (3, 0, 5)]
    rows, err = profile(capsys, *models, ("LlamaModel", {}), ("Qwen2Model", {"calls": 1}))
    assert [row[:2] for row in rows] == [
        ["LlamaForCausalLM", "1"],
        ["LlamaForCausalLM", "3"],
        ["Qwen2Model", "1"],
    ]
    assert [row[2] for row in rows] == ["3", "5", "0"]
    assert "tli-engine: the script took 1.5 s, loading included\n" in err
    rows, err = profile(capsys, ("LlamaModel", {}))
    assert rows == []
    assert "no accelerated model was called" in err


@pytest.mark.parametrize("option", ["--bad", "--profil", "-x"])
def test_an_unknown_option_is_no_script(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", option, "scan.py"]) == 2
    # older versions of click put a colon
    said = f"tli-engine: error: No such option:? '?{option}'?[.]"
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(said, f"{line}.")


def test_what_is_no_script_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(script: str) -> str:
        assert main(["run", script]) == 2
        return capsys.readouterr().err.removeprefix("tli-engine: error: ")

    folder = tmp_path / "package"
    folder.mkdir()
    assert refused(str(folder)) == f"{folder}: is a directory, not a script\n"
    (folder / "__main__.py").touch()
    assert refused(str(folder)).endswith(f"not a script; name {folder}/__main__.py\n")
    assert refused("-") == "-: a script is read from a file, not from standard input\n"
    device = "/dev/null: is a pipe or a device; a script is read from a file\n"
    assert refused("/dev/null") == device
    assert refused("nowhere.py") == "nowhere.py: no such script\n"


def test_a_script_finds_what_python_shows_it(tmp_path: Path) -> None:
    """The folder of the command is not searched for modules, and nothing is left in the environment."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "tli-engine"
    command.write_text("import sys\nfrom tli_engine.cli import main\nsys.exit(main())\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys\n"
        "ours = [name for name in os.environ if name.startswith('TLI_ENGINE')]\n"
        "print(json.dumps([sys.path, sys.argv, ours]))\n"
    )

    def found(*arguments: str) -> list[list[str]]:
        result = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
            check=True,
        )
        lists: list[list[str]] = json.loads(result.stdout)
        return lists

    plain = found(str(script), "--x")
    assert found(str(command), "run", str(script), "--x") == plain
    assert plain[1:] == [[str(script), "--x"], []]
