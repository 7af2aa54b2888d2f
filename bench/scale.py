"""How the cost of a round grows with the number of peers: bytes and seconds per round, and the exponents fitted to them."""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import linked, report
from bench.hosts import Link
from bench.linked import Note
from bench.report import Report
from peer.recipes import tiny_manifest
from swarm.auto import part_values
from swarm.manifest import Manifest

SIZES, SIZES_QUICK = (2, 4, 8, 16, 32), (2, 4, 8)
CODECS = ("int4", "sparse")
ROUNDS, ROUNDS_QUICK = 12, 6
WARM_UP_ROUNDS = 2
STEP_S = 0.05
INNER_STEPS = 4
PARAMETERS = 1_000_000
PART_VALUES = 1 << 14
ROUND_S = 120.0


async def scale(out: Report, folder: Path) -> None:
    """Every size with every codec, one after the other."""
    rounds = out.choose(ROUNDS, ROUNDS_QUICK)
    taken: dict[str, dict[int, dict[str, float]]] = {}
    for codec in CODECS:
        found = {}
        for size in SIZES_QUICK if out.quick else SIZES:
            out.say(f"  {codec}, {size} peers")
            found[size] = await _measure(folder / f"{codec}-{size}", codec, size, rounds)
            out.row("a round by peers", codec=codec, peers=size, **found[size])
        taken[codec] = found
        _exponents(out, codec, found)
    for name, label in (("bytes_per_peer", "bytes that a peer sends per round"), ("seconds", "seconds of a round less training")):
        series = {codec: [(size, found[size][name]) for size in found] for codec, found in taken.items()}
        out.plot(label, series, x="peers", y=label, log="xy")


async def _measure(folder: Path, codec: str, size: int, rounds: int) -> dict[str, float]:
    """Medians over some rounds after the first ones."""
    manifest = _manifest(folder / "files", codec, size)
    async with linked.running(folder, manifest, folder / "files", [Link()] * size, step_s=STEP_S) as swarm:
        await swarm.first_round()
        for _ in range(WARM_UP_ROUNDS):
            before = await swarm.next_round(ROUND_S)
        sent_before = swarm.sent_bytes()
        taken: list[list[Note]] = [await swarm.next_round(ROUND_S) for _ in range(rounds)]
        sent = [after - earlier for after, earlier in zip(swarm.sent_bytes(), sent_before, strict=True)]
    trained_s = INNER_STEPS * STEP_S
    walls = [statistics.median(note["wall_s"] for note in notes) for notes in taken]
    processor = sum(note["processor_s"] for note in taken[-1]) - sum(note["processor_s"] for note in before)
    return {
        "bytes_per_peer": statistics.mean(sent) / rounds,
        "bytes": sum(sent) / rounds,
        "seconds": statistics.median(walls) - trained_s,
        "processor_s_per_peer": processor / rounds / size,
        "processor_s": processor / rounds,
        "differing_roots": _differing_roots(itertools.chain.from_iterable(taken)),
    }


def _differing_roots(notes: Iterable[Note]) -> int:
    """Rounds after which not all that played them had one root; who was left out of one is a note behind the others."""
    roots: dict[int, set[str]] = {}
    for note in notes:
        roots.setdefault(note["round"], set()).add(note["root"])
    return sum(len(found) > 1 for found in roots.values())


def _manifest(files: Path, codec: str, size: int) -> Manifest:
    """Rounds of 1 M parameters, whose training is a fifth of a second of waiting, until everybody has noted enough of them.

    Butterflies have 62 parts, so that each of 32 peers merges one or two; who gathers all gets those that `auto` would choose.
    """
    made = tiny_manifest(files, size, scale_to_speed=False, grace_floor_s=20.0, max_peers=64)
    values: dict[str, Any] = made.model_dump(mode="json")
    values["model"]["parameters"] = PARAMETERS
    values["codec"] = {"kind": codec, "part_values": part_values(codec, PARAMETERS) if codec == "sparse" else PART_VALUES}
    values["strategy"]["inner_steps"] = INNER_STEPS
    return Manifest.model_validate(values)


def _exponents(out: Report, codec: str, found: Mapping[int, Mapping[str, float]]) -> None:
    sizes = list(found)
    how = f"slope of the logarithms over {', '.join(map(str, sizes))} peers, {codec}, {PARAMETERS:,} parameters: "
    for name, what in (
        ("bytes_per_peer", "bytes that a peer's interface sends per round"),
        ("seconds", "wall time of a round less its emulated training; all peers share this machine's cores"),
        ("processor_s_per_peer", "processor time of a peer and its p2pd per round"),
    ):
        out.figure(f"{codec}_{name}_exponent", slope(sizes, [found[size][name] for size in sizes]), how + what)
    out.add(
        "roots_differing",
        int(sum(values["differing_roots"] for values in found.values())),
        "rounds of all runs here after which not all peers had one root",
        "== 0",
    )


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent b of the power law a x^b that fits best, by least squares of the logarithms."""
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(value) for value in values]).slope


def main(argv: Sequence[str] | None = None) -> int:
    """Measure."""
    with report.workspace() as folder:
        return report.run("scale", __doc__, {"scale": lambda out: scale(out, folder)}, argv)


if __name__ == "__main__":
    sys.exit(main())
