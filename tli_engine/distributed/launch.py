"""How the processes of a run start, find one another, and end together."""

import ctypes
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING

import torch
from torch import distributed as dist

from tli_engine.distributed.world import ALONE, World
from tli_engine.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

# what `start` promised, for `joined` to check
PROMISED = "TLI_ENGINE_PROCESSES"
# the number of the process that did
_STARTER = "TLI_ENGINE_STARTER"
# of prctl: the signal that a process gets when the one that started it is gone
_PR_SET_PDEATHSIG = 1
# what torchrun says to each process beside WORLD_SIZE
_PLACE = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# seconds that processes have to keep a checkpoint after a signal
_GRACE = 120
# what a process without a GPU says it has
_CPU = "the CPU"
# for what one process does and the others wait for, such as a download
_PATIENCE = timedelta(days=2)


def start(processes: int, arguments: Sequence[str], *, on_cpu: bool) -> int:
    """Run ``tli-engine`` in so many processes of this machine, as ``torchrun --standalone`` does.

    Args:
        processes: A GPU each.
        arguments: Of ``tli-engine``.
        on_cpu: Whether they need no GPU.

    Returns:
        0, or the exit status of the first process that failed.

    Raises:
        UserError: There are fewer GPUs, or this is one of several processes.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    if "WORLD_SIZE" in os.environ:
        raise UserError(
            "--gpus starts processes, and torchrun has started this one, as WORLD_SIZE in the "
            "environment says; leave --gpus out, or unset WORLD_SIZE"
        )
    if not on_cpu:
        check_gpus(processes, torch.cuda.device_count())
    # many processes' threads would wait for one another
    usual = {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_GRACE)}
    before = dict(os.environ)
    os.environ.update(usual | before | {PROMISED: str(processes), _STARTER: str(os.getpid())})
    try:
        launched = elastic_launch(_launch_config(processes), sys.executable)
        with _hung_up_once():
            launched("-m", "tli_engine", *arguments)
    except ChildFailedError as e:
        code = int(e.get_first_failure()[1].exitcode)
        return code if code >= 0 else 128 - code
    except SignalException as e:
        return 128 + e.sigval
    finally:
        os.environ.clear()
        os.environ.update(before)
    return 0


def _launch_config(processes: int) -> "LaunchConfig":
    from torch.distributed.launcher.api import LaunchConfig

    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"tli-engine-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        signals_to_handle=",".join(_heard("SIGTERM", "SIGINT", "SIGQUIT")),
    )


def _heard(*names: str) -> list[str]:
    """Those of some signals that there are here, and that were not ignored when the command began."""
    there = [name for name in names if hasattr(signal, name)]
    return [n for n in there if signal.getsignal(getattr(signal, n)) != signal.SIG_IGN]


@contextmanager
def _hung_up_once() -> Iterator[None]:
    """Have the first SIGHUP stop the processes, and no other.

    A closing terminal sends several, and a second would break off the wait for their checkpoint.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise SignalException(f"signal {number}", signal.Signals(number))

    previous = {s: signal.signal(s, stop) for s in (getattr(signal, n) for n in _heard("SIGHUP"))}
    try:
        yield
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


def check_gpus(processes: int, gpus: int) -> None:
    """Raise ``UserError`` unless each process of this machine has a GPU of its own."""
    if processes > gpus:
        raise UserError(
            f"{processes} processes need {processes} GPUs and {gpus} are here; start no more than "
            f"that, or set device=cpu"
        )


@contextmanager
def joined(device: str, timeout: float) -> Iterator[tuple[World, str]]:
    """Join the other processes of a run, if torchrun started this one among several.

    Args:
        device: As configured; any GPU stands for the one that is this process's.
        timeout: Seconds after which waiting for another process is an error.

    Yields:
        The world, and the device to use.

    Raises:
        UserError: Too few GPUs, GPUs of several kinds or on some machines alone, no NCCL or gloo, fewer
            processes than were to start, some that are not there in time, or an environment that says
            only a part of what torchrun says, or what cannot be.
    """
    size = world_size()
    check_promised(size, os.environ.get(PROMISED))
    if _STARTER in os.environ:
        end_with(int(os.environ[_STARTER]))
    if size == 1:
        yield ALONE, device
        return
    on_gpu = device != "cpu" and (device != "auto" or torch.cuda.is_available())
    check_backends(on_gpu)
    local = int(os.environ["LOCAL_RANK"])
    if on_gpu:
        check_gpus(int(os.environ.get("LOCAL_WORLD_SIZE") or local + 1), torch.cuda.device_count())
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    else:
        device = "cpu"
    world = _meet("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout)
    os.environ["TLI_ENGINE_RANK"] = str(world.rank)
    check_complete(world, size)
    check_same_gpus(world, _device_name(device))
    yield world, device
    # not in a finally: with a partner lost, this would wait for it
    world.together(lambda: None)
    dist.destroy_process_group()
    del os.environ["TLI_ENGINE_RANK"]


def _meet(backends: str, timeout: float) -> World:
    """Wait for the other processes, ``timeout`` seconds.

    Raises:
        UserError: Some of them did not come, or cannot be met where the environment says.
    """
    start = time.monotonic()
    with _torch_unheard():
        try:
            dist.init_process_group(backends, timeout=timedelta(seconds=timeout))
            patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
        except (RuntimeError, ValueError) as e:
            in_time = time.monotonic() - start < timeout
            if dist.is_initialized():
                dist.destroy_process_group()
            raise _not_met(str(e).partition("\n")[0].rstrip("."), in_time, timeout) from None
    size = dist.get_world_size()
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or size)
    return World(dist.get_rank(), size, patient, one_machine=here == size)


def _not_met(reason: str, in_time: bool, timeout: float) -> UserError:
    rank, size, *place = (
        os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    )
    which, where = f"rank {rank} of {size}", ":".join(place)
    if in_time:
        return UserError(f"{which} cannot meet the others at {where}: {reason}")
    return UserError(
        f"{which} did not meet the others at {where} within {timeout:g} s (distributed.timeout): "
        f"{reason}; start all of them, unless one has ended with an error"
    )


@contextmanager
def _torch_unheard() -> Iterator[None]:
    """Keep back what is written on stderr, and drop it where a ``UserError`` says what went wrong.

    Of a first process that does not come, torch's C++ logs its stack.
    """
    sys.stderr.flush()
    heard = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        dropped = False
        try:
            yield
        except UserError:
            dropped = "TLI_ENGINE_DEBUG" not in os.environ
            raise
        finally:
            sys.stderr.flush()
            os.dup2(heard, 2)
            os.close(heard)
            kept.seek(0)
            if not dropped and (text := kept.read()):
                os.write(2, text)


def world_size() -> int:
    """How many processes there are, as torchrun says.

    Raises:
        UserError: It is no number, or what is said of which of them this is and where the first one is
            is missing, or cannot be.
    """
    said = os.environ.get("WORLD_SIZE") or "1"
    if not said.isdecimal() or int(said) < 1:
        raise UserError(f"WORLD_SIZE={said} in the environment is no number of processes; unset it")
    size = int(said)
    # a cluster may number its jobs by RANK: of one process it says nothing
    if size > 1:
        _check_place(size)
    return size


def _check_place(size: int) -> None:
    """Raise ``UserError`` unless the environment says which of several processes this is."""
    missing = [name for name in _PLACE if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE={size} in the environment says that this is one of {size} processes, and "
            f"{', '.join(missing)} do not say which: start them by torchrun or by --gpus, or unset "
            f"WORLD_SIZE to train in one"
        )
    here = os.environ.get("LOCAL_WORLD_SIZE") or str(size)
    if not here.isdecimal() or not 0 < int(here) <= size:
        raise UserError(
            f"LOCAL_WORLD_SIZE={here} in the environment is no number of processes of this machine, "
            f"of {size} in all"
        )
    for name, processes in (("RANK", str(size)), ("LOCAL_RANK", here)):
        rank = os.environ[name]
        if not rank.isdecimal() or int(rank) >= int(processes):
            raise UserError(
                f"{name}={rank} in the environment is none of {processes} processes, which are counted "
                f"from 0"
            )


def end_with(starter: int) -> None:
    """Have this process asked to stop, as by SIGTERM, when the one that started it is gone.

    On Linux; elsewhere it goes on alone.

    Raises:
        UserError: It is gone already.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != starter:
        raise UserError("the process that started this one is gone")


def check_promised(size: int, promised: str | None) -> None:
    """Raise ``UserError`` unless there are as many processes as ``--gpus`` said."""
    if promised is not None and int(promised) != size:
        raise UserError(f"--gpus {promised} was asked for, and this is one of {size} processes")


def check_backends(on_gpu: bool) -> None:
    """Raise ``UserError`` if this PyTorch lacks what processes talk by."""
    if not dist.is_available() or not dist.is_gloo_available():
        raise UserError("this PyTorch was built without gloo: processes cannot find one another")
    if on_gpu and not dist.is_nccl_available():
        raise UserError(
            "this PyTorch was built without NCCL: several GPUs need it; install PyTorch for CUDA, "
            "or set device=cpu"
        )


def check_complete(world: World, size: int) -> None:
    """Raise ``UserError`` unless every process that was started has joined."""
    (found,) = world.sum([1.0])
    if world.size != size or int(found) != size:
        raise UserError(f"{size} processes were started and {int(found)} joined")


def check_same_gpus(world: World, name: str) -> None:
    """Raise ``UserError`` if GPUs differ in kind or memory: all would wait for the slowest.

    A process without a GPU has :data:`_CPU`, which must be everyone's then.
    """
    names = world.gather(name)
    if len(set(names)) > 1:
        kinds = ", ".join(f"{n} on rank {names.index(n)}" for n in dict.fromkeys(names))

        def refuse() -> None:
            if _CPU in names:
                raise UserError(
                    f"not every process has a GPU: {kinds}; leave out the machines that have none, or set "
                    f"device=cpu on all"
                )
            raise UserError(
                f"GPUs of several kinds: {kinds}; choose like ones by CUDA_VISIBLE_DEVICES"
            )

        world.together(refuse)


def _device_name(device: str) -> str:
    if device == "cpu":
        return _CPU
    gpu = torch.cuda.get_device_properties(device)
    return f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB"


def is_lost_partner(error: BaseException) -> bool:
    """Whether an error says that another process is gone, and nothing of this one."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    signs = ("gloo", "connection closed by peer", "connection reset by peer", "nccl")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)
