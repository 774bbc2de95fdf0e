"""The buffer of gradients goes with what it was made for."""

import gc
import weakref

import torch
from torch import nn

from tli_engine.distributed.flat_gradients import FlatGradients
from tli_engine.distributed.world import World


def test_gradients_stay_once_all_of_them_lie_in_the_buffer() -> None:
    tensors = {f"{i}": nn.Parameter(torch.randn(3)) for i in range(4)}
    summed = FlatGradients(tensors, World(0, 2), bucket_bytes=24)
    assert not summed.stay
    views = [view for bucket in summed._buckets for view in bucket.views]
    for tensor, view in zip(reversed(tensors.values()), views, strict=True):
        assert not summed.stay
        tensor.grad = view
    assert summed.stay
    torch.autograd.backward(sum(t.sum() for t in tensors.values()))
    # added to where they are
    assert summed.stay
    tensors["2"].grad = torch.zeros(3)
    assert not summed.stay
    assert FlatGradients(tensors, World(0, 1)).stay


def test_nothing_is_kept_alive() -> None:
    tensors = {f"{i}": nn.Parameter(torch.randn(3)) for i in range(4)}
    summed = FlatGradients(tensors, World(0, 2), bucket_bytes=24)
    gone = weakref.ref(summed), weakref.ref(tensors["0"])
    # no pass is the last one yet, so that nothing is sent
    torch.autograd.backward(sum(t.sum() for t in tensors.values()))
    assert summed.sums
    del summed, tensors
    gc.collect()
    assert [each() for each in gone] == [None, None]
