"""Generate the Python code of `proto/swarm/v1` into `swarm/rpc/v1`: `python -m swarm.rpc.generate [--check]`.

Generated modules import each other as `swarm.v1...`; that path is rewritten to where they live in this package. The descriptor
names stay `swarm/v1/*.proto`, so that they never collide with hivemind's unpackaged ones.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "proto"
TARGET = ROOT / "swarm" / "rpc" / "v1"


def generate(target: Path) -> None:
    """Write the modules and their type stubs into `target`."""
    with tempfile.TemporaryDirectory() as folder:
        names = sorted(str(path.relative_to(SOURCES)) for path in (SOURCES / "swarm").rglob("*.proto"))
        outputs = ("python_out", "mypy_out", "grpc_python_out", "mypy_grpc_out")
        options = [f"--{name}={folder}" for name in outputs]
        plugins = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{SOURCES}", *options, *names]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, env={**os.environ, "PATH": plugins})
        target.mkdir(parents=True, exist_ok=True)
        (target / "__init__.py").write_text('"""Generated from `proto/swarm/v1`; run `make proto` to renew."""\n')
        for path in sorted((Path(folder) / "swarm" / "v1").iterdir()):
            if "_grpc" in path.name and "Stub" not in path.read_text():
                continue
            text = re.sub(r"\bfrom swarm\.v1 import\b", "from swarm.rpc.v1 import", path.read_text())
            (target / path.name).write_text(re.sub(r"\bswarm\.v1\.(\w+_pb2)\b", r"swarm.rpc.v1.\1", text))


def stale() -> list[str]:
    """Names of generated files that differ from what the sources give now."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = {path.name: path.read_text() for path in Path(folder).iterdir()}
    present = {path.name: path.read_text() for path in TARGET.iterdir() if path.is_file()}
    return sorted(name for name in fresh.keys() | present.keys() if fresh.get(name) != present.get(name))


def main() -> int:
    """Generate, or with `--check` fail when something is stale."""
    if "--check" not in sys.argv[1:]:
        generate(TARGET)
        return 0
    names = stale()
    sys.stdout.write("".join(f"stale: swarm/rpc/v1/{name}\n" for name in names))
    return 1 if names else 0


if __name__ == "__main__":
    sys.exit(main())
