import json
import os
import re
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tli_engine import __version__, backends
from tli_engine.cli import main
from tli_engine.cli._info import collect, print_info
from tli_engine.config import recipe_names, resolve_config
from tli_engine.errors import ConfigError

Cli = Callable[..., Any]
Tree = Callable[[Path], dict[str, bytes | None]]


def test_help_answers_at_once() -> None:
    """CPU time, not wall-clock time: other work on the machine must not fail this."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "tli_engine", "train", "--help"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert "--recipe" in result.stdout
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert statistics.median(seconds) < 0.5


def test_torch_is_not_imported_to_help_or_to_refuse() -> None:
    calls = [
        ["--help"],
        ["--version"],
        *([command, "--help"] for command in ("scan", "train", "plan", "evaluate", "data", "info")),
        ["data", "check", "--help"],
        ["train", "none.yaml"],
        ["train", "--recipe", "demo", "--set", "seeed=1"],
        ["train", "--recipe", "demo", "--print-config"],
    ]
    code = (
        "import sys; from tli_engine.cli import main; "
        f"print([main(c) for c in {calls}], file=sys.stderr); "
        "print([m for m in ('torch', 'transformers', 'numpy', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.endswith("\n[]\n")
    assert result.stderr.endswith("\n[0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 0]\n")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param({}, "expandable_segments:True", id="unasked"),
        pytest.param(
            {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64", id="asked"
        ),
        pytest.param(
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, None, id="by-its-old-name"
        ),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch has no such segments")
def test_memory_grows_unless_the_user_has_set_it_up(
    given: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "PYTORCH_ALLOC_CONF"
    for each in (name, "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(each, raising=False)
    for each, value in given.items():
        monkeypatch.setenv(each, value)
    # a script's memory is its own affair
    assert main(["run", "--help"]) == 0
    assert os.environ.get(name) == given.get(name)
    assert main(["plan", "--help"]) == 0
    assert os.environ.get(name) == expected
    monkeypatch.delenv(name, raising=False)


def test_help_and_version(cli: Cli) -> None:
    status, out, err = cli("--help")
    assert (status, err) == (0, "")
    assert cli("-h").out == out
    commands = re.findall(r"^  (\w+)  ", out.partition("Commands:")[2], re.MULTILINE)
    assert {"scan", "train", "evaluate", "data", "info"} <= set(commands)
    for command in commands:
        assert cli(command, "--help").out.startswith(f"Usage: tli-engine {command} ")
    assert cli("--version").out == f"tli-engine, version {__version__}\n"


USAGE = [
    pytest.param(["trian"], "trian", id="unknown-command"),
    pytest.param(["--quick"], "--quick", id="unknown-global-option"),
    pytest.param(["train", "--quick"], "--quick", id="unknown-option"),
    pytest.param(["data", "chek"], "chek", id="unknown-subcommand"),
    pytest.param(["scan"], "MODEL", id="missing-argument"),
    pytest.param(["evaluate", "run", "more"], "more", id="one-argument-too-many"),
    pytest.param(["scan", "m", "--layers", "two"], "two", id="not-a-number"),
    pytest.param(["scan", "m", "--pooling", "mean"], "weighted", id="not-a-choice"),
    pytest.param(["train", "--set"], "--set", id="option-without-value"),
]


@pytest.mark.parametrize(("args", "named"), USAGE)
def test_usage_error_is_the_users(
    args: list[str], named: str, cli: Cli, tmp_path: Path, tree: Tree
) -> None:
    status, out, err = cli(*args)
    assert (status, out) == (2, "")
    assert named in err.splitlines()[-1]
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(("args", "named"), USAGE)
def test_usage_error_is_one_line(args: list[str], named: str, cli: Cli) -> None:
    (line,) = cli(*args).err.splitlines()
    assert named in line


ERRORS = [
    ("train", "give either a YAML file or --recipe NAME"),
    ("train {config} --recipe demo", "give either a YAML file or --recipe NAME"),
    ("train none.yaml", "none.yaml: no such configuration; give a YAML file or --recipe demo|"),
    ("train {tmp}", "cannot be read as UTF-8 YAML"),
    ("train --recipe demmo", "--recipe: no recipe 'demmo'; there are "),
    ("train {config} --set train.stepz=3", "train.stepz: unknown key; known here: epochs, steps"),
    ("train {config} --set trian.steps=3", "trian: unknown key; known here: model, "),
    ("train {config} --set train.steps", "--set train.steps: must be key=value"),
    ("train {config} --set lora.r=0", "lora.r: input should be greater than or equal to 1"),
    ("train {config} --set data.pairs=none.csv", "none.csv: cannot be read: No such file"),
    ("train {config} --set data.pairs=bad.csv", "bad.csv: line 3: 'english' is ''; every pair"),
    ("train {config} --set data.pairs=bad.json", "bad.json: line 1: not JSON"),
    ("train {config} --set data.pairs=one.csv", "one.csv: a contrastive loss needs at least 2"),
    ("train {config} --set data.control=none.csv", "none.csv: cannot be read"),
    ("train {config} --set data.languages=[swahili,luo]", "no column 'luo'; the columns are: swa"),
    ("train {config} --set model=nowhere", "nowhere: no such model"),
    ("train {config} --set model=builtin:x", "builtin:x: no such built-in model; there is builtin"),
    ("train {config} --set model=full", "full: no config.json; not a Hugging Face model folder"),
    ("train {config} --set device=tpu", "device: 'tpu'"),
    ("train {config} --set device=cuda:99", "device: 'cuda:99' is not there"),
    ("train {config} --set align.layer=4", "hidden_states[4] does not exist; it has 0 … 3"),
    ("train {config} --set lora.layers=2", "no gradient reaches block 2: the loss reads hidden_"),
    ("train {config} --set lora.layers=7", "lora.layers: the model has blocks 0-2, none 7"),
    ("train {config} --set lora.layers=x", "lora.layers: 'x' is not of the form"),
    ("train {config} --set lora.modules=[query]", "'query' matches no linear layer; there are q_"),
    ("train {config} --set words.prefix=[BOS]", "words.prefix: "),
    ("train {config} --set words.prefix=BOS", "words.prefix: 'BOS' is not a token of this model"),
    ("train {config} --set lora.init=none", "none: no adapter_config.json; not a PEFT adapter"),
    ("train {config} --run full", "full: is not empty; choose another folder, or --overwrite"),
    ("train {config} --run full --overwrite", "full: is not a run folder; --overwrite leaves"),
    ("train {config} --run file", "file: is a file; choose another folder"),
    ("train {config} --run file --overwrite", "file: is a file; choose another folder"),
    ("train {config} --run file/run", "cannot be written: Not a directory; choose another"),
    ("train {config} --run /proc/run", "/proc: cannot be written: "),
    ("evaluate none", "none: not a run folder; it has no config.yaml"),
    ("evaluate full", "full: not a run folder; it has no config.yaml"),
    ("evaluate file", "file: not a run folder; it has no config.yaml"),
    ("scan nowhere", "nowhere: no such model; give a Hugging Face folder"),
    ("scan full", "full: no config.json; not a Hugging Face model folder"),
    ("scan none.gguf", "none.gguf: no such GGUF file"),
    ("scan {model} --pairs none.csv", "none.csv: cannot be read: No such file"),
    ("scan {model} --pairs pairs.txt", "pairs.txt: unknown kind of file '.txt'; known are .json,"),
    ("scan {model} --pairs builtin:xx", "builtin:xx: no such built-in lexicon"),
    ("scan {model} --languages swahili", "--languages swahili: must be two column names"),
    ("scan {model} --languages swahili,luo", "no column 'luo'"),
    ("scan {model} --limit 1", "--limit 1: a scan needs at least 2 pairs"),
    ("scan {model} --device tpu", "device: 'tpu'"),
    ("scan {model} --presentation template", "'template' needs a template per language"),
    ("scan {model} --template neno", "--template neno: must be LANGUAGE=TEXT"),
    ("scan {model} --out full", "full: is not empty; choose another folder, or --overwrite"),
    ("scan {model} --out file", "file: is a file; choose another folder"),
    ("data check none.csv", "none.csv: cannot be read: No such file"),
    ("data check bad.csv", "bad.csv: line 3: 'english' is ''; every pair needs two non-empty"),
    ("data check {pairs} --languages a,a", "--languages a,a: must be two column names"),
    ("data check {pairs} --control none.csv", "none.csv: cannot be read"),
    ("data check {pairs} --model nowhere", "nowhere: no such model"),
]


ERRORS += [
    ("scan {model} --layers 9", "hidden_states[9] does not exist; it has 0 … 3"),
    ("scan {model} --dtype int8", "dtype: 'int8' is not one"),
    ("scan {model} --out file --overwrite", "file: is a file; choose another folder"),
    ("scan list", "list/config.json: "),
    ("scan odd", "odd/config.json: "),
]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        *(pytest.param(*e, id=e[0]) for e in ERRORS),
    ],
)
def test_users_error_is_one_line_and_leaves_nothing(
    command: str,
    message: str,
    cli: Cli,
    tmp_path: Path,
    config_file: Path,
    tiny_model: Path,
    pairs_file: Path,
    tree: Tree,
) -> None:
    (tmp_path / "file").write_text("content")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    (tmp_path / "bad.csv").write_text("swahili,english\nmaji,water\nmoto\n")
    (tmp_path / "one.csv").write_text("swahili,english\nmaji,water\n")
    (tmp_path / "bad.json").write_text("[{swahili: maji}]")
    for name, text in (("list", "[]"), ("odd", '{"model_type": "llama", "hidden_size": "x"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    before = tree(tmp_path)

    places = {"config": config_file, "model": tiny_model, "pairs": pairs_file, "tmp": tmp_path}
    status, out, err = cli(*(part.format(**places) for part in command.split(" ")))

    (line,) = err.splitlines()
    assert line.startswith("tli-engine: error: ")
    assert message in line
    assert (status, out) == (2, "")
    assert tree(tmp_path) == before


def test_debug_shows_the_traceback(cli: Cli) -> None:
    with pytest.raises(ConfigError, match="no such configuration"):
        main(["--debug", "train", "none.yaml"])
    # and not for the next command of the same process
    assert cli("train", "none.yaml").status == 2


@pytest.mark.parametrize("recipe", recipe_names())
def test_print_config_resolves_again(recipe: str, cli: Cli, tmp_path: Path, tree: Tree) -> None:
    printed = cli("train", "--recipe", recipe, "--set", "seed=3", "--print-config")
    assert (printed.status, printed.err) == (0, "")
    values = yaml.safe_load(printed.out)
    assert values["seed"] == 3
    assert resolve_config(values, recipe).seed == 3
    again = tmp_path / "again.yaml"
    again.write_text(printed.out, encoding="utf-8")
    assert cli("train", again, "--print-config") == printed
    assert tree(tmp_path).keys() == {"again.yaml"}


def test_info_json(cli: Cli) -> None:
    status, out, _ = cli("info", "--json")
    facts = json.loads(out)
    assert status == 0
    assert facts["versions"]["tli-engine"] == __version__
    assert facts["devices"][0]["name"] == "cpu"
    assert facts["ops"].keys() >= {"cosine_similarity", "segment_mean"}
    assert all(op["cpu"] == "reference" for op in facts["ops"].values())
    assert "llama" in facts["families"]
    # the text for people says the same
    shown = cli("info").out
    assert facts["versions"]["torch"] in shown
    assert facts["builtin_data"] == ["builtin:sw-en", "builtin:sw-demo"]
    assert "builtin:sw-en, builtin:sw-demo\n" in shown


def test_info_says_once_that_there_is_no_gpu(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A CPU-only install has no Triton, which is no fault and not worth a line an op."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setitem(sys.modules, "triton", None)
    backends._resolve.cache_clear()
    shown = cli("info")
    backends._resolve.cache_clear()
    lines = [line for line in shown.out.splitlines() if line.startswith("ops ")]
    assert len(lines) == 1
    assert "there is no GPU here, so the reference runs all: add_rms_norm, " in lines[0]
    assert (shown.err, caplog.records) == ("", [])


def test_info_sums_up_ops_that_run_alike(capsys: pytest.CaptureFixture[str]) -> None:
    gpu = {"name": "H200", "memory_mib": 1, "architecture": "sm_90", "nf4_layers": "cuda"}
    facts = collect() | {"devices": [{"name": "cpu", "threads": 1}, gpu]}
    facts["ops"] = {
        "swiglu": {"cpu": "reference", "gpu": "triton", "not": []},
        "rotary": {"cpu": "reference", "gpu": "triton", "not": []},
        "word_attention": {"cpu": "reference", "gpu": "reference", "not": ["triton has none"]},
    }
    print_info(facts)
    out = capsys.readouterr().out
    assert "ops        reference on a CPU, triton on a GPU: swiglu, rotary\n" in out
    assert "reference on a GPU (triton has none): word_attention\n" in out


def test_data_check(cli: Cli, pairs_file: Path, tiny_model: Path) -> None:
    status, out, err = cli("data", "check", pairs_file, "--json", "--model", tiny_model)
    report = json.loads(out)
    assert (status, err) == (0, "")
    assert report["train"]["swahili"]["words"] == 10
    assert report["control"]["english"]["words"] == 4
    # a BOS and a token a byte
    assert report["train"]["english"]["tokens"]["max"] == 1 + len("water")
    assert report["leaks"] == {"swahili": [], "english": []}
    assert "duplicate pairs: 0" in cli("data", "check", pairs_file).out


def test_data_check_warns_of_a_leak(cli: Cli, pairs_file: Path, tmp_path: Path) -> None:
    (tmp_path / "control.jsonl").write_text('{"swahili": "Maji", "english": "liquid"}\n')
    status, out, err = cli("data", "check", pairs_file, "--control", "control.jsonl")
    assert status == 0
    assert "swahili control words seen in training: 1: maji" in out
    assert "warning: 1 swahili control words are in training: not unseen" in err


def test_data_check_of_the_lexicon(cli: Cli) -> None:
    report = json.loads(cli("data", "check", "builtin:sw-en", "--json").out)
    assert report["warnings"] == []
    assert report["control"]["swahili"]["words"] >= 120


def test_output_to_a_closed_pipe_is_no_error(pairs_file: Path) -> None:
    command = [sys.executable, "-m", "tli_engine", "train", "--recipe", "demo", "--print-config"]
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert "Traceback" not in result.stderr


def test_info_names_a_backend_of_every_op(cli: Cli) -> None:
    pytest.importorskip("triton")
    facts = json.loads(cli("info", "--json").out)
    assert {"nf4_linear", "word_attention", "cross_entropy_rows", "flat_adamw"} <= set(facts["ops"])
    for op, backend in facts["ops"].items():
        assert backend["gpu"] in ("triton", "cuda"), op
    assert facts["attention"]["sdpa"] == "runs"
    assert "none of Liger's" in facts["blocks"]
    assert set(facts["attention"]) == {"sdpa", "varlen", "flash-attn"}
