"""Swarms with attackers among them, as real processes: what becomes of the loss, who is found out, and what attackers earn.

Honest peers know nothing of it. What counts is read from their folders and from the ledger.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

from peer.attacks import ATTACK_VARIABLE, HONEST_WORK
from peer.evidence import verify_evidence
from peer.outcome import EVIDENCE, held_out_losses, newest_weights
from peer.recipes import tiny_manifest
from peer.rounds.docket import SUFFIX
from peer.tasks import cancel
from swarm.credits import CreditState, apply_entry
from swarm.errors import SwarmError
from swarm.identity import Identity
from swarm.local import LocalPeer, LocalSwarm
from swarm.manifest import Audit, Manifest
from swarm.messages import JoinLink
from swarm.rpc.client import CoordinatorClient
from swarm.scenario import Scenario, last_round, write_run

CHECK_VARIABLE = "SWARM_CHECK_TRAFFIC"
POLL_S = 0.5
KEY = "identity.key"
STALL_S, NEVER = 300.0, 1 << 60
SYBIL, KEYS_EACH = "sybil", 4
LYING_DONOR, LATE_ROUND, LATE_S = "lying_donor", 3, 20.0
VALIDATION_SAMPLES = 512
LONGER_STEPS, FAST_LR = 24, 1.6e-2  # so that in this small model, too, work shows in the loss, and auditors keep up

Told = Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """One swarm: `attackers` of the `peers` attack from the first round on, in the way of `kind` (empty = nobody does).

    `check_traffic` is the share of a round's traffic that honest peers spend on checking others' merges. With an `inner_state`
    that is `kept` nobody can compute a round again: then all contributions are audited, by the loss.
    """

    kind: str = ""
    attackers: int = 2
    peers: int = 8
    rounds: int = 40
    merge: str = "centered_clip"
    check_traffic: float = 0.02
    inner_state: str = "fresh"

    @property
    def clean(self) -> Trial:
        """The same swarm without attackers."""
        return replace(self, kind="")


@dataclass(frozen=True)
class Outcome:
    """What came of a trial.

    `loss` is the held-out one in nats per byte; `detected_after` counts rounds until the first attacker was proven guilty or
    suspended after audits, None if none was; `convicted` and `honest_accused` count such keys; `credit_kept` is the attackers'
    share of all credit, in any state. Those that only disturb do their work: of theirs, what goes beyond it counts.
    """

    loss: float
    rounds: int
    detected_after: int | None
    convicted: int
    honest_accused: int
    credit_kept: float
    roots_agree: bool


async def run(trial: Trial, folder: Path, told: Told = lambda line: None) -> Outcome:
    """Carry a trial out in an empty folder. Raises `SwarmError` if an honest peer fails or nothing moves any more."""
    manifest = await asyncio.to_thread(_manifest, trial, folder / "files")
    path, key = write_run(folder, manifest)
    async with LocalSwarm(folder, {CHECK_VARIABLE: str(trial.check_traffic)}) as swarm:
        await swarm.start_coordinator(path, key)
        honest, attackers = list[LocalPeer](), list[LocalPeer]()

        async def join(attacks: bool) -> None:
            environment = {ATTACK_VARIABLE: trial.kind} if attacks else {}
            name = f"peer-{len(honest) + len(attackers)}"
            peer = await swarm.join(name, "--files", str(folder / "files"), environment=environment)
            (attackers if attacks else honest).append(peer)

        for index in range(trial.peers):
            await join(bool(trial.kind) and index < trial.attackers)
        regular = list(honest)
        if trial.kind == LYING_DONOR:
            await _until_round(honest[0], LATE_ROUND)
            await join(False)
        renewing = asyncio.create_task(_renew(swarm.link, attackers, join)) if trial.kind == SYBIL else None
        try:
            await _until_over(regular, trial.rounds, told)
            for newcomer in honest[len(regular) :]:
                await _end_if_outside(newcomer)
        finally:
            if renewing is not None:
                await cancel([renewing])
                if not renewing.cancelled():
                    renewing.result()
        seen = Scenario(swarm, folder, {peer.name: peer for peer in honest})
        credit = await seen.credit()
        hostile = Scenario(swarm, folder, {peer.name: peer for peer in attackers})
        worked = await hostile.worked() if trial.kind in HONEST_WORK else {}
        suspended = await _suspended(swarm.link)
    guilty = {_key(peer) for peer in attackers} - {""}
    loss = await asyncio.to_thread(_loss, manifest, folder, honest[0].directory)
    accused = {path.stem: path for peer in honest for path in (peer.directory / EVIDENCE).glob(f"*{SUFFIX}")}
    proven = {name: await asyncio.to_thread(_round_of, path) for name, path in accused.items()}
    found = {name: min(found.get(name, NEVER) for found in (proven, suspended)) for name in proven.keys() | suspended}
    total = sum(credit.values())
    return Outcome(
        loss=loss,
        rounds=min(map(last_round, regular)),
        detected_after=min((number for name, number in found.items() if name in guilty), default=None),
        convicted=len(found.keys() & guilty),
        honest_accused=len(found.keys() - guilty),
        credit_kept=sum(max(0, credit.get(peer, 0) - worked.get(peer, 0)) for peer in guilty) / total if total else 0.0,
        roots_agree=not seen.differing_roots(),
    )


async def _until_round(peer: LocalPeer, number: int) -> None:
    """Let a trial go on for some rounds, or as far as it gets."""
    for _ in range(int(STALL_S / POLL_S)):
        if last_round(peer) >= number or not peer.running:
            return
        await asyncio.sleep(POLL_S)


async def _end_if_outside(newcomer: LocalPeer) -> None:
    """Who hasn't come in before all others had ended waits for somebody for ever."""
    with contextlib.suppress(TimeoutError):
        if await newcomer.wait(LATE_S):
            raise SwarmError(f"{newcomer.name} ended with {newcomer.process.returncode}", newcomer.log()[-2000:])
    await newcomer.end()


async def _renew(link: str, attackers: list[LocalPeer], join: Callable[[bool], Awaitable[None]]) -> None:
    """Give an attacker a new key whenever one of theirs is suspended, a few times each."""
    most, replaced = KEYS_EACH * len(attackers), set[str]()
    async with await CoordinatorClient.connect(JoinLink.parse(link)) as client:
        while len(attackers) < most:
            await asyncio.sleep(POLL_S)
            suspended = set((await client.list_audits("")).suspended)
            for peer in list(attackers):
                if peer.name not in replaced and _key(peer) in suspended:
                    replaced.add(peer.name)
                    await peer.end()
                    await join(True)


def _key(peer: LocalPeer) -> str:
    """Empty for a peer that has only just been started."""
    path = peer.directory / KEY
    return Identity.load(path).peer_id if path.exists() else ""


def _manifest(trial: Trial, files: Path) -> Manifest:
    files.mkdir(parents=True)
    made = tiny_manifest(files, trial.peers, total=trial.rounds)
    values = made.model_dump(mode="json")
    values["merge"] = {"kind": trial.merge}
    values["strategy"]["inner_state"] = trial.inner_state
    values["audit"] = Audit().model_dump(mode="json")
    if trial.inner_state == "kept":
        inner = {"kind": "muon", "lr": FAST_LR, "adamw": {"lr": FAST_LR / 2}}
        values["strategy"] |= {"inner_steps": LONGER_STEPS, "inner": inner}
        values["strategy"]["schedule"]["total_tokens"] *= LONGER_STEPS // made.most_inner_steps
        values["audit"]["first"] = trial.rounds
    return Manifest.model_validate(values)


async def _until_over(honest: list[LocalPeer], rounds: int, told: Told) -> None:
    loop = asyncio.get_running_loop()
    newest, moved_s = -1, loop.time()
    while any(peer.running for peer in honest):
        failed = next((peer for peer in honest if peer.process.returncode), None)
        if failed is not None:
            raise SwarmError(f"{failed.name} ended with {failed.process.returncode}", failed.log()[-2000:])
        present = max(map(last_round, honest))
        if present > newest:
            newest, moved_s = present, loop.time()
            told(f"round {newest} of {rounds}")
        if loop.time() > moved_s + STALL_S:
            raise SwarmError(f"no round after {newest} in {STALL_S:.0f} s", honest[0].log()[-2000:])
        await asyncio.sleep(POLL_S)


def _loss(manifest: Manifest, folder: Path, peer: Path) -> float:
    theta = newest_weights(peer, manifest).state.theta
    return held_out_losses(manifest, folder / "files", theta, VALIDATION_SAMPLES).last


async def _suspended(link: str) -> dict[str, int]:
    """The keys that the ledger suspends, and the newest confirmed round at that moment."""
    joined = JoinLink.parse(link)
    async with await CoordinatorClient.connect(joined) as client:
        state = CreditState((await client.get_run()).coordinator)
        found: dict[str, int] = {}
        index = 0
        async for raw in client.entries():
            apply_entry(state, index, raw, check_signatures=False)
            index += 1
            for name in state.suspended(joined.run_id):
                found.setdefault(name, state.progress(joined.run_id).confirmed_round)
    return found


def _round_of(path: Path) -> int:
    return verify_evidence(path.read_bytes()).round_index
