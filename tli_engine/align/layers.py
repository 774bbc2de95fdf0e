"""The vectors of many words layer by layer, in memory that does not grow with the layers."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tli_engine.align.encode import Staged, StagedPack
from tli_engine.models.early import EarlyModel

# bytes of a GPU left to what a block and the comparison of vectors hold meanwhile
_SPARE = 4 << 30


@torch.no_grad()
def vectors_by_layer(
    model: EarlyModel,
    staged: Staged,
    *,
    room: int | None = None,
    advance: Callable[[int], None] = lambda words: None,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[tuple[int, Tensor]]:
    """Run all packs through one layer after another, and pool each pack as it comes.

    What is held are the hidden states of one layer, ``[T, D]``, and its vectors. Nothing waits
    for the device.

    Args:
        model: The whole model, or its early blocks.
        staged: Words on its device.
        room: Bytes of the device that hidden states may take; by default what is free. Where they
            do not fit, they stay in the host's memory, and a pack at a time is moved.
        advance: Called with the number of words done after each pack of each layer.
        say: Called with a line if they stay in the host's memory.

    Yields:
        ``(k, vectors)`` for k = 0 … depth; vectors are ``[poolings, words, D]``, fp32, on the
        model's device, in the order of ``staged``, and stand until the next layer is asked for.
    """
    packs, width = staged.packs, model.config.hidden_size
    poolings = len(packs[0].weights) if packs else 0
    vectors = torch.empty(poolings, len(staged.row_of), width, device=model.device)
    states = _hidden_states(model, staged, room, say)
    rotary = [model.rotary(part.pack) for part in packs]
    for layer in range(model.depth + 1):
        for n, part in enumerate(packs):
            if layer == 0:
                hidden = model.embed(part.pack)
            else:
                hidden = model.run_block(layer - 1, states.take(n), part.pack, rotary[n])
            part.pool(model.read_out(layer, hidden), vectors)
            if layer < model.depth:
                states.put(n, hidden)
            del hidden
            advance(part.pack.words)
        yield layer, vectors


class _OnDevice:
    """The hidden states of every pack at one layer, on the model's device."""

    def __init__(self, packs: int) -> None:
        self._of_pack: list[Tensor | None] = [None] * packs

    def take(self, n: int) -> Tensor:
        """The hidden states of a pack, which are given up."""
        hidden, self._of_pack[n] = self._of_pack[n], None
        assert hidden is not None
        return hidden

    def put(self, n: int, hidden: Tensor) -> None:
        """Hold the hidden states of a pack."""
        self._of_pack[n] = hidden


class _OnHost:
    """The same in the host's memory, pinned where the device is a GPU."""

    def __init__(self, packs: list[StagedPack], width: int, dtype: torch.dtype) -> None:
        self._device = packs[0].pack.input_ids.device
        sizes = [len(part.pack.input_ids) for part in packs]
        pinned = self._device.type == "cuda"
        whole = torch.empty(sum(sizes), width, dtype=dtype, pin_memory=pinned)
        self._of_pack = torch.split(whole, sizes)

    def take(self, n: int) -> Tensor:
        """The hidden states of a pack, on their way to the device."""
        return self._of_pack[n].to(self._device, non_blocking=True)

    def put(self, n: int, hidden: Tensor) -> None:
        """Hold the hidden states of a pack; one stream orders the copies, so none is waited for."""
        self._of_pack[n].copy_(hidden, non_blocking=True)


def _hidden_states(
    model: EarlyModel, staged: Staged, room: int | None, say: Callable[[str], None]
) -> _OnDevice | _OnHost:
    dtype: torch.dtype = model.decoder.embed_tokens.weight.dtype
    needed = staged.tokens * model.config.hidden_size * dtype.itemsize
    if room is None:
        room = _free(model.device)
    if room is None or needed <= room:
        return _OnDevice(len(staged.packs))
    say(
        f"a layer's hidden states take {needed / 1e9:.1f} GB, more than {model.device} has free: "
        f"they stay in the host's memory, a pack at a time on {model.device}"
    )
    return _OnHost(staged.packs, model.config.hidden_size, dtype)


def _free(device: torch.device) -> int | None:
    """Bytes of a GPU that may be taken; ``None`` where device and host share their memory."""
    if device.type == "cpu":
        return None
    unreserved, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, unreserved + unused - _SPARE)
