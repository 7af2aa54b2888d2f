"""One peer per folder."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from swarm.errors import AlreadyRunning


@contextlib.contextmanager
def only_one(directory: Path) -> Iterator[None]:
    """Hold the directory's lock file. Raises `AlreadyRunning`."""
    file: IO[str] = (directory / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise AlreadyRunning(f"a peer is running already in {directory}", "see it with: swarm status") from error
    try:
        yield
    finally:
        file.close()
