"""``tli-engine verify``: is a run or a checkpoint what its manifest says?"""

from pathlib import Path

import click

from tli_engine.errors import UserError


@click.command("verify")
@click.argument("path", type=click.Path(path_type=Path))
def command(path: Path) -> int:
    """Check a run folder, or one checkpoint of it, against its manifest's SHA-256.

    Exit status 1 if anything is missing or changed.
    """
    from tli_engine.train.manifest import problems

    if not path.is_dir():
        raise UserError(f"{path}: no such run folder or checkpoint")
    folders = [path, *sorted(path.glob("checkpoints/step-*"))]
    found = [line for folder in folders for line in problems(folder)]
    for line in found:
        print(line)
    if not found:
        print(f"{path}: whole ({len(folders)} manifest{'s' if len(folders) > 1 else ''} checked)")
    return 1 if found else 0
