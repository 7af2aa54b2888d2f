"""What `make wire` refuses and what it lets through, tried on a copy of the wire."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
BUF = Path(sys.executable).with_name("buf")

BREAKING = {
    "a field with another number": (
        "bytes run_id = 1;\n  repeated string addresses = 2;",
        "bytes run_id = 21;\n  repeated string addresses = 2;",
    ),
    "a field with a larger type": ("uint32 peers_alive = 4;", "uint64 peers_alive = 4;"),
    "a field with another name": ("bytes state_root = 10;", "bytes root = 10;"),
    "a field that is gone": ("  double uptime_s = 14;\n", ""),
    "a field that repeats": ("string client_version = 5;", "repeated string client_version = 5;"),
    "a value that is gone": ("  TWIN_OTHER_COUNTS = 2;\n", ""),
    "a call that is gone": ("  rpc ListAudits(ListAuditsRequest) returns (ListAuditsResponse);\n", ""),
    "a call with another request": ("rpc ListAudits(ListAuditsRequest)", "rpc ListAudits(GetCreditsRequest)"),
    "a signed message that is gone": ("message GrantRequest {", "message AskedGrant {"),
}
ADDING = {
    "a field": ("  double uptime_s = 14;\n", "  double uptime_s = 14;\n  string motto = 99;\n"),
    "a value": ("  TWIN_OTHER_COUNTS = 2;\n", "  TWIN_OTHER_COUNTS = 2;\n  TWIN_BOTH_COUNT = 3;\n"),
    "a message": ("message SubmitAuditResponse {}", "message SubmitAuditResponse {}\n\nmessage Motto {\n  string text = 1;\n}"),
    "a call": (
        "  rpc ListAudits(ListAuditsRequest)",
        "  rpc GetMotto(GetMottoRequest) returns (GetMottoResponse);\n  rpc ListAudits(ListAuditsRequest)",
    ),
}
MOTTO = "\nmessage GetMottoRequest {}\n\nmessage GetMottoResponse {}\n"


def checked(folder: Path, change: tuple[str, str]) -> subprocess.CompletedProcess[str]:
    """Hold a copy of the wire, changed in one place, against the last release."""
    shutil.copytree(ROOT / "proto", folder / "proto")
    shutil.copy(ROOT / "buf.yaml", folder)
    source = folder / "proto" / "swarm" / "v1" / "coordinator.proto"
    text = source.read_text()
    assert text.count(change[0]) == 1
    source.write_text(text.replace(*change) + MOTTO)
    command = [BUF, "breaking", "--against", "proto/released"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("change", BREAKING.values(), ids=BREAKING)
def test_breaking_change_is_refused(tmp_path: Path, change: tuple[str, str]) -> None:
    """What the last release would read differently, or miss, doesn't get through."""
    done = checked(tmp_path, change)
    assert (done.returncode, "coordinator.proto:" in done.stdout) == (100, True), done.stdout + done.stderr


@pytest.mark.parametrize("change", ADDING.values(), ids=ADDING)
def test_addition_is_accepted(tmp_path: Path, change: tuple[str, str]) -> None:
    """What the last release ignores may come."""
    done = checked(tmp_path, change)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wire_fits_the_last_release() -> None:
    """The wire as it is would pass, also without a network or the repository's history."""
    done = subprocess.run(
        [BUF, "breaking", "--against", "proto/released"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
