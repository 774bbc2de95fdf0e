"""Checks of gradients that several processes sum together; see ``on_ranks.py``."""

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from subjects import Tuner, config_of, examples
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

from tli_engine.align.losses import alignment_loss
from tli_engine.distributed import gathered_blocks
from tli_engine.distributed.flat_gradients import FlatGradients
from tli_engine.distributed.gathered import gather_rows, share_of
from tli_engine.distributed.gradient_sums import GradientSums
from tli_engine.distributed.world import World
from tli_engine.testing import example_store
from tli_engine.train.sft_step import pack_of


def check_gradients_are_sums(world: World, folder: Path) -> None:
    """Of several buckets, over two passes, where a rank does not reach a tensor last."""
    generator = torch.Generator().manual_seed(world.rank)
    tensors = {f"t{i}": nn.Parameter(torch.ones(3 + i, dtype=torch.float64)) for i in range(4)}
    weights = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in tensors.values()]
    summed = FlatGradients(tensors, world, bucket_bytes=64)
    last = range(4) if world.rank else (0, 1, 3)
    for _ in range(2):
        for t in tensors.values():
            t.grad = None
        for reached, is_last in ((range(4), False), (last, True)):
            if is_last:
                summed.overlap()
            loss = sum((weights[i] * tensors[f"t{i}"]).sum() for i in reached)
            torch.autograd.backward(loss)
        # on its way before the pass has ended, in everyone's order: the last tensor's comes first
        sent = [bucket.work is not None for bucket in summed._buckets]
        assert sent == ([True, True, True] if world.rank else [True, False, False])
        summed.finish()
        for i, t in enumerate(tensors.values()):
            own = weights[i] * (1 + (i in last))
            parts = [torch.empty_like(own) for _ in range(world.size)]
            dist.all_gather(parts, own)
            torch.testing.assert_close(t.grad, torch.stack(parts).sum(0))


def check_gradients_of_shares_are_summed_in_fp32(world: World, folder: Path) -> None:
    """Sent as they are; of 16 bits a sum in their own dtype, or of rounded sums, is another."""
    generator = torch.Generator().manual_seed(world.rank)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        reduce = GradientSums(dtype, ())
        # of the first rank larger: most of what others add is lost in 16 bits
        own = torch.randn(world.size * 33, generator=generator) * (1 if world.rank else 100)
        for _ in range(2):
            sent = reduce.allocate([len(own)], dtype=torch.float32, device=own.device)
            found = reduce.allocate([33], dtype=torch.float32, device=own.device)
            assert (sent.dtype, found.dtype) == (dtype, torch.float32)
            sent.copy_(own)
            with CommDebugMode() as mode:
                reduce(found, sent, None, dist.ReduceOp.SUM)
            assert mode.get_total_counts() == 1
            parts = [torch.empty_like(own) for _ in range(world.size)]
            dist.all_gather(parts, sent.float())
            expected = sum(part.double() for part in parts)[33 * world.rank :][:33]
            torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)
            assert dtype.itemsize == 4 or not torch.equal(found, found.to(dtype).float())
        with pytest.raises(NotImplementedError, match="sums in order alone"):
            reduce(found, sent, None, dist.ReduceOp.AVG)


def check_gradients_that_are_added_to_keep_their_place(world: World, folder: Path) -> None:
    """New sums lie where those before them lay, unless these are gradients still."""
    tensor = nn.Parameter(torch.zeros(4))
    sums, at = GradientSums(torch.float32, [tensor]), torch.device("cpu")

    def place() -> Tensor:
        sums.allocate([8], dtype=torch.float32, device=at)
        return sums.allocate([4], dtype=torch.float32, device=at)

    assert place() is not place()
    assert sums.kept_nbytes == 0
    sums.in_place = True
    first = place()
    assert place() is first
    assert sums.kept_nbytes == 16
    tensor.grad = first
    assert place() is not first
    tensor.grad = None
    assert place() is first
    sums.allocate([6], dtype=torch.float32, device=at)
    with pytest.raises(RuntimeError, match="gradients of 3 weights, where those of 4 were"):
        sums.allocate([3], dtype=torch.float32, device=at)


def check_gradients_of_adapters_are_sent_once(world: World, folder: Path) -> None:
    tensors = {f"t{i}": nn.Parameter(torch.ones(64, 64)) for i in range(30)}
    summed = FlatGradients(tensors, world)
    summed.overlap()
    with CommDebugMode() as mode:
        torch.autograd.backward(sum(t.sum() for t in tensors.values()))
        summed.finish()
    assert mode.get_total_counts() == 1
    assert all(t.grad is not None and bool((t.grad == world.size).all()) for t in tensors.values())


def check_gradients_of_gathered_negatives_are_exact(world: World, folder: Path) -> None:
    """Also where shares differ, and where a rank has none."""
    config = config_of("align").align
    for count in (1, 5, 8):
        generator = torch.Generator().manual_seed(count)
        rows = torch.randn(2, count, 6, generator=generator, dtype=torch.float64)
        weight = torch.randn(6, 6, generator=generator, dtype=torch.float64)

        def loss_of(source: Tensor, target: Tensor, count: int = count) -> Tensor:
            is_negative = ~torch.eye(count, dtype=torch.bool)
            return alignment_loss(source @ target.T, is_negative, config)

        exact = weight.clone().requires_grad_()
        expected = loss_of(*(rows @ exact))
        torch.autograd.backward(expected)
        own = share_of(count, world)
        mine = rows[:, own.start : own.stop] if len(own) else rows[:, :1]
        shared = weight.clone().requires_grad_()
        gathered = [gather_rows(side, count, world) for side in mine @ shared]
        assert torch.equal(gathered[0].detach(), rows[0] @ weight)
        loss = loss_of(*gathered)
        torch.autograd.backward(loss)
        assert shared.grad is not None
        dist.all_reduce(shared.grad)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(shared.grad, exact.grad, rtol=1e-12, atol=1e-12)


class Watched(GradientSums):
    """Takes note of what is sent, and of what comes of it."""

    seen: ClassVar[list[tuple[torch.dtype, torch.dtype]]] = []

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, *args: Any, **options: Any
    ) -> None:
        self.seen.append((input_tensor.dtype, output_tensor.dtype))
        super().__call__(output_tensor, input_tensor, *args, **options)


def check_gradients_of_every_weight_travel_as_they_are(world: World, folder: Path) -> None:
    """In 16 bits, and arrive as sums in fp32; between machines they are sent in fp32."""
    apart = replace(world, one_machine=False)
    wide, narrow = torch.float32, torch.bfloat16
    for dtype, of, sent in (
        ("bfloat16", world, narrow),
        ("float32", world, wide),
        ("bfloat16", apart, wide),
    ):
        config = config_of("sft", method="full", dtype=dtype, train={"engine": "fused"})
        Watched.seen.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gathered_blocks, "GradientSums", Watched)
            tuner = Tuner(folder, config, of)
        torch.autograd.backward(tuner.model.loss(pack_of(example_store(examples()), [[0]])))
        # those of weights in no block are one more
        assert Watched.seen == [(sent, wide)] * 5
