"""Tying a child process to this one: the kernel ends it when we end, however that happens (Linux, `prctl(2)`)."""

from __future__ import annotations

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None, use_errno=True)


def die_with(parent: int) -> None:
    """Run in the child before it executes its program: be killed when the process `parent`, which starts us, ends."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
