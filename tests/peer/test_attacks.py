"""What attackers send instead of an honest update."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from peer.attacks import ATTACK_VARIABLE, KINDS, Attack
from peer.leaves import Leaf
from peer.rounds.run import Contribution
from swarm.errors import UsageError
from swarm.rpc.v1.peer_pb2 import Delivery
from swarm.rpc.v1.signed_pb2 import Member, Proposal, Signed
from tests.peer.codec.codec_cases import normal

UPDATE = normal(4096)
HONEST = Contribution(UPDATE, 8, 1.0, 2.0)


def sent(kind: str) -> np.ndarray:
    update = Attack(kind, np.random.default_rng(0)).contribution(HONEST).update
    assert update is not None
    return np.asarray(update)


def test_each_kind_does_what_it_says() -> None:
    """Directions and norms."""
    norm = np.linalg.norm(UPDATE)
    assert np.array_equal(sent("sign_flip"), -UPDATE)
    assert np.array_equal(sent("ipm"), UPDATE * np.float32(-0.5))
    assert np.linalg.norm(sent("scale")) == pytest.approx(1000 * norm, rel=1e-4)
    assert np.linalg.norm(sent("noise")) == pytest.approx(10 * norm, rel=1e-4)
    assert np.linalg.norm(sent("plausible_noise")) == pytest.approx(norm, rel=1e-4)
    assert abs(float(sent("plausible_noise") @ UPDATE)) < 0.1 * norm**2
    assert not sent("zeros").any()
    assert np.allclose(UPDATE - sent("alie"), np.sqrt(np.mean(UPDATE**2)), rtol=1e-3)


def test_a_free_rider_sends_what_it_had() -> None:
    """The update of the round before."""
    attack, other = Attack("stale"), Contribution(normal(4096, 1), 8, 1.0, 2.0)
    attack.contribution(HONEST)
    assert attack.contribution(other).update is UPDATE
    assert attack.contribution(HONEST).update is other.update


def test_work_that_is_left_out() -> None:
    """Half of it is done, or nine tenths in the mean over rounds; all of it is claimed, in leaves that are too long."""
    leaf = Leaf(4, 2.0, np.zeros((8, 32), dtype=np.float32))
    attack = Attack("skip")
    assert attack.quota(20) == 10
    claimed = attack.contribution(replace(HONEST, leaves=(leaf, leaf)))
    assert (claimed.weight, [item.samples for item in claimed.leaves]) == (16, [8, 8])
    tenth = Attack("skip_tenth", np.random.default_rng(0))
    done = [tenth.quota(4) for _ in range(1000)]
    assert set(done) == {3, 4}
    assert sum(done) == pytest.approx(3600, rel=0.02)
    while tenth.quota(4) == 4:
        pass
    claimed = tenth.contribution(replace(HONEST, weight=12, leaves=(leaf, leaf, leaf)))
    assert (claimed.weight, [item.samples for item in claimed.leaves]) == (16, [4, 4, 8])
    assert Attack("sign_flip").quota(20) == 20


def test_flipped_labels() -> None:
    """The last token id for the first, and so on; others leave labels alone."""
    labels = torch.tensor([[0, 1, 9]])
    assert Attack("label_flip").labels(labels, 10).tolist() == [[9, 8, 0]]
    assert Attack("skip").labels(labels, 10) is labels


def test_what_else_they_say() -> None:
    """Two proposals, wrong chunks, and old messages; everybody else says things once."""
    message = Proposal(round=3, next_roster=[Member(peer_id="a", quota=4)])
    first, second = Attack("equivocate").proposals(message)
    assert (first.next_roster[0].quota, second.next_roster[0].quota) == (4, 2)
    assert Attack("skip").proposals(message) == [message]
    chunk = memoryview(b"chunk")
    assert bytes(Attack("lying_donor").served(chunk) or b"") == b"bhunk"
    assert Attack("lying_donor").served(None) is None
    assert Attack("skip").served(chunk) is chunk
    replay, said = Attack("replay"), [Delivery(evidence=Signed(kind=str(number))) for number in range(3)]
    assert [replay.again(each) for each in said] == [[], said[:1], said[:2]]
    assert Attack("skip").again(said[0]) == []


def test_parts_and_merges() -> None:
    """Of the right size; only the kinds that are about them change anything."""
    assert Attack("nan").parts([b"abc", b"d"]) == [b"\xff\xff\xff", b"\xff"]
    assert np.array_equal(Attack("tamper").merged(UPDATE), -UPDATE)
    for kind in KINDS:
        attack, empty = Attack(kind), Contribution(None, 0, 0.0, 0.0)
        assert attack.contribution(empty) == empty
        assert kind == "tamper" or attack.merged(UPDATE) is UPDATE
        assert kind == "nan" or attack.parts([b"abc"]) == [b"abc"]


def test_only_who_is_told_attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the variable; a misspelt kind is an error."""
    monkeypatch.delenv(ATTACK_VARIABLE, raising=False)
    assert Attack.from_environment() is None
    monkeypatch.setenv(ATTACK_VARIABLE, "ipm")
    assert Attack.from_environment() is not None
    monkeypatch.setenv(ATTACK_VARIABLE, "imp")
    with pytest.raises(UsageError, match="no such attack"):
        Attack.from_environment()
