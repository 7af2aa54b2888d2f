"""What others can check from outside: the ledger, the receipts, the metrics."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from peer.metrics import PeerMetrics
from peer.status import REASONS
from tests.runs import LiveRun, run_command
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(300)

COORDINATOR_SERIES = {
    "swarm_coordinator_build_info",
    "swarm_coordinator_peers_alive",
    "swarm_coordinator_confirmed_round",
    "swarm_coordinator_ledger_entries",
    "swarm_coordinator_rejected_messages",
}


@pytest.fixture
async def exported(two_peer_run: LiveRun, tmp_path: Path) -> Path:
    """The run's ledger as a file, with at least a few reports in it."""
    await eventually(lambda: len(receipts_of(two_peer_run)) >= 3, "receipts", 60)
    path = tmp_path / "run.ledger"
    outcome = await run_command("ledger", "export", two_peer_run.link, "--to", str(path))
    assert outcome.code == 0, outcome.err
    return path


async def test_the_ledger_and_every_receipt_verify(two_peer_run: LiveRun) -> None:
    """Anybody with the link can check the ledger, a volunteer's receipts against it, and recompute both balances."""
    receipts = str(two_peer_run.peer_folders[1] / "receipts")
    outcome = await run_command("ledger", "verify", two_peer_run.link, "--receipts", receipts, "--json")
    assert outcome.code == 0, outcome.err
    answer = json.loads(outcome.out)
    assert answer["verified"] is True
    assert answer["receipts"] >= 1
    assert len(answer["balances"]) >= 2
    assert answer["tokens"] > 0


async def test_an_exported_ledger_verifies_offline(two_peer_run: LiveRun, exported: Path, tmp_path: Path) -> None:
    """The file alone is enough to check the ledger and the receipts that were there when it was written."""
    assert (await run_command("ledger", "verify", "--file", str(exported))).code == 0
    first = receipts_of(two_peer_run)[0]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / first.name).write_bytes(first.read_bytes())
    outcome = await run_command("ledger", "verify", "--file", str(exported), "--receipts", str(tmp_path / "mine"), "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["receipts"] == 1


async def test_tampering_with_a_ledger_or_a_receipt_shows(two_peer_run: LiveRun, exported: Path, tmp_path: Path) -> None:
    """A changed entry, a missing tail and a changed receipt each end with exit code 42 and one line that names the fault."""
    changed, cut, folder = tmp_path / "changed", tmp_path / "cut", tmp_path / "receipts"
    tamper(exported, changed, cut)
    forge(receipts_of(two_peer_run)[0], folder)
    for arguments in (["--file", str(changed)], ["--file", str(cut)], ["--file", str(exported), "--receipts", str(folder)]):
        outcome = await run_command("ledger", "verify", *arguments)
        assert outcome.code == 42, (arguments, outcome)
        assert outcome.err.startswith("error: ")
        assert "Traceback" not in outcome.err


async def test_metrics_have_their_documented_names(two_peer_run: LiveRun) -> None:
    """Every series of the code is exported from the start, in base units, and the reason codes are the status's own."""
    expected = {family.name for family in PeerMetrics(CollectorRegistry()).registry.collect()}
    for target in two_peer_run.metrics_urls[1:]:
        families = {family.name: family for family in text_string_to_metric_families(await scrape(target))}
        assert expected <= set(families)
        states = {sample.labels["state"] for sample in families["swarm_peer_state"].samples}
        assert states == set(REASONS)
        assert sum(sample.value for sample in families["swarm_peer_state"].samples) == 1
        assert families["swarm_peer_tokens"].samples[0].value > 0
        assert families["swarm_peer_sent_bytes"].samples[0].value > 0
    families = {family.name: family for family in text_string_to_metric_families(await scrape(two_peer_run.metrics_urls[0]))}
    assert set(families) >= COORDINATOR_SERIES
    names = {name for name in families if name.startswith("swarm_")} | expected
    assert [name for name in names if re.search(r"_(ms|percent|mib|gib|kb|mb|minutes)(_|$)", name)] == []


def receipts_of(two_peer_run: LiveRun) -> list[Path]:
    """The first peer's receipts, oldest first."""
    return sorted((two_peer_run.peer_folders[0] / "receipts").glob("*.receipt"))


def tamper(ledger: Path, changed: Path, cut: Path) -> None:
    """Two copies of an exported ledger: one with a bit changed in the middle, one without its last quarter."""
    content = ledger.read_bytes()
    middle = len(content) // 2
    changed.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    cut.write_bytes(content[: len(content) * 3 // 4])


def forge(receipt: Path, folder: Path) -> None:
    """A copy of a receipt with one bit of its signature changed."""
    content = receipt.read_bytes()
    folder.mkdir()
    (folder / "forged.receipt").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


async def scrape(target: str) -> str:
    """What an endpoint shows."""
    async with httpx.AsyncClient() as client:
        answer = await client.get(f"http://{target}/metrics", timeout=20)
    answer.raise_for_status()
    return answer.text
