"""Optimizers of fine-tuning: AdamW of many kinds over named tensors, one contract for all."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tli_engine.config import TrainConfig
from tli_engine.distributed.fully_sharded import clip, own_part
from tli_engine.distributed.gradient_hooks import on_gradient
from tli_engine.errors import UserError
from tli_engine.train.mixed_adamw import MasterAdamW, StochasticAdamW, in_one_pass

_BITSANDBYTES = {
    "adamw-8bit": "AdamW8bit",
    "adamw-paged": "PagedAdamW",
    "adamw-paged-8bit": "PagedAdamW8bit",
}
# of fp32 copies of gradients at a time; of one tensor if that takes more
_WIDE_BYTES = 1 << 30


class Updates:
    """Clips gradients and updates tensors, in one go or each as soon as its gradient is there.

    Tensors of 16 bits have an fp32 master copy, which is updated in their place, unless
    ``train.rounding`` is ``stochastic``: they are then updated alone, rounded at random, with
    statistics of their own dtype.

    Attributes:
        settings: Optimizer and its numbers.
        keeps_gradients: Whether gradients are set to zero after an update, where they are, or given up.
    """

    def __init__(self, tensors: Mapping[str, nn.Parameter], train: TrainConfig) -> None:
        """Set up the statistics.

        Args:
            tensors: What to update, by name.
            train: Optimizer and its numbers.

        Raises:
            UserError: An optimizer of bitsandbytes, which is not installed or needs a GPU; tensors that
                are not rounded at random.
        """
        _check_rounding(tensors, train)
        self._tensors, self.settings = dict(tensors), train
        self.keeps_gradients = False
        self._held = {name: self._master(tensor) for name, tensor in tensors.items()}
        make = optimizer_of(train, next(iter(tensors.values())).device)
        self._in_one_pass = reads_gradients_as_they_are(tensors, train)
        if self._in_one_pass:
            make = partial(
                MasterAdamW, trained={self._held[name]: t for name, t in tensors.items()}
            )
        parts = [[name] for name in tensors] if train.in_backward else update_parts(tensors, train)
        self._optimizers = [(part, make(self._groups(part))) for part in parts]
        self._norms: list[Tensor] = []
        if train.in_backward:
            for number, (part, _) in enumerate(self._optimizers):
                on_gradient(tensors[part[0]], self._at_once, number)

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of the next step, before its backward pass."""
        for _, optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["factor"]

    def clip(self) -> Tensor:
        """Clip the gradients' norm; return what it was.

        Where tensors are updated in the backward pass, that has happened; the norm is of what was.
        """
        if self.settings.in_backward:
            norms, self._norms = self._norms, []
            total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
            return total
        held = [t.grad for t in self._tensors.values() if t.grad is not None]
        return clip(held, self.settings.max_grad_norm)

    def step(self) -> None:
        """Update all tensors, and free their gradients, or set them to zero."""
        if not self.settings.in_backward:
            for part, optimizer in self._optimizers:
                self._update(part, optimizer)

    def clear_gradients(self) -> None:
        """Give up all gradients, or set them to zero."""
        self._give_up([*self._tensors.values()])

    def _give_up(self, tensors: list[nn.Parameter]) -> None:
        found = [own_part(t.grad) for t in tensors if t.grad is not None]
        if self.keeps_gradients and found:
            torch._foreach_zero_(found)
            return
        for tensor in tensors:
            tensor.grad = None

    def state(self) -> dict[str, Tensor]:
        """Statistics as ``<tensor>/<statistic>``, and master copies, on the CPU."""
        found: dict[str, Tensor] = {}
        for name, statistics in self._statistics():
            for key, value in statistics.items():
                value = value if isinstance(value, Tensor) else torch.tensor(value)
                found[f"{name}/{key}"] = value.detach().to("cpu", copy=True)
        for name, held in self._held.items():
            if held is not self._tensors[name]:
                found[f"{name}/master"] = held.detach().to("cpu", copy=True)
        return found

    def live(self) -> dict[str, Tensor]:
        """The statistics themselves, by :meth:`state`'s names, of tensors without master copies."""
        return {f"{n}/{key}": v for n, s in self._statistics() for key, v in s.items()}

    def blank(self) -> dict[str, Tensor]:
        """AdamW's statistics before the first step, to be filled: as :meth:`live` gives them later."""
        found: dict[str, Tensor] = {}
        for name, tensor in self._tensors.items():
            found[f"{name}/step"] = torch.zeros(())
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{name}/{key}"] = torch.zeros_like(tensor.detach())
        return found

    @property
    def with_master(self) -> list[str]:
        """Names of the tensors that have a master copy."""
        return [name for name, held in self._held.items() if held is not self._tensors[name]]

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go back to what :meth:`state` gave; the tensors themselves are set already.

        Raises:
            KeyError: It is of other tensors.
            RuntimeError: It is of another shape.
        """
        by_name: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, _, statistic = key.rpartition("/")
            by_name.setdefault(name, {})[statistic] = value
        if unknown := by_name.keys() - self._tensors.keys():
            raise KeyError(min(unknown))
        for name, held in self._held.items():
            if held is not self._tensors[name]:
                # a copy that a state lacks is of a tensor that was never updated
                held.copy_(by_name.get(name, {}).pop("master", self._tensors[name]))
        for _, optimizer in self._optimizers:
            groups = optimizer.state_dict()["param_groups"]
            order = [name for group in optimizer.param_groups for name in group["names"]]
            numbered = {i: _plain(by_name[n]) for i, n in enumerate(order) if by_name.get(n)}
            optimizer.load_state_dict({"state": numbered, "param_groups": groups})

    def nbytes(self) -> tuple[int, int]:
        """Bytes of the gradients that are held, and of statistics and master copies."""
        grads = [t.grad for t in self._tensors.values() if t.grad is not None]
        held: list[Tensor] = [h for n, h in self._held.items() if h is not self._tensors[n]]
        held += [v for _, s in self._statistics() for v in s.values() if isinstance(v, Tensor)]
        return sum(own_part(g).nbytes for g in grads), sum(own_part(h).nbytes for h in held)

    def _statistics(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for part, optimizer in self._optimizers:
            for name in part:
                yield name, optimizer.state.get(self._held[name], {})

    def _master(self, tensor: nn.Parameter) -> nn.Parameter:
        return (
            nn.Parameter(tensor.detach().float()) if has_master(tensor, self.settings) else tensor
        )

    def _groups(self, names: list[str]) -> list[dict[str, Any]]:
        """Parameter groups: B matrices have LoRA+'s rate, norms and biases no decay."""
        by_kind: dict[tuple[float, float], list[str]] = {}
        for name in names:
            factor = self.settings.lora_plus if "lora_B" in name else 1.0
            decay = self.settings.weight_decay if self._tensors[name].ndim > 1 else 0.0
            by_kind.setdefault((factor, decay), []).append(name)
        return [
            {"params": [self._held[n] for n in group], "names": group, "factor": factor, "weight_decay": decay}
            for (factor, decay), group in by_kind.items()
        ]  # fmt: skip

    def _at_once(self, number: int, tensor: Tensor) -> None:
        assert tensor.grad is not None
        self._norms.append(tensor.grad.float().norm())
        self._update(*self._optimizers[number])

    @torch.no_grad()
    def _update(self, part: list[str], optimizer: torch.optim.Optimizer) -> None:
        if self._in_one_pass:
            optimizer.step()
            self._give_up([self._tensors[n] for n in part])
            return
        copies = [(self._tensors[n], self._held[n]) for n in part]
        copies = [(tensor, held) for tensor, held in copies if held is not tensor]
        kept = [self._tensors[n].grad for n in part] if self.keeps_gradients else []
        for tensor, held in copies:
            held.grad = None if tensor.grad is None else tensor.grad.float()
            if not self.keeps_gradients:
                tensor.grad = None
        optimizer.step()
        for _, held in copies:
            held.grad = None
        if kept := [own_part(grad) for grad in kept if grad is not None]:
            torch._foreach_zero_(kept)
        else:
            optimizer.zero_grad(set_to_none=True)
        if copies:
            torch._foreach_copy_([t for t, _ in copies], [held for _, held in copies])


def update_parts(tensors: Mapping[str, Tensor], train: TrainConfig) -> list[list[str]]:
    """Names of the tensors that are updated at a time.

    Those with an fp32 master copy have an fp32 copy of the gradient meanwhile, too: of all at once these
    would take as much as the master copies.
    """
    parts: list[list[str]] = [[]]
    wide = 0
    for name, tensor in tensors.items():
        size = 4 * tensor.numel() * has_master(tensor, train)
        if wide + size > _WIDE_BYTES and parts[-1]:
            parts.append([])
            wide = 0
        parts[-1].append(name)
        wide += size
    return parts


def reads_gradients_as_they_are(
    tensors: Mapping[str, Tensor], train: TrainConfig, on_gpu: bool | None = None
) -> bool:
    """Whether master copies are updated from 16-bit gradients: by AdamW on a GPU, if all have one.

    ``on_gpu``: where they will be; by default where they are.
    """
    if train.optimizer != "adamw":
        return False
    there = (in_one_pass(t) if on_gpu is None else on_gpu for t in tensors.values())
    return all(there) and all(has_master(t, train) for t in tensors.values())


def has_master(tensor: Tensor, train: TrainConfig) -> bool:
    """Whether a copy in fp32 is updated in a tensor's place."""
    return tensor.dtype not in (torch.float32, torch.float64) and train.rounding != "stochastic"


def _plain(statistics: dict[str, Tensor]) -> dict[str, Any]:
    """Statistics as their optimizer has them: bitsandbytes counts steps in a plain number."""
    step = statistics["step"]
    return statistics | ({} if step.is_floating_point() else {"step": int(step)})


def _check_rounding(tensors: Mapping[str, Tensor], train: TrainConfig) -> None:
    if train.rounding == "stochastic" and any(t.dtype == torch.float16 for t in tensors.values()):
        raise UserError(
            "train.rounding: stochastic takes bfloat16, the weights are float16, in which the mean of "
            "the squared gradients is lost; set dtype: bfloat16, or rounding: master"
        )


def check_optimizer(train: TrainConfig, device: torch.device) -> None:
    """Raise ``UserError`` if the optimizer does not run on that kind of device, or not with the rest."""
    if train.optimizer != "adamw" and train.rounding == "stochastic":
        raise UserError(
            f"train.rounding: stochastic goes with optimizer adamw, not {train.optimizer}"
        )
    if device.type != "cuda" and "paged" in train.optimizer:
        raise UserError(f"train.optimizer: {train.optimizer} needs a GPU; use adamw or adamw-8bit")


def optimizer_of(train: TrainConfig, device: torch.device) -> Any:
    """What makes the optimizer of a run from parameter groups.

    Raises:
        UserError: It cannot run there, or is not installed.
    """
    check_optimizer(train, device)
    if train.rounding == "stochastic" and train.optimizer == "adamw":
        return StochasticAdamW
    if train.optimizer == "adamw":
        return partial(torch.optim.AdamW, lr=0.0, fused=device.type == "cuda")
    return partial(bitsandbytes_optimizer(train.optimizer), lr=0.0)


def bitsandbytes_optimizer(name: str) -> Any:
    """The class of bitsandbytes behind ``train.optimizer``.

    Raises:
        UserError: It is not installed.
    """
    try:
        from bitsandbytes import optim
    except ImportError:
        raise UserError(
            f"train.optimizer: {name} is bitsandbytes', which is not installed; pip install "
            f"'tli-engine[bitsandbytes]'"
        ) from None
    return getattr(optim, _BITSANDBYTES[name])
