"""Optimizers of fine-tuning against torch's own, and what is theirs alone."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tli_engine.config import TrainConfig
from tli_engine.errors import UserError
from tli_engine.ops.mixed_adamw import round_at_random_
from tli_engine.train import mixed_adamw
from tli_engine.train import updates as module
from tli_engine.train.updates import Updates, update_parts

STEPS, RATE = 6, 1e-2
# bitsandbytes keeps statistics of fewer than 4,096 numbers in fp32
SHAPES = {"lora_A": (4, 6), "lora_B": (8, 4), "norm": (6,), "weight": (128, 64)}


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in SHAPES.items()
    }


def train(
    named: dict[str, nn.Parameter], updates: Updates, first: int = 0, last: int = STEPS
) -> None:
    """Steps towards numbers that each step draws by its own seed."""
    for step in range(first, last):
        torch.manual_seed(step)
        updates.set_rate(RATE * (1 + step))
        loss = sum(
            ((t.float() - torch.randn(t.shape, device=t.device)) ** 2).sum() for t in named.values()
        )
        assert isinstance(loss, Tensor)
        torch.autograd.backward(loss)
        updates.clip()
        updates.step()


def by_torch(named: dict[str, nn.Parameter], config: TrainConfig, factor: float = 1.0) -> None:
    """The same steps by torch's AdamW: no decay of vectors, another rate for B."""
    groups = [
        {"params": [t], "weight_decay": config.weight_decay if t.ndim > 1 else 0.0}
        for t in named.values()
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    for step in range(STEPS):
        torch.manual_seed(step)
        for name, group in zip(named, optimizer.param_groups, strict=True):
            group["lr"] = RATE * (1 + step) * (factor if name == "lora_B" else 1.0)
        loss = sum(((t - torch.randn(t.shape)) ** 2).sum() for t in named.values())
        assert isinstance(loss, Tensor)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(named.values(), config.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_grad_norm": 0.5}, {"weight_decay": 0.3}, {"lora_plus": 16.0}, {"in_backward": True}],
    ids=str,
)
def test_equals_torchs_adamw(settings: dict[str, Any]) -> None:
    config = TrainConfig(**settings)
    ours, theirs = tensors(), tensors()
    train(ours, Updates(ours, config))
    by_torch(theirs, config, config.lora_plus)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"rounding": "stochastic"}),
        (torch.bfloat16, {"in_backward": True}),
        (torch.bfloat16, {"in_backward": True, "rounding": "stochastic"}),
        (torch.float32, {"optimizer": "adamw-8bit"}),
        (torch.bfloat16, {"optimizer": "adamw-8bit"}),
    ],
    ids=str,
)
def test_going_on_from_a_state_is_exact(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    if "optimizer" in settings:
        pytest.importorskip("bitsandbytes")
    config = TrainConfig(**settings)
    whole = tensors(dtype)
    train(whole, Updates(whole, config))
    half = tensors(dtype)
    updates = Updates(half, config)
    train(half, updates, last=3)
    state = updates.state()
    assert all(t.device.type == "cpu" for t in state.values())
    resumed = tensors(dtype)
    with torch.no_grad():
        for name, tensor in resumed.items():
            tensor.copy_(half[name])
    again = Updates(resumed, config)
    again.restore(state)
    train(resumed, again, first=3)
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "settings", [{}, {"max_grad_norm": 0.5}, {"rounding": "stochastic"}], ids=str
)
def test_gradients_that_stay_give_the_same_bits(
    settings: dict[str, Any], dtype: torch.dtype
) -> None:
    config = TrainConfig(**settings)
    plain, kept = tensors(dtype), tensors(dtype)
    train(plain, Updates(plain, config))
    updates = Updates(kept, config)
    updates.keeps_gradients = True
    train(kept, updates, last=1)
    places = {name: tensor.grad for name, tensor in kept.items()}
    train(kept, updates, first=1)
    for name, tensor in kept.items():
        assert torch.equal(tensor, plain[name]), name
        assert plain[name].grad is None
        assert tensor.grad is places[name] is not None
        assert not tensor.grad.any()
    kept["norm"].grad = torch.ones_like(kept["norm"])
    updates.clear_gradients()
    assert not kept["norm"].grad.any()


@pytest.mark.parametrize("keeps", [False, True])
def test_gradients_are_copied_to_fp32_a_part_at_a_time(
    keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(max_grad_norm=0.5)
    whole, cut = tensors(torch.bfloat16), tensors(torch.bfloat16)
    train(whole, Updates(whole, config))
    monkeypatch.setattr(module, "_WIDE_BYTES", 250)
    assert update_parts(cut, config) == [["lora_A", "lora_B", "norm"], ["weight"]]
    # of fp32 there is nothing to copy
    assert update_parts(tensors(), config) == [list(SHAPES)]
    updates = Updates(cut, config)
    updates.keeps_gradients = keeps
    wide: list[int] = []
    for part, optimizer in updates._optimizers:
        step = optimizer.step

        def counted(step: Any = step, names: list[str] = part) -> None:
            held = [tensor.grad for tensor in updates._held.values()]
            wide.append(sum(grad is not None for grad in held))
            assert wide[-1] == len(names)
            step()

        monkeypatch.setattr(optimizer, "step", counted)
    train(cut, updates)
    assert wide == [3, 1] * STEPS
    for name, tensor in whole.items():
        assert torch.equal(cut[name], tensor), name


@pytest.fixture
def in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; on a CPU the op's definition runs."""
    for where in (module, mixed_adamw):
        monkeypatch.setattr(where, "in_one_pass", lambda tensor: tensor.dtype == torch.bfloat16)


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("in_backward", [False, True])
def test_masters_are_updated_from_16_bit_gradients_as_from_copies(
    keeps: bool, in_backward: bool, in_one_pass: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(in_backward=in_backward)
    ours, theirs = tensors(torch.bfloat16), tensors(torch.bfloat16)
    updates = Updates(ours, config)
    updates.keeps_gradients = keeps and not in_backward
    train(ours, updates)
    monkeypatch.undo()
    plain = Updates(theirs, config)
    train(theirs, plain)
    for name, tensor in theirs.items():
        grad = ours[name].grad
        assert grad is None if not updates.keeps_gradients else not grad.any()
        torch.testing.assert_close(ours[name], tensor, rtol=2**-7, atol=0)
        for key in ("master", "exp_avg", "exp_avg_sq", "step"):
            mine, its = (u.state()[f"{name}/{key}"] for u in (updates, plain))
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("settings", [{}, {"rounding": "stochastic"}], ids=str)
def test_going_on_in_one_pass_is_exact(settings: dict[str, Any], in_one_pass: None) -> None:
    test_going_on_from_a_state_is_exact(torch.bfloat16, settings)


def test_a_state_of_other_tensors_is_refused() -> None:
    updates = Updates(tensors(), TrainConfig())
    with pytest.raises(KeyError, match="other"):
        updates.restore({"other/exp_avg": torch.zeros(3)})


def test_a_master_copy_keeps_what_bf16_loses() -> None:
    """Steps far smaller than a rounding step of bf16: a copy in fp32 adds them up."""
    config = TrainConfig(weight_decay=0.0)
    ends = {}
    for rounding in ("master", "stochastic"):
        weight = {"w": nn.Parameter(torch.full((4096, 1), 256.0, dtype=torch.bfloat16))}
        updates = Updates(weight, config.model_copy(update={"rounding": rounding}))
        for _ in range(40):
            updates.set_rate(0.05)
            weight["w"].grad = torch.ones_like(weight["w"])
            updates.step()
        ends[rounding] = weight["w"].float().mean().item()
    # AdamW steps by its rate where all gradients are equal: 256 - 40 * 0.05, and bf16 has 254 and 256
    assert ends["master"] == 254.0
    assert ends["stochastic"] == pytest.approx(254.0, abs=0.1)


def test_rounding_at_random_is_right_in_the_mean() -> None:
    torch.manual_seed(0)
    # a quarter of the way from one bf16 number to the next, of either sign
    for low, high in ((1.0, 1.0078125), (-1.0, -1.0078125)):
        exact = torch.full((40_000,), low + (high - low) / 4)
        target = torch.empty(40_000, dtype=torch.bfloat16)
        round_at_random_(target, exact, torch.randint(0, 1 << 16, exact.shape))
        assert set(target.tolist()) == {low, high}
        assert (target == high).float().mean().item() == pytest.approx(0.25, abs=0.01)


def test_numbers_that_bf16_holds_stay() -> None:
    exact = torch.tensor([0.0, -0.0, 1.5, -3.0, 2.0**-130])
    target = torch.empty(5, dtype=torch.bfloat16)
    round_at_random_(target, exact.clone(), torch.randint(0, 1 << 16, exact.shape))
    assert torch.equal(target.float(), exact)


def test_other_dtypes_are_rounded_to_nearest() -> None:
    exact = torch.randn(100)
    for dtype in (torch.float16, torch.float32):
        target = torch.empty(100, dtype=dtype)
        round_at_random_(target, exact.clone(), torch.randint(0, 1 << 16, exact.shape))
        assert torch.equal(target, exact.to(dtype))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adamw-paged-8bit"}, "train.optimizer: adamw-paged-8bit needs a GPU"),
        (
            {"optimizer": "adamw-paged", "rounding": "stochastic"},
            "train.rounding: stochastic goes with optimizer adamw",
        ),
    ],
)
def test_what_cannot_run_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Updates(tensors(), TrainConfig(**settings))


def test_bytes_are_counted() -> None:
    named = tensors(torch.bfloat16)
    updates = Updates(named, TrainConfig())
    count = sum(t.numel() for t in named.values())
    assert updates.nbytes() == (0, 4 * count)
    train(named, updates, last=1)
    # two means in fp32 and a master copy; steps are numbers of four bytes
    assert updates.nbytes() == (0, 12 * count + 4 * len(named))


def test_updates_in_the_backward_pass_keep_nothing_alive() -> None:
    """Several runs in one process, those of a comparison, give their memory back."""
    named = tensors()
    updates = Updates(named, TrainConfig(in_backward=True))
    train(named, updates)
    gone = weakref.ref(updates), weakref.ref(named["weight"])
    del updates, named
    gc.collect()
    assert [each() for each in gone] == [None, None]


def test_rounding_at_random_is_not_of_fp16() -> None:
    with pytest.raises(UserError, match="stochastic takes bfloat16, the weights are float16"):
        Updates(tensors(torch.float16), TrainConfig(rounding="stochastic"))
