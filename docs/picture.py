"""Make docs/live-view.svg, the picture in the README: the live view of a real `swarm demo`, as it stood in the middle of the run.

python docs/picture.py [ARGUMENTS OF swarm demo]
"""

from __future__ import annotations

import os
import pty
import re
import sys
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

PICTURE = Path(__file__).with_name("live-view.svg")
COLUMNS, ROWS = 110, 30
CURSOR_UP = re.compile(r"\x1b\[\d*A|\x1b\[2K|\r")
AT = 2 / 3


def main(arguments: list[str]) -> int:
    """Run the demo in a terminal of its own, show what it shows, and draw one of the frames."""
    said = bytearray()

    def read(descriptor: int) -> bytes:
        piece = os.read(descriptor, 1 << 16)
        said.extend(piece)
        return piece

    os.environ |= {"COLUMNS": str(COLUMNS), "LINES": str(ROWS), "TERM": "xterm-256color"}
    status = os.waitstatus_to_exitcode(pty.spawn([str(Path(sys.executable).with_name("swarm")), "demo", *arguments], read))
    frames = _frames(said.decode(errors="replace"))
    if status or not frames:
        print(f"no picture: exit code {status}, {len(frames)} frames", file=sys.stderr)  # noqa: T201 - a tool for the terminal
        return 1
    _draw(frames[int(len(frames) * AT)])
    return 0


def _frames(said: str) -> list[str]:
    """The tables of the live view, one after the other, in the order in which they were shown."""
    pieces = (piece.strip("\n") for piece in re.split(r"(?:" + CURSOR_UP.pattern + r")+(?=\x1b\[[\d;]*m|round)", said))
    return [CURSOR_UP.sub("", piece) for piece in pieces if "training" in piece and "credits" in piece]


def _draw(frame: str) -> None:
    console = Console(record=True, width=COLUMNS, file=StringIO(), force_terminal=True)
    console.print(Text("$ swarm demo", style="bold"))
    console.print(Text.from_ansi(frame))
    drawing = console.export_svg(title="swarm demo")
    PICTURE.write_text(re.sub(r"@font-face \{.*?\}\s*", "", drawing, flags=re.DOTALL))  # nothing is loaded from elsewhere


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
