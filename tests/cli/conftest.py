"""A tiny random Llama, word pairs and articles, for commands that need a model."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from tli_engine.cli import main

PAIRS = """swahili,english,split
maji,water,train
moto,fire,train
nyumba,house,train
mti,tree,train
ndege,bird,train
samaki,fish,train
jua,sun,train
mwezi,moon,train
chumvi,salt,train
kitabu,book,train
barabara,road,control
mvua,rain,control
mlango,door,control
kisu,knife,control
"""

ARTICLES = [
    ("Mvua kubwa imenyesha mjini leo asubuhi.", "Mvua mjini"),
    ("Timu ya taifa imeshinda mchezo wake wa kwanza.", "Timu yashinda"),
    ("Bei ya mahindi imepanda tena sokoni.", "Mahindi yapanda"),
    ("Shule zitafunguliwa wiki ijayo kote nchini.", "Shule kufunguliwa"),
    ("Daraja jipya limefunguliwa juu ya mto.", "Daraja lafunguliwa"),
    ("Wakulima wanasubiri mvua za masika.", "Wakulima wasubiri"),
]


class Result(NamedTuple):
    """What a command left: its exit status, and its lines on either stream."""

    status: int
    out: str
    err: str


Cli = Callable[..., Result]


@pytest.fixture(autouse=True)
def _alone_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths, the cache and runs/ lie in the test's own folder; no hub is asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TLI_ENGINE_CACHE", str(tmp_path.parent / "no-cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # main() sets it, so it is put back
    monkeypatch.setenv("TLI_ENGINE_DEBUG", "")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """For a model this small, threads that wait for each other are all the time it takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    """Run a command in this process."""

    def run(*args: object) -> Result:
        capfd.readouterr()
        status = main([str(a) for a in args])
        return Result(status, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, bytes | None]]:
    """Lists every path below a folder, with the bytes of the files."""

    def tree(folder: Path) -> dict[str, bytes | None]:
        return {
            str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
            for p in folder.rglob("*")
        }

    return tree


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: three blocks of width 32, and a byte tokenizer that adds a BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.csv"
    path.write_text(PAIRS, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def config_file(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, pairs_file: Path
) -> Path:
    """Six steps on the tiny model, two epochs of three batches."""
    values = {
        "model": str(tiny_model),
        "device": "cpu",
        "data": {"pairs": str(pairs_file)},
        "lora": {"layers": "0-1", "r": 4, "alpha": 8},
        "align": {"layer": 2},
        "train": {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2},
    }
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, config_file: Path, _one_thread: None) -> Path:
    """A finished run; not to be written to."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["train", str(config_file), "--run", str(folder)]) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def articles(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    lines = [json.dumps({"text": text, "summary": summary}) for text, summary in ARTICLES]
    path.write_text("\n".join(lines[:4]) + "\n", encoding="utf-8")
    (tmp_path / "unseen.jsonl").write_text("\n".join(lines[4:]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def sft_config(tmp_path: Path, tiny_model: Path, articles: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        values: dict[str, Any] = {
            "model": str(tiny_model),
            "device": "cpu",
            "objective": "sft",
            "data": {"texts": str(articles), "validation": str(tmp_path / "unseen.jsonl")},
            "prompt": {"instruction": "Fupisha: {text}"},
            "lora": {"layers": "0-1", "r": 4, "alpha": 8, "dropout": 0.1},
            "sft": {"context": 80, "evaluate_steps": 2},
            "train": {"steps": 4, "batch_size": 1, "learning_rate": 1e-2, "checkpoint_steps": 3},
        }
        for section, change in changes.items():
            old = values.get(section)
            values[section] = old | change if isinstance(old, dict) else change
        path = tmp_path / "sft.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return write
