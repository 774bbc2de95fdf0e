"""The ``tli-engine`` command."""

import importlib
import os
import sys
import time
import traceback
from typing import Any

import click

from tli_engine import __version__
from tli_engine.errors import StoppedElsewhere, TrainingError, UserError

# seconds that a process waits for the one whose error it is to speak, and to end
_LAST_WORDS = 5.0
_COMMANDS = {
    "scan": "measure the alignment of two languages at every layer",
    "train": "train adapters on early blocks, or any weights on summaries",
    "plan": "say what a run would take: downloads, disk, memory, time",
    "evaluate": "measure a run's alignment before and after training",
    "compare": "several ways of training on the same data, side by side",
    "verify": "check a run or a checkpoint against its manifest",
    "export": "write a run's adapter, or a whole model, for use elsewhere",
    "data": "look at word pairs before training on them",
    "run": "run another code base's script on this engine",
    "info": "print versions, devices and which backend each op uses",
}


def let_segments_grow() -> None:
    """Have torch's allocator grow its segments, before torch is imported, unless the user has set it up.

    In segments of a fixed size, gaps between tensors took the room that ``sft.activations: auto`` had
    planned to fill: within 12 and 24 GiB the 8B shape ran out of memory.
    """
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


class _Lazy(click.Group):
    """Imports a command's module when the command is called, so that ``--help`` is instant."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        if cmd_name != "run":
            # a script's memory is its own affair
            let_segments_grow()
        command: click.Command = importlib.import_module(f"tli_engine.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.command(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tli-engine")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def group(debug: bool) -> None:
    """Align two languages in the early layers of an LLM, and measure it honestly."""
    command = click.get_current_context().invoked_subcommand
    started = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    # a script that is run joins its processes by itself
    if started and command not in ("train", "run"):
        raise UserError(f"{command} takes one process; start it without torchrun")
    # read by main(), which alone knows how an error is shown
    if debug:
        os.environ["TLI_ENGINE_DEBUG"] = "1"
    else:
        os.environ.pop("TLI_ENGINE_DEBUG", None)


def main(args: list[str] | None = None) -> int:
    """Run the command line; return 0, 1 for a failure, 2 for the user's mistake, 130 for Ctrl-C."""
    try:
        status = _invoke(args)
    except Exception as e:
        if _rank() is None:
            raise
        status = _failed_among_others(e)
    if status and _rank() is not None:
        # what waits for the other processes must not keep this one
        sys.stdout.flush()
        os._exit(status)
    return status


def _invoke(args: list[str] | None) -> int:
    try:
        result: Any = group.main(args, prog_name="tli-engine", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as e:
        e.show()
        return 2
    except click.ClickException as e:
        return _failed(UserError(e.format_message()), 2)
    except (click.Abort, KeyboardInterrupt):
        _say("interrupted")
        return 130
    except UserError as e:
        return _failed(e, 2)
    except BrokenPipeError:
        # the reader of our output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (TrainingError, OSError) as e:
        return _failed(e, 1)
    except RuntimeError as e:
        # by name: torch and the backends are not imported for the sake of --help
        if type(e).__name__ == "OutOfMemoryError":
            return _failed(RuntimeError(f"{e}; lower train.batch_size, or quantize: nf4"), 1)
        if type(e).__name__ == "BackendUnavailableError":
            return _failed(e, 1)
        raise


def _failed(error: Exception, status: int) -> int:
    if os.environ.get("TLI_ENGINE_DEBUG"):
        raise error
    _say(f"error: {error}")
    return status


def _failed_among_others(error: Exception) -> int:
    """End one process of several with its traceback, after that of whoever has the error first."""
    from tli_engine.distributed.launch import is_lost_partner

    if isinstance(error, StoppedElsewhere):
        # whoever has the error ends first, and so do all
        time.sleep(_LAST_WORDS)
        return error.status
    if is_lost_partner(error):
        time.sleep(_LAST_WORDS)
        _say(
            f"stopped: another process of the run is gone, or cannot be reached: {_first_line(error)}"
        )
    lines = traceback.format_exc().splitlines()
    print("\n".join(f"rank {_rank()}: {line}" for line in lines), file=sys.stderr, flush=True)
    return 1


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def _rank() -> str | None:
    """This process's number among those of a run; None of one that is alone."""
    return os.environ.get("TLI_ENGINE_RANK")


def _say(line: str) -> None:
    rank = _rank()
    where = f"rank {rank}: " if rank not in (None, "0") else ""
    print(f"tli-engine: {where}{line}", file=sys.stderr, flush=True)
