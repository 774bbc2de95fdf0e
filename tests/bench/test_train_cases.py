"""Cases, providers and the floor of the bench of fine-tuning steps; its peers, on a tiny model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.models import RandomSource, Subject, config_of
from bench.train_cases import (
    ALPHA,
    CASES,
    MODULES,
    NAMES,
    Absent,
    Provider,
    draw_adapters,
    optimizer_of,
    providers_of,
    random_batches,
    train_config,
    train_floor,
    train_subject,
)
from bench.train_engine import engine_train_step
from bench.train_peers import apply_liger, mark_quantized, peer_step

Make = Callable[..., Subject]
# of the 8B shape: numbers of weights of a block, of its q, k and v, of the output layer
BLOCK = 4096 * (4096 + 1024 + 1024) + 4096 * 4096 + 3 * 4096 * 14336
READS_INPUT = 4096 * (4096 + 1024 + 1024)
HEAD = 4096 * 128256


def floor_of(case: str) -> float:
    return train_floor(config_of("llama-3-8b"), 4, 2048, CASES[case]).flops


def test_floor_of_the_8b_step() -> None:
    """All blocks adapted: forward and the inputs' gradients, attention, 42 M weights of adapters."""
    tokens, labels = 8192, 4 * 2047
    attention = 2 * tokens * 2048 * 4096 * (32 + 2 * 32)
    inputs_and_outputs = 2 * (4096 + 1024) + 2 * 4096 + 4096 + 4096 + 3 * (4096 + 14336)
    expected = 2 * tokens * (2 * 32 * BLOCK - READS_INPUT) + 4 * labels * HEAD + attention
    assert floor_of("lora_all") == expected + 6 * tokens * 16 * 32 * inputs_and_outputs
    assert inputs_and_outputs * 16 * 32 == 41_943_040
    # the early case spares adapters alone: its gradient goes down to block 0 too
    spared = 6 * tokens * 16 * 29 * inputs_and_outputs
    assert floor_of("lora_all") - floor_of("lora_early") == spared
    # 750 TFLOP/s are some 23 thousand tokens a second, the ceiling that was measured against
    assert 22_500 < tokens / (floor_of("lora_all") / 750e12) < 24_000


def test_floor_of_full_fine_tuning_has_the_weights_gradients() -> None:
    tokens, labels = 8192, 4 * 2047
    attention = 2 * tokens * 2048 * 4096 * 3 * 32
    assert floor_of("full") == 6 * tokens * 32 * BLOCK + 6 * labels * HEAD + attention


def test_fp32_computes_with_the_bytes_of_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.train_cases.random_subject", lambda *args: args)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    _, config, dtype, _, *options = train_subject(
        "tiny", gpu, nf4=True, double_quant=True, fp32=True
    )
    assert (dtype, options) == (torch.float32, [True, True, torch.bfloat16])
    half = RandomSource(config, torch.bfloat16, cpu, True, True)
    full = RandomSource(config, dtype, cpu, *options)
    weight = "layers.0.self_attn.q_proj.weight"
    assert full.read(weight).dtype == torch.float32
    assert torch.equal(full.read(weight), half.read(weight).float())
    same, ours = half.read_nf4(weight), full.read_nf4(weight)
    assert same is not None
    assert ours is not None
    assert torch.equal(ours.packed, same.packed)
    assert torch.equal(ours.absmax, same.absmax)


def test_every_case_starts_with_a_peer_but_for_the_largest_model() -> None:
    for name in NAMES:
        for case in CASES.values():
            found = providers_of(case, name)
            assert len({p.name for p in found}) == len(found) > 0
            if name == "qwen2-72b":
                assert {p.kind for p in found} == {"engine"}
            else:
                assert found[0].kind == "transformers"
                assert {"tli-engine", "tli-engine:in-backward"} & {p.name for p in found}


def test_full_fine_tuning_of_8b_has_states_of_8_bits() -> None:
    full, early = CASES["full"], CASES["lora_early"]
    kinds = {p.name: optimizer_of(full, "llama-3-8b", p) for p in providers_of(full, "llama-3-8b")}
    assert kinds == {
        "transformers": "adamw-8bit",
        "transformers+liger": "adamw-8bit",
        "tli-engine:in-backward": "adamw-8bit",
        "tli-engine:stochastic-in-backward": "adamw",
    }
    assert {optimizer_of(full, "qwen2-1.5b", p) for p in providers_of(full, "qwen2-1.5b")} == {
        "adamw"
    }
    assert optimizer_of(early, "llama-3-8b", providers_of(early, "llama-3-8b")[0]) == "adamw"


def test_shape_of_the_1_5b_model() -> None:
    config = train_config("qwen2-1.5b")
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == 1_543_714_304


def test_batches_are_the_same_at_every_call_and_differ(tiny_subject: Make) -> None:
    config = tiny_subject().files.config
    first, again = (random_batches(config, 2, 8) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert all(b.shape == (2, 8) and b.max() < config.eos_token_id for b in first)


def test_adapters_start_alike_whatever_they_are_called() -> None:
    names = [
        "base_model.model.model.layers.1.mlp.up_proj.lora_A.default.weight",
        "layers.1.mlp.up_proj.lora_A.weight",
        "layers.1.mlp.up_proj.lora_B.weight",
        "layers.2.mlp.up_proj.lora_A.weight",
    ]
    tensors = [torch.zeros(16, 64) for _ in names]
    draw_adapters(zip(names, tensors, strict=True))
    peer, engine, b, other = tensors
    assert torch.equal(peer, engine)
    assert not torch.equal(engine, other)
    assert torch.equal(b, torch.zeros(16, 64))
    assert 0.1 < peer.abs().max() <= 64**-0.5


def test_double_quantised_bytes_are_the_same_for_bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import dequantize_4bit

    from bench.nf4_shapes import bnb_weight

    subject = train_subject("tiny", torch.device("cpu"), nf4=True, double_quant=True)
    weight = subject.files.source.read_nf4("layers.0.mlp.up_proj.weight")
    assert weight is not None
    assert weight.nested is not None
    packed, state = bnb_weight(weight)
    assert state.nested
    assert torch.equal(dequantize_4bit(packed, state), weight.dequantize())


@pytest.mark.parametrize("activations", ["recompute", "save"])
@pytest.mark.parametrize("case", CASES)
def test_peers_learn_what_plain_transformers_does(
    tiny_subject: Make, case: str, activations: Any
) -> None:
    """Step by step: the same losses as a model without adapters' or checkpointing's machinery."""
    pytest.importorskip("peft")
    subject = tiny_subject()
    batches = random_batches(subject.files.config, 2, 12)
    step = peer_step(subject, CASES[case], Provider("peer", "transformers", activations), batches)
    actual = [float(step.call()) for _ in range(6)]

    assert actual == pytest.approx(plain_losses(subject, case, batches, 6), abs=2e-5)
    # batches come round after four steps
    assert actual[4] < actual[0] - 1e-4


@pytest.mark.parametrize("case", CASES)
def test_a_batch_in_parts_is_the_batch(tiny_subject: Make, case: str) -> None:
    pytest.importorskip("peft")
    losses = []
    for kind, step in (("transformers", peer_step), ("engine", engine_train_step)):
        for parts in (1, 3):
            subject = tiny_subject()
            batches = random_batches(subject.files.config, 3, 12)
            provider = Provider("anyone", kind, "save", accumulate=parts)  # type: ignore[arg-type]
            made = step(subject, CASES[case], provider, batches)
            losses.append([float(made.call()) for _ in range(4)])
    for others in losses[1:]:
        assert others == pytest.approx(losses[0], abs=5e-5)


def plain_losses(subject: Subject, case: str, batches: list[Any], steps: int) -> list[float]:
    """Losses of weights that are functions of the trained tensors, written out."""
    model = subject.causal_lm().train()
    if case == "full":
        trained = dict(model.requires_grad_(True).named_parameters())
    else:
        blocks = CASES[case].early or range(subject.files.config.num_hidden_layers)
        targets = {
            name: parameter
            for name, parameter in model.named_parameters()
            for block in blocks
            if f"layers.{block}." in name and name.split(".")[-2] in MODULES
        }
        trained = {}
        for name, parameter in targets.items():
            n, k = parameter.shape
            trained[f"{name}.lora_A"] = torch.zeros(16, k)
            trained[f"{name}.lora_B"] = torch.zeros(n, 16)
        draw_adapters((name.replace(".weight.lora", ".lora"), t) for name, t in trained.items())
        for tensor in trained.values():
            tensor.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.values(), lr=2e-4)
    losses = []
    for i in range(steps):
        ids = batches[i % len(batches)]
        weights = {
            name: parameter + ALPHA / 16 * trained[f"{name}.lora_B"] @ trained[f"{name}.lora_A"]
            for name, parameter in (() if case == "full" else targets.items())
        }
        out = torch.func.functional_call(model, weights, (), {"input_ids": ids})
        loss = torch.nn.functional.cross_entropy(
            out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_checkpointing_is_on_where_it_is_said(tiny_subject: Make) -> None:
    subject, kept = tiny_subject(), {}
    batches = random_batches(subject.files.config, 2, 12)
    for activations in ("recompute", "save"):
        provider = Provider("peer", "transformers", activations)
        step = peer_step(subject, CASES["full"], provider, batches)
        sizes: list[int] = []

        def keep(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            step.call()
        kept[activations] = sizes
    # recomputed blocks save nothing in the forward that these hooks see but their own inputs
    assert len(kept["recompute"]) < len(kept["save"])


def test_a_peer_of_4_bits_says_so(tiny_subject: Make) -> None:
    pytest.importorskip("bitsandbytes")
    model = tiny_subject(nf4=True).causal_lm()
    mark_quantized(model)
    assert model.is_loaded_in_4bit
    assert model.config.quantization_config.bnb_4bit_quant_type == "nf4"


def test_liger_is_absent_with_a_reason(tiny_subject: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "liger_kernel", None)
    with pytest.raises(Absent, match="liger-kernel is not there"):
        apply_liger(tiny_subject().causal_lm())


def test_what_a_gpu_holds_twice_is_measured_with_and_without_graphs() -> None:
    for name in NAMES:
        for case in CASES.values():
            graphs = {p.graphs for p in providers_of(case, name) if p.kind == "engine"}
            none = name == "qwen2-72b" or (name == "llama-3-8b" and case.method == "full")
            assert graphs == ({None} if none else {None, True, False})


def test_the_smallest_shape_is_smollm2s() -> None:
    config = train_config("smollm2-135m")
    block = 576 * (576 + 2 * 192) + 576 * 576 + 3 * 576 * 1536
    parameters = config.num_hidden_layers * (block + 2 * 576) + 49152 * 576 + 576
    assert parameters == 134_515_008
