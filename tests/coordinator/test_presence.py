"""Who is alive."""

from __future__ import annotations

import pytest

from coordinator.presence import MAX_PEERS, Presence, Sighting
from swarm.errors import Rejected

TTL_S = 45.0


def announce(presence: Presence, peer_id: str, now_s: float, issued_at: int | None = None) -> None:
    """A fresh announcement at `now_s`."""
    sighting = Sighting(peer_id, ("/ip4/1.2.3.4",), 0, now_s)
    presence.announced(sighting, int(now_s) if issued_at is None else issued_at, f"{peer_id}{now_s}".encode())


def test_peers_expire() -> None:
    """A silent peer is forgotten after the time to live, one that reports meanwhile is not."""
    presence = Presence(TTL_S, 0.0)
    announce(presence, "a", 0.0)
    announce(presence, "b", 0.0)
    presence.heard("b", 30.0)
    presence.heard("unknown", 30.0)
    presence.expire(46.0)
    assert [sighting.peer_id for sighting in presence.others("", 10)] == ["b"]


def test_interval_is_well_within_the_silence() -> None:
    """A peer that announces on time can't be taken for gone."""
    presence = Presence(TTL_S, 0.0)
    assert presence.interval_s == 10.0
    assert presence.silence_s == 15.0
    assert Presence(3.0, 0.0).silence_s == 5.0


def test_newest_first_without_oneself() -> None:
    """The peers heard last come first, bounded, and never the asking one."""
    presence = Presence(TTL_S, 0.0)
    for number in range(5):
        announce(presence, str(number), float(number))
    assert [sighting.peer_id for sighting in presence.others("4", 2)] == ["3", "2"]


def test_genesis_is_sticky() -> None:
    """One peer starts the run until it leaves or expires; then another may."""
    presence = Presence(TTL_S, 0.0)
    announce(presence, "a", 0.0)
    assert presence.choose_genesis("a")
    assert not presence.choose_genesis("b")
    announce(presence, "b", 40.0)
    presence.expire(50.0)
    assert presence.choose_genesis("b")
    presence.left("b", 60, b"bye")
    assert presence.choose_genesis("c")


def test_genesis_survives_a_restart() -> None:
    """After a restart the remembered peer has a whole time to live to come back."""
    presence = Presence(TTL_S, 100.0, genesis="a")
    presence.expire(140.0)
    assert not presence.choose_genesis("b")
    presence.expire(146.0)
    assert presence.choose_genesis("b")


ROSTER = frozenset({"a", "b", "c"})


def hold(presence: Presence, peer_id: str, now_s: float, round_index: int = 7, *, playing: bool = False) -> bool:
    """Announce a state, and ask to resume the run unless playing; whether the peer may."""
    sighting = Sighting(peer_id, ("/ip4/1.2.3.4",), round_index, now_s, b"root of %d" % round_index, playing)
    presence.announced(sighting, int(now_s), f"{peer_id}{now_s}".encode())
    return not playing and presence.choose_resumer(peer_id, lambda _: [ROSTER], now_s)


def test_the_newest_state_of_a_majority_is_resumed() -> None:
    """A majority of the roster decides at once; of its holders the smallest peer id resumes, and stays chosen."""
    presence = Presence(TTL_S, 0.0)
    assert not hold(presence, "c", 1.0)
    assert not hold(presence, "a", 2.0, 9)
    assert hold(presence, "b", 3.0)
    assert not hold(presence, "c", 4.0)
    assert not hold(presence, "a", 5.0)
    assert hold(presence, "b", 6.0)


def test_who_began_the_run_does_not_resume_it_alone_after_a_restart() -> None:
    """The coordinator was away and the first peer is the first to speak, left out by the others, who go on playing."""
    presence = Presence(TTL_S, 100.0, genesis="a")
    assert not hold(presence, "a", 101.0)
    assert not hold(presence, "b", 109.0, 8, playing=True)
    assert not hold(presence, "a", 111.0)
    assert not hold(presence, "a", 121.0)


def test_whom_the_silence_favours_is_chosen_anew_once_somebody_has_played() -> None:
    """A single holder resumes after the silence only; when the others have played and paused, their newer state wins."""
    presence = Presence(TTL_S, 0.0)
    assert not hold(presence, "a", 1.0)
    assert not hold(presence, "a", 16.0)
    assert hold(presence, "a", 16.1)
    for peer in ("b", "c"):
        assert not hold(presence, peer, 17.0, 9, playing=True)
    assert not hold(presence, "a", 18.0)
    assert not hold(presence, "c", 19.0, 9)
    assert hold(presence, "b", 19.0, 9)


def test_the_first_to_come_waits_for_who_may_have_a_newer_state() -> None:
    """However long everybody was away: the silence begins with the first that comes back, and who comes later may be further."""
    presence = Presence(TTL_S, 0.0)
    assert not hold(presence, "a", 1.0, 9, playing=True)
    presence.left("a", 2, b"bye")
    assert not hold(presence, "b", 1000.0)
    assert not hold(presence, "a", 1010.0, 9)
    assert not hold(presence, "b", 1014.0)
    assert hold(presence, "a", 1016.0, 9)
    assert not hold(presence, "b", 1017.0)


def test_nobody_is_gone_right_after_a_restart() -> None:
    """Peers that weren't heard yet count as heard at the start."""
    presence = Presence(TTL_S, 100.0)
    assert presence.recently_heard(["a"], 110.0) == ["a"]
    assert presence.recently_heard(["a"], 116.0) == []


def test_replays() -> None:
    """The newest announcement may be repeated; an older one, or an earlier one of the same second, is refused."""
    presence = Presence(TTL_S, 0.0)
    sighting = Sighting("a", (), 0, 0.0)
    presence.announced(sighting, 10, b"first")
    assert presence.is_repeat("a", 10, b"first")
    assert not presence.is_repeat("a", 10, b"second")
    presence.announced(sighting, 10, b"second")
    for issued_at, payload_hash in ((10, b"first"), (9, b"old")):
        with pytest.raises(Rejected, match="replayed"):
            presence.is_repeat("a", issued_at, payload_hash)
    presence.left("a", 11, b"bye")
    with pytest.raises(Rejected, match="replayed"):
        presence.is_repeat("a", 10, b"second")


def test_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many keys announce, memory is bounded and the newest stay."""
    monkeypatch.setattr("coordinator.presence.MAX_PEERS", 3)
    presence = Presence(TTL_S, 0.0)
    for number in range(10):
        announce(presence, str(number), 1.0)
    assert len(presence) == len(presence._issued) == 3
    assert MAX_PEERS >= 100_000
