"""AdamW whose parameters, gradients and statistics are flat buffers: a step is one launch."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tli_engine.ops.flat_adamw import check_numbers, flat_adamw_

# elements; 256 bytes of fp32, as an allocation of its own is aligned to at least
_ALIGNMENT = 64
_STATISTICS = ("step", "exp_avg", "exp_avg_sq")


class FlatAdamW:
    """``torch.optim.AdamW`` after clipping, for parameters that it lays into one buffer.

    Parameters become views of :attr:`parameters`, and their ``grad`` views of :attr:`grad`, in
    which autograd adds up: call :meth:`zero_grad` (one memset) before each backward, and no
    ``zero_grad(set_to_none=True)`` of a module or of another optimizer. Whoever writes all of
    :attr:`gradients` anew in each step, as a kernel may, needs no zeros.

    Nothing waits for the device and a step reads all that changes from device memory: a CUDA graph
    that holds :meth:`step` replays it, with the next learning rate.

    Attributes:
        parameters: ``[P]``; each tensor starts at a multiple of 64, zeros fill the gaps.
        grad: ``[P]``, gradients in the same places.
        exp_avg: ``[P]``, running means of the gradients.
        exp_avg_sq: ``[P]``, running means of their squares.
        counts: Steps done and steps skipped, ``[2]``, int64, on the parameters' device.
        learning_rates: ``[total_steps]``, fp32, as given.
        shadow: 16-bit copy of ``parameters``, or ``None``.
        gradients: Each parameter's gradient by name, views of ``grad``.
        shadows: Each parameter's 16-bit copy by name, views of ``shadow``; empty without one.
    """

    def __init__(
        self,
        tensors: Mapping[str, nn.Parameter],
        learning_rates: Tensor,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        max_grad_norm: float = math.inf,
        shadow_dtype: torch.dtype | None = None,
    ) -> None:
        """Lay the parameters into one buffer; their values stay, gradients start at zero.

        Args:
            tensors: Parameters by name, all on one device; fp32 or, on a CPU, fp64.
            learning_rates: Learning rate of each step, ``[total_steps]``.
            betas: Decay of the running means.
            eps: As in AdamW, positive.
            weight_decay: As in AdamW, decoupled.
            max_grad_norm: Norm that the gradient is clipped to; infinity for no clipping.
            shadow_dtype: bf16 or fp16 for a copy of the parameters, written in each step.

        Raises:
            ValueError: No parameters, one twice, unlike dtypes or devices, or a wrong number.
        """
        check_numbers(*betas, eps, weight_decay, max_grad_norm)
        self._numbers = {
            "beta1": betas[0],
            "beta2": betas[1],
            "eps": eps,
            "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm,
        }
        first = _first_of(tensors)
        self._tensors = dict(tensors)
        self._places, size = _places(tensors)
        self._gaps = size != sum(tensor.numel() for tensor in tensors.values())
        self.parameters, self.grad, self.exp_avg, self.exp_avg_sq = (
            torch.zeros(size, dtype=first.dtype, device=first.device) for _ in range(4)
        )
        self.counts = torch.zeros(2, dtype=torch.int64, device=first.device)
        self.learning_rates = learning_rates.to(first.device, torch.float32).contiguous()
        self.shadow = None if shadow_dtype is None else self.parameters.to(shadow_dtype)
        self.gradients = self._views(self.grad)
        self.shadows = {} if self.shadow is None else self._views(self.shadow)
        for name, view in self._views(self.parameters).items():
            parameter = self._tensors[name]
            view.copy_(parameter.detach())
            parameter.data, parameter.grad = view, self.gradients[name]
        self.refresh_shadow()

    def zero_grad(self) -> None:
        """Set all gradients to zero, in place."""
        self.grad.zero_()

    def write_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Take one gradient for each parameter, in their order, in place of what was there."""
        if self._gaps:
            for view, gradient in zip(self.gradients.values(), gradients, strict=True):
                view.copy_(gradient)
            return
        # one launch, where copies of tensors of unlike sizes take three times as long (H100)
        torch.cat([gradient.reshape(-1) for gradient in gradients], out=self.grad)

    def step(self) -> Tensor:
        """Clip, and take a step with the gradients as they are.

        Returns:
            Gradient norm before clipping, learning rate, and 1 if the norm was not finite and the
            step therefore skipped, else 0; ``[3]``, on the parameters' device.

        Raises:
            RuntimeError: A parameter's gradient is no longer a view of :attr:`grad`.
        """
        for name, parameter in self._tensors.items():
            if parameter.grad is not self.gradients[name]:
                raise RuntimeError(
                    f"the gradient of {name} was replaced; zero it by FlatAdamW.zero_grad()"
                )
        return flat_adamw_(
            self.parameters,
            self.grad,
            self.exp_avg,
            self.exp_avg_sq,
            self.counts,
            self.learning_rates,
            **self._numbers,
            shadow=self.shadow,
        )

    def refresh_shadow(self) -> None:
        """Copy the parameters to their shadow, after they were set from outside."""
        if self.shadow is not None:
            self.shadow.copy_(self.parameters)

    def state(self) -> dict[str, Tensor]:
        """Statistics as ``<tensor>/step``, ``/exp_avg`` and ``/exp_avg_sq``, on the CPU.

        They are those of ``torch.optim.AdamW``, copied; none before the first step. The count of
        skipped steps is not among them.
        """
        steps = int(self.counts[0])
        if steps == 0:
            return {}
        step = torch.tensor(float(steps), dtype=torch.float32)
        means = self._views(self.exp_avg), self._views(self.exp_avg_sq)
        return {
            f"{name}/{key}": value.to("cpu", copy=True)
            for name in self._tensors
            for key, value in zip(
                _STATISTICS, (step, *(mean[name] for mean in means)), strict=True
            )
        }  # fmt: skip

    @torch.no_grad()
    def load(self, statistics: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state`, or ``torch.optim.AdamW``, gave; nothing is a fresh start.

        Gradients and the count of skipped steps become zero; the shadow follows the parameters.

        Raises:
            KeyError: The statistics are of other tensors.
            RuntimeError: They are of another shape, or not all of the same step.
        """
        expected = [f"{name}/{key}" for name in self._tensors for key in _STATISTICS]
        if statistics and (wrong := set(expected) ^ statistics.keys()):
            raise KeyError(min(wrong))
        steps = {int(statistics[f"{name}/step"]) for name in self._tensors if statistics}
        if len(steps) > 1:
            raise RuntimeError(f"tensors of different steps: {', '.join(map(str, sorted(steps)))}")
        for key in _STATISTICS[1:] if statistics else ():
            for name, tensor in self._tensors.items():
                if (shape := statistics[f"{name}/{key}"].shape) != tensor.shape:
                    raise RuntimeError(
                        f"{name}/{key} must be {list(tensor.shape)}, got {list(shape)}"
                    )
        for key, mean in zip(_STATISTICS[1:], (self.exp_avg, self.exp_avg_sq), strict=True):
            mean.zero_()
            for name, view in self._views(mean).items() if statistics else ():
                view.copy_(statistics[f"{name}/{key}"])
        self.counts.zero_()
        self.counts[0] = max(steps, default=0)
        self.zero_grad()
        self.refresh_shadow()

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        return {
            name: flat[place].view(self._tensors[name].shape)
            for name, place in self._places.items()
        }


def _places(tensors: Mapping[str, nn.Parameter]) -> tuple[dict[str, slice], int]:
    """Where each tensor lies in the buffers, and their size."""
    places, size = {}, 0
    for name, tensor in tensors.items():
        places[name] = slice(size, size + tensor.numel())
        size += -(-tensor.numel() // _ALIGNMENT) * _ALIGNMENT
    return places, size


def _first_of(tensors: Mapping[str, nn.Parameter]) -> nn.Parameter:
    """Raise ``ValueError`` unless all can lie in one buffer; return the first."""
    first = next(iter(tensors.values()), None)
    if first is None:
        raise ValueError("tensors must not be empty")
    names: dict[int, str] = {}
    for name, tensor in tensors.items():
        if (tensor.dtype, tensor.device) != (first.dtype, first.device):
            raise ValueError(
                f"{name} must be {first.dtype} on {first.device} as the first tensor, got "
                f"{tensor.dtype} on {tensor.device}"
            )
        if (other := names.setdefault(id(tensor), name)) != name:
            raise ValueError(f"{name} is the parameter {other}")
    return first
