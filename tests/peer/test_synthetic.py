"""Data of what a run's peers have written: pieces on disk, what of them counts, and what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peer.dataset import read
from peer.generator import Generator
from peer.pieces import unpack
from peer.rounds.gathering import PieceFolder
from peer.synthetic import PROVENANCE, Completing, Keeping, Provenance, collect, longest_row, verify
from swarm.errors import DataInvalid
from swarm.identity import Identity
from swarm.manifest import Manifest
from swarm.merkle import blob_hash
from swarm.messages import seal
from swarm.rpc.v1.signed_pb2 import Commit
from tests.writing import EACH, PROMPTS, writing_run

CPU = torch.device("cpu")
TOTAL = PROMPTS * EACH


class Written:
    """A run that generates, and the folder of a peer in which others' pieces are kept."""

    def __init__(self, folder: Path) -> None:
        self.directory = folder / "peer"
        self.directory.mkdir()
        self.manifest, files, self.base = writing_run(self.directory, batch_samples=8)
        self.run_id = bytes.fromhex(self.manifest.run_id)
        self.generator = Generator.open(self.manifest, CPU, files)
        self.peers = [Identity.generate() for _ in range(2)]
        self.keeping = Keeping(sequence_length=longest_row(self.manifest), held_out=0.2)

    def keep(self, peer: int, round_index: int, first: int, count: int, run_id: bytes | None = None) -> PieceFolder:
        """Have a peer write samples, and keep them as everybody does."""
        raw = self.generator.write_round(first, count).piece
        commit = Commit(run_id=run_id or self.run_id, round=round_index, evidence_root=blob_hash(raw))
        folder = PieceFolder(self.directory / "pieces")
        folder.keep(seal(self.peers[peer], commit), blob_hash(raw), round_index, raw)
        return folder

    def collect(self, to: Path, suspended: tuple[str, ...] = (), completing: Completing | None = None) -> Provenance:
        """Make data of it."""
        return collect(self.manifest, self.directory, to, self.keeping, suspended, {}, completing)


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return Written(tmp_path)


def test_pieces_of_all_become_data(written: Written, tmp_path: Path) -> None:
    """Each sample once, whoever wrote it, with its round and author; the licence of the prompts is a matter of the command."""
    written.keep(0, 1, 0, 5)
    written.keep(1, 1, 3, 5)
    written.keep(0, 2, 8, 16)
    made = written.collect(tmp_path / "out")
    assert (made.counts["generated"], made.counts["missing"]) == (TOTAL, 0)
    assert [(source.round, source.first) for source in sorted(made.pieces, key=lambda item: (item.round, item.first))] == [
        (1, 0),
        (1, 3),
        (2, 8),
    ]
    assert {source.peer for source in made.pieces} == {peer.peer_id for peer in written.peers}
    assert read(tmp_path / "out").data.layout == "marked"
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(peer.peer_id in card for peer in written.peers)
    assert "2, from 1 to 2" in card
    found = verify(tmp_path / "out", written.base, CPU, 10)
    assert (found.checked, found.failed) == (10, ())


def test_what_does_not_count_is_left_out_and_can_be_written_here(written: Written, tmp_path: Path) -> None:
    """Suspended keys, other runs, damaged bytes; one machine writes what is missing, as the peers would have."""
    written.keep(0, 1, 0, 8)
    whole = written.collect(tmp_path / "whole", completing=Completing(written.base, CPU))
    written.keep(1, 2, 8, 8)
    written.keep(0, 3, 16, 8, run_id=b"x" * 32)
    (damaged,) = (written.directory / "pieces").glob("*1-*.piece")
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + b"\0")
    made = written.collect(tmp_path / "out")
    assert (made.counts["generated"], made.counts["missing"]) == (8, 16)
    damaged.write_bytes(content)
    made = written.collect(tmp_path / "suspended", suspended=(written.peers[1].peer_id,))
    assert [source.first for source in made.pieces] == [0]
    assert made.about["pieces_left_out"] == {"suspended": 1}
    completed = written.collect(tmp_path / "completed", completing=Completing(written.base, CPU))
    assert (completed.counts, completed.counts["missing"]) == (whole.counts, 0)
    assert read(tmp_path / "completed") == read(tmp_path / "whole")
    assert "missing: 0" in (tmp_path / "completed" / PROVENANCE).read_text()
    with pytest.raises(DataInvalid, match="no piece"):
        written.collect(tmp_path / "none", suspended=tuple(peer.peer_id for peer in written.peers))


def test_pieces_are_served_after_a_restart(written: Written) -> None:
    """By their hashes, as long as they are what they were."""
    written.keep(0, 1, 0, 8)
    folder = PieceFolder(written.directory / "pieces")
    (kept,) = folder.pieces(written.run_id)
    assert (kept.round_index, kept.peer) == (1, written.peers[0].peer_id)
    name = blob_hash(kept.raw)
    assert folder.lookup(name) is None
    folder.load(written.run_id)
    assert folder.lookup(name) == kept.raw
    assert len(unpack(kept.raw, written.generator.writer.sampling, 257).samples) == 8
    (path,) = (written.directory / "pieces").glob("*.piece")
    path.write_bytes(b"else")
    assert folder.lookup(name) is None
    path.unlink()
    assert folder.lookup(name) is None


def test_a_run_that_trains_has_no_samples(written: Written, tmp_path: Path) -> None:
    """Said with what to do instead."""
    values = written.manifest.model_dump(mode="json")
    values["strategy"] = {"kind": "sync", "batch_samples": 8, "schedule": {"total_tokens": 100}}
    values["data"]["layout"] = "plain"
    with pytest.raises(DataInvalid, match="doesn't generate"):
        collect(Manifest.model_validate(values), written.directory, tmp_path / "out", written.keeping, (), {})
