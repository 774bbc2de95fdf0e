"""The flat optimizer beside torch's, and the checkpoints of both."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tli_engine.config import TrainConfig
from tli_engine.train.flat_adamw import FlatAdamW
from tli_engine.train.schedule import learning_rate

STEPS = 50
BAD = 20
SHAPES = {"a.lora_A": (4, 33), "a.lora_B": (70, 4), "b.lora_A": (4, 16), "bias": (3,), "one": ()}
Parameters = dict[str, nn.Parameter]


def make_parameters(dtype: torch.dtype = torch.float32) -> Parameters:
    generator = torch.Generator().manual_seed(1)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype))
        for name, shape in SHAPES.items()
    }


def make_rates(total: int = STEPS) -> Tensor:
    """Warm-up from zero, then a cosine."""
    config = TrainConfig(learning_rate=0.05, warmup_steps=8, schedule="cosine", steps=total)
    return torch.tensor([learning_rate(config, step, total) for step in range(total)])


def loss_of(parameters: Parameters, step: int) -> Tensor:
    """Not convex, other at each step; its gradient is large at some and small at others."""
    scale = 10.0 ** (step % 5 - 2)
    return scale * sum((p * (1 + math.sin(step))).cos().sum() + p.square().sum() / 9
                       for p in parameters.values())  # type: ignore[return-value]  # fmt: skip


class TorchRun:
    """``torch.optim.AdamW`` and ``clip_grad_norm_``, as the training loop has them."""

    def __init__(self, parameters: Parameters, rates: Tensor, decay: float, norm: float) -> None:
        self.parameters, self.rates, self.norm = parameters, rates, norm
        self.optimizer = torch.optim.AdamW(parameters.values(), weight_decay=decay)
        self.done = 0

    def step(self, step: int) -> float:
        self.optimizer.zero_grad()
        torch.autograd.backward(loss_of(self.parameters, step))
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.norm)
        self.optimizer.param_groups[0]["lr"] = self.rates[self.done].item()
        self.optimizer.step()
        self.done += 1
        return float(norm)

    def state(self) -> dict[str, Tensor]:
        return {
            f"{name}/{key}": value.detach().cpu()
            for name, tensor in self.parameters.items()
            for key, value in self.optimizer.state.get(tensor, {}).items()
        }

    def load(self, statistics: dict[str, Tensor]) -> None:
        """As ``Trainer.restore``."""
        numbers = {name: i for i, name in enumerate(self.parameters)}
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in statistics.items():
            name, _, statistic = key.partition("/")
            state.setdefault(numbers[name], {})[statistic] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


class FlatRun:
    def __init__(
        self, parameters: Parameters, rates: Tensor, decay: float, norm: float, **options: Any
    ) -> None:
        self.parameters = parameters
        self.optimizer = FlatAdamW(
            parameters, rates, weight_decay=decay, max_grad_norm=norm, **options
        )

    def step(self, step: int) -> list[float]:
        self.optimizer.zero_grad()
        torch.autograd.backward(loss_of(self.parameters, step))
        metrics: list[float] = self.optimizer.step().tolist()
        return metrics


def assert_same(flat: FlatRun, plain: TorchRun) -> None:
    """Equal to fp32 rounding, of the values and of the terms that they are sums of."""
    for name, tensor in plain.parameters.items():
        torch.testing.assert_close(flat.parameters[name], tensor, rtol=1e-5, atol=2e-6)
    ours, theirs = flat.optimizer.state(), plain.state()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        scale = 1e-6 * value.abs().max().item()
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=scale)


@pytest.mark.parametrize("max_grad_norm", [0.5, 20.0, math.inf])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fifty_steps_equal_torch(weight_decay: float, max_grad_norm: float) -> None:
    """Clipped at every step, at some and at none; one gradient is infinite."""
    rates = make_rates()
    flat = FlatRun(make_parameters(), rates, weight_decay, max_grad_norm)
    plain = TorchRun(make_parameters(), rates, weight_decay, max_grad_norm)
    for step in range(STEPS):
        if step == BAD:
            before = flat.optimizer.parameters.clone()
            flat.optimizer.zero_grad()
            flat.optimizer.gradients["b.lora_A"][1, 2] = math.inf
            norm, rate, skipped = flat.optimizer.step().tolist()
            assert (norm, rate, skipped) == (math.inf, rates[BAD].item(), 1)
            assert torch.equal(flat.optimizer.parameters, before)
        norm, rate, skipped = flat.step(step)
        assert (rate, skipped) == (rates[step].item(), 0)
        assert norm == pytest.approx(plain.step(step), rel=1e-5)
    assert_same(flat, plain)
    assert flat.optimizer.counts.tolist() == [STEPS, 1]


def test_parameters_and_gradients_are_views_that_start_at_multiples_of_64() -> None:
    parameters = make_parameters()
    values = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = FlatAdamW(parameters, make_rates(), shadow_dtype=torch.bfloat16)
    used = torch.zeros_like(optimizer.parameters, dtype=torch.bool)
    for name, parameter in parameters.items():
        assert torch.equal(parameter, values[name])
        assert parameter.is_leaf
        assert parameter.is_contiguous()
        start = parameter.storage_offset()
        assert start % 64 == 0
        assert not used[start : start + parameter.numel()].any()
        used[start : start + parameter.numel()] = True
        assert parameter.data_ptr() == optimizer.parameters[start:].data_ptr()
        assert parameter.grad is optimizer.gradients[name]
        assert parameter.grad.data_ptr() == optimizer.grad[start:].data_ptr()
        assert torch.equal(optimizer.shadows[name], values[name].bfloat16())
    assert len(optimizer.parameters) == 3 * 64 + 5 * 64 + 64 + 64 + 64
    flat = FlatRun(parameters, make_rates(), 0.1, 1.0)
    for step in range(3):
        flat.step(step)
    for buffer in ("parameters", "grad", "exp_avg", "exp_avg_sq"):
        assert (getattr(flat.optimizer, buffer)[~used] == 0).all()


def test_gradients_add_up_until_zeroed() -> None:
    flat = FlatRun(make_parameters(), make_rates(), 0.1, 1.0)
    torch.autograd.backward(loss_of(flat.parameters, 1))
    once = flat.optimizer.grad.clone()
    torch.autograd.backward(loss_of(flat.parameters, 1))
    assert torch.equal(flat.optimizer.grad, 2 * once)
    flat.optimizer.zero_grad()
    assert not flat.optimizer.grad.any()
    assert once.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_shadow_follows_the_parameters(dtype: torch.dtype) -> None:
    flat = FlatRun(make_parameters(), make_rates(), 0.1, 1.0, shadow_dtype=dtype)
    for step in range(3):
        flat.step(step)
        for name, tensor in flat.parameters.items():
            assert torch.equal(flat.optimizer.shadows[name], tensor.to(dtype))
    with torch.no_grad():
        flat.parameters["bias"].fill_(7)
    assert not (flat.optimizer.shadows["bias"] == 7).any()
    flat.optimizer.load({})
    assert (flat.optimizer.shadows["bias"] == 7).all()


def saved(run: FlatRun | TorchRun, path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and statistics, through files."""
    statistics = run.state() if isinstance(run, TorchRun) else run.optimizer.state()
    save_file({n: p.detach().cpu() for n, p in run.parameters.items()}, path / "adapter")
    save_file(statistics, path / "optimizer")
    return load_file(path / "adapter"), load_file(path / "optimizer")


@pytest.mark.parametrize("writer", ["flat", "torch"])
@pytest.mark.parametrize("reader", ["flat", "torch"])
def test_checkpoints_are_read_both_ways(writer: str, reader: str, tmp_path: Path) -> None:
    rates, half = make_rates(), STEPS // 2
    make: dict[str, Callable[..., Any]] = {"flat": FlatRun, "torch": TorchRun}
    first = make[writer](make_parameters(), rates, 0.1, 1.0)
    for step in range(half):
        first.step(step)
    adapter, statistics = saved(first, tmp_path)
    # in the model's order: a file has its own
    parameters = {name: nn.Parameter(adapter[name]) for name in SHAPES}
    second = make[reader](parameters, rates, 0.1, 1.0)
    if isinstance(second, TorchRun):
        second.load(statistics)
        second.done = half
    else:
        second.optimizer.load(statistics)
    for step in range(half, STEPS):
        first.step(step)
        second.step(step)
    for name, tensor in first.parameters.items():
        if writer == reader:
            assert torch.equal(parameters[name], tensor)
        torch.testing.assert_close(parameters[name], tensor, rtol=1e-5, atol=2e-6)


def test_before_the_first_step_there_is_no_state_and_loading_none_starts_afresh() -> None:
    flat = FlatRun(make_parameters(), make_rates(), 0.1, 1.0)
    assert flat.optimizer.state() == {}
    start = flat.optimizer.parameters.clone()
    flat.step(1)
    flat.step(2)
    first = flat.optimizer.parameters.clone()
    assert not torch.equal(first, start)
    flat.optimizer.parameters.copy_(start)
    flat.optimizer.load({})
    assert flat.optimizer.state() == {}
    flat.step(1)
    flat.step(2)
    assert torch.equal(flat.optimizer.parameters, first)


def test_state_is_a_copy() -> None:
    flat = FlatRun(make_parameters(), make_rates(), 0.1, 1.0)
    flat.step(0)
    state = flat.optimizer.state()
    kept = {name: value.clone() for name, value in state.items()}
    flat.step(1)
    assert all(torch.equal(state[name], kept[name]) for name in kept)


def test_fp64_parameters_stay_fp64() -> None:
    flat = FlatRun(make_parameters(torch.float64), make_rates(), 0.1, 1.0)
    plain = TorchRun(make_parameters(torch.float64), make_rates(), 0.1, 1.0)
    for step in range(10):
        flat.step(step)
        plain.step(step)
    for name, tensor in plain.parameters.items():
        torch.testing.assert_close(flat.parameters[name], tensor, rtol=1e-12, atol=1e-12)


def test_a_replaced_gradient_is_named() -> None:
    parameters = make_parameters()
    optimizer = FlatAdamW(parameters, make_rates())
    parameters["bias"].grad = None
    with pytest.raises(RuntimeError, match="the gradient of bias was replaced"):
        optimizer.step()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param({"bias/exp_avg": None}, KeyError, "bias/exp_avg", id="missing"),
        pytest.param({"c/step": torch.tensor(1.0)}, KeyError, "c/step", id="unknown"),
        pytest.param(
            {"bias/exp_avg": torch.zeros(1)}, RuntimeError, r"must be \[3\], got \[1\]", id="shape"
        ),
        pytest.param(
            {"bias/step": torch.tensor(9.0)}, RuntimeError, "of different steps: 1, 9", id="steps"
        ),
    ],
)
def test_statistics_that_do_not_fit_change_nothing(
    change: dict[str, Tensor | None], error: type[Exception], message: str
) -> None:
    flat = FlatRun(make_parameters(), make_rates(), 0.1, 1.0)
    flat.step(0)
    state = flat.optimizer.state()
    wrong = {name: t for name, t in (state | change).items() if t is not None}
    with pytest.raises(error, match=message):
        flat.optimizer.load(wrong)
    after = flat.optimizer.state()
    assert all(torch.equal(after[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"tensors": {}}, "tensors must not be empty", id="none"),
        pytest.param({"dtype": torch.float16}, "bias must be torch.float32 on cpu", id="dtype"),
        pytest.param({"again": True}, "other is the parameter bias", id="twice"),
        pytest.param({"eps": 0.0}, "eps must be positive", id="eps"),
        pytest.param({"betas": (0.9, 1.0)}, "beta2 must be in", id="beta2"),
    ],
)
def test_wrong_argument_is_named_in_the_error(change: dict[str, Any], message: str) -> None:
    tensors = make_parameters()
    if dtype := change.pop("dtype", None):
        tensors["bias"] = nn.Parameter(tensors["bias"].detach().to(dtype))
    if change.pop("again", False):
        tensors["other"] = tensors["bias"]
    before = tensors["one"].data_ptr()
    with pytest.raises(ValueError, match=message):
        FlatAdamW(**{"tensors": tensors, "learning_rates": make_rates()} | change)
    assert tensors["one"].data_ptr() == before
