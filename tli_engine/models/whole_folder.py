"""A folder that is written whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from tli_engine.errors import UserError


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Make a folder, in the place of an earlier one of that name.

    Yields:
        A hidden folder beside it to write to, which then gets its name.

    Raises:
        UserError: It cannot be written.
    """
    part = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        if folder.exists():
            shutil.rmtree(folder)
        part.rename(folder)
    except (OSError, SafetensorError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"{folder}: cannot be written: {reason}; nothing was kept") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
