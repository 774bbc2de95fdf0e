"""Blocks of training steps on few tokens, replayed from CUDA graphs: their work is mostly the host's.

A block is some fifty launches there and as many back. What is replayed is what would be launched, kernel
by kernel and bit for bit. A call keeps a block's recording until its gradients are computed or its results
given up: another call of the same shape meanwhile takes another.
"""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from tli_engine.integrations.block_weights import BlockWeights, NotStaticError
from tli_engine.integrations.lazy_run import Call, RunStep, Step, run_step
from tli_engine.integrations.model_parts import is_transformed
from tli_engine.integrations.recording import Lease, Recorder, Recording, Replayed
from tli_engine.integrations.static_block import StaticBlock, take_apart
from tli_engine.models.graph_recorder import GraphRecorder

# before a reason among a model's counts, which count the blocks that it kept from a graph
LAUNCHED = "launched: "
# calls of a shape before it is recorded: a recording runs the block twice more, and waits for the device
_CALLS_BEFORE = 2
# tokens of a call: of more, launches are a small part, and memory is not
_MOST_TOKENS = 512
# trained numbers of a block: copying gradients of more costs what launches do
_MOST_TRAINED = 1 << 24
# memory that a model's recordings hold, give or take one
_BYTES = 2 << 30
# a recording that so many blocks' calls did not take makes room for others
_IDLE = 4096
# calls' kinds that are counted before all are forgotten: some scripts move their weights at each step
_MOST_KINDS = 1024
# what attends without asking the GPU how long texts are
_ATTENTION = ("sdpa", "eager")


def on_gpu(device: torch.device) -> Recorder | None:
    """What records on a device; only GPUs have graphs."""
    return GraphRecorder(device, at_once=True) if device.type == "cuda" else None


class TrainingGraphs:
    """Recordings of a model's blocks, forward and backward, by all that they depend on.

    Args:
        recorder: Makes what records on a device, or ``None``: then all is launched.
        limit: Bytes that recordings hold.
    """

    def __init__(
        self,
        recorder: Callable[[torch.device], Recorder | None] = on_gpu,
        limit: int = _BYTES,
    ) -> None:
        self._make_recorder, self._limit = recorder, limit
        self._recorder: Recorder | None = None
        self._failed = False
        self._device: torch.device | None = None
        self._stream: object = None
        self._calls: Counter[Hashable] = Counter()
        self._recordings: dict[Hashable, list[Recording]] = {}
        self._number = self._held = 0
        self._parts: object = None
        self._weights: dict[int, BlockWeights] = {}

    def runner(self, call: Call) -> RunStep:
        """What runs the blocks of a call: replayed if they can be, else launched.

        Why they are not is counted with the call's model, as :data:`LAUNCHED` and a reason.
        """
        if not call.state.grad:
            return run_step

        def run(number: int, step: Step, hidden: Tensor) -> Tensor:
            y = self._replay(call, step, hidden)
            return step(hidden) if y is None else y

        return run

    def _replay(self, call: Call, step: Step, hidden: Tensor) -> Tensor | None:
        if self._failed or not self._can_record(hidden.device):
            return None
        try:
            self._check(call, hidden)
            block, tensors = take_apart(step, hidden, self._weights_of(call, step.block))
            if sum(p.numel() for p in block.weights.trained) > _MOST_TRAINED:
                raise NotStaticError(f"more than {_MOST_TRAINED:,} trained numbers in a block")
        except NotStaticError as reason:
            call.counts[f"{LAUNCHED}{reason}"] += 1
            return None
        recording = self._take(call, block, tensors)
        if recording is None:
            return None
        recording.used = self._number
        call.counts["replayed"] += 1
        given = (*tensors, *block.weights.trained)
        y: Tensor = Replayed.apply(Lease(recording), block, call.state, *given)  # type: ignore[no-untyped-call]
        return y

    def _can_record(self, device: torch.device) -> bool:
        """Whether there is a recorder: of the first device that has one, and of its stream then."""
        if self._recorder is None:
            self._recorder = self._make_recorder(device)
            self._device, self._stream = device, _stream(device)
        return self._recorder is not None

    def _check(self, call: Call, hidden: Tensor) -> None:
        attention = getattr(call.decoder.config, "_attn_implementation", None)
        if attention not in _ATTENTION:
            raise NotStaticError(f"attention is {attention}")
        if hidden.shape[0] * hidden.shape[1] > _MOST_TOKENS:
            raise NotStaticError(f"more than {_MOST_TOKENS} tokens")
        if hidden.device != self._device or _stream(hidden.device) != self._stream:
            raise NotStaticError("on another device or stream than the first call")
        reason = _observed(hidden.device)
        if reason is not None:
            raise NotStaticError(reason)

    def _take(self, call: Call, block: StaticBlock, tensors: Sequence[Tensor]) -> Recording | None:
        """A recording of such a call that no other reads any more."""
        self._number += 1
        config = call.decoder.config
        key = (config._attn_implementation, *_numerics(), block.key)
        if len(self._calls) >= _MOST_KINDS:
            self._calls.clear()
        self._calls[key] += 1
        if self._calls[key] <= _CALLS_BEFORE:
            return None
        found = next((r for r in self._recordings.get(key, ()) if r.is_free), None)
        if found is None:
            found = self._record(call, block, tensors, key in self._recordings)
            if found is not None:
                self._recordings.setdefault(key, []).append(found)
        return found

    def _record(
        self, call: Call, block: StaticBlock, tensors: Sequence[Tensor], is_warm: bool
    ) -> Recording | None:
        """A new recording, if there is room."""
        assert self._recorder is not None
        self._drop_idle()
        if self._held > self._limit:
            call.counts[f"{LAUNCHED}recordings hold {self._limit >> 20} MiB already"] += 1
            return None
        aliases = [nn.Parameter(p.detach()) for p in block.weights.trained]
        start = time.perf_counter_ns()
        try:
            recording = Recording(block, tensors, aliases, self._recorder, is_warm)
        except RuntimeError as reason:
            warnings.warn(f"no CUDA graphs of training: {reason}", stacklevel=2)
            self._failed = True
            return None
        call.counts["recordings"] += 1
        call.counts["recording_ns"] += time.perf_counter_ns() - start
        self._held += recording.nbytes
        return recording

    def _drop_idle(self) -> None:
        held = self._held
        for key in list(self._recordings):
            self._drop_idle_of(key)
        if self._held < held:
            assert self._recorder is not None
            self._recorder.give_back()

    def _drop_idle_of(self, key: Hashable) -> None:
        recordings = self._recordings[key]
        idle = [r for r in recordings if self._number - r.used > _IDLE and r.is_free]
        for recording in idle:
            recordings.remove(recording)
            self._held -= recording.nbytes
        if idle:
            del self._calls[key]
        if not recordings:
            # a key holds frozen weights
            del self._recordings[key]

    def _weights_of(self, call: Call, block: nn.Module) -> BlockWeights:
        if call.state.parts is not self._parts:
            # some were exchanged
            self._parts = call.state.parts
            self._weights.clear()
        if id(block) not in self._weights:
            self._weights[id(block)] = BlockWeights(block.modules())
        return self._weights[id(block)]


def _observed(device: torch.device) -> str | None:
    """What looks at, or changes, kernels as they are launched, which a replay would pass by."""
    if torch.is_autocast_enabled(device.type):
        return "under autocast"
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "what is saved for the backward pass has hooks"
    if is_transformed():
        return "inside a transform of torch.func"
    if _get_current_dispatch_mode() is not None:
        return "a mode watches what is launched"
    if torch.is_anomaly_enabled():
        return "anomalies are looked for"
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "inside another graph"
    return None


def _numerics() -> tuple[Any, ...]:
    """Settings that choose between kernels."""
    cuda: Any = torch.backends.cuda
    matmul = cuda.matmul
    return (
        torch.are_deterministic_algorithms_enabled(),
        # torch.get_float32_matmul_precision() is an error once a script has set this one
        matmul.fp32_precision,
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
        *(cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()),
        *(cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
    )


def _stream(device: torch.device) -> object:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None
