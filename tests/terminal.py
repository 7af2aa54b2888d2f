"""A pseudo-terminal with a program in it, for what people see and type."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.waiting import eventually

CTRL_C, CTRL_S, CTRL_Q = b"\x03", b"\x13", b"\x11"
SHOWN = 20_000
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass
class Terminal:
    """What a program has written to its terminal so far, and its process."""

    process: subprocess.Popen[bytes]
    ours: int
    screen: bytearray = field(default_factory=bytearray)

    async def until(self, text: str, timeout_s: float = 60.0) -> None:
        """Wait until the program has written `text`; fails when it ends without it."""
        await eventually(lambda: self.shows(text.encode()), repr(text), timeout_s)

    def shows(self, text: bytes) -> bool:
        """Whether it has written that; fails when it has ended without it."""
        ended = self.process.poll() is not None
        assert not ended or text in self.screen, bytes(self.screen[-3000:])
        return text in self.screen

    def read(self) -> None:
        """Take what it writes until it ends: a program whose terminal nobody reads stands still."""
        with contextlib.suppress(OSError):  # the other end is closed
            while found := os.read(self.ours, 1 << 16):
                self.screen += found

    def type(self, keys: bytes) -> None:
        """What somebody at the keyboard types."""
        os.write(self.ours, keys)

    async def end(self, timeout_s: float = 90.0) -> int:
        """Wait for the program to end by itself; its exit code."""
        await eventually(lambda: self.process.poll() is not None, "the end", timeout_s)
        return int(self.process.wait())


@contextmanager
def terminal(command: Sequence[str], environment: Mapping[str, str], folder: Path | None = None) -> Iterator[Terminal]:
    """Run a command in a pseudo-terminal of its own; it is ended with the block."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=folder,
        env=dict(environment),
        start_new_session=True,
        preexec_fn=_take_terminal,
    )
    os.close(theirs)
    seen = Terminal(process, ours)
    reader = threading.Thread(target=seen.read, daemon=True)
    reader.start()
    try:
        yield seen
    except BaseException:
        sys.stderr.write(f"--- {' '.join(command)}\n{COLOURS.sub('', seen.screen.decode(errors='replace'))[-SHOWN:]}\n")
        raise
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        reader.join(5)
        os.close(ours)


def _take_terminal() -> None:
    """In the child: make the pseudo-terminal the one that Ctrl-C comes from."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
