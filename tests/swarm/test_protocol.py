"""Which version of the protocol two sides use."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import Rejected
from swarm.protocol import OURS, SILENT, TOO_NEW, TOO_OLD, Range, Version, agree, spoken_by, used_in
from swarm.rpc.v1.coordinator_pb2 import Announcement, AnnounceResponse, GetRunRequest
from swarm.rpc.v1.signed_pb2 import AdmissionToken, ProtocolRange, ProtocolVersion

VERSIONS = st.builds(Version, st.integers(1, 3), st.integers(0, 3))
RANGES = st.tuples(VERSIONS, VERSIONS).map(lambda pair: Range(min(pair), max(pair)))


def outcome(theirs: Range, ours: Range) -> Version | str:
    """The version that is used, or the reason why there is none."""
    try:
        return agree(theirs, ours)
    except Rejected as error:
        return error.reason


@given(RANGES, RANGES)
def test_both_sides_come_to_the_same(one: Range, other: Range) -> None:
    """The newest version that both speak, whoever asks; or the older side is told that it is, and the newer one, too."""
    here, there = outcome(one, other), outcome(other, one)
    if isinstance(here, Version):
        assert here == there
        assert here in one
        assert here in other
        assert not [v for v in (one.newest, other.newest) if v > here and v in one and v in other]
    else:
        assert {here, there} == {TOO_OLD, TOO_NEW}
        assert (here == TOO_OLD) == (one.newest < other.oldest)


@given(st.lists(RANGES, min_size=2, max_size=5))
def test_who_can_talk_in_pairs_can_talk_together(ranges: list[Range]) -> None:
    """So a roster needs no vote: it is enough that nobody is let in who can't talk with one of its members."""
    together, pairs = ranges[0], [outcome(one, other) for one in ranges for other in ranges]
    if all(isinstance(used, Version) for used in pairs):
        for each in ranges[1:]:
            together = together.narrowed(each)
        assert all(each.covers(together) for each in ranges)


def test_who_says_nothing_is_from_before() -> None:
    """The first release knew no versions; this one still speaks with it."""
    for said in (GetRunRequest(), Announcement(), AdmissionToken()):
        assert spoken_by(said) == SILENT
    assert used_in(AnnounceResponse()) == Version(1, 0)
    assert str(agree(SILENT)) == "1.0"


def test_a_range_survives_the_way() -> None:
    """What is said is what is heard."""
    assert spoken_by(Announcement(protocol=OURS.message)) == OURS
    assert used_in(AnnounceResponse(protocol=Version(1, 1).message)) == (1, 1)
    assert str(Range(Version(1, 0), Version(2, 3))) == "1.0 to 2.3"


@pytest.mark.parametrize(
    "said",
    [
        ProtocolRange(),
        ProtocolRange(newest=ProtocolVersion(major=1)),
        ProtocolRange(oldest=ProtocolVersion(major=2), newest=ProtocolVersion(major=1, minor=9)),
    ],
)
def test_nonsense_is_no_range(said: ProtocolRange) -> None:
    """There is no version 0, and none that is older than the oldest."""
    with pytest.raises(Rejected, match="malformed"):
        spoken_by(Announcement(protocol=said))
