"""Scripts run as they are: results, what is said, exit statuses and tracebacks; and the bench of them."""

import json
import py_compile
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench import bench_drop_in
from bench.bench_drop_in import (
    FEW,
    SCRIPTS,
    Case,
    Timing,
    cases,
    numbers,
    tiny_subject,
    write_model,
    write_pairs,
)
from bench.harness import Row, write_results
from tests.integrations.fake_graphs import FakeRecorder
from tli_engine.cli import main
from tli_engine.integrations.direct_grad import direct_grad
from tli_engine.integrations.script import ScriptRun, accelerated_loading
from tli_engine.integrations.training_graphs import TrainingGraphs

ROOT = Path(__file__).resolve().parents[2]
Load = Callable[..., Any]


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
        check=False,
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense and a 4-bit model, and pairs."""
    folder = tmp_path_factory.mktemp("drop_in")
    for name, nf4 in (("dense", False), ("nf4", True)):
        write_model(tiny_subject(4, torch.float32, nf4), folder / name / "model")
        write_pairs(folder / "pairs.csv", 8)
    return folder


def results(case: Case, out: Path, monkeypatch: pytest.MonkeyPatch, run: bool) -> list[float]:
    """The numbers that a script writes, run here by Python or by ``run``."""
    arguments = [str(SCRIPTS / case.script), *case.before, str(out), *case.after]
    if run:
        assert main(["run", *arguments]) == 0
    else:
        monkeypatch.setattr(sys, "argv", arguments)
        runpy.run_path(arguments[0], run_name="__main__")
    return numbers(out)


def strengthen(adapter: Path) -> None:
    """Make a short training's adapter one that shows in cosines."""
    file = adapter / "adapter_model.safetensors"
    weights = {n: t * 100 if "lora_B" in n else t for n, t in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_scripts_of_the_published_kind_give_the_same(
    work: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # bitsandbytes infers in bf16 on some CPUs, so its own results are coarse there; it trains in fp32
    inferred = {"dense": 1e-5, "nf4": 6e-3}[kind]
    for name, case in cases(work / kind, {"scan": 3, "train": 16, "evaluate": 4}).items():
        out = work / f"{kind}.csv"
        if name == "evaluate":
            strengthen(work / kind / "adapter")
        plain, run = (results(case, out, monkeypatch, run) for run in (False, True))
        tolerance = 1e-5 if name == "train" else inferred
        # a row a layer, a step, a pair
        rows = {"scan_layers.py": 10, "train_early.py": 4, "evaluate_pairs.py": 8}
        assert len(run) == rows[case.script]
        torch.testing.assert_close(run, plain, rtol=0, atol=tolerance)
        if name == "evaluate":
            # each pair's cosine by the base model, then by the merged one
            changes = [abs(a - b) for a, b in zip(plain[::2], plain[1::2], strict=True)]
            assert max(changes) > 10 * inferred


def test_a_script_without_models_is_told_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text("print('done')\n")
    assert main(["run", str(script)]) == 0
    out, err = capfd.readouterr()
    assert out == "done\n"
    assert "no model was accelerated: none was loaded by from_pretrained" in err


def test_what_is_printed(work: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [str(work / "nf4" / "model"), str(work / "pairs.csv"), str(tmp_path / "out.csv")]
    assert main(["run", "--profile", str(SCRIPTS / "scan_layers.py"), *arguments]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("scanned in ")
    assert "LlamaForCausalLM: accelerated: 28 x bitsandbytes Linear4bit" in err
    assert "lazy hidden states: the model" in err
    # 8 pairs, 5 layers, one after another: each word goes through each block once
    line = next(line for line in err.splitlines() if line.split()[1:2] == ["80"])
    assert line.split() == ["LlamaForCausalLM", "80", "80", "64", "64", "320", "0"]
    assert re.search(r"LlamaForCausalLM: host: \d+\.\d\d s in lazy calls; ", err)
    assert "in 0 recordings of blocks" in err
    # a decoder inside, which was not called by itself, has none
    assert err.count(" in lazy calls") == 1
    assert len(numbers(tmp_path / "out.csv")) == 10


def test_why_training_was_not_replayed_is_printed(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    make = TrainingGraphs
    monkeypatch.setattr(
        "tli_engine.integrations.script.TrainingGraphs", lambda: make(lambda device: FakeRecorder())
    )
    case = cases(work / "nf4", FEW | {"train": 16})["train"]
    script = tmp_path / "script.py"
    text = (SCRIPTS / case.script).read_text()
    script.write_text(text.replace("lora_dropout=0.0", "lora_dropout=0.5"))
    arguments = [*case.before, str(tmp_path / "out.csv"), str(tmp_path / "adapter"), "1"]
    assert main(["run", "--profile", str(script), *arguments]) == 0
    # two steps of two calls, two blocks each
    expected = "LlamaForCausalLM: blocks trained without graphs: 8 x: Linear4bit adds"
    assert expected in capfd.readouterr().err


SCRIPT = """
import os, sys
import __main__
from helper import shout
shout(sys.argv, sys.path[0], __name__, __file__, __spec__, __package__, __loader__.path)
shout(__main__.__file__, __main__.__dict__ is globals(), sorted(globals()))
{end}
"""


@pytest.mark.parametrize(
    ("end", "status", "shown"),
    [
        ("", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('no pairs')", 1, "no pairs\n"),
        ("raise SystemExit", 0, ""),
        ("open('missing')", 1, "FileNotFoundError"),
        ("raise RuntimeError('out of luck')", 1, "RuntimeError: out of luck"),
        ("raise KeyboardInterrupt", 130, "KeyboardInterrupt"),
        ("def f(:", 1, "SyntaxError"),
    ],
)
def test_a_script_behaves_as_with_python(
    tmp_path: Path,
    end: str,
    status: int,
    shown: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "helper.py").write_text("def shout(*args): print(args, flush=True)\n")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(end=end))
    # a path that a script cannot find its neighbours by once it has changed the folder
    monkeypatch.chdir(tmp_path)
    script = script.relative_to(tmp_path)
    plain = python(str(script), "--flag", "x", "--profile", cwd=tmp_path)
    capfd.readouterr()
    sys.modules.pop("helper", None)
    argv, path = list(sys.argv), list(sys.path)
    assert main(["run", str(script), "--flag", "x", "--profile"]) == status
    sys.modules.pop("helper", None)
    out, err = capfd.readouterr()
    assert (sys.argv, sys.path) == (argv, path)
    assert getattr(sys.modules["__main__"], "__file__", None) != str(script.absolute())
    assert out == plain.stdout
    assert shown in err
    if status != 130:
        # by a signal, as the shell sees it, python ends otherwise
        assert plain.returncode == status
    if "Traceback" in plain.stderr and "Keyboard" not in shown:
        assert err[err.index("Traceback") :] == plain.stderr[plain.stderr.index("Traceback") :]


def test_a_compiled_script(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys; print(__name__, sys.argv[1:])")
    compiled = py_compile.compile(str(script), cfile=str(tmp_path / "script.pyc"))
    assert compiled is not None
    assert main(["run", compiled, "x"]) == 0
    assert capfd.readouterr().out == "__main__ ['x']\n"


def test_a_missing_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "nowhere.py"]) == 2
    assert capsys.readouterr().err == "tli-engine: error: nowhere.py: no such script\n"
    assert main(["run"]) == 2


def test_a_script_of_several_processes_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under torchrun, which docs/drop-in.md names, and other commands refuse."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", "2")
    script = tmp_path / "script.py"
    script.write_text("import os; print(os.environ['WORLD_SIZE'])")
    assert main(["run", str(script)]) == 0
    assert capsys.readouterr().out == "2\n"


def test_an_error_before_the_script_shows_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(run: ScriptRun) -> None:
        raise ImportError("no transformers")

    monkeypatch.setattr("tli_engine.integrations.script.accelerated_loading", broken)
    script = tmp_path / "script.py"
    script.write_text("")
    assert main(["run", str(script)]) == 1
    shown = capsys.readouterr().err
    assert "in broken" in shown
    assert "ImportError: no transformers" in shown


def test_loading_is_as_it_was_afterwards(load: Load, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import PreTrainedModel

    before = {o: dict(vars(o)) for o in (PreTrainedModel, PeftModel)}
    said: list[str] = []
    run = ScriptRun(said.append)
    with accelerated_loading(run):
        model = get_peft_model(load(), LoraConfig(target_modules=["q_proj"]))
        model.add_adapter("more", LoraConfig(target_modules=["v_proj"]))
        plain = load(nf4=False)
        plain.add_adapter(LoraConfig(target_modules=["q_proj"]))
    assert {o: dict(vars(o)) for o in (PreTrainedModel, PeftModel)} == before
    assert "data" not in torch.Tensor.__dict__
    assert "PeftModel: accelerated: 28 x bitsandbytes Linear4bit, 8 x LoRA over Linear4bit" in said
    assert "LlamaForCausalLM: accelerated: 4 x LoRA over Linear" in said


def test_gradients_of_4bit_parameters_are_read_directly() -> None:
    from bitsandbytes.nn import Params4bit

    weight = Params4bit(torch.randn(2, 3), requires_grad=True)
    asked: list[Any] = []

    class Other(Params4bit):  # type: ignore[misc]
        @classmethod
        def __torch_function__(cls, func: Any, *args: Any) -> Any:
            asked.append(func)
            return super().__torch_function__(func, *args)

    other = torch.Tensor._make_subclass(Other, torch.randn(2, 3), True)
    with accelerated_loading(ScriptRun(lambda line: None)), direct_grad(Other):
        assert weight.grad is None
        (weight * 2).sum().backward()
        assert type(weight.grad) is Tensor
        assert torch.equal(weight.grad, torch.full((2, 3), 2.0))
        weight.grad = None
        assert weight.grad is None
        with pytest.raises(RuntimeError, match="size"):
            weight.grad = torch.ones(5)
        weight.grad = torch.ones(2, 3)
        del weight.grad
        assert weight.grad is None
        other.sum().backward()
        asked.clear()
        assert other.grad is not None
        assert not asked
    assert "grad" not in Params4bit.__dict__
    assert other.grad is not None
    assert asked
    plain = type("Plain", (Tensor,), {})
    with direct_grad(plain):
        assert "grad" not in vars(plain)


def test_what_cannot_be_accelerated_runs_as_it_is(load: Load) -> None:
    from accelerate import cpu_offload

    said: list[str] = []
    model = load(nf4=False)
    cpu_offload(model, execution_device=torch.device("cpu"))
    ScriptRun(said.append).take(model)
    assert len(said) == 1
    assert said[0].startswith("LlamaForCausalLM runs as it is: ")
    assert "offloaded" in said[0]


@pytest.mark.long
def test_the_bench_runs_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr("bench.harness.RESULTS", tmp_path)
    options = ["--layers", "4", "--scripts", "evaluate", "--evaluate-pairs", "2", "--keep"]
    monkeypatch.setattr(sys, "argv", ["drop_in", "--model", "tiny", *options])
    in_a_process = bench_drop_in.run_case

    def run(case: Case, way: list[str], out: Path) -> Timing:
        """The adapters are made here: a process takes seconds to start, and three are left."""
        if case.script != "train_early.py":
            return in_a_process(case, way, out)
        return Timing(1.0, 1.0, results(case, out, monkeypatch, bool(way)))

    monkeypatch.setattr(bench_drop_in, "run_case", run)
    other = Row("script", {}, "tiny fp32: scan_layers", "tli-engine", 1.0, 1.0, 1.0, 1.0)
    old = replace(other, model="tiny fp32: evaluate_pairs")
    write_results("drop_in", [other, old], [])
    bench_drop_in.main()
    result = json.loads((tmp_path / "cpu" / "drop_in.json").read_text())
    assert {"device", "torch", "peers", "commit", "rows"} <= result.keys()
    kept, *rows = result["rows"]
    assert Row(**kept) == other
    assert [row["provider"] for row in rows] == ["transformers", "tli-engine"]
    for row in rows:
        assert (row["case"], row["model"]) == ("script", "tiny fp32: evaluate_pairs")
        assert row["ms"] > 0
        assert row["notes"]["max_difference"] < 1e-4
    assert rows[1]["notes"]["first_run_pairs"] == 2


def test_results_are_written_after_each_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that is cut short keeps what was measured; one whose results are off is an error."""
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["drop_in", "--scripts", "scan", "train", "--pairs", "3"])
    monkeypatch.setattr(bench_drop_in, "write_model", lambda _, folder: folder.mkdir(parents=True))
    ran = []

    def run(case: Case, way: list[str], out: Path) -> Timing:
        ran.append((case.script, case.pairs, bool(way)))
        if len(ran) == 6:
            return Timing(1.0, 2.0, [0.5, 0.9])
        return Timing(0.5 if way else 2.0, 3.0, [0.5, 0.5])

    monkeypatch.setattr(bench_drop_in, "run_case", run)
    with pytest.raises(SystemExit, match=r"train_early.py: results differ by 0.4; not timed"):
        bench_drop_in.main()
    # a few pairs by the engine, then all of them both ways
    scan = "scan_layers.py"
    assert ran[:3] == [(scan, 1, True), (scan, 3, False), (scan, 3, True)]
    rows = json.loads((tmp_path / "cpu" / "drop_in.json").read_text())["rows"]
    assert [(r["model"], r["provider"]) for r in rows] == [
        ("tiny fp32: scan_layers", "transformers"),
        ("tiny fp32: scan_layers", "tli-engine"),
        ("tiny fp32: train_early", "transformers"),
    ]
    assert [r["ratio_to_baseline"] for r in rows] == [1.0, 4.0, 1.0]
    assert capsys.readouterr().out.count("written: ") == 3
