"""Of all processes that see a comparison's folder, one at a time makes a run of it."""

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tli_engine.cli.console import warn
from tli_engine.errors import UserError

# folder of a comparison's locks: a run's own folder is empty when it begins
LOCKS = "locks"


@contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """Hold a lock that ends with this process, however it ends; the file stays and says nothing then.

    Args:
        path: Of the lock's file; it and its folder are made where they are missing.
        what: That is made under the lock.

    Raises:
        UserError: Another process holds it, on this machine or on one that shares the folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # shared file systems lock files that are open for writing, and no folders
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "it has not said which"
            raise UserError(
                f"{what}: another process is making it ({holder}); wait until it has ended, or end it"
            ) from None
        except OSError as e:
            warn(
                f"{path}: cannot be locked: {e.strerror}; see to it that no other process makes {what}"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


@contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Wait until no other process is between the same two lines; as :func:`held`, it ends with this one.

    Args:
        path: Of the lock's file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        # a file system without locks is told of where a run is to be made
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
