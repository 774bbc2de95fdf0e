"""Every weight of a model spread over ranks, gathered block by block: FSDP2."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from tli_engine.distributed.world import World


def shard_fully(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    forward: str,
    device: torch.device,
    dtype: torch.dtype,
    world: World,
    offload: bool,
) -> None:
    """Spread a model's weights over the ranks, in fp32; blocks are computed with in ``dtype``.

    What a rank holds of weights, gradients and optimizer states is a share in fp32: the master copy.
    A block is gathered in ``dtype`` before it runs, there and back; the rest of the model for all of
    the way there, and again for the way back. Gradients are summed over ranks in fp32, not averaged.

    Args:
        model: On the CPU; blocks are moved and split one at a time.
        blocks: Modules of it that are gathered one by one.
        forward: Name of its method that runs it.
        device: Where it is to be computed.
        dtype: What of.
        world: The ranks.
        offload: Keep the shares on the CPU.
    """
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        FSDPModule,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    on_gpu = device.type == "cuda"
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (world.size,)),
        "mp_policy": MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy(pin_memory=on_gpu) if offload else OffloadPolicy(),
    }
    # the model too, not only its blocks: measured without a way back, it must not stay whole
    options["reshard_after_forward"] = True
    for module in (*blocks, model):
        fully_shard(module.float(), **options)
        assert isinstance(module, FSDPModule)
        # each rank's loss is a part of the sum, over the labels of all
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, forward)


def is_sharded(tensor: Tensor) -> bool:
    """Whether ranks hold a share each of a tensor."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each rank may hold a share, gathered on all."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(tensor: Tensor, values: Tensor) -> None:
    """Overwrite what this rank holds of a tensor, given all of it, on any device.

    Raises:
        RuntimeError: They are of another shape.
    """
    if tensor.shape != values.shape:
        raise RuntimeError(f"a tensor must be {list(tensor.shape)}, got {list(values.shape)}")
    if isinstance(tensor, DTensor):
        # as FSDP2 cuts the rows, the last ranks' shares being shorter, or empty
        rank, size = tensor.device_mesh.get_local_rank(), tensor.device_mesh.size()
        rows = -(-len(values) // size)
        values = values[rank * rows : (rank + 1) * rows]
    own_part(tensor).copy_(values)


def save_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, each rank its shares, as safetensors with the place of each share.

    ``torch.distributed.checkpoint`` writes them, without its pickled index: :func:`load_shards` finds
    the shares by their headers, for any number of ranks.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(dict(tensors), storage_writer=writer)
    except CheckpointException as e:
        # no Exception, and the same on all ranks
        rank, reason = min(e.failures.items())
        raise OSError(f"rank {rank}: {reason[0]}") from None


def stored(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of each whole tensor in a folder of safetensors, shares or not."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {
        name: (kind.size, kind.properties.dtype)
        for name, kind in found.items()
        if isinstance(kind, TensorStorageMetadata)
    }


def load_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, whole or shared out over any number of ranks, from a folder of safetensors.

    Raises:
        KeyError: One is not there.
        RuntimeError: One has another shape there.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    there = stored(folder)
    for name, tensor in tensors.items():
        size, _ = there[name]
        if size != tensor.shape:
            raise RuntimeError(f"{name} must be {list(tensor.shape)}, got {list(size)}")
    reader = HuggingFaceStorageReader(str(folder))
    alone = not any(map(is_sharded, tensors.values()))
    load(dict(tensors), storage_reader=reader, no_dist=alone)
