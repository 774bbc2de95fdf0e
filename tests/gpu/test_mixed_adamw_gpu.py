"""AdamW of 16-bit tensors on a GPU: values, random numbers, launches, and training by it."""

import pytest
import torch
from torch import nn

from tests.ops.test_mixed_adamw import NUMBERS, copies, make
from tli_engine import backends
from tli_engine.config import TrainConfig
from tli_engine.ops.mixed_adamw import mixed_adamw_
from tli_engine.reference.mixed_adamw import mixed_adamw as reference
from tli_engine.testing import assert_within_error_budget
from tli_engine.train.updates import Updates

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
GPU = torch.device("cuda")
SIZES = [1, 63, 1024, 1025, 20_000_001]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("P", SIZES)
def test_a_master_copy(P: int, dtype: torch.dtype) -> None:
    assert backends.explain("mixed_adamw") == ("triton", ())
    actual = make((P,), dtype, GPU, master=True)
    plain, exact = copies(actual), copies(actual, torch.float64)
    mixed_adamw_(**actual, **NUMBERS)  # type: ignore[arg-type]
    for tensors in (plain, exact):
        reference(**tensors, **NUMBERS)  # type: ignore[arg-type]
    for name in ("master", "exp_avg", "exp_avg_sq"):
        assert_within_error_budget(actual[name], plain[name], exact[name])  # type: ignore[arg-type]
    assert torch.equal(actual["parameter"], actual["master"].to(dtype))  # type: ignore[arg-type,union-attr]


@pytest.mark.parametrize("P", SIZES)
def test_random_rounding(P: int) -> None:
    torch.manual_seed(P)
    actual = make((P,), torch.bfloat16, GPU, master=False)
    plain, again = copies(actual), copies(actual)
    mixed_adamw_(**actual, **NUMBERS)  # type: ignore[arg-type]
    mixed_adamw_(**again, **NUMBERS)  # type: ignore[arg-type]
    reference(**plain, **NUMBERS)  # type: ignore[arg-type]
    for name in ("parameter", "exp_avg", "exp_avg_sq"):
        ours, theirs, same = actual[name], plain[name], again[name]
        assert ours is not None
        assert theirs is not None
        assert same is not None
        assert torch.equal(ours, same)
        # fp32 sums that differ in their last bit may fall to the other side
        assert (ours != theirs).sum() <= 0.01 * P


@pytest.mark.parametrize("rounding", ["master", "stochastic"])
@pytest.mark.parametrize("in_backward", [False, True])
def test_updates_are_those_of_a_cpu(rounding: str, in_backward: bool) -> None:
    config = TrainConfig(rounding=rounding, in_backward=in_backward)
    ends = []
    for device in ("cuda", "cpu"):
        torch.manual_seed(0)
        weight = torch.randn(300, 200).to(device, torch.bfloat16)
        named = {"w": nn.Parameter(weight), "norm": nn.Parameter(weight[0].clone())}
        updates = Updates(named, config)
        for step in range(5):
            updates.set_rate(1e-2)
            generator = torch.Generator().manual_seed(step)
            loss = torch.zeros((), device=device)
            for tensor in named.values():
                target = torch.randn(tensor.shape, generator=generator).to(device)
                loss = loss + ((tensor.float() - target) ** 2).sum()
            torch.autograd.backward(loss)
            updates.clip()
            updates.step()
            assert all(tensor.grad is None for tensor in named.values())
        ends.append({name: tensor.detach().cpu().float() for name, tensor in named.items()})
    for name, tensor in ends[0].items():
        # a last bit of bf16; where it is drawn, the sum of five draws
        off = (tensor - ends[1][name]).abs()
        assert (off <= 2**-6 * ends[1][name].abs() + 2e-2).float().mean() >= 0.99
        assert off.max() <= 0.2


def test_an_update_takes_no_memory() -> None:
    named = {str(i): nn.Parameter(torch.zeros(1 << 22, device="cuda").bfloat16()) for i in range(8)}
    updates = Updates(named, TrainConfig())
    for number in range(2):
        for tensor in named.values():
            tensor.grad = torch.ones_like(tensor)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        updates.step()
        # the statistics come with the first step
        if number:
            assert torch.cuda.max_memory_allocated() == before


@pytest.mark.parametrize("master", [True, False])
def test_operator_contract(master: bool) -> None:
    tensors = make((130,), torch.bfloat16, GPU, master)
    arguments = (*tensors.values(), *NUMBERS.values())
    torch.library.opcheck(torch.ops.tli_engine.mixed_adamw_.default, arguments)
