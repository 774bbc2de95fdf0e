"""Benches of the training step and of the scan on a GPU: every provider is traced, and losses are equal."""

import pytest
import torch

from bench.bench_tli_scan import bench_subject, scan_many
from bench.bench_tli_step import bench_case
from bench.harness import gpu_busy
from bench.models import random_subject
from tli_engine.testing import tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_step_of_every_provider(family: str) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    config = tiny_config(family, hidden_size=256, intermediate_size=512, num_attention_heads=4)
    subject = random_subject("tiny", config, torch.bfloat16, torch.device("cuda"))
    # stops by itself where losses differ
    rows = bench_case(subject, 8, 1, speed=(3e12, 7e14))
    published, cut, *_ = rows
    ours = ["tli-engine", "tli-engine:fast", "tli-engine:bf16"]
    assert [row.provider for row in rows] == ["published", "peft+bitsandbytes", *ours]
    for row in rows:
        assert row.gpu_ms is not None
        assert 0 < row.gpu_ms < row.ms_p80
        assert row.peak_mib is not None
        assert row.peak_mib > 0
    # four blocks and a head against two
    assert published.notes["kernels"] > cut.notes["kernels"]


def test_scan_and_evaluation_of_every_provider() -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    config = tiny_config("llama", hidden_size=256, intermediate_size=512, num_attention_heads=4)
    subject = random_subject("tiny", config, torch.bfloat16, torch.device("cuda"))
    rows = bench_subject(subject, sample=1, rounds=2, speed=(3e12, 7e14))
    assert [row.case for row in rows] == ["scan"] * 3 + ["evaluate"] * 2
    for row in rows:
        assert row.gpu_ms is not None
        # the published ones are traced on one pair, and launched kernel by kernel
        assert 0 < row.gpu_ms < row.ms_p80
        assert row.notes["kernels"] > 0
        assert row.peak_mib is not None
        assert row.peak_mib > 0
        assert (row.roofline is not None) == (row.case == "scan")
    _, scan, forward, *_ = rows
    assert scan.gpu_ms is not None
    assert forward.gpu_ms is not None
    assert forward.gpu_ms < scan.gpu_ms
    many = scan_many(subject, 300)
    assert many.peak_mib is not None
    assert many.peak_mib > many.notes["weights_mib"] > 0


def test_a_copy_to_the_host_is_no_kernel() -> None:
    a = torch.randn(512, 512, device="cuda")
    host = torch.empty(512, 512, pin_memory=True)

    def call() -> None:
        a.mul_(1.0)
        host.copy_(a)

    ms, kernels = gpu_busy(call)
    assert kernels == 1
    assert ms > 0
