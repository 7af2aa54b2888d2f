"""What an auditor makes of pieces: honest ones pass, in any precision; whatever else was committed to doesn't."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from peer.generator import Generator
from peer.model import initial_theta
from peer.pieces import Piece, pack, unpack
from peer.rounds.planning import sample_spans
from peer.rounds.proofreading import Proofreader
from peer.rounds.training import TrainingThread
from peer.rounds.values import CommitFacts, RosterMember
from peer.trainer import Progress
from swarm.audits import FAILED, PASSED
from swarm.errors import Rejected
from swarm.manifest import Manifest
from tests.writing import writing_run

CPU = torch.device("cpu")
PEERS = ("12D3KooWa", "12D3KooWb", "12D3KooWc")
ROSTER = tuple(RosterMember(peer, quota) for peer, quota in zip(PEERS, (2, 5, 3), strict=True))
BATCH, ROUND = 10, 2
SEED = bytes(range(32))


@dataclass(frozen=True)
class Written:
    """A run that generates, and what one of its peers has written in a round."""

    manifest: Manifest
    files: Path
    thread: TrainingThread
    piece: Piece

    def commit(self, raw: bytes, peer: str = PEERS[1]) -> CommitFacts:
        """What a peer with this piece would commit to."""
        piece = unpack(raw, self.thread.generator.writer.sampling, 257)
        return CommitFacts(peer, b"", piece.tokens, (), loss=piece.loss)

    async def judged(self, raw: bytes, commit: CommitFacts | None = None) -> tuple[str, str]:
        """An auditor's finding and its reason."""
        reader = Proofreader(self.thread, ROUND, ROSTER, BATCH)
        found = await reader.judged(commit or self.commit(raw), raw, SEED)
        assert found is not None
        return found.finding, found.reason


def manifest_of(folder: Path, seed: int) -> tuple[Manifest, Path]:
    """A run and its files."""
    folder.mkdir(exist_ok=True)
    return writing_run(folder, seed, BATCH, top_p=0.95, stop=[256, *range(0, 250, 25)])[:2]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Written]:
    manifest, files = manifest_of(tmp_path_factory.mktemp("run"), 3)
    thread = TrainingThread(Generator.open(manifest, CPU, files))
    raw = thread.generator.write_round(*sample_spans(ROUND, ROSTER, BATCH)[PEERS[1]]).piece
    yield Written(manifest, files, thread, unpack(raw, thread.generator.writer.sampling, 257))
    thread.close()


async def test_an_honest_piece_passes(written: Written) -> None:
    """The state stays one zero, the weight is in tokens."""
    assert (written.piece.first, len(written.piece.samples)) == (BATCH + 2, 5)
    assert await written.judged(pack(written.piece.samples, "fp32")) == (PASSED, "")
    assert initial_theta(written.manifest.model).tolist() == [0]


async def test_a_peer_that_was_stopped_shows_less(written: Written) -> None:
    """Fewer samples pass, from the first on; none at all is no contribution."""
    assert await written.judged(pack(written.piece.samples[:2], "fp32")) == (PASSED, "")
    contribution = await written.thread.write(BATCH + 2, 5)
    assert contribution.weight == written.piece.tokens
    written.thread.stop("pause")
    stopped = await written.thread.write(BATCH + 2, 5)
    reader = Proofreader(written.thread, ROUND, ROSTER, BATCH)
    raw = pack(written.piece.samples, "fp32")
    assert await reader.judged(written.commit(raw), raw, SEED) is None
    written.thread.go_on()
    assert (stopped.weight, stopped.piece) == (0, b"")


@pytest.mark.parametrize(
    "change",
    [
        lambda samples: samples[1:],
        lambda samples: [replace(sample, index=sample.index - 2) for sample in samples],
        lambda samples: [*samples, replace(samples[0], index=samples[-1].index + 1)],
    ],
    ids=["without the first", "another's", "one too many"],
)
async def test_other_samples_than_promised_fail(written: Written, change: Callable[..., list[object]]) -> None:
    """Whoever picks samples, copies a piece or adds to its own."""
    assert await written.judged(pack(change(list(written.piece.samples)), "fp32")) == (FAILED, "piece")  # type: ignore[arg-type]


async def test_a_commit_that_says_otherwise_fails(written: Written) -> None:
    """More tokens than the piece has, or another loss, or a peer that wasn't there."""
    raw = pack(written.piece.samples, "fp32")
    commit = written.commit(raw)
    changes = {"weight": commit.weight + 1}, {"loss": commit.loss + 0.1}, {"peer": "12D3KooWx"}
    for change in changes:
        assert await written.judged(raw, replace(commit, **change)) == (FAILED, "piece")


async def test_samples_that_the_model_did_not_write_fail(written: Written) -> None:
    """Made up, of another model, or with made up losses."""
    samples = written.piece.samples
    made_up = [replace(sample, tokens=np.append(np.full(sample.tokens.size - 1, 33), sample.tokens[-1])) for sample in samples]
    assert await written.judged(pack(made_up, "fp32")) == (FAILED, "sample_tokens")
    assert await written.judged(pack([replace(item, loss=1.0) for item in samples], "fp32")) == (FAILED, "sample_loss")


async def test_another_model_is_found_out(written: Written, tmp_path: Path) -> None:
    """One of the same architecture, in the same run's name."""
    manifest, files = manifest_of(tmp_path, 4)
    other = Generator.open(manifest, CPU, files)
    other.writer._run = written.thread.generator.writer._run
    raw = other.write_round(BATCH + 2, 5).piece
    assert await written.judged(raw) == (FAILED, "sample_tokens")


async def test_bytes_that_are_no_piece_are_rejected(written: Written) -> None:
    """Truncated, empty, of an unknown precision, with samples that go on after their end."""
    raw = pack(written.piece.samples, "fp32")
    long = replace(written.piece.samples[0], tokens=np.full(17, 33))
    for bad in (raw[:-9], b"", pack(written.piece.samples, "int8"), pack([long], "fp32"), b"\xff" * 50):
        with pytest.raises(Rejected):
            await written.judged(bad, written.commit(raw))


def test_the_last_round_writes_what_is_left(written: Written) -> None:
    """No sample is written beyond the last that was asked for; progress is told."""
    told: list[Progress] = []
    made = written.thread.generator.write_round(20, 10, progress=told.append)
    assert [sample.index for sample in unpack(made.piece, written.thread.generator.writer.sampling, 257).samples] == [
        20,
        21,
        22,
        23,
    ]
    assert (told[-1].samples, told[-1].samples_total) == (4, 4)
    assert written.thread.generator.write_round(24, 10).piece == b""


def test_spans_follow_from_the_roster() -> None:
    """They follow each other, in the order of peer ids, and stay within the round."""
    assert sample_spans(1, ROSTER, BATCH) == {PEERS[0]: (0, 2), PEERS[1]: (2, 5), PEERS[2]: (7, 3)}
    assert sample_spans(3, ROSTER[::-1], BATCH)[PEERS[1]] == (22, 5)
    assert sample_spans(1, ROSTER, 6) == {PEERS[0]: (0, 2), PEERS[1]: (2, 4), PEERS[2]: (6, 0)}
