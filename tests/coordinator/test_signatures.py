"""Signatures are checked in place or by processes, with the same outcome, whatever happens to the processes."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator

import psutil
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from coordinator.signatures import SignatureChecker
from swarm.errors import Rejected
from swarm.identity import is_valid, pre_authentication_encoding, public_key_of
from swarm.rpc.v1.signed_pb2 import Signed
from tests.waiting import eventually
from tests.world import World, identity

ALICE = identity(0)
ORDER = 2**252 + 27742317777372353535851937790883648493


def signed(payload: bytes = b"payload") -> Signed:
    """What Alice signs."""
    return Signed(kind="kind", payload=payload, signer=ALICE.peer_id, signature=ALICE.sign("kind", payload))


def forged(**changes: object) -> Signed:
    """The same with something changed afterwards."""
    made = signed()
    made.MergeFrom(Signed(**changes))
    return made


def ours() -> list[psutil.Process]:
    """The processes that check signatures for this one."""
    children = psutil.Process().children()
    return [child for child in children if child.status() != psutil.STATUS_ZOMBIE and "coordinator.signatures" in child.cmdline()]


@pytest.fixture(params=["in place", "in processes"])
async def checker(request: pytest.FixtureRequest) -> AsyncIterator[SignatureChecker]:
    """A checker of either kind."""
    processes = 1 if request.param == "in processes" else 0
    async with SignatureChecker(processes, start_after=0) as made:
        await made.check([signed()])
        await eventually(lambda: made.processes == processes, "the processes start")
        yield made


async def test_valid_signatures_pass_and_forged_ones_are_named(checker: SignatureChecker) -> None:
    """Valid ones pass, large ones too; whatever is changed afterwards is refused with its signer."""
    await asyncio.gather(
        *(checker.check([signed(b"%d" % number)]) for number in range(100)), checker.check([signed(b"x" * 10**6)])
    )
    for bad in (forged(payload=b"other"), forged(kind="other"), forged(signature=b"\x00" * 64), forged(signature=b"short")):
        with pytest.raises(Rejected, match="bad_signature") as caught:
            await checker.check([signed(), bad])
        assert caught.value.sender == ALICE.peer_id
    with pytest.raises(Rejected, match="bad_peer_id"):
        await checker.check([forged(signer="nobody")])


async def test_a_lost_process_costs_nothing() -> None:
    """When the process is killed, what it had and what comes later is checked in place."""
    async with SignatureChecker(1, start_after=0) as checker:
        await checker.check([signed()])
        await eventually(lambda: checker.processes == 1, "the process starts")
        for child in ours():
            child.kill()
        await asyncio.gather(*(checker.check([signed(b"%d" % number)]) for number in range(100)))
        await eventually(lambda: checker.processes == 0, "the process is missed")
        await checker.check([signed()])


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 8, 13])
async def test_leaving_at_any_moment_leaves_no_process(steps: int) -> None:
    """While the process is being started, connected or missed, too."""
    async with SignatureChecker(1, start_after=0) as checker:
        await checker.check([signed()])
        for _ in range(steps):
            await asyncio.sleep(0)
    assert not ours()
    async with SignatureChecker(1, start_after=0) as checker:
        await checker.check([signed()])
        await eventually(lambda: checker.processes == 1, "the process starts")
        for child in ours():
            child.kill()
        await checker.check([signed()])
        await eventually(lambda: checker.processes == 0, "the process is missed")
        for _ in range(steps):
            await asyncio.sleep(0)
    assert not ours()
    gc.collect()  # a process that nobody has waited for warns now, and warnings are errors


async def test_few_signatures_start_no_process() -> None:
    """A quiet coordinator stays one process."""
    proposal, reports = World().round([ALICE], 0)
    async with SignatureChecker(2) as checker:
        await checker.check([*reports, proposal])
        assert checker.processes == 0


@pytest.mark.parametrize("part", ["key", "point", "scalar"])
def test_stricter_than_others(part: str) -> None:
    """Keys and points of small order and scalars out of range are refused: nothing passes here that others refuse."""
    message = pre_authentication_encoding("kind", b"payload")
    key, signature = public_key_of(ALICE.peer_id), ALICE.sign("kind", b"payload")
    neutral = b"\x01" + bytes(31)
    scalar = (int.from_bytes(signature[32:], "little") + ORDER).to_bytes(32, "little")
    changed = {
        "key": (neutral, neutral + bytes(32)),
        "point": (key, neutral + signature[32:]),
        "scalar": (key, signature[:32] + scalar),
    }
    assert is_valid(key, signature, message)
    assert not is_valid(*changed[part], message)


def test_small_order_is_what_others_let_pass() -> None:
    """The looser check of OpenSSL accepts a signature of the neutral key over anything; ours is the stricter one."""
    neutral = b"\x01" + bytes(31)
    try:
        Ed25519PublicKey.from_public_bytes(neutral).verify(neutral + bytes(32), b"anything")
    except InvalidSignature:
        pytest.skip("this OpenSSL refuses it, too")
    assert not is_valid(neutral, neutral + bytes(32), b"anything")
