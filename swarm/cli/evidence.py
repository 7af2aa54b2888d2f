"""`swarm evidence`: who was proven to have cheated, and why anybody should believe it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.cli.output import print_fields, print_json, print_table
from swarm.config import PeerSettings, load
from swarm.errors import EvidenceInvalid, Rejected, UsageError

if TYPE_CHECKING:
    from peer.evidence import Verdict

app = typer.Typer(help="What was proven against peers: list, verify.", no_args_is_help=True, rich_markup_mode=None)

JsonOption = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="Evidence, as a peer keeps it in its folder.")], as_json: JsonOption = False
) -> None:
    """Check evidence from its bytes alone: by whom, and why. Exits with 44 where it proves nothing.

    Examples:

      swarm evidence verify ~/.local/share/swarm/peer/evidence/12D3KooW....evidence
    """
    verdict = _verdict(file)
    print_json(_values(verdict)) if as_json else print_fields(_values(verdict))


@app.command("list")
def list_(
    folder: Annotated[Path | None, typer.Option("--dir", help="The peer's folder, if it isn't the configured one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check and show all evidence that this machine's peers have kept."""
    from peer.rounds.docket import SUFFIX

    place = folder or load(PeerSettings).data_dir
    verdicts = [_verdict(path) for path in sorted(place.rglob(f"*{SUFFIX}"))]
    if as_json:
        for verdict in verdicts:
            print_json(_values(verdict))
        return
    rows = [(item.accused, item.kind, item.round_index, item.part) for item in verdicts]
    print_table(("peer", "what", "round", "part"), rows, numbers=("round", "part"))


def _verdict(path: Path) -> Verdict:
    from peer.evidence import MAX_EVIDENCE_BYTES, verify_evidence

    try:
        if path.stat().st_size > MAX_EVIDENCE_BYTES:
            raise EvidenceInvalid(f"{path} is too large to be evidence")
        return verify_evidence(path.read_bytes())
    except OSError as error:
        raise UsageError(f"can't read {path}: {error.strerror}", "check the path") from error
    except Rejected as error:
        raise EvidenceInvalid(f"{path} proves nothing: {error}", "don't believe it") from error


def _values(verdict: Verdict) -> dict[str, object]:
    return {
        "proven": True,
        "accused": verdict.accused,
        "kind": verdict.kind,
        "run_id": verdict.run_id.hex(),
        "round": verdict.round_index,
        "part": verdict.part,
        "why": verdict.why,
    }
