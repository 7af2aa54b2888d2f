"""Where log lines go without making anybody wait: a stopped terminal (Ctrl-S), or a pipe that nobody reads, blocks its writers.

A thread writes; what finds no place meanwhile is left out and counted. It writes to the descriptor, not to `sys.stderr`, whose
lock a blocked thread would hold when the program ends.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading

MOST_LINES = 4096


class LogWriter:
    """A file to write log lines to."""

    def __init__(self, descriptor: int, most_lines: int = MOST_LINES) -> None:
        self._descriptor = descriptor
        self._lines: queue.Queue[str] = queue.Queue(most_lines)
        self._left_out = 0
        self._lock = threading.Lock()
        threading.Thread(target=self._work, name="log", daemon=True).start()

    def write(self, text: str) -> int:
        """Take a line; at most so many wait."""
        try:
            self._lines.put_nowait(text)
        except queue.Full:
            with self._lock:
                self._left_out += 1
        return len(text)

    def flush(self) -> None:
        """Nothing to do: lines are written as soon as they can be."""

    def drain(self, timeout_s: float) -> bool:
        """Wait until all lines are written, though no longer than this; whether they are."""
        done = threading.Thread(target=self._lines.join, daemon=True)
        done.start()
        done.join(timeout_s)
        return not done.is_alive()

    def _work(self) -> None:
        while True:
            text = self._lines.get()
            with self._lock:
                left_out, self._left_out = self._left_out, 0
            if left_out:
                text += f"{left_out} lines of the log were left out: nobody took them\n"
            self._write(text.encode(errors="replace"))
            self._lines.task_done()

    def _write(self, raw: bytes) -> None:
        with contextlib.suppress(OSError):  # a terminal that was closed
            while raw:
                raw = raw[os.write(self._descriptor, raw) :]
