"""`swarm demo` as a newcomer runs it: what it writes, what it leaves behind, and Ctrl-C in the middle."""

from __future__ import annotations

import asyncio
import json
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from swarm.control import history
from swarm.local import swarm_command
from swarm.manifest import Manifest
from swarm.messages import parse
from swarm.rpc.v1.signed_pb2 import Signed
from tests.runs import alive, clean_environment, run_command
from tests.waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]

FIELDS = {
    "run_id",
    "wall_s",
    "rounds",
    "tokens",
    "loss",
    "state_roots_agree",
    "round_overhead_s",
    "bytes_sent_total",
    "peers",
    "ledger",
    "export_dir",
}
LOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("def ", return_tensors="pt").input_ids
model.generate(ids, max_new_tokens=3, do_sample=False)
assert not [name for name in sys.modules if name.split(".")[0] in ("swarm", "peer", "hivemind")]
"""


@asynccontextmanager
async def demo(*arguments: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, dict[int, psutil.Process]]]:
    """A running demo, and all processes that it has ever had."""
    process = await asyncio.create_subprocess_exec(
        *swarm_command(),
        "demo",
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env=clean_environment(),
    )
    descendants: dict[int, psutil.Process] = {}

    async def watch() -> None:
        root = psutil.Process(process.pid)
        while True:
            try:
                descendants.update({child.pid: child for child in root.children(recursive=True)})
            except psutil.NoSuchProcess:
                return
            await asyncio.sleep(0.1)

    watching = asyncio.create_task(watch())
    try:
        yield process, descendants
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def test_a_demo_from_the_first_command_to_the_loaded_model(tmp_path: Path) -> None:
    """It trains, agrees, verifies, exports a model that loads with no code of ours, writes the JSON, and leaves no process."""
    folder, report = tmp_path / "demo", tmp_path / "outcome.json"
    arguments = ("--peers", "2", "--rounds", "3", "--inner-steps", "2", "--dir", str(folder), "--json", str(report))
    async with demo(*arguments) as (process, descendants):
        _, err = await asyncio.wait_for(process.communicate(), 400)
        assert process.returncode == 0, err.decode()
        assert len(descendants) >= 5
        assert alive(list(descendants.values())) == []
    check_report(json.loads(report.read_text()), folder)

    exported = await run_command("export", "--to", str(tmp_path / "again"), "--dir", str(folder / "peer-1"), "--json")
    assert exported.code == 0, exported.err
    assert json.loads(exported.out)["state_root"] == history(folder / "peer-1")[-1]["root"]
    for model in (folder / "model", tmp_path / "again"):
        loading = await asyncio.create_subprocess_exec(sys.executable, "-I", "-c", LOAD, str(model))
        assert await asyncio.wait_for(loading.wait(), 120) == 0
    card = (folder / "model" / "README.md").read_text()
    assert json.loads(report.read_text())["run_id"] in card


def check_report(outcome: dict[str, Any], folder: Path) -> None:
    assert set(outcome) == FIELDS
    assert outcome["run_id"] == Manifest.read(folder / "run.yaml").run_id
    assert outcome["rounds"] == 3
    assert outcome["state_roots_agree"] is True
    assert set(outcome["loss"]) == {"train_first", "train_last", "validation_first", "validation_last"}
    assert outcome["loss"]["validation_last"] < outcome["loss"]["validation_first"]
    assert set(outcome["round_overhead_s"]) == {"p50", "p95"}
    assert outcome["ledger"]["verified"] is True
    assert len(bytes.fromhex(outcome["ledger"]["root"])) == 32
    assert outcome["ledger"]["size"] >= 1 + 2 + 3 * 4
    assert len(outcome["peers"]) == 2
    for peer in outcome["peers"]:
        assert set(peer) == {"peer_id", "tokens", "bytes_sent", "bytes_received", "rounds", "credits"}
        assert set(peer["credits"]) == {"pending", "verified", "final"}
        assert min(peer["tokens"], peer["bytes_sent"], peer["bytes_received"], peer["rounds"]) > 0
        assert sum(peer["credits"].values()) > 0
    assert outcome["bytes_sent_total"] == sum(peer["bytes_sent"] for peer in outcome["peers"])
    assert outcome["tokens"] == sum(peer["tokens"] for peer in outcome["peers"])


@pytest.mark.parametrize("moment", ["preparing", "training"])
async def test_ctrl_c_leaves_no_process_and_no_broken_file(tmp_path: Path, moment: str) -> None:
    """Interrupted while it prepares or while it trains, a demo ends everything that it has started, and every file is whole."""
    folder = tmp_path / "demo"
    async with demo("--peers", "2", "--rounds", "100000", "--inner-steps", "2", "--dir", str(folder)) as (process, descendants):
        if moment == "training":
            await eventually(lambda: len(history(folder / "peer-0")) >= 2, "two rounds", 200)
        else:
            await eventually(lambda: folder.exists(), "the folder", 60)
        process.send_signal(signal.SIGINT)
        _, err = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 130, err.decode()
        assert b"Traceback" not in err
        assert alive(list(descendants.values())) == []
    if moment == "training":
        check_files(folder)


def check_files(folder: Path) -> None:
    from peer.state import Layout, load_newest

    manifest = Manifest.read(folder / "run.yaml")
    for name in ("peer-0", "peer-1"):
        peer = folder / name
        loaded = load_newest(peer / "checkpoints", Layout.of(manifest), manifest.run_id)
        assert list(loaded.skipped) == []
        for line in (peer / "history.jsonl").read_text().splitlines():
            json.loads(line)
        for receipt in (peer / "receipts").iterdir():
            assert parse(Signed, receipt.read_bytes()).signature
        assert list(peer.rglob("*.tmp")) == []
        assert "Traceback" not in (peer / "log").read_text()
    database = sqlite3.connect(folder / "coordinator" / "coordinator.db")
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()
