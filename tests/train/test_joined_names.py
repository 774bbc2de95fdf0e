"""Checkpoints by modules' names are read where layers are joined."""

import torch

from tli_engine.train.joined_names import join_parts, joined_keys, parts_of

GATE_UP = "layers.0.mlp.gate_proj+up_proj.weight"
GATE, UP = "layers.0.mlp.gate_proj.weight", "layers.0.mlp.up_proj.weight"
DOWN = "layers.0.mlp.down_proj.weight"


def test_parts_of_a_name() -> None:
    assert parts_of(GATE_UP) == [GATE, UP]
    assert parts_of(DOWN) == [DOWN]
    assert parts_of("layers.1.self_attn.q_proj+k_proj+v_proj.bias")[2] == (
        "layers.1.self_attn.v_proj.bias"
    )


def test_joined_keys_have_those_of_their_parts() -> None:
    keys = [GATE_UP, f"{GATE_UP}/step", DOWN, f"{DOWN}/step"]
    assert joined_keys(keys) == {
        GATE_UP: [GATE, UP],
        f"{GATE_UP}/step": [f"{GATE}/step", f"{UP}/step"],
    }


def test_rows_are_put_end_to_end() -> None:
    gate, up, down = torch.randn(3, 2), torch.randn(3, 2), torch.randn(2, 3)
    found = join_parts({UP: up, DOWN: down, GATE: gate}, [GATE_UP, DOWN])
    assert found.keys() == {GATE_UP, DOWN}
    assert torch.equal(found[GATE_UP], torch.cat([gate, up]))
    assert torch.equal(found[DOWN], down)


def test_statistics_too_and_one_count_of_steps() -> None:
    mean, step = torch.randn(3, 2), torch.tensor(5.0)
    statistics = {
        f"{part}/{key}": value
        for part in (GATE, UP)
        for key, value in (("step", step), ("exp_avg", mean))
    }
    found = join_parts(statistics, [GATE_UP])
    assert found.keys() == {f"{GATE_UP}/step", f"{GATE_UP}/exp_avg"}
    assert found[f"{GATE_UP}/step"] == 5
    assert torch.equal(found[f"{GATE_UP}/exp_avg"], torch.cat([mean, mean]))


def test_what_is_joined_already_and_what_lacks_a_part_stays() -> None:
    whole = {GATE_UP: torch.randn(6, 2)}
    assert join_parts(whole, [GATE_UP]).keys() == whole.keys()
    half = {GATE: torch.randn(3, 2)}
    assert join_parts(half, [GATE_UP]).keys() == half.keys()
