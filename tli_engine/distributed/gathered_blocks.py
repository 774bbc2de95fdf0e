"""Every weight of a model spread over ranks, gathered block by block: FSDP2."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from tli_engine.distributed.fully_sharded import is_sharded
from tli_engine.distributed.gradient_sums import GradientSums
from tli_engine.distributed.world import World

_GIB = 2**30
# of a weight, fp32: its gradient, and AdamW's two moments; of an offloaded one on its way, itself and
# its gradient
_STATES, _ON_THEIR_WAY = 12, 8

_Out = tuple[Tensor, Tensor | None]
_Work = Callable[[Tensor, Tensor | None], _Out]


@dataclass(frozen=True)
class Sharding:
    """How a model is spread.

    Attributes:
        device: Where it is computed.
        dtype: What in; shares are fp32.
        offload: Whether the shares lie on the CPU.
        runs_inside: Whether what runs a block is given to :meth:`GatheredBlocks.run`; else the blocks
            themselves are called, which gathers them.
    """

    device: torch.device
    dtype: torch.dtype
    offload: bool
    runs_inside: bool


def shard_fully(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    forward: str,
    options: Sharding,
    world: World,
    prepare: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda line: None,
) -> "GatheredBlocks":
    """Spread a model's weights over the ranks, in fp32; blocks are computed with in another dtype.

    What a rank holds of weights, gradients and optimizer states is a share in fp32: the master copy.
    A block is gathered before it runs, in the dtype that it is computed in, and again for the way back
    unless it stays; the rest of the model for all of the way there and back. Gradients are summed over
    ranks in fp32, not averaged; on one machine they are sent in the dtype that they have.

    Args:
        model: On the CPU; blocks are moved and split one at a time.
        blocks: Modules of it that are gathered one by one.
        forward: Name of its method that runs it.
        options: Where, what in, and how.
        world: The ranks.
        prepare: Called for each block when it is on the device, as it was stored, and whole.
        say: Takes a line on whether blocks stay gathered.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    arguments, sums = _arguments(options, world), []
    # between machines every rank's own share would go to every other, where a ring passes on sums
    sent = options.dtype if world.one_machine else torch.float32
    for module in (*blocks, model):
        # what is fp32 takes a CPU longer, and twice the way
        _set(module, lambda t: t.to(options.device))
        if module is not model:
            prepare()
        _set(module, Tensor.float)
        names = [n for n, p in module.named_parameters() if not is_sharded(p)]
        fully_shard(module, **arguments)
        assert isinstance(module, FSDPModule)
        # each rank's loss is a part of the sum, over the labels of all
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        sums.append(GradientSums(sent, [module.get_parameter(n) for n in names]))
        module.set_custom_reduce_scatter(sums[-1])  # type: ignore[arg-type]
    register_fsdp_forward_method(model, forward)
    if options.runs_inside:
        for block in blocks:
            block.run_inside = _run_inside  # type: ignore[assignment]
            register_fsdp_forward_method(block, "run_inside")
    return GatheredBlocks(model, blocks, options, world, say, sums)


def _arguments(options: Sharding, world: World) -> dict[str, Any]:
    """Of FSDP2's ``fully_shard``."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy

    pinned = CPUOffloadPolicy(pin_memory=options.device.type == "cuda")
    return {
        "mesh": init_device_mesh(options.device.type, (world.size,)),
        "mp_policy": MixedPrecisionPolicy(options.dtype, torch.float32, cast_forward_inputs=False),
        "offload_policy": pinned if options.offload else OffloadPolicy(),
        # whatever is chosen for a pass later
        "reshard_after_forward": True,
    }


class GatheredBlocks:
    """Blocks that ranks hold shares of, and how long they stay whole.

    From the way there to the way back they stay so if memory allows it, which is decided once, the last
    one always; in a pass without a way back nothing does. The next block is gathered while one runs.

    Attributes:
        to_come: Bytes on the device of gradients, of AdamW's statistics, and of blocks on their way.
        stay: Whether blocks stay whole; None until it is decided.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        options: Sharding,
        world: World,
        say: Callable[[str], None],
        sums: Sequence[GradientSums],
    ) -> None:
        """Arguments as of :func:`shard_fully`, which makes it; what sums each module's gradients."""
        self._sums = sums
        self._model: Any = model
        self._blocks: list[Any] = list(blocks)
        self._runs_inside, self._world, self._say = options.runs_inside, world, say
        sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
        rest = sum(p.numel() for p in model.parameters()) - sum(sizes)
        element = options.dtype.itemsize
        self._nbytes = element * sum(sizes)
        self.to_come = bytes_to_come(sizes, rest, element, world.size, offload=options.offload)
        self.stay: bool | None = None
        # the model, its blocks: as they were set
        self._resharded = [True] * (1 + len(blocks))

    def place_gradients(self) -> None:
        """Have gradients of tensors that have none lie where those before them lay, from here on."""
        for sums in self._sums:
            sums.in_place = True

    @property
    def placed(self) -> int | None:
        """Bytes of these places, also while there are no gradients; None where gradients have none."""
        if not any(sums.in_place for sums in self._sums):
            return None
        return sum(sums.kept_nbytes for sums in self._sums)

    @property
    def undecided(self) -> bool:
        """Whether :meth:`decide` is to be called before the first way back."""
        return self.stay is None

    def begin(self) -> None:
        """A pass of the model begins: of one without a way back nothing is to stay whole."""
        back = torch.is_grad_enabled()
        stay = bool(back and self.stay)
        # the way back begins with the rest and the last block
        wanted = [not back, *[not stay] * (len(self._blocks) - 1), not back]
        modules = [self._model, *self._blocks]
        for module, now, before in zip(modules, wanted, self._resharded, strict=True):
            if now != before:
                module.set_reshard_after_forward(now, recurse=False)
        self._resharded = wanted

    def run(self, number: int, work: _Work, x: Tensor, residual: Tensor | None) -> _Out:
        """Do a block's work with its weights gathered."""
        if not self._runs_inside:
            return work(x, residual)
        out: _Out = self._blocks[number].run_inside(work, x, residual)
        return out

    @contextmanager
    def gathered(self, number: int) -> Iterator[None]:
        """A block's weights, gathered for as long as it lasts, whatever runs the block meanwhile."""
        block = self._blocks[number]
        block.set_reshard_after_forward(False, recurse=False)
        block.unshard()
        try:
            yield
        finally:
            block.set_reshard_after_forward(self._resharded[1 + number], recurse=False)
            block.reshard()

    def largest(self, values: Sequence[float]) -> list[float]:
        """Largest of each over the ranks."""
        return self._world.largest(values)

    def decide(self, free: int | None) -> None:
        """Choose whether blocks stay whole.

        Args:
            free: Bytes that are free at a step's fullest moment, the same on all ranks; None: enough.
        """
        self.stay = free is None or self._nbytes <= free
        size = f"{self._nbytes / _GIB:.1f} GiB"
        if self.stay:
            self._say(f"blocks stay gathered until their way back: {size} a GPU")
        else:
            room = f"{max(free or 0, 0) / _GIB:.1f}"
            self._say(f"blocks are gathered again for the way back: {size}, and {room} are free")
        # asked for by the host before the block that runs meanwhile
        for block, following in pairwise([self._model, *self._blocks]):
            block.set_modules_to_forward_prefetch([following])
        self.begin()


def bytes_to_come(
    blocks: Sequence[int], rest: int, element: int, ranks: int, *, offload: bool
) -> int:
    """Bytes on a GPU beside its share of the weights, activations, and blocks that stay whole.

    Gradients and states of the share, or what is on its way of an offloaded one; the gradient of what is
    in no block; a block, and the next one, as gathered or its copy; the gradient of one, as it is sent and
    as it arrives.

    Args:
        blocks: Weights of each block.
        rest: Weights that are in no block.
        element: Bytes of a gathered weight, and of its gradient.
        ranks: Among which weights are shared out.
        offload: Whether the shares lie on the CPU.
    """
    largest = max(blocks)
    if offload:
        share = _ON_THEIR_WAY * -(-(largest + rest) // ranks)
    else:
        share = _STATES * -(-(sum(blocks) + rest) // ranks)
    return share + element * rest + (3 * element + 4) * largest


def _run_inside(work: _Work, x: Tensor, residual: Tensor | None) -> _Out:
    return work(x, residual)


def _set(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Change what of a module is not shared out yet."""
    for parameter in module.parameters():
        if not is_sharded(parameter):
            parameter.data = change(parameter.data)
