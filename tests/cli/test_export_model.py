"""export --format merged and nf4: a whole model and its drift, or nothing."""

import json
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tli_engine.evaluate.logit_drift import measure_drift, sample_words
from tli_engine.models.blockwise import logits_of
from tli_engine.models.early import load_early
from tli_engine.models.files import open_model
from tli_engine.models.merged import MergedSource, write_model, write_nf4
from tli_engine.models.peft_format import read_adapter
from tli_engine.train.manifest import write_manifest

Cli = Callable[..., Any]
Tree = Callable[[Path], dict[str, bytes | None]]

WEIGHTS = "model.safetensors"
DRIFT = re.compile(r"logit drift: max (\S+), mean (\S+), KL (\S+) nats\n")
FORMATS = ["merged", "nf4"]


def refused(cli: Cli, *args: object) -> str:
    """The one line on stderr of a command that ends with status 2."""
    status, out, err = cli(*args)
    assert (status, out) == (2, ""), err
    (line,) = err.splitlines()
    assert line.startswith("tli-engine: error: ")
    return str(line)


def exported(cli: Cli, run: Path, *options: object) -> tuple[dict[str, Any], str]:
    """``export.json`` of an export to ``out``, and its lines on stderr."""
    status, out, err = cli("export", run, *options, "--out", "out")
    assert status == 0, err
    printed = DRIFT.fullmatch(out)
    assert printed is not None, out
    record = json.loads(Path("out/export.json").read_text())
    drift = record["logit_drift"]
    figures = [f"{drift[k]:.3g}" for k in ("max", "mean", "kl")]
    assert figures == list(printed.groups())
    return record, err


def with_config(run: Path, **values: Any) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | values))


@pytest.fixture
def full_run(run: Path, tiny_model: Path) -> Path:
    """A run that has trained all weights, as its folder looks."""
    shutil.rmtree(run / "adapter")
    data = {"texts": "articles.jsonl"}
    with_config(run, objective="sft", method="full", data=data)
    files = open_model(str(tiny_model))

    def trained(name: str) -> torch.Tensor:
        return 1.5 * files.source.read(name)

    write_model(files, trained, run / "model", torch.bfloat16)
    write_manifest(run, [f"model/{path.name}" for path in (run / "model").iterdir()])
    return run


def test_merged_weights_are_base_plus_adapter(
    trained: Path, tiny_model: Path, cli: Cli, tree: Tree
) -> None:
    before = tree(trained)
    record, err = exported(cli, trained, "--format", "merged")
    assert "written: out (30 tensors, 0.00 GB, files of weights: 1, strength 1)" in err
    drift = record["logit_drift"]
    # of fp32 weights only sums are rounded
    assert drift["max"] < 1e-5
    assert drift["kl"] < 1e-9
    assert (drift["against"], drift["sentences"]) == ("base model and adapter", 16)
    assert (record["format"], record["strength"], record["note"]) == ("merged", 1.0, None)
    assert record["base_model"] == str(tiny_model)

    adapter = load_file(trained / "adapter/adapter_model.safetensors")
    base, merged = load_file(tiny_model / WEIGHTS), load_file(Path("out") / WEIGHTS)
    assert base.keys() == merged.keys()
    changed = [n for n in base if not torch.equal(base[n], merged[n])]
    assert len(changed) == 4
    for name in changed:
        key = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (adapter[f"{key}.lora_{letter}.weight"] for letter in "AB")
        torch.testing.assert_close(merged[name], base[name] + 2.0 * b @ a, rtol=0, atol=1e-6)
    assert tree(trained) == before


def test_transformers_and_this_package_read_it(trained: Path, cli: Cli) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported(cli, trained, "--format", "merged")
    model = AutoModelForCausalLM.from_pretrained("out")
    ids = AutoTokenizer.from_pretrained("out")("maji", return_tensors="pt").input_ids
    assert model(ids).logits.shape == (1, 5, 258)
    assert open_model("out").config.num_hidden_layers == 3
    modes = {p.name: p.stat().st_mode & 0o777 for p in Path("out").iterdir()}
    assert modes[WEIGHTS] == 0o644


@pytest.mark.parametrize("kind", FORMATS)
def test_strength_scales_what_is_merged(
    kind: str, trained: Path, tiny_model: Path, cli: Cli
) -> None:
    record, err = exported(cli, trained, "--format", kind, "--strength", 0.5)
    assert "strength 0.5)" in err
    assert record["strength"] == 0.5
    # the reference is scaled too
    assert record["logit_drift"]["max"] < {"merged": 1e-5, "nf4": 1.0}[kind]
    if kind == "merged":
        name = "model.layers.0.self_attn.q_proj.weight"
        adapter = load_file(trained / "adapter/adapter_model.safetensors")
        key = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (adapter[f"{key}.lora_{letter}.weight"] for letter in "AB")
        expected = load_file(tiny_model / WEIGHTS)[name] + b @ a
        torch.testing.assert_close(load_file(Path("out") / WEIGHTS)[name], expected)


@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_is_smaller_and_drifts_more(double_quant: bool, run: Path, cli: Cli) -> None:
    with_config(run, double_quant=double_quant)
    record, _ = exported(cli, run, "--format", "nf4")
    assert 1e-4 < record["logit_drift"]["max"] < 1.0
    config = json.loads(Path("out/config.json").read_text())["quantization_config"]
    assert (config["bnb_4bit_quant_type"], config["bnb_4bit_use_double_quant"]) == (
        "nf4",
        double_quant,
    )
    assert open_model("out").source.read_nf4("layers.0.mlp.up_proj.weight") is not None


def test_what_the_adapter_is_merged_into_is_said(
    run: Path, tiny_model: Path, cli: Cli, tmp_path: Path
) -> None:
    # a run that records no base: this one's was not in NF4
    with_config(run, quantize="nf4", provenance={})
    record, err = exported(cli, run, "--format", "merged")
    assert record["note"] in err
    assert "was trained beside in NF4 (quantize: nf4)" in record["note"]
    shutil.rmtree("out")

    base = open_model(str(tiny_model))
    (tmp_path / "base").mkdir()
    write_nf4(base, MergedSource(base), tmp_path / "base")
    with_config(run, quantize="auto", provenance={}, model=str(tmp_path / "base"))
    record, err = exported(cli, run, "--format", "merged")
    assert record["note"] in err
    assert record["note"].endswith("is NF4; the adapter is merged into its dequantised values")
    assert record["logit_drift"]["max"] < 1e-5


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", FORMATS)
def test_the_drift_is_from_the_quantised_model_that_was_trained(
    kind: str, double_quant: bool, run: Path, tiny_model: Path, cli: Cli, tmp_path: Path
) -> None:
    with_config(run, quantize="nf4", double_quant=double_quant, provenance={})
    record, _ = exported(cli, run, "--format", kind)
    base = open_model(str(tiny_model))
    (tmp_path / "base").mkdir()
    write_nf4(base, MergedSource(base), tmp_path / "base", double_quant=double_quant)
    words, adapter = sample_words(base), read_adapter(run / "adapter")
    trained = logits_of(open_model(str(tmp_path / "base")), words, adapter)
    drift = measure_drift(trained, logits_of(open_model("out"), words))
    assert record["logit_drift"]["against"] == "base model in NF4 and adapter"
    for name in ("max", "mean", "kl"):
        assert record["logit_drift"][name] == pytest.approx(getattr(drift, name), rel=1e-3), name
    # what NF4 took from the base is not in what is written
    assert drift.max > 1e-3
    dense = measure_drift(logits_of(base, words, adapter), logits_of(open_model("out"), words))
    assert dense.max != pytest.approx(drift.max, rel=1e-2)


def test_a_base_at_another_revision_is_said(run: Path, cli: Cli) -> None:
    provenance = yaml.safe_load((run / "config.yaml").read_text())["provenance"]
    with_config(run, provenance=provenance | {"base_revision": "abc"})
    _, err = exported(cli, run, "--format", "merged")
    assert "warning: " in err
    assert "is at revision None, the run was at abc" in err


@pytest.mark.parametrize("objective", ["align", "joint"])
def test_other_weights_in_the_bases_place_are_refused(
    objective: str, run: Path, tiny_model: Path, cli: Cli, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    with_config(run, model=str(base))
    if objective == "joint":
        # whose record is of the whole model
        cpu = torch.device("cpu")
        whole = load_early(open_model(str(base)), 3, dtype=torch.float32, device=cpu)
        data = {"texts": "articles.jsonl"}
        record = {"base_sha256": whole.base_digest()}
        with_config(run, objective="joint", data=data, provenance=record)
    exported(cli, run, "--format", "merged")
    shutil.rmtree("out")
    tensors = load_file(base / WEIGHTS)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})
    line = refused(cli, "export", run, "--format", "merged", "--out", "out")
    assert f"{base}: its weights are not those that {run} was trained on" in line
    assert not Path("out").exists()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_flipped_byte_of_the_trained_model_is_refused(
    kind: str, full_run: Path, cli: Cli
) -> None:
    path = full_run / "model" / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    line = refused(cli, "export", full_run, "--format", kind, "--out", "out")
    assert f"{path}: its SHA-256 is not the manifest's" in line
    assert not Path("out").exists()


def test_all_weights_trained_are_copied_or_quantised(
    full_run: Path, tiny_model: Path, cli: Cli, tmp_path: Path
) -> None:
    record, _ = exported(cli, full_run, "--format", "merged")
    assert (record["method"], record["logit_drift"]["against"]) == ("full", "trained model")
    assert record["base_model"] == str(tiny_model)
    assert record["logit_drift"]["max"] == 0.0
    model, out = load_file(full_run / "model" / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert model.keys() == out.keys()
    assert all(torch.equal(out[name], tensor) for name, tensor in model.items())
    assert {t.dtype for t in out.values()} == {torch.bfloat16}
    shutil.rmtree("out")
    record, _ = exported(cli, full_run, "--format", "nf4")
    assert record["logit_drift"]["max"] > 1e-3


def test_what_is_for_adapters_is_refused_of_a_full_run(full_run: Path, cli: Cli) -> None:
    line = refused(cli, "export", full_run, "--out", "out")
    assert "trained all weights, no adapter; use --format merged or nf4" in line
    line = refused(cli, "export", full_run, "--format", "nf4", "--strength", "0.5", "--out", "out")
    assert "trained all weights; --strength is for an adapter" in line
    shutil.rmtree(full_run / "model")
    line = refused(cli, "export", full_run, "--format", "merged", "--out", "out")
    assert "has no model yet; finish it with tli-engine train --resume --run" in line
    assert not Path("out").exists()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_folder_that_holds_something_is_left_alone(
    kind: str, trained: Path, cli: Cli, tree: Tree, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    line = refused(cli, "export", trained, "--format", kind, "--out", "out")
    assert "out: is not empty" in line
    assert tree(tmp_path) == {"out": None, "out/mine.txt": b"mine"}


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_limit_on_file_size_leaves_nothing(
    kind: str, there: bool, trained: Path, cli: Cli, tree: Tree, tmp_path: Path
) -> None:
    """The file system itself refuses: no file may pass 20,000 bytes, the weights have more."""
    if there:
        (tmp_path / "out").mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        line = refused(cli, "export", trained, "--format", kind, "--out", "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "out: cannot be written: " in line
    assert line.endswith("nothing was kept")
    assert tree(tmp_path) == ({"out": None} if there else {})


@pytest.mark.parametrize("kind", FORMATS)
def test_an_interruption_while_the_drift_is_measured_leaves_nothing(
    kind: str, trained: Path, cli: Cli, tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        assert (tmp_path / "out/config.json").is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr("tli_engine.cli._export.measure_drift", interrupt)
    assert cli("export", trained, "--format", kind, "--out", "out").status == 130
    assert tree(tmp_path) == {}


def test_an_adapter_of_another_model_leaves_nothing(run: Path, cli: Cli, tmp_path: Path) -> None:
    path = run / "adapter/adapter_model.safetensors"
    tensors = load_file(path)
    save_file({n: t[:, :-1].contiguous() for n, t in tensors.items()}, path)
    write_manifest(run, ["adapter/adapter_model.safetensors"])
    line = refused(cli, "export", run, "--format", "merged", "--out", "out")
    assert "is it the right base model?" in line
    assert not (tmp_path / "out").exists()
