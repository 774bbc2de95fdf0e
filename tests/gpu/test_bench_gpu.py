"""The bench of the training step on a GPU: every provider gives the same loss, and is traced."""

import pytest
import torch

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


def test_a_copy_to_the_host_is_no_kernel() -> None:
    a = torch.randn(512, 512, device="cuda")
    host = torch.empty(512, 512, pin_memory=True)

    def call() -> None:
        a.mul_(1.0)
        host.copy_(a)

    ms, kernels = gpu_busy(call)
    assert kernels == 1
    assert ms > 0
