"""AdamW on 16-bit tensors: with fp32 master copies in one pass, or on them alone, rounded at random."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tli_engine.ops.mixed_adamw import adamw_step_, mixed_adamw_, round_at_random_

# elements updated at a time on a CPU: fp32 copies of no more than these are held
CHUNK = 1 << 26
_BETAS, _EPS = (0.9, 0.999), 1e-8


class MasterAdamW(torch.optim.Optimizer):
    """AdamW on fp32 master copies, which reads 16-bit gradients and writes the 16-bit tensors too.

    torch's own takes gradients in fp32, 4 bytes a number more, and two passes more over all.

    Args:
        params: Master copies, in groups.
        trained: The 16-bit tensor of each, whose gradient is used.
    """

    def __init__(self, params: Iterable[dict[str, Any]], trained: Mapping[Tensor, Tensor]) -> None:
        super().__init__(params, {"lr": 0.0, "weight_decay": 0.01})
        self._trained = trained

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every tensor that has a gradient, and its master copy."""
        for group in self.param_groups:
            options = {"rate": group["lr"], "weight_decay": group["weight_decay"]}
            for master in group["params"]:
                tensor = self._trained[master]
                if tensor.grad is None:
                    continue
                state = _state(self, master)
                mixed_adamw_(
                    tensor, tensor.grad, state["exp_avg"], state["exp_avg_sq"],
                    master=master, step=int(state["step"]), **options,
                )  # fmt: skip


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW whose parameters and statistics stay in the parameters' dtype.

    Each is computed in fp32 and, in bf16, rounded up or down with the probability of its distance:
    an update smaller than a rounding step still counts. Random numbers come from torch's generator
    of the device. Parameters are bf16; on a GPU each is updated in one pass.

    Source: Gupta et al. 2015; Zamirai et al. 2020, "Revisiting BFloat16 Training".
    """

    def __init__(self, params: Iterable[dict[str, Any]]) -> None:
        super().__init__(params, {"lr": 0.0, "weight_decay": 0.01})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group["lr"], group["weight_decay"])

    def _update(self, parameter: Tensor, rate: float, decay: float) -> None:
        state = _state(self, parameter)
        assert parameter.grad is not None
        if in_one_pass(parameter):
            seed = torch.empty((), dtype=torch.int64, device=parameter.device).random_()
            mixed_adamw_(
                parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"],
                seed=seed, step=int(state["step"]), rate=rate, weight_decay=decay,
            )  # fmt: skip
            return
        tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        for p, g, m, v in zip(*(torch.split(x.view(-1), CHUNK) for x in tensors), strict=True):
            value, mean, square = (x.to(torch.float32, copy=True) for x in (p, m, v))
            adamw_step_(
                value, g.float(), mean, square, int(state["step"]), rate, *_BETAS, _EPS, decay
            )
            for target, exact in ((p, value), (m, mean), (v, square)):
                bits = torch.randint(0, 1 << 16, exact.shape, dtype=torch.int32, device=p.device)
                round_at_random_(target, exact, bits)


def in_one_pass(tensor: Tensor) -> bool:
    """Whether the op updates a tensor: on a CPU its random numbers take longer than torch's own."""
    return tensor.is_cuda and tensor.dtype in (torch.bfloat16, torch.float16)


def _state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """A parameter's statistics, for the step that is to come."""
    state: dict[str, Tensor] = optimizer.state[parameter]
    if not state:
        # a tensor on the CPU, as torch's own AdamW keeps it
        state["step"] = torch.zeros(())
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    state["step"] += 1
    return state
