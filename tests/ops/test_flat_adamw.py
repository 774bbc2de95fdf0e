import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tli_engine.ops.flat_adamw import flat_adamw_
from tli_engine.reference.flat_adamw import flat_adamw as reference
from tli_engine.testing import assert_within_error_budget

pytest.importorskip("triton")
from tli_engine.kernels import flat_adamw as module
from tli_engine.kernels.flat_adamw import flat_adamw as triton_step

NUMBERS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "max_grad_norm": 1.0}
CLIPPING = [pytest.param(0.5, id="clipped"), pytest.param(1e4, id="not-clipped"), math.inf]
SIZES = [
    pytest.param(0, id="empty"),
    pytest.param(1, id="one"),
    pytest.param(64, id="one-tensor"),
    pytest.param(module.BLOCK, id="one-tile"),
    pytest.param(module.BLOCK + 1, id="one-past-a-tile"),
    pytest.param(5 * module.BLOCK, id="a-tile-a-program"),
    pytest.param(33 * module.BLOCK - 7, id="uneven-shares"),
]
Buffers = dict[str, Tensor]


def make_buffers(
    P: int, device: torch.device, dtype: torch.dtype = torch.float32, done: int = 3
) -> Buffers:
    """Buffers as after some steps."""
    return {
        "parameters": torch.randn(P, device=device, dtype=dtype),
        "grad": torch.randn(P, device=device, dtype=dtype),
        "exp_avg": 0.1 * torch.randn(P, device=device, dtype=dtype),
        "exp_avg_sq": 0.1 * torch.rand(P, device=device, dtype=dtype),
        "state": torch.tensor([done, 2], device=device),
        "schedule": torch.linspace(0, 0.01, 6, device=device),
    }


def copies(buffers: Buffers, dtype: torch.dtype | None = None) -> Buffers:
    return {
        name: t.to(dtype, copy=True) if dtype and name not in ("state", "schedule") else t.clone()
        for name, t in buffers.items()
    }


def torch_steps(
    parameters: Tensor, grads: list[Tensor], rates: Tensor, max_grad_norm: float
) -> tuple[nn.Parameter, dict[str, Tensor], list[Tensor]]:
    """torch's own clipping and AdamW, on a CPU."""
    parameter = nn.Parameter(parameters.cpu().clone())
    optimizer = torch.optim.AdamW([parameter], weight_decay=NUMBERS["weight_decay"])
    norms = []
    for grad, rate in zip(grads, rates.tolist(), strict=True):
        parameter.grad = grad.cpu().clone()
        norms.append(nn.utils.clip_grad_norm_(parameter, max_grad_norm))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return parameter, optimizer.state[parameter], norms


@pytest.mark.parametrize("max_grad_norm", CLIPPING)
@pytest.mark.parametrize("step", [flat_adamw_, triton_step], ids=["op", "triton"])
def test_equals_torch(step: Any, max_grad_norm: float, device: torch.device) -> None:
    P, numbers = 3000, NUMBERS | {"max_grad_norm": max_grad_norm}
    buffers = make_buffers(P, device) | {
        "exp_avg": torch.zeros(P, device=device),
        "exp_avg_sq": torch.zeros(P, device=device),
        "state": torch.zeros(2, dtype=torch.int64, device=device),
    }
    grads = [torch.randn(P, device=device) * scale for scale in (1, 1e-4, 0, 30, 2, 1e-9)]
    expected, statistics, norms = torch_steps(
        buffers["parameters"], grads, buffers["schedule"], max_grad_norm
    )
    for i, grad in enumerate(grads):
        metrics = step(**buffers | {"grad": grad}, **numbers)
        torch.testing.assert_close(metrics[0].cpu(), norms[i])
        assert metrics[1:].tolist() == [buffers["schedule"][i].item(), 0]
    assert buffers["state"].tolist() == [len(grads), 0]
    close = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(buffers["parameters"].cpu(), expected.detach(), **close)
    for name in ("exp_avg", "exp_avg_sq"):
        # its terms, of any sign, were as large as its largest numbers
        # and both norms, each within 1e-7, scale them
        atol = 1e-6 * statistics[name].max().item()
        torch.testing.assert_close(buffers[name].cpu(), statistics[name], rtol=2e-6, atol=atol)


@pytest.mark.parametrize("shadow", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("P", SIZES)
def test_kernel_errs_no_more_than_plain_torch(
    P: int, shadow: torch.dtype | None, device: torch.device
) -> None:
    buffers = make_buffers(P, device)
    copy = {} if shadow is None else {"shadow": torch.empty(P, dtype=shadow, device=device)}
    plain, exact = copies(buffers), copies(buffers, torch.float64)
    actual = triton_step(**buffers, **NUMBERS, **copy)
    metrics = [reference(**b, **NUMBERS) for b in (plain, exact)]
    assert_within_error_budget(actual, *metrics)
    assert buffers["state"].tolist() == [4, 2]
    if P:
        for name in ("parameters", "exp_avg", "exp_avg_sq"):
            assert_within_error_budget(buffers[name], plain[name], exact[name])
    for tensor in copy.values():
        # the interpreter's rounding to bf16 included
        assert torch.equal(tensor, buffers["parameters"].to(shadow))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2e19])
@pytest.mark.parametrize("step", [flat_adamw_, triton_step], ids=["op", "triton"])
def test_a_norm_that_is_not_finite_skips_the_step(
    step: Any, value: float, device: torch.device
) -> None:
    P = 3 * module.BLOCK
    buffers = make_buffers(P, device)
    shadow = buffers["parameters"].half()
    buffers["grad"][P - 5] = value
    before, shadow_before = copies(buffers), shadow.clone()
    metrics = step(**buffers, **NUMBERS, shadow=shadow)
    assert not math.isfinite(metrics[0])
    assert metrics[1:].tolist() == [before["schedule"][3].item(), 1]
    assert buffers.pop("state").tolist() == [3, 3]
    for name, tensor in buffers.items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), name
    assert torch.equal(shadow, shadow_before)
    # and the next one counts as if there had been none
    buffers["grad"][P - 5] = before["grad"][P - 5] = 1
    state = before.pop("state")
    step(**buffers, state=state, **NUMBERS)
    untouched = before | {"state": torch.tensor([3, 2], device=device)}
    step(**untouched, **NUMBERS)
    assert state.tolist() == [4, 2]
    assert torch.equal(buffers["parameters"], untouched["parameters"])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("step", [flat_adamw_, triton_step], ids=["op", "triton"])
def test_steps_beyond_the_schedule_take_its_last_rate(
    step: Any, dtype: torch.dtype, device: torch.device
) -> None:
    buffers = make_buffers(70, device, done=100)
    buffers["state"] = buffers["state"].to(dtype)
    assert step(**buffers, **NUMBERS)[1] == buffers["schedule"][-1]
    assert buffers["state"].tolist() == [101, 2]
    assert buffers["state"].dtype == dtype


@pytest.mark.parametrize("step", [flat_adamw_, triton_step], ids=["op", "triton"])
def test_many_steps_are_corrected_as_in_fp64(step: Any, device: torch.device) -> None:
    """The corrections of the first step, and of one after which they are nothing."""
    for done in (0, 1, 10**6):
        buffers = make_buffers(64, device, done=done)
        before = copies(buffers, torch.float64)
        step(**buffers, **NUMBERS)
        reference(**before, **NUMBERS)
        torch.testing.assert_close(
            buffers["parameters"].double(), before["parameters"], rtol=2e-7, atol=1e-8
        )


@pytest.mark.parametrize("step", [flat_adamw_, triton_step], ids=["op", "triton"])
@pytest.mark.parametrize("change", [{"beta1": 0.0}, {"beta2": 0.0}, {"weight_decay": 0.0}], ids=str)
def test_numbers_may_be_zero(step: Any, change: dict[str, float], device: torch.device) -> None:
    buffers = make_buffers(100, device)
    exact = copies(buffers, torch.float64)
    numbers = NUMBERS | change
    step(**buffers, **numbers)
    reference(**exact, **numbers)
    torch.testing.assert_close(
        buffers["parameters"].double(), exact["parameters"], rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("step", [flat_adamw_, triton_step], ids=["op", "triton"])
def test_padding_stays_zero(step: Any, device: torch.device) -> None:
    buffers = make_buffers(3 * 64, device)
    for name in ("parameters", "grad", "exp_avg", "exp_avg_sq"):
        buffers[name][70:128] = 0
    for _ in range(3):
        step(**buffers, **NUMBERS)
    for name in ("parameters", "exp_avg", "exp_avg_sq"):
        assert (buffers[name][70:128] == 0).all()
        assert (buffers[name][:70] != 0).all()


def test_same_bits_again(device: torch.device) -> None:
    buffers = make_buffers(20 * module.BLOCK + 64, device)
    results = []
    for _ in range(2):
        again = copies(buffers)
        metrics = triton_step(**again, **NUMBERS)
        results.append([metrics, *again.values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("with_shadow", [False, True])
def test_operator_contract(with_shadow: bool, device: torch.device) -> None:
    buffers = make_buffers(130, device)
    shadow = torch.zeros(130, dtype=torch.float16, device=device) if with_shadow else None
    arguments = (*buffers.values(), *NUMBERS.values(), shadow)
    torch.library.opcheck(torch.ops.tli_engine.flat_adamw_.default, arguments)


def test_compiles_without_graph_breaks(device: torch.device) -> None:
    torch.compiler.reset()
    compiled = torch.compile(flat_adamw_, fullgraph=True, backend="aot_eager")
    buffers = make_buffers(130, device)
    expected = copies(buffers)
    metrics = [step(**b, **NUMBERS) for step, b in ((compiled, buffers), (flat_adamw_, expected))]
    torch.testing.assert_close(*metrics, rtol=0, atol=0)
    for name, tensor in buffers.items():
        assert torch.equal(tensor, expected[name]), name


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On ``device`` with its strides, which ``Tensor.to`` does not keep."""
    strides = tensor.shape, tensor.stride()
    return torch.empty_strided(*strides, dtype=tensor.dtype, device=device).copy_(tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"parameters": torch.zeros(2, 3)},
            r"parameters must be fp32 \[P\], .*\[2, 3\]",
            id="matrix",
        ),
        pytest.param(
            {"parameters": torch.zeros(6).half()}, "parameters must be fp32 .*float16", id="half"
        ),
        pytest.param({"grad": torch.zeros(5)}, r"grad must be .*\[6\] .*got .*\[5\]", id="short"),
        pytest.param(
            {"exp_avg": torch.zeros(6).double()}, "exp_avg must be .* got torch.float64", id="fp64"
        ),
        pytest.param(
            {"exp_avg_sq": torch.zeros(12)[::2]},
            r"exp_avg_sq must be contiguous .* strides \[2\]",
            id="strided",
        ),
        pytest.param(
            {"state": torch.zeros(2)}, r"state must be int32 or int64 \[2\], got torch.float32",
            id="float-state",
        ),
        pytest.param(
            {"schedule": torch.zeros(0)}, r"schedule must be fp32 .*\[0\]", id="no-schedule"
        ),
        pytest.param(
            {"shadow": torch.zeros(6)}, "shadow must be bf16 or fp16 .*float32", id="fp32-shadow"
        ),
        pytest.param({"beta1": 1.0}, r"beta1 must be in \[0, 1\), got 1.0", id="beta1"),
        pytest.param({"beta2": -0.1}, r"beta2 must be in \[0, 1\), got -0.1", id="beta2"),
        pytest.param({"eps": 0.0}, "eps must be positive, got 0.0", id="eps"),
        pytest.param({"max_grad_norm": 0.0}, "max_grad_norm must be positive", id="no-norm"),
        pytest.param({"weight_decay": -1.0}, "weight_decay must not be negative", id="decay"),
    ],
)  # fmt: skip
def test_wrong_argument_is_named_in_the_error(
    change: dict[str, Any], message: str, device: torch.device
) -> None:
    wrong = {n: moved(v, device) if isinstance(v, Tensor) else v for n, v in change.items()}
    with pytest.raises(ValueError, match=message):
        flat_adamw_(**make_buffers(6, device) | NUMBERS | wrong)
