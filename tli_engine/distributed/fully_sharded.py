"""Tensors of which each rank holds a share: what there is of them, filled, written and read."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor


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
def clip(gradients: Sequence[Tensor], limit: float | None) -> Tensor:
    """Scale gradients down to a norm of ``limit``, unless they have less; return what it was.

    Shares are added up in one sum over the ranks, as are those of one tensor; None leaves all as it is.
    """
    parts = [own_part(gradient) for gradient in gradients]
    norm: Tensor = nn.utils.get_total_norm(parts)
    sharded = next((g for g in gradients if isinstance(g, DTensor)), None)
    if sharded is not None:
        squares = norm.square()
        dist.all_reduce(squares, group=sharded.device_mesh.get_group())
        norm = squares.sqrt()
    if limit is not None:
        torch._foreach_mul_(parts, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


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


def save_shards(folder: Path, tensors: Mapping[str, Tensor], group: Any = None) -> None:
    """Write tensors, each rank its shares, as safetensors with the place of each share.

    Ranks wait for one another in ``group``, the default one if None: as long as its timeout says.

    ``torch.distributed.checkpoint`` writes them, without its pickled index: :func:`load_shards` finds
    the shares by their headers, for any number of ranks.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(dict(tensors), storage_writer=writer, process_group=group)
    except CheckpointException as e:
        raise _of_a_rank(e.failures) from None


def _of_a_rank(failures: Mapping[int, Any]) -> OSError:
    """What a ``CheckpointException`` says, which is no ``Exception``: the same on all ranks."""
    rank, reason = min(failures.items())
    return OSError(f"rank {rank}: {reason[0]}")


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


def load_shards(folder: Path, tensors: Mapping[str, Tensor], group: Any = None) -> None:
    """Fill tensors, whole or shared out over any number of ranks, from a folder of safetensors.

    Ranks wait for one another as in :func:`save_shards`.

    Raises:
        KeyError: One is not there.
        RuntimeError: One has another shape there.
        OSError: A rank cannot read it; then all of them raise it.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    there = stored(folder)
    for name, tensor in tensors.items():
        size, _ = there[name]
        if size != tensor.shape:
            raise RuntimeError(f"{name} must be {list(tensor.shape)}, got {list(size)}")
    reader = HuggingFaceStorageReader(str(folder))
    alone = not any(map(is_sharded, tensors.values()))
    try:
        with warnings.catch_warnings():
            # that it is one process which reads, as is meant
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            load(dict(tensors), storage_reader=reader, process_group=group, no_dist=alone)
    except CheckpointException as e:
        raise _of_a_rank(e.failures) from None
