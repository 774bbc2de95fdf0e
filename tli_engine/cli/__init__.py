"""The ``tli-engine`` command."""

import importlib
import os
import sys
from typing import Any

import click

from tli_engine import __version__
from tli_engine.errors import TrainingError, UserError

_COMMANDS = {
    "scan": "measure the alignment of two languages at every layer",
    "train": "train adapters on a few early layers",
    "plan": "say what a run would take: downloads, disk, memory, time",
    "evaluate": "measure a run's alignment before and after training",
    "compare": "several ways of training on the same data, side by side",
    "verify": "check a run or a checkpoint against its manifest",
    "export": "write a run's adapter, or a whole model, for use elsewhere",
    "data": "look at word pairs before training on them",
    "run": "run another code base's script on this engine",
    "info": "print versions, devices and which backend each op uses",
}


class _Lazy(click.Group):
    """Imports a command's module when the command is called, so that ``--help`` is instant."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
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
    # read by main(), which alone knows how an error is shown
    os.environ["TLI_ENGINE_DEBUG"] = "1" if debug else ""


def main(args: list[str] | None = None) -> int:
    """Run the command line; return 0, 1 for a failure, 2 for the user's mistake, 130 for Ctrl-C."""
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


def _say(line: str) -> None:
    print(f"tli-engine: {line}", file=sys.stderr, flush=True)
