"""What is asked of the Hub, and what comes of each way it can fail."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, file_download

from tli_engine.cli import main
from tli_engine.errors import UserError
from tli_engine.models.early import EarlyModel, load_early
from tli_engine.models.files import open_model
from tli_engine.models.survey import survey
from tli_engine.testing import save_tiny_model

REPO = "org/tiny"
INDEX = "model.safetensors.index.json"
# conftest.py's
FakeHub = Any


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def load(depth: int, name: str = REPO) -> EarlyModel:
    files = open_model(name)
    return load_early(files, depth, dtype=torch.float32, device=torch.device("cpu"))


def refuses(*parts: str, name: str = REPO, depth: int = 1) -> str:
    """Loading raises one line for the user that begins with the model and holds ``parts``."""
    with pytest.raises(UserError) as caught:
        load(depth, name)
    message = str(caught.value)
    assert message.startswith(name)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message
    return message


def shards_of(model: Path, depth: int) -> set[str]:
    """The shards in which the embeddings and the first blocks lie."""
    weight_map = json.loads((model / INDEX).read_text())["weight_map"]
    needed = ("model.embed_tokens.", *(f"model.layers.{k}." for k in range(depth)))
    return {file for tensor, file in weight_map.items() if tensor.startswith(needed)}


def assert_same_weights(actual: EarlyModel, folder: Path) -> None:
    expected = load(actual.depth, str(folder)).state_dict()
    assert actual.state_dict().keys() == expected.keys()
    assert all(torch.equal(actual.state_dict()[n], tensor) for n, tensor in expected.items())


def unfinished(cache: Path) -> list[Path]:
    return [p for p in cache.rglob("*") if "incomplete" in p.name or p.name.endswith(".part")]


def test_only_shards_with_needed_tensors_are_downloaded(hub: FakeHub, model: Path) -> None:
    every = {p.name for p in model.glob("*.safetensors")}
    assert len(every) >= 3
    assert shards_of(model, 2) < shards_of(model, 3) < every

    two = load(2)
    assert set(hub.shards()) == set(hub.shards("HEAD")) == shards_of(model, 2)
    assert len(hub.shards()) == len(shards_of(model, 2))
    assert_same_weights(two, model)

    hub.log.clear()
    four = load(4)
    # those that were there are asked about, not fetched again
    assert sorted(hub.shards()) == sorted(shards_of(model, 4) - shards_of(model, 2))
    assert_same_weights(four, model)

    hub.log.clear()
    load(4)
    assert hub.asked("GET") == []


def test_nothing_but_the_model_is_downloaded(hub: FakeHub, cache: Path) -> None:
    files = open_model(REPO)
    assert hub.shards("HEAD") == hub.shards() == []
    load(1)
    assert files.tokenizer("a")["input_ids"] == [256, files.tokenizer.convert_tokens_to_ids("a")]
    fetched = set(hub.asked("GET"))
    assert fetched >= {"config.json", "tokenizer.json", "tokenizer_config.json", INDEX}
    others = {"README.md", "pytorch_model.bin", "modeling_tiny.py", "model.onnx"}
    assert not fetched & others
    assert not {p.name for p in cache.rglob("*")} & others
    assert files.hub_id == REPO


def test_a_model_in_one_file(hub: FakeHub, single: Path) -> None:
    assert_same_weights(load(2, "org/single"), single)
    assert hub.shards() == ["model.safetensors"]


@pytest.mark.parametrize("name", [REPO, "org/single"])
def test_offline_what_was_downloaded_is_enough(
    name: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load(2, name).state_dict()
    hub.log.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    actual = load(2, name).state_dict()
    assert all(torch.equal(actual[n], tensor) for n, tensor in expected.items())
    assert hub.log == []


def test_offline_what_was_not_downloaded_is_named(
    hub: FakeHub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(2)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refuses("not in the local cache, and the Hub cannot be reached", depth=4)
    assert any(shard in message for shard in shards_of(model, 4) - shards_of(model, 2))


def test_offline_and_never_downloaded(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refuses("not in the local cache, and the Hub cannot be reached")
    assert hub.log == []


def test_no_connection(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    # nobody listens on the discard port
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refuses("not in the local cache, and the Hub cannot be reached")


def test_a_broken_connection_is_resumed_where_it_broke(hub: FakeHub, model: Path) -> None:
    (shard, *_) = sorted(shards_of(model, 1))
    hub.breaks[shard] = [10_000, 5_000]
    assert_same_weights(load(1), model)
    ranges = [r.range for r in hub.log if r.method == "GET" and r.path.endswith(shard)]
    assert ranges == [None, "bytes=10000-", "bytes=15000-"]


def test_a_connection_that_keeps_breaking(hub: FakeHub, model: Path, cache: Path) -> None:
    (shard, *_) = sorted(shards_of(model, 1))
    hub.breaks[shard] = [1000] + [0] * 20
    refuses(shard, "the download failed: ", "run again")
    assert unfinished(cache) == []
    hub.breaks.clear()
    assert_same_weights(load(1), model)


def test_an_interrupted_process_keeps_whole_shards(
    hub: FakeHub, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface_hub 2 keeps no part of a file for the next process; it begins that one anew."""
    first, *_, last = dict.fromkeys(_in_order_of_need(model, 2))
    original = file_download.http_get

    def interrupted(url: str, temp_file: Any, **options: Any) -> None:
        if url.endswith(last):
            temp_file.write(b"some of it")
            raise KeyboardInterrupt
        original(url, temp_file, **options)

    with monkeypatch.context() as patched:
        patched.setattr(file_download, "http_get", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load(2)
    assert first in hub.shards()
    assert unfinished(cache) == []

    hub.log.clear()
    assert_same_weights(load(2), model)
    assert first not in hub.shards()
    assert last in hub.shards()
    assert all(r.range is None for r in hub.log)


def _in_order_of_need(model: Path, depth: int) -> list[str]:
    files = open_model(str(model))
    weight_map = json.loads((model / INDEX).read_text())["weight_map"]
    names = load_early(files, depth, dtype=torch.float32, device=torch.device("cpu")).decoder
    return [weight_map[f"model.{name}"] for name, _ in names.named_parameters()]


def test_content_of_a_wrong_sha256_is_removed(hub: FakeHub, model: Path, cache: Path) -> None:
    (shard, *_) = sorted(shards_of(model, 1))
    content = bytearray((model / shard).read_bytes())
    content[-1] ^= 1
    hub.altered[shard] = bytes(content)
    refuses(shard, "wrong SHA-256", "was removed", "retry")
    digest = hashlib.sha256((model / shard).read_bytes()).hexdigest()
    assert [p for p in cache.rglob("*") if p.name in (shard, digest)] == []

    hub.altered.clear()
    assert_same_weights(load(1), model)


def test_content_that_is_too_short_is_not_kept(hub: FakeHub, model: Path, cache: Path) -> None:
    (shard, *_) = sorted(shards_of(model, 1))
    hub.altered[shard] = (model / shard).read_bytes()[:-100]
    refuses(shard, "the download failed: Consistency check failed", "run again")
    assert [p for p in cache.rglob("*") if p.name == shard] == []
    assert unfinished(cache) == []


@pytest.mark.parametrize("damaged", [False, True], ids=["whole", "damaged"])
def test_a_cache_that_shares_its_blobs(
    damaged: bool, hub: FakeHub, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Since 2.0 what comes by Xet is moved to a store, where it goes by a hash that is not SHA-256."""
    original = huggingface_hub.hf_hub_download

    def shared(*args: Any, **options: Any) -> str:
        path = Path(original(*args, **options))
        blob = path.parent / os.readlink(path)
        if len(blob.name) == 64 and not blob.is_symlink():
            xet_hash = hashlib.blake2s(blob.name.encode()).hexdigest()
            stored = cache / "blobs" / xet_hash[:2] / xet_hash
            stored.parent.mkdir(parents=True, exist_ok=True)
            blob.rename(stored)
            if damaged:
                stored.write_bytes(b"damaged")
            blob.symlink_to(os.path.relpath(stored, blob.parent))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", shared)
    if damaged:
        refuses("wrong SHA-256")
        assert b"damaged" not in [p.read_bytes() for p in cache.rglob("*") if p.is_file()]
        assert [p for p in cache.rglob("*") if p.is_symlink() and not p.exists()] == []
    else:
        assert_same_weights(load(2), model)


def test_no_such_model(hub: FakeHub) -> None:
    refuses("no such model, neither a local folder nor on the Hub", name="org/none")


def test_a_name_that_can_be_no_model(hub: FakeHub) -> None:
    refuses("no such model", name="org/a b")
    assert hub.log == []


def test_a_private_model_may_ask_for_a_login(hub: FakeHub) -> None:
    """The Hub answers a stranger alike for what is private and for what is not there."""
    hub.errors["/api/models/org/tiny"] = (401, "RepoNotFound", "GET")
    refuses("no such model", "if it is private, log in with `hf auth login`")


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model_says_how_to_get_access(status: int, hub: FakeHub) -> None:
    # as on the Hub: what there is may be seen by anyone
    hub.errors["/org/tiny/resolve"] = (status, "GatedRepo", "GET HEAD")
    refuses("access must be granted on the Hub", "hf auth login")


def test_a_server_that_fails(hub: FakeHub, model: Path) -> None:
    open_model(REPO)
    (shard, *_) = sorted(shards_of(model, 1))
    for status, code in ((403, ""), (500, "")):
        # weights come from the commit that the configuration came from
        prefix = f"/org/tiny/resolve/{hub.commit(REPO, 'main')}/{shard}"
        hub.errors[prefix] = (status, code, "GET")
        message = refuses(shard, "the download failed: ", str(status), "run again")
        assert "failed: ;" not in message


def test_revisions_are_different_models(hub: FakeHub, model: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", "llama", seed=3, max_shard_size=40_000)
    hub.repos[REPO] |= {"v2": other, "refs/pr/7": other}
    for name in (f"{REPO}@v2", f"{REPO}@refs/pr/7", f"{REPO}@{hub.commit(REPO, 'v2')}"):
        assert_same_weights(load(1, name), other)
    assert_same_weights(load(1), model)
    assert_same_weights(load(1, f"{REPO}@main"), model)
    assert open_model(f"{REPO}@v2").hub_id == REPO
    refuses("no such revision on the Hub", name=f"{REPO}@v3")


@pytest.mark.parametrize("during", ["config", "weights"])
def test_a_full_disk(
    during: str, hub: FakeHub, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suffix = {"config": "config.json", "weights": ".safetensors"}[during]
    original = file_download.http_get

    def full(url: str, temp_file: Any, **options: Any) -> None:
        if url.endswith(suffix):
            temp_file.write(b"{")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(url, temp_file, **options)

    with monkeypatch.context() as patched:
        patched.setattr(file_download, "http_get", full)
        refuses("the disk is full", "HF_HOME")
    assert unfinished(cache) == []
    assert [p for p in cache.rglob(f"*{suffix}") if "snapshots" in p.parts] == []
    assert_same_weights(load(1), model)


def test_a_cache_that_cannot_be_written(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    refuses("the download failed: ", str(tmp_path / "file"))


def test_remote_code_is_never_fetched_nor_run(
    hub: FakeHub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unknown family is refused by its name; of a known one only our own code is used."""
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked whether to trust it"))
    folder = shutil.copytree(model, tmp_path / "remote")
    (folder / "modeling_tiny.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n"
    )
    hub.repos["org/remote"] = {"main": folder}
    config = json.loads((folder / "config.json").read_text())
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    config["auto_map"] = dict.fromkeys(names, "modeling_tiny.Config")
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["modeling_tiny.Config", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))

    (folder / "config.json").write_text(json.dumps(config | {"model_type": "tiny"}))
    refuses("family 'tiny' is not supported; those are llama", name="org/remote")
    refuses("family 'tiny' is not supported; those are llama", name=str(folder))

    (folder / "config.json").write_text(json.dumps(config))
    hub.repos["org/known"] = {"main": folder}
    for name in ("org/known", str(folder)):
        assert open_model(name).tokenizer("a")["input_ids"][0] == 256
        load(2, name)
    assert not (tmp_path / "ran").exists()
    assert "modeling_tiny.py" not in hub.asked("GET") + hub.asked("HEAD")


def test_scan_of_a_model_on_the_hub(
    hub: FakeHub, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("swahili,english\nmaji,water\nmoto,fire\nmti,tree\n")
    assert main(["scan", REPO, "--pairs", str(pairs), "--layers", "1"]) == 0
    assert set(hub.shards()) == shards_of(model, 1)
    assert f"{REPO}, 3 pairs, content pooling" in capfd.readouterr().out

    assert main(["scan", "org/none", "--pairs", str(pairs)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("tli-engine: error: org/none: no such model")


def test_a_survey_asks_for_sizes_and_fetches_no_weights(hub: FakeHub, model: Path) -> None:
    found = survey(REPO)
    names = [f"layers.{k}.mlp.up_proj.weight" for k in range(2)] + ["embed_tokens.weight"]
    needed = {
        file
        for tensor, file in json.loads((model / INDEX).read_text())["weight_map"].items()
        if tensor.removeprefix("model.") in names
    }
    total = sum((model / file).stat().st_size for file in needed)
    assert found.missing(names) == (total, True)
    assert hub.shards() == []
    # of what is there nothing more is needed
    load(2)
    assert found.missing(names) == (0, True)


def test_a_survey_of_one_file_takes_its_size(hub: FakeHub, single: Path) -> None:
    names = ["embed_tokens.weight"]
    size = (single / "model.safetensors").stat().st_size
    assert survey("org/single").missing(names) == (size, True)
    assert hub.shards() == []
