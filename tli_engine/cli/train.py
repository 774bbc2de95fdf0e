"""``tli-engine train``: train adapters on a few early layers."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import click

from tli_engine.config import (
    Kind,
    RunConfig,
    apply_overrides,
    read_recipe,
    read_yaml,
    resolve_config,
    to_yaml,
)
from tli_engine.errors import ConfigError

# an exit status above is that of a signal; of these processes have said themselves how to go on
_SIGNALLED = 128
_ASKED_TO_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@click.command("train")
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option(
    "--recipe",
    help="A shipped configuration, in place of CONFIG: demo, paper, qwen2-72b, xlsum-swahili, qwen2-72b-xlsum.",
)
@click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="Override a key, e.g. train.steps=100; may be repeated.",
)
@click.option(
    "--run",
    # torchrun takes --run for one of its own
    "--run-folder",
    "run",
    type=click.Path(path_type=Path),
    help="Run folder; default runs/<recipe>-<UTC time>.",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier run in the run folder.")
@click.option("--resume", is_flag=True, help="Go on with the interrupted run in --run.")
@click.option(
    "--gpus",
    type=click.IntRange(min=1),
    help="Train on so many GPUs of this machine, as torchrun --nproc-per-node would.",
)
@click.option("--print-config", is_flag=True, help="Print the resolved configuration and stop.")
@click.option(
    "--dry-run", is_flag=True, help="Print what the run would take, as plan does, and stop."
)
def command(
    config: Path | None,
    recipe: str | None,
    overrides: tuple[str, ...],
    run: Path | None,
    overwrite: bool,
    resume: bool,
    gpus: int | None,
    print_config: bool,
    dry_run: bool,
) -> int:
    """Train adapters as the YAML file CONFIG or a recipe says, then measure what they did.

    Ctrl-C, SIGTERM or a terminal that closes keeps a checkpoint and prints the command that resumes.
    """
    if resume:
        if run is None:
            raise ConfigError("--resume needs --run DIR, the folder of the run that is to go on")
        if config or recipe or overrides or overwrite or print_config or dry_run:
            raise ConfigError(
                "--resume goes with --run DIR, and --gpus, alone; the run has its configuration"
            )
        return _resume(run, gpus)
    resolved, name = resolve_run(config, recipe, overrides)
    if print_config:
        print(to_yaml(resolved), end="")
        return 0
    # torch and transformers are imported here so that --help and bad keys answer at once
    if dry_run:
        from tli_engine.cli._plan import run_plan

        run_plan(resolved, gpus=gpus or 1)
        return 0
    if gpus is not None:
        source = ["--recipe", recipe] if recipe else [str(config)]
        sets = [part for override in overrides for part in ("--set", override)]
        from tli_engine.train.run_folder import default_folder

        # named here: what is said of a run that was killed names it too
        folder = run or default_folder(name)
        return _start(gpus, resolved, (*source, *sets, *["--overwrite"] * overwrite), folder)
    from tli_engine.cli._train import run_training

    return run_training(resolved, name, run, overwrite)


def _resume(run: Path, gpus: int | None) -> int:
    """Go on with the run of a folder, here or in so many processes."""
    config = run / "config.yaml"
    if not config.is_file():
        raise ConfigError(f"{run}: not a run folder; it has no config.yaml")
    resolved = resolve_config(read_yaml(config), str(config))
    if gpus is not None:
        return _start(gpus, resolved, ("--resume",), run)
    from tli_engine.cli._train import resume_training

    return resume_training(resolved, run)


def resolve_run(
    config: Path | None, recipe: str | None, overrides: tuple[str, ...]
) -> tuple[RunConfig, str]:
    """The configuration of a run, and what to name it after.

    Raises:
        ConfigError: Neither or both of a file and a recipe, or what is wrong in it.
    """
    resolved = resolve_config(*read_values(config, recipe, overrides))
    return resolved, recipe or (config or Path("run")).stem


def read_values(
    config: Path | None, recipe: str | None, overrides: tuple[str, ...], kind: Kind = "run"
) -> tuple[dict[str, Any], str]:
    """What a file or a recipe says, ``--set`` applied, and what messages call it.

    Raises:
        ConfigError: Neither or both of a file and a recipe, or one that cannot be read.
    """
    if (config is None) == (recipe is None):
        example = {"run": "demo", "compare": "compare-demo"}[kind]
        raise ConfigError(f"give either a YAML file or --recipe NAME, e.g. --recipe {example}")
    values = read_recipe(recipe, kind) if recipe else read_yaml(config or Path(), kind)
    where = f"recipe {recipe}" if recipe else str(config)
    where += " with --set" if overrides else ""
    return apply_overrides(values, list(overrides)), where


def _start(gpus: int, config: RunConfig, options: tuple[str, ...], folder: Path) -> int:
    from tli_engine.cli._resume_command import by_gpus
    from tli_engine.cli.console import say
    from tli_engine.distributed.launch import start

    debug = ["--debug"] if os.environ.get("TLI_ENGINE_DEBUG") else []
    arguments = (*debug, "train", *options, "--run", str(folder))
    began = time.time()
    status = start(gpus, arguments, on_cpu=config.device == "cpu")
    if status > _SIGNALLED and status - _SIGNALLED not in _ASKED_TO_STOP:
        what = f"a process was killed by signal {status - _SIGNALLED}"
        record = folder / "config.yaml"
        # one that was there before is of the run that this one was to overwrite
        if record.is_file() and ("--resume" in options or record.stat().st_mtime >= began - 1):
            say(f"{what}; resume with: {by_gpus(folder, gpus)}")
        else:
            say(f"{what} before the run began")
    return status
