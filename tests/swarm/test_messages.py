"""Signed messages on the wire, and join links."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import LinkError, Rejected
from swarm.identity import Identity
from swarm.messages import JoinLink, open_signed, payload_hash, seal, split_hashes
from swarm.rpc.v1.signed_pb2 import Commit, Result, Signed

ALICE = Identity.from_seed(bytes(range(32)))
BOB = Identity.from_seed(b"b" * 32)
RUN = b"\x01" * 32
COMMIT = Commit(run_id=RUN, round=7, base_root=b"\x02" * 32, weight=4, tokens=256, codec="fp16", loss=2.5)


def test_golden_commit() -> None:
    """A commit's bytes, signature and hash are what other implementations compute."""
    signed = seal(ALICE, COMMIT)
    assert signed.payload.hex() == "0a20" + "01" * 32 + "10071a20" + "02" * 32 + "2004288002320466703136590000000000000440"
    assert signed.signature.hex() == (
        "d5c68e0014b712d1fe97da3438d7da3b187a2ed6fef03a119aa9149ec9763e3f"
        "998f4406ec54f9debcc67dfc687a4a78c02745e6b98dc1e4b4e745809507ee0d"
    )
    assert payload_hash(signed).hex() == "c4077470f518e584f9e617480235eb91e8f37f1964e0164ef8233a4be104ef3a"


def test_open_gives_the_message_back() -> None:
    """An untouched message opens for its signer and run."""
    assert open_signed(seal(ALICE, COMMIT), Commit, ALICE.peer_id, RUN) == COMMIT


def rejected(signed: Signed, **expected: object) -> str:
    """The reason for which opening fails."""
    with pytest.raises(Rejected) as caught:
        open_signed(signed, expected.pop("kind", Commit), **expected)
    return caught.value.reason


def test_every_check_has_its_reason() -> None:
    """Size, kind, signer, signature, parsability and run are told apart."""
    good = seal(ALICE, COMMIT)
    assert rejected(seal(ALICE, Commit(codec="x" * 40_000))) == "too_large"
    assert rejected(good, kind=Result) == "wrong_kind"
    assert rejected(good, signer=BOB.peer_id) == "wrong_signer"
    assert rejected(good, run_id=b"\x09" * 32) == "wrong_run"
    forged = Signed(kind=good.kind, payload=good.payload, signer=BOB.peer_id, signature=good.signature)
    assert rejected(forged) == "bad_signature"
    garbage = Signed(kind=good.kind, payload=b"\xff", signer=ALICE.peer_id, signature=ALICE.sign(good.kind, b"\xff"))
    assert rejected(garbage) == "malformed"


@given(st.data())
def test_any_flipped_bit_is_noticed(data: st.DataObject) -> None:
    """Changing one bit of payload or signature makes the message invalid."""
    signed = seal(ALICE, COMMIT)
    name = data.draw(st.sampled_from(["payload", "signature"]))
    content = bytearray(getattr(signed, name))
    position = data.draw(st.integers(0, len(content) * 8 - 1))
    content[position // 8] ^= 1 << position % 8
    setattr(signed, name, bytes(content))
    assert rejected(signed) == "bad_signature"


def test_split_hashes() -> None:
    """Concatenated hashes come apart only when they come out even."""
    assert split_hashes(b"a" * 32 + b"b" * 32) == [b"a" * 32, b"b" * 32]
    with pytest.raises(Rejected, match="malformed"):
        split_hashes(b"a" * 33)


def test_golden_link() -> None:
    """A link's text form is fixed."""
    link = JoinLink("example.org", 4300, b"\x01" * 32, b"\x02" * 32)
    text = "swarm://example.org:4300/" + "aeaqcaib" * 6 + "aeaq" + "#" + "aibaeaqc" * 6 + "aiba"
    assert str(link) == text
    assert JoinLink.parse(f" {text}\n") == link


@given(st.integers(1, 65535), st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32))
def test_links_round_trip(port: int, run_id: bytes, fingerprint: bytes) -> None:
    """Every link reads back as itself, also with an IPv6 address."""
    for host in ("10.0.0.1", "[::1]", "a-b.example"):
        link = JoinLink(host, port, run_id, fingerprint)
        assert JoinLink.parse(str(link)) == link


@pytest.mark.parametrize(
    "text", ["", "http://x", "swarm://h:1/abc#def", str(JoinLink("h", 1, RUN, RUN)).replace(":1/", ":99999/")]
)
def test_broken_links_say_so(text: str) -> None:
    """What is not a whole link is refused with a hint."""
    with pytest.raises(LinkError) as caught:
        JoinLink.parse(text)
    assert caught.value.hint
