"""The bench of generation: who takes part, the floor, and that everyone writes the same."""

import argparse

import pytest
import torch

from bench.bench_generation import compared, measure, off_by
from bench.generation_cases import (
    BASELINE,
    PROVIDERS,
    generation_subject,
    jobs,
    random_prompts,
    step_bytes,
    writer_of,
)
from bench.models import config_of

CPU = torch.device("cpu")
ARGS = argparse.Namespace(model="tiny", prompt=9, tokens=5, rounds=2, layers=2)


def test_bytes_of_a_step_of_the_8b_shape() -> None:
    """NF4 with a doubly quantised absmax is 0.516 bytes a weight; the output layer is in bf16."""
    config = config_of("llama-3-8b")
    blocks, head = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336), 128256 * 4096
    assert step_bytes(config, 16, 0, nf4=False, element=2) == 2 * (blocks + head)
    nf4 = step_bytes(config, 16, 0, nf4=True, element=2)
    assert nf4 == pytest.approx(0.516 * blocks + 2 * head, rel=1e-3)
    # 1.5 ms at the 3.02 TB/s that an H100 copies with
    assert 1.4e-3 < nf4 / 3.02e12 < 1.6e-3
    # keys and values of 8 heads of 128 in 32 blocks, bf16
    with_cache = step_bytes(config, 16, 544, nf4=True, element=2)
    assert with_cache - nf4 == pytest.approx(16 * 544 * 131_072, rel=1e-9)


def test_the_baseline_is_measured_first_and_a_second_compilation_last() -> None:
    order = [(provider.name, batch) for provider, batch in jobs(list(PROVIDERS), [16, 1])]
    assert order[:3] == [(BASELINE, 16), (BASELINE, 1), ("tli-engine", 16)]
    assert order[-1] == ("transformers:static", 1)
    assert len(order) == 2 * len(PROVIDERS)


@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
def test_everyone_writes_the_same(nf4: bool) -> None:
    if nf4:
        pytest.importorskip("bitsandbytes")
    written, logits = [], []
    for provider in PROVIDERS.values():
        # rounded products may choose other tokens
        if provider.nf4 != nf4 or provider.numerics == "fast":
            continue
        subject = generation_subject("tiny", 2, CPU, provider)
        assert subject.files.config.num_hidden_layers == 2
        prompts = random_prompts(subject.files.config, 3, 9)
        writer = writer_of(subject, provider, 9 + 5)
        # a second call begins anew
        first, again = ([list(text) for text in writer.write(prompts, 5)] for _ in range(2))
        assert first == again
        written.append(first)
        logits.append(writer.logits(prompts))
    assert len(logits) == (2 if nf4 else 3)
    assert {len(text) for texts in written for text in texts} == {5}
    # on a CPU bitsandbytes rounds products to less than fp32
    assert max(off_by(found, logits[0]) for found in logits) < (6e-3 if nf4 else 1e-4)
    assert nf4 or all(texts == written[0] for texts in written)


def test_a_row_has_tokens_a_second_and_its_share_of_the_floor() -> None:
    rows = []
    for name in (BASELINE, "tli-engine"):
        pytest.importorskip("bitsandbytes")
        provider = PROVIDERS[name]
        subject = generation_subject("tiny", 2, CPU, provider)
        writer = writer_of(subject, provider, 14)
        rows.append(measure(writer, provider, subject.files.config, ARGS, 3))
    rows = compared(rows, 1e9)
    assert [row.provider for row in rows] == [BASELINE, "tli-engine"]
    assert rows[0].ratio_to_baseline == 1
    assert rows[1].ratio_to_baseline == pytest.approx(rows[0].ms / rows[1].ms)
    for row in rows:
        assert row.shape == {"batch": 3, "prompt": 9, "tokens": 5}
        assert row.bytes is not None
        assert row.roofline == pytest.approx(row.bytes / 1e9 / row.ms * 1e3)
        assert row.notes["tokens_per_s"] == pytest.approx(3 / row.ms * 1e3, rel=1e-3)
