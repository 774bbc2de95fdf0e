"""AdamW of 16-bit tensors in one pass: values against fp64, rounding, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tli_engine.ops.mixed_adamw import mixed_adamw_, round_at_random_
from tli_engine.reference.mixed_adamw import mixed_adamw as reference
from tli_engine.testing import assert_within_error_budget

pytest.importorskip("triton")
from tli_engine.kernels import mixed_adamw as module
from tli_engine.kernels.mixed_adamw import mixed_adamw as triton_step

NUMBERS = {"step": 4, "rate": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(0,), (1,), (3, 5), (module.BLOCK,), (7, module.BLOCK // 2 + 1)]
Tensors = dict[str, Tensor | None]


def make(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, master: bool) -> Tensors:
    held = torch.float32 if master else dtype
    value = torch.randn(shape, device=device)
    return {
        "parameter": value.to(dtype),
        "grad": torch.randn(shape, device=device).to(dtype),
        "exp_avg": (0.1 * torch.randn(shape, device=device)).to(held),
        "exp_avg_sq": (0.1 * torch.rand(shape, device=device)).to(held),
        "master": value if master else None,
        "seed": None if master else torch.tensor(2**62 + 77, device=device),
    }


def copies(tensors: Tensors, dtype: torch.dtype | None = None) -> Tensors:
    return {
        name: t if t is None or name == "seed" else t.to(dtype or t.dtype, copy=True)
        for name, t in tensors.items()
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_master_copy_errs_no_more_than_plain_torch(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    actual = make(shape, dtype, device, master=True)
    plain, exact = copies(actual), copies(actual, torch.float64)
    for step, tensors in ((triton_step, actual), (reference, plain), (reference, exact)):
        step(**tensors, **NUMBERS)  # type: ignore[operator]
    if not exact["parameter"].numel():  # type: ignore[union-attr]
        return
    for name in ("master", "exp_avg", "exp_avg_sq"):
        assert_within_error_budget(actual[name], plain[name], exact[name])  # type: ignore[arg-type]
    # the interpreter's rounding to bf16 included
    assert torch.equal(actual["parameter"], actual["master"].to(dtype))  # type: ignore[arg-type,union-attr]


@pytest.mark.parametrize("step", [mixed_adamw_, triton_step], ids=["op", "triton"])
def test_many_steps_are_torchs_own(step: Any, device: torch.device) -> None:
    tensors = make((40, 30), torch.bfloat16, device, master=True)
    for name in ("exp_avg", "exp_avg_sq"):
        tensors[name].zero_()  # type: ignore[union-attr]
    master = tensors["master"]
    assert master is not None
    theirs = nn.Parameter(master.clone())
    optimizer = torch.optim.AdamW([theirs], weight_decay=0.1)
    for number in range(1, 9):
        grad = torch.randn(40, 30, device=device).bfloat16() * 10.0 ** (number % 4 - 2)
        rate = 1e-2 / number
        step(**tensors | {"grad": grad}, **NUMBERS | {"step": number, "rate": rate})
        theirs.grad = grad.float()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    torch.testing.assert_close(master, theirs.detach(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_random_rounding_is_that_of_the_reference(
    shape: tuple[int, ...], device: torch.device
) -> None:
    """The same random numbers, and either neighbour of what fp32 arithmetic gives."""
    start = make(shape, torch.bfloat16, device, master=False)
    actual, plain, exact = (copies(start) for _ in range(3))
    triton_step(**actual, **NUMBERS)  # type: ignore[arg-type]
    reference(**plain, **NUMBERS)  # type: ignore[arg-type]
    wide = copies(exact, torch.float64)
    reference(**wide, **NUMBERS)  # type: ignore[arg-type]
    for name in ("parameter", "exp_avg", "exp_avg_sq"):
        ours, theirs, true = actual[name], plain[name], wide[name]
        assert ours is not None
        assert theirs is not None
        assert true is not None
        # fp32 sums that differ in their last bit may fall to the other side
        assert (ours != theirs).float().mean() <= 0.01
        assert ((ours.double() - true).abs() <= 2**-7 * true.abs() + 1e-7).all(), name
    other = copies(start) | {"seed": torch.tensor(5, device=device)}
    triton_step(**other, **NUMBERS)  # type: ignore[arg-type]
    if actual["parameter"].numel() > 100:  # type: ignore[union-attr]
        assert not torch.equal(other["parameter"], actual["parameter"])  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [mixed_adamw_, triton_step], ids=["op", "triton"])
def test_what_is_less_than_a_rounding_step_counts_in_the_mean(
    step: Any, device: torch.device
) -> None:
    tensors = make((4096,), torch.bfloat16, device, master=False)
    tensors["parameter"].fill_(256.0)  # type: ignore[union-attr]
    for name in ("exp_avg", "exp_avg_sq"):
        tensors[name].zero_()  # type: ignore[union-attr]
    for number in range(1, 31):
        grad = torch.ones(4096, device=device).bfloat16()
        seed = torch.tensor(number, device=device)
        rest = NUMBERS | {"step": number, "rate": 0.05, "weight_decay": 0.0}
        step(**tensors | {"grad": grad, "seed": seed}, **rest)
    mean = tensors["parameter"].float().mean().item()  # type: ignore[union-attr]
    # AdamW steps by its rate where all gradients are equal; bf16 has 254 and 256
    assert mean == pytest.approx(254.5, abs=0.15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameter": torch.zeros(4)}, "parameter must be bf16 or fp16, got torch.float32"),
        ({"grad": torch.zeros(5).bfloat16()}, r"grad must be torch.bfloat16 \[4\]"),
        ({"exp_avg": torch.zeros(4).bfloat16()}, r"exp_avg must be torch.float32 \[4\]"),
        ({"master": None, "seed": torch.tensor(1)}, r"exp_avg must be torch.bfloat16 \[4\]"),
        ({"master": torch.zeros(8)[::2]}, r"master must be contiguous, got strides \[2\]"),
        ({"step": 0}, "step must be positive and rate not negative, got 0"),
        ({"rate": float("nan")}, "rate not negative, got 4 and nan"),
        ({"beta2": 1.0}, r"beta2 must be in \[0, 1\), got 1.0"),
        ({"eps": 0.0}, "eps must be positive, got 0.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    tensors = make((4,), torch.bfloat16, torch.device("cpu"), master=True)
    with pytest.raises(ValueError, match=message):
        mixed_adamw_(**tensors | NUMBERS | change)  # type: ignore[arg-type]


def test_random_rounding_is_of_bf16() -> None:
    tensors = make((4,), torch.float16, torch.device("cpu"), master=False)
    with pytest.raises(ValueError, match="without a master copy parameter must be bf16"):
        mixed_adamw_(**tensors, **NUMBERS)  # type: ignore[arg-type]


def test_random_rounding_needs_a_seed() -> None:
    tensors = make((4,), torch.bfloat16, torch.device("cpu"), master=False) | {"seed": None}
    with pytest.raises(ValueError, match="without a master copy, rounding takes a seed"):
        mixed_adamw_(**tensors, **NUMBERS)  # type: ignore[arg-type]


@pytest.mark.parametrize("master", [True, False])
def test_operator_contract(master: bool) -> None:
    tensors = make((6, 5), torch.bfloat16, torch.device("cpu"), master)
    arguments = (*tensors.values(), *NUMBERS.values())
    torch.library.opcheck(torch.ops.tli_engine.mixed_adamw_.default, arguments)


def test_nan_stays_nan(device: torch.device) -> None:
    """Whichever bits a GPU gives it."""
    exact = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1], dtype=torch.int32).view(torch.float32)
    target = torch.empty(3, dtype=torch.bfloat16)
    round_at_random_(target, exact, torch.full((3,), 0xFFFF))
    assert target.isnan().all()
    tensors = make((64,), torch.bfloat16, device, master=False)
    tensors["grad"] = torch.full((64,), torch.nan, device=device, dtype=torch.bfloat16)
    triton_step(**tensors, **NUMBERS)  # type: ignore[arg-type]
    for name in ("parameter", "exp_avg", "exp_avg_sq"):
        assert tensors[name].isnan().all()  # type: ignore[union-attr]
