"""Sharded weights on a GPU: by NCCL among one, and on two where they are there."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch import distributed as dist

from tli_engine.config import RunConfig
from tli_engine.data.examples import Example
from tli_engine.data.packing import TextPack, text_pack
from tli_engine.distributed.fully_sharded import is_sharded, load_shards, save_shards, whole
from tli_engine.distributed.sharded_nf4 import ShardedNF4
from tli_engine.distributed.world import World
from tli_engine.models.adapters import add_lora, nf4_blocks
from tli_engine.models.causal import CausalModel, load_causal
from tli_engine.models.files import open_model
from tli_engine.models.recompute import Activations
from tli_engine.testing import save_tiny_model
from tli_engine.train.metrics import read_metrics
from tli_engine.train.sft_distribute import shard_weights
from tli_engine.train.sft_prepare import fuse_for_texts

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    return save_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama", **sizes)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A process group of this process alone: what is sent goes through NCCL all the same."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    torch.cuda.set_device(0)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    yield World(0, 1, dist.new_group(backend="gloo"))
    dist.destroy_process_group()


def config_of(**changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "model": "m", "objective": "sft", "data": "a.jsonl", "device": "cuda", "dtype": "bfloat16",
        "lora": {"layers": "0-3", "modules": ["q_proj", "down_proj"], "r": 16},
    }  # fmt: skip
    return RunConfig.model_validate(values | changes)


def pack() -> TextPack:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (3, 90), generator=generator).tolist()
    return text_pack([Example(tuple(row), 20) for row in ids]).to(GPU)


def adapted(folder: Path) -> CausalModel:
    model = load_causal(open_model(str(folder)), dtype=torch.bfloat16, device=GPU, quantize="nf4")
    add_lora(model.early, config_of().lora, model.early.depth, 0)
    for name, tensor in model.trainable().items():
        if "lora_B" in name:
            torch.nn.init.normal_(tensor, std=0.02, generator=torch.Generator(GPU).manual_seed(1))
    model.fuse()
    for tensor in model.trainable().values():
        tensor.requires_grad_(True)
    return model


def loss_and_gradients(model: CausalModel, passes: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    for _ in range(passes):
        loss = model.loss(pack()) / 210
        torch.autograd.backward(loss)
    trained = model.trainable().items()
    return loss.detach(), {n: whole(t.grad) for n, t in trained if t.grad is not None}


def test_gathered_nf4_bytes_are_those_of_before(folder: Path, one: World) -> None:
    """As the kernels lay them out here; the same products, there and back."""
    model = adapted(folder)
    model.activations = Activations("recompute")
    expected = loss_and_gradients(model, passes=2)
    model.zero_grad()
    for tensor in model.trainable().values():
        tensor.grad = None
    blocks = nf4_blocks(model.early)
    before = [[t.clone() for layer in b for t in layer.stored_tensors()] for b in blocks]
    shards = ShardedNF4(blocks, one)
    model.fetch = shards.fetch
    found = loss_and_gradients(model, passes=2)
    assert torch.equal(found[0], expected[0])
    assert len(found[1]) == len(expected[1]) > 0
    for name, theirs in expected[1].items():
        # sums may be taken in another order from run to run
        assert (found[1][name] - theirs).norm() <= 1e-4 * theirs.norm()
    for number, tensors in enumerate(before):
        shards.fetch(number)
        now = [t for layer in blocks[number] for t in layer.stored_tensors()]
        assert all(map(torch.equal, now, tensors))
    assert shards.unchanged()


def freed(folder: Path, config: RunConfig, device: torch.device) -> CausalModel:
    """A model whose every weight is trained, on the ops or in modules, to be computed on the GPU."""
    model = load_causal(open_model(str(folder)), dtype=torch.bfloat16, device=device)
    model.train_all(own=False)
    fuse_for_texts(model, config, moves_to=GPU if device == CPU else None)
    return model


@pytest.mark.parametrize("engine", ["modules", "fused"])
@pytest.mark.parametrize("activations", ["auto", "recompute"])
@pytest.mark.parametrize("free", [None, 0], ids=["measured", "gathered-twice"])
def test_blocks_that_stay_or_not(
    free: int | None, activations: str, engine: str, folder: Path, one: World
) -> None:
    """What is kept and what stays is decided by what is measured; the gradients are the same."""
    config = config_of(method="full", train={"engine": engine}, sft={"activations": activations})
    plain = freed(folder, config, GPU)
    plain.activations = Activations("save")
    expected, gradients = loss_and_gradients(plain)
    model = freed(folder, config, CPU)
    said: list[str] = []
    tensors = shard_weights(model, config, one, said.append)
    assert model.spread is not None
    if free is not None:
        model.spread.decide(free)
    with torch.no_grad():
        model.loss(pack())
    assert all(map(is_sharded, model.trainable().values()))
    for _ in range(2):
        model.zero_grad()
        loss, found = loss_and_gradients(model)
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
    assert found.keys() == gradients.keys() == tensors.keys()
    for name, theirs in gradients.items():
        error = (found[name] - theirs.float()).norm() / theirs.float().norm()
        assert error < 0.05, name
    assert said[0].startswith("blocks stay" if free is None else "blocks are gathered again")
    arrangement = model.activations.arrangement
    assert arrangement is not None
    assert any(arrangement.keeps(0, 1)) is (activations == "auto")
    assert all(map(is_sharded, model.trainable().values()))


@pytest.mark.parametrize("engine", ["modules", "fused"])
@pytest.mark.parametrize("offload", [False, True])
def test_fully_sharded_weights(
    offload: bool, engine: str, folder: Path, one: World, tmp_path: Path
) -> None:
    """Gradients are those of the whole model in bf16; the shares are fp32, and are read again."""
    config = config_of(method="full", train={"engine": engine}, distributed={"offload": offload})
    expected, gradients = loss_and_gradients(freed(folder, config, GPU))
    model = freed(folder, config, CPU)
    tensors = shard_weights(model, config, one)
    assert all(map(is_sharded, tensors.values()))
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert {t.device.type for t in tensors.values()} == {"cpu" if offload else "cuda"}
    assert model.early.device.type == "cuda"
    loss, found = loss_and_gradients(model)
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
    assert found.keys() == gradients.keys()
    for name, theirs in gradients.items():
        error = (found[name].to(GPU) - theirs.float()).norm() / theirs.float().norm()
        assert error < 0.05, name
    save_shards(tmp_path, tensors, one.patient)
    read = {name: torch.zeros_like(t.detach()) for name, t in tensors.items()}
    load_shards(tmp_path, read, one.patient)
    assert all(torch.equal(whole(read[n]), whole(t.detach())) for n, t in tensors.items())


@pytest.fixture
def environment() -> dict[str, str]:
    """Of processes that find this package."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@two_gpus
def test_two_gpus_train_as_one(environment: dict[str, str], tmp_path: Path) -> None:
    """All cases of a program that takes longer to start than to train."""
    program = ROOT / "tests" / "distributed" / "as_one.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", str(program), "cuda", str(tmp_path)]
    subprocess.run(command, check=True, timeout=180, env=environment)
    for rank in range(2):
        report: dict[str, str] = json.loads((tmp_path / f"{rank}.json").read_text())
        failures = [f"{case} on rank {rank}:\n{trace}" for case, trace in report.items() if trace]
        assert not failures, "\n".join(failures)
        assert len(report) == 11


@two_gpus
def test_the_command_trains_on_two(environment: dict[str, str], tmp_path: Path) -> None:
    """Every weight: what is written is gathered from both."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    # larger ones make so much of rounding that a few steps are another run
    model = save_tiny_model(tmp_path / "llama", "llama", **sizes, initializer_range=0.05)
    lines = [{"text": "habari " * (i % 5 + 1), "summary": "x" * (i % 4 + 2)} for i in range(11)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values: dict[str, Any] = {
        "model": str(model), "objective": "sft", "data": str(tmp_path / "a.jsonl"),
        "method": "full", "prompt": {"instruction": "F: {text}"},
        "sft": {"context": 64, "packing": False},
        "train": {"steps": 2, "batch_size": 4, "learning_rate": 1e-3},
    }  # fmt: skip
    config = tmp_path / "run.yaml"
    # YAML takes JSON
    config.write_text(json.dumps(values))
    one, two = tmp_path / "one", tmp_path / "two"
    command = [sys.executable, "-m", "tli_engine", "train", str(config), "--run"]
    started = [
        subprocess.Popen([*command, str(run), *options], env=environment)
        for run, options in ((one, []), (two, ["--gpus", "2"]))
    ]
    try:
        assert [process.wait(timeout=120) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    steps = [read_metrics(run) for run in (two, one)]
    for key, tolerance in (("grad_norm", 2e-2), ("loss", 1e-2)):
        found, expected = (torch.tensor([step[key] for step in run]) for run in steps)
        assert len(expected) == 2
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
    weights, expected_weights = (
        load_file(run / "model" / "model.safetensors") for run in (two, one)
    )
    assert weights.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():
        # an update is as long as the rate, and where a gradient is all rounding goes either way
        torch.testing.assert_close(weights[name], tensor, rtol=2**-7, atol=4e-3)
