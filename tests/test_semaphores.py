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


def test_each_captured_launch_has_its_own_until_they_run_out(gpu: SimpleNamespace) -> None:
    eager = module.semaphores(GPUS[0], 8)
    gpu.capturing, before = True, gpu.zeroed
    captured = [module.semaphores(GPUS[0], 8) for _ in range(module._CAPTURED)]
    # none is zeroed within the graph, none is shared
    assert gpu.zeroed == before
    assert len({t.data_ptr() for t in (eager, *captured)}) == module._CAPTURED + 1
    module.semaphores(GPUS[0], 8)
    assert gpu.zeroed == before + 1


def test_a_gpu_first_used_within_a_capture_gets_zeros_of_the_graph(gpu: SimpleNamespace) -> None:
    module.semaphores(GPUS[0], 8)
    gpu.capturing, before = True, gpu.zeroed
    module.semaphores(GPUS[1], 8)
    assert gpu.zeroed == before + 1
    assert list(module._slabs) == [GPUS[0]]


def test_many_counters_are_made_for_the_launch(gpu: SimpleNamespace) -> None:
    many = module._PER_LAUNCH + 1
    assert module.semaphores(GPUS[0], many).shape == (many,)
