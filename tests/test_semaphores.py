from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from tli_engine.kernels import semaphores as module

GPUS = [torch.device("cuda", i) for i in range(2)]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """GPUs whose memory is the CPU's; the test says which stream is current, and captured."""
    state = SimpleNamespace(stream=1, capturing=False, zeroed=0)

    def zeros(*size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        state.zeroed += 1
        return torch.zeros(*size, dtype=dtype)

    cuda = SimpleNamespace(
        is_current_stream_capturing=lambda: state.capturing,
        current_stream=lambda device: SimpleNamespace(cuda_stream=state.stream),
    )
    fake: Any = SimpleNamespace(zeros=zeros, int32=torch.int32, cuda=cuda)
    monkeypatch.setattr(module, "torch", fake)
    monkeypatch.setattr(module, "_slabs", {})
    module._of_stream.cache_clear()
    return state


def test_launches_of_a_stream_share_and_streams_do_not(gpu: SimpleNamespace) -> None:
    first = module.semaphores(GPUS[0], 8)
    assert module.semaphores(GPUS[0], 3).data_ptr() == first.data_ptr()
    gpu.stream = 2
    assert module.semaphores(GPUS[0], 8).data_ptr() != first.data_ptr()
    assert module.semaphores(GPUS[1], 8).data_ptr() != first.data_ptr()


def test_each_captured_launch_has_its_own(gpu: SimpleNamespace) -> None:
    eager = module.semaphores(GPUS[0], 8)
    gpu.capturing, before = True, gpu.zeroed
    captured = [module.semaphores(GPUS[0], count) for count in (8, 33, 1, 4096, 128)]
    # none is zeroed within the graph, no two share a line of 128 bytes
    assert gpu.zeroed == before
    assert [t.shape for t in captured] == [(8,), (33,), (1,), (4096,), (128,)]
    assert eager.data_ptr() not in {t.data_ptr() for t in captured}
    spans = [(t.storage_offset(), t.storage_offset() + t.numel() - 1) for t in captured]
    lines = [line for first, last in spans for line in range(first // 32, last // 32 + 1)]
    assert len(set(lines)) == len(lines)


def test_a_capture_that_takes_all_gets_zeros_of_the_graph(gpu: SimpleNamespace) -> None:
    module.semaphores(GPUS[0], 8)
    gpu.capturing, before = True, gpu.zeroed
    for _ in range(module._PER_SLAB // 4096):
        module.semaphores(GPUS[0], 4096)
    assert gpu.zeroed == before
    module.semaphores(GPUS[0], 8)
    assert gpu.zeroed == before + 1


def test_later_captures_find_half_a_slab_at_least(gpu: SimpleNamespace) -> None:
    """However many launches were captured before, where one outside a capture comes between."""
    held = []
    for _ in range(8):
        gpu.capturing = False
        module.semaphores(GPUS[0], 8)
        gpu.capturing, before = True, gpu.zeroed
        held += [module.semaphores(GPUS[0], 4096) for _ in range(module._PER_SLAB // 2 // 4096)]
        assert gpu.zeroed == before
    # slabs stay, for graphs know their addresses
    assert len({t.data_ptr() for t in held}) == len(held)
    assert sum(len(slab.counters) for slab in module._slabs[GPUS[0]]) >= 4096 * len(held)


def test_a_gpu_first_used_within_a_capture_gets_zeros_of_the_graph(gpu: SimpleNamespace) -> None:
    module.semaphores(GPUS[0], 8)
    gpu.capturing, before = True, gpu.zeroed
    module.semaphores(GPUS[1], 8)
    assert gpu.zeroed == before + 1
    assert not module._slabs[GPUS[1]]


def test_many_counters_are_made_for_the_launch(gpu: SimpleNamespace) -> None:
    many = module._PER_STREAM + 1
    assert module.semaphores(GPUS[0], many).shape == (many,)
