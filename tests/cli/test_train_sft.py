"""``tli-engine train`` on summaries: from articles to an adapter or a model that others load."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tli_engine.train.manifest import write_manifest
from tli_engine.train.sft_loop import SftTrainer

Cli = Callable[..., Any]


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is most of the time that a tiny model takes."""
    monkeypatch.setattr(
        "tli_engine.cli._train_sft.plot_losses", lambda steps, before, path: path.write_bytes(b"")
    )


def summed_loss(model: Any, tokenizer: Any, text: str, summary: str) -> tuple[float, int]:
    """What transformers makes of an article: the summed loss of its summary."""
    prompt = tokenizer(f"Fupisha: {text}")["input_ids"]
    answer = tokenizer(f" {summary}", add_special_tokens=False)["input_ids"]
    answer = [*answer, tokenizer.eos_token_id]
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1]
    return torch.nn.functional.cross_entropy(
        logits, torch.tensor(answer), reduction="sum"
    ).item(), len(answer)


def unseen() -> list[tuple[str, str]]:
    """The articles that are not trained on, and their summaries."""
    lines = map(json.loads, Path("unseen.jsonl").read_text(encoding="utf-8").splitlines())
    return [(line["text"], line["summary"]) for line in lines]


def loss_of(model: Any, tokenizer: Any) -> float:
    losses = [summed_loss(model, tokenizer, *article) for article in unseen()]
    return sum(loss for loss, _ in losses) / sum(count for _, count in losses)


def test_an_adapter_that_peft_reads(
    cli: Cli, sft_config: Callable[..., Path], tiny_model: Path
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = cli("train", sft_config(), "--run", "run")
    assert result.status == 0, result.err
    assert "3 blocks, lora training of" in result.err
    assert "on 4 articles, on cpu" in result.err
    measured = json.loads(Path("run/evaluation.json").read_text())["loss"]["validation"]
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert measured["before"] == pytest.approx(loss_of(base, tokenizer), abs=1e-5)
    adapted = peft.PeftModel.from_pretrained(base, "run/adapter")
    assert measured["after"] == pytest.approx(loss_of(adapted, tokenizer), abs=1e-5)
    assert measured["after"] < measured["before"]
    assert f"{measured['before']:.4f} → {measured['after']:.4f} nats a token" in result.out
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation_loss" in line] == [2, 4]
    assert lines[0].keys() >= {"step", "epoch", "loss", "lr", "grad_norm", "tokens_per_s", "labels"}
    assert cli("verify", "run").status == 0


def test_a_model_that_transformers_reads(
    cli: Cli, sft_config: Callable[..., Path], tiny_model: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = cli("train", sft_config(method="full", train={"learning_rate": 1e-3}), "--run", "run")
    assert result.status == 0, result.err
    assert "full training of" in result.err
    measured = json.loads(Path("run/evaluation.json").read_text())["loss"]["validation"]
    model = AutoModelForCausalLM.from_pretrained("run/model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained("run/model")
    assert measured["after"] == pytest.approx(loss_of(model, tokenizer), abs=1e-5)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert not torch.equal(model.model.norm.weight, base.model.norm.weight)
    assert cli("verify", "run").status == 0


@pytest.mark.parametrize("objective", ["sft", "joint"])
def test_parameters_are_counted_as_they_are_saved(
    objective: str, cli: Cli, sft_config: Callable[..., Path], config_file: Path
) -> None:
    """Fused blocks join q, k and v; k has no adapter, and its zeros are none."""
    from safetensors.torch import load_file

    path = sft_config(
        objective=objective, lora={"modules": ["q_proj", "v_proj"]}, train={"engine": "fused"}
    )
    result = cli("train", path, "--run", "run")
    assert result.status == 0, result.err
    saved = load_file("run/adapter/adapter_model.safetensors").values()
    count = f"{sum(tensor.numel() for tensor in saved):,}"
    assert f"lora training of {count} parameters" in result.err
    assert f" {count} parameters." in Path("run/adapter/README.md").read_text("utf-8")
    for device in ("cpu", "4090"):
        assert f" {count} trained parameters" in cli("plan", path, "--device", device).out
    # of the align objective, fused where it is planned for a GPU
    default = [
        cli("plan", config_file, "--device", d).out.split(" trained")[0] for d in ("cpu", "4090")
    ]
    assert default[0].rpartition(" ")[2] == default[1].rpartition(" ")[2]


def test_joint_training_takes_pairs_too(
    cli: Cli, sft_config: Callable[..., Path], pairs_file: Path
) -> None:
    values = {"data": {"pairs": str(pairs_file)}, "sft": {"align_pairs": 4}, "align": {"layer": 2}}
    result = cli("train", sft_config(objective="joint", **values), "--run", "run")
    assert result.status == 0, result.err
    assert "on 4 articles and 10 pairs, on cpu" in result.err
    first = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[0])
    assert first.keys() >= {"loss", "align_loss", "cosine_true", "cosine_random"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sft": {"context": 4096}}, "sft.context: 4096 is more than the model's 2048 tokens"),
        ({"sft": {"context": 24}}, "leave no room for the article in a context of 24"),
        ({"data": {"columns": ["body", "summary"]}}, "no column 'body'"),
        ({"data": {"texts": "none.jsonl"}}, "none.jsonl"),
        ({"data": {"texts": "xlsum:klingon"}}, "klingon"),
        ({"prompt": {"template": "chat"}}, "no chat template; use plain"),
        ({"train": {"optimizer": "adamw-paged"}}, "train.optimizer: adamw-paged needs a GPU"),
        ({"sft": {"attention": "varlen"}}, "varlen needs train.engine: fused, on a GPU"),
        (
            {"sft": {"attention": "flash-attn"}, "train": {"engine": "fused"}},
            "sft.attention: flash-attn cannot run here: it needs a GPU",
        ),
        ({"lora": {"layers": "0-3"}}, "lora.layers: the model has blocks 0-2"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_input_is_one_line(
    cli: Cli, sft_config: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    result = cli("train", sft_config(**changes), "--run", "run")
    assert result.status == 2, result.err
    (line,) = result.err.strip().splitlines()[-1:]
    assert message in line
    assert not Path("run").exists() or not any(Path("run").iterdir())


def test_full_training_of_nf4_weights_is_refused(cli: Cli, sft_config: Callable[..., Path]) -> None:
    result = cli("train", sft_config(method="full", quantize="nf4"), "--run", "run")
    assert result.status == 2
    assert "method full trains the weights" in result.err


def test_no_memory_is_said_and_checkpoints_stay(
    cli: Cli, sft_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tli_engine.train.sft_step import SftStep

    run = SftStep.run

    def running_out(self: SftStep, step: int, **options: Any) -> Any:
        if step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has …")
        return run(self, step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(SftStep, "run", running_out)
        result = cli("train", sft_config(), "--run", "run")
    assert result.status == 1
    assert "Tried to allocate 2 GiB; held at the peak: weights 0.0 GiB" in result.err
    assert cli("train", "--resume", "--run", "run").status == 0


@pytest.mark.parametrize("engine", ["modules", "fused"])
def test_after_a_loss_that_is_no_number_the_checkpoint_is_whole(
    engine: str, cli: Cli, sft_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tli_engine.train.sft_step import SftStep

    path, run = sft_config(train={"engine": engine, "checkpoint_steps": 1}), SftStep.run
    assert cli("train", path, "--run", "whole").status == 0

    def spoiling(self: SftStep, step: int, **options: Any) -> Any:
        if step == 2:
            for tensor in self.tensors.values():
                tensor.data.fill_(torch.nan)
        return run(self, step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(SftStep, "run", spoiling)
        result = cli("train", path, "--run", "run")
    assert result.status == 1
    line = result.err.splitlines()[-1]
    assert "step 3: loss nan, gradient norm nan; lower train.learning_rate" in line
    assert line.endswith("; run/checkpoints/step-000002 is whole")
    assert cli("train", "--resume", "--run", "run").status == 0
    name = "adapter/adapter_model.safetensors"
    assert (Path("whole") / name).read_bytes() == (Path("run") / name).read_bytes()


def test_a_run_that_diverges_is_no_result(cli: Cli, sft_config: Callable[..., Path]) -> None:
    """The last step's own loss is of the weights before it: unseen articles alone tell."""
    path = sft_config(train={"learning_rate": 1e30, "steps": 1})
    result = cli("train", path, "--run", "run")
    assert result.status == 1
    line = result.err.splitlines()[-1]
    assert "error: step 1: the loss on unseen articles is " in line
    assert line.endswith("or set train.max_grad_norm; there is no checkpoint yet")
    assert not Path("run/adapter").exists()
    assert not Path("run/best").exists()
    # a run of an earlier version had gone on, and written its last step
    result = cli("train", sft_config(train={"learning_rate": 1e-2}), "--run", "earlier")
    folder = Path("earlier/checkpoints/step-000004")
    state = json.loads((folder / "state.json").read_text())
    state["best"] = {"before": state["best"]["before"]}
    (folder / "state.json").write_text(json.dumps(state))
    write_manifest(folder, [p.name for p in folder.iterdir() if p.name != "manifest.json"])
    Path("earlier/manifest.json").unlink()
    shutil.rmtree("earlier/best")
    result = cli("train", "--resume", "--run", "earlier")
    assert result.status == 1
    assert "no loss on unseen articles was a finite number" in result.err.splitlines()[-1]


@pytest.mark.parametrize("engine", ["modules", "fused"])
def test_after_unseen_articles_give_no_number_the_run_goes_on_from_its_checkpoint(
    engine: str, cli: Cli, sft_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, validate = sft_config(train={"engine": engine}), SftTrainer.validate
    assert cli("train", path, "--run", "whole").status == 0

    def spoilt(self: SftTrainer, until: Callable[[], bool]) -> float:
        return math.inf if self.step == 4 else validate(self, until)

    with monkeypatch.context() as patch:
        patch.setattr(SftTrainer, "validate", spoilt)
        result = cli("train", path, "--run", "run")
    assert result.status == 1
    line = result.err.splitlines()[-1]
    assert "error: step 4: the loss on unseen articles is inf; lower train.learning_rate" in line
    assert line.endswith("; run/checkpoints/step-000003 is whole")
    assert cli("train", "--resume", "--run", "run").status == 0
    name = "adapter/adapter_model.safetensors"
    assert (Path("whole") / name).read_bytes() == (Path("run") / name).read_bytes()


def test_a_base_model_without_a_loss_is_not_trained(
    cli: Cli, sft_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SftTrainer, "validate", lambda self, until: math.nan)
    result = cli("train", sft_config(), "--run", "run")
    assert result.status == 1
    assert "error: the base model's loss on unseen articles is nan; try another" in result.err
    assert not Path("run/metrics.jsonl").read_text()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_evaluating_a_run_gives_the_loss_that_training_measured(
    cli: Cli, sft_config: Callable[..., Path], method: str
) -> None:
    changes = {"learning_rate": 1e-3} if method == "full" else {}
    assert cli("train", sft_config(method=method, train=changes), "--run", "run").status == 0
    trained = json.loads(Path("run/evaluation.json").read_text())["loss"]["validation"]
    result = cli("evaluate", "run")
    assert result.status == 0, result.err
    again = json.loads(Path("run/evaluation.json").read_text())
    for stage in ("before", "after"):
        assert again["loss"]["validation"][stage] == pytest.approx(trained[stage], abs=1e-6)
    assert again["loss"]["validation"]["best_step"] == trained["best_step"]
    assert "throughput" in again
    assert "on 2 unseen articles" in result.out
    assert again["text"].keys() == {"bleu", "chrf", "rouge1", "rouge2", "rougeL", "rougeLsum"}
    assert again["text"]["bleu"].keys() == {"score", "ci95", "signature"}
    assert again["baselines"].keys() == {"zero-shot", "lead-1", "lead-3", "random-summary"}
    # the texts of the fixture are a sentence each
    assert again["baselines"]["lead-1"] == again["baselines"]["lead-3"]
    assert cli("verify", "run").status == 0


@pytest.mark.parametrize("method", ["lora", "full"])
def test_summaries_are_those_that_transformers_writes(
    cli: Cli, sft_config: Callable[..., Path], tiny_model: Path, method: str
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    changes = {"learning_rate": 1e-3} if method == "full" else {}
    assert cli("train", sft_config(method=method, train=changes), "--run", "run").status == 0
    result = cli("evaluate", "run", "--max-new-tokens", "6", "--batch-size", "1")
    assert result.status == 0, result.err
    assert "this run: 2 articles" in result.err
    lines = [json.loads(line) for line in Path("run/predictions.jsonl").read_text().splitlines()]
    assert [line["number"] for line in lines] == [0, 1]
    folder = "run/model" if method == "full" else tiny_model
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if method == "lora":
        model = peft.PeftModel.from_pretrained(model, "run/adapter")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for (text, _), line in zip(unseen(), lines, strict=True):
        prompt = tokenizer(f"Fupisha: {text}", return_tensors="pt")
        written = model.generate(
            input_ids=prompt["input_ids"], max_new_tokens=6, do_sample=False, pad_token_id=1
        )
        new = written[0, prompt["input_ids"].shape[1] :]
        assert line["prediction"] == tokenizer.decode(new, skip_special_tokens=True).strip()


def test_a_joint_run_is_measured_on_pairs_and_articles(
    cli: Cli, sft_config: Callable[..., Path], pairs_file: Path, tmp_path: Path
) -> None:
    data = {"pairs": str(pairs_file)}
    path = sft_config(objective="joint", data=data, align={"layer": 2}, sft={"align_pairs": 4})
    assert cli("train", path, "--run", "run").status == 0
    result = cli("evaluate", "run", "--max-new-tokens", "2", "--no-final-layer")
    assert result.status == 0, result.err
    found = json.loads(Path("run/evaluation.json").read_text())
    assert found.keys() >= {"alignment", "text", "loss", "generation", "warnings"}
    assert found["baselines"].keys() == {
        *("linear_head", "zero-shot", "lead-1", "lead-3", "random-summary")
    }
    assert found["throughput"].keys() == {"tokens_per_s", "words_per_s"}


def test_a_run_without_unseen_articles_cannot_be_evaluated(
    cli: Cli, sft_config: Callable[..., Path]
) -> None:
    path = sft_config(data={"validation": None})
    result = cli("train", path, "--run", "run")
    assert result.status == 0, result.err
    assert json.loads(Path("run/evaluation.json").read_text())["loss"]["validation"] is None
    result = cli("evaluate", "run")
    assert result.status == 2
    assert "has no data.validation" in result.err
