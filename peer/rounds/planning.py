"""Pure decisions of a leader, which every peer can recompute: rotation, quorum, spans, quotas, grace."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Collection, Mapping, Sequence

from peer.rounds.values import CommitFacts, RosterMember

QUOTA_CHANGE_IGNORED = 0.15
SLOWEST_SHARE = 1 / 16
SHORTEST_S = 1e-3


def leader_of(run_id: bytes, round_index: int, roster: Sequence[str], term: int) -> str:
    """The leader of a term: a rotation over the sorted roster from a start that the round's hash gives."""
    start = int.from_bytes(hashlib.blake2b(run_id + round_index.to_bytes(8, "big"), digest_size=8).digest(), "big")
    return roster[(start + term) % len(roster)]


def quorum_of(roster_size: int) -> int:
    """The majority that must be present for a round to go on without the coordinator's grant."""
    return roster_size // 2 + 1


def roster_hash(roster: Sequence[RosterMember]) -> bytes:
    """BLAKE2b-256 over the members and their quotas."""
    text = "\n".join(f"{member.peer} {member.quota}" for member in roster)
    return hashlib.blake2b(text.encode(), digest_size=32).digest()


def spans_of(part_count: int, uploads: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Cut the parts into one span per reducer, proportional to upload bandwidth (bytes per second, 0 = unknown).

    Largest remainders, ties by peer id; the spans follow each other in the order of peer ids. An unknown bandwidth counts as the
    median of the known ones.
    """
    peers = sorted(uploads)
    known = [rate for rate in uploads.values() if rate > 0]
    middle = int(statistics.median(known)) if known else 1
    rates = {peer: uploads[peer] or middle for peer in peers}
    total = sum(rates.values())
    shares = {peer: part_count * rates[peer] // total for peer in peers}
    rest = sorted(peers, key=lambda peer: (-(part_count * rates[peer] % total), peer))
    for peer in rest[: part_count - sum(shares.values())]:
        shares[peer] += 1
    spans, first = {}, 0
    for peer in peers:
        spans[peer] = (first, shares[peer])
        first += shares[peer]
    return spans


def sample_spans(round_index: int, roster: Sequence[RosterMember], batch_samples: int) -> dict[str, tuple[int, int]]:
    """Where the run generates: the first sample that each member writes in a round, and how many.

    Samples are numbered over the whole run. A round has `batch_samples` of them, which the roster shares by quota, in the order
    of peer ids; quotas beyond that are not used.
    """
    first, end = (round_index - 1) * batch_samples, round_index * batch_samples
    spans = {}
    for member in sorted(roster, key=lambda member: member.peer):
        count = min(member.quota, end - first)
        spans[member.peer] = (first, count)
        first += count
    return spans


def quotas_of(
    members: Sequence[str],
    previous: Mapping[str, int],
    commits: Mapping[str, CommitFacts],
    full_quota: int,
    shared: bool,
    scale_to_speed: bool,
) -> dict[str, int]:
    """The work of each member in the next round.

    `shared`: the quotas add up to `full_quota` (`sync`: the target batch); otherwise `full_quota` is what the fastest gets
    (`diloco`: inner steps), and nobody gets less than one. A member whose speed is not known gets the slowest known share; one
    that was given work and came too late gets half of what it had.
    """
    if not scale_to_speed:
        return _divided(full_quota, dict.fromkeys(members, 1.0)) if shared else dict.fromkeys(members, full_quota)
    speeds = {
        peer: previous[peer] / max(commit.seconds, SHORTEST_S)
        for peer, commit in commits.items()
        if peer in members and previous.get(peer) and commit.weight and commit.seconds > 0
    }
    halves = {peer: max(1, previous[peer] // 2) for peer in members if previous.get(peer) and peer not in commits}
    fastest = max(speeds.values(), default=1.0)
    slowest = min(speeds.values(), default=1.0)
    rates = {peer: speeds.get(peer, slowest) for peer in members if peer not in halves}
    if shared:
        rest = max(len(rates), full_quota - sum(halves.values()))
        unit = sum(rates.values()) / rest if rates else 1.0
        return _divided(full_quota, rates | {peer: unit * half for peer, half in halves.items()})
    least = max(1, int(full_quota * SLOWEST_SHARE))
    wanted = {peer: round(full_quota * rate / fastest) for peer, rate in rates.items()}
    quotas = {peer: _steady(previous.get(peer), quota) for peer, quota in wanted.items()}
    return {peer: min(full_quota, max(least, quota)) for peer, quota in (quotas | halves).items()}


def held_back(
    quotas: Mapping[str, int], newcomers: Collection[str], share: float, full_quota: int, shared: bool
) -> dict[str, int]:
    """The quotas with those of newcomers held to `share` of a full one (`sync`: of an even one), where there are others.

    What `sync` lacks then, the others do.
    """
    held = {peer for peer in quotas if peer in newcomers}
    if not held or len(held) == len(quotas):
        return dict(quotas)
    most = max(1, int(share * (full_quota / len(quotas) if shared else full_quota)))
    capped = {peer: min(quotas[peer], most) for peer in held}
    others = {peer: quota for peer, quota in quotas.items() if peer not in held}
    if shared:
        others = _divided(sum(quotas.values()) - sum(capped.values()), others)
    return others | capped


def grace_of(lateness_s: Sequence[float], floor_s: float, mads: float) -> float:
    """How long a late peer is waited for once a quorum has committed: median + k x MAD of recent lateness, in seconds."""
    if not lateness_s:
        return 10 * floor_s
    middle = statistics.median(lateness_s)
    spread = statistics.median(abs(value - middle) for value in lateness_s)
    return max(floor_s, middle + mads * spread)


def _steady(previous: int | None, wanted: int) -> int:
    """Ignore small changes, so that noise in the speeds doesn't move the quotas."""
    if previous and abs(wanted - previous) <= QUOTA_CHANGE_IGNORED * previous:
        return previous
    return wanted


def _divided(total: int, rates: Mapping[str, float]) -> dict[str, int]:
    """`total` in proportion to `rates`, at least one each: largest remainders, ties by peer id; the largest pay for the least."""
    peers, whole = sorted(rates), sum(rates.values())
    exact = {peer: total * rates[peer] / whole for peer in peers}
    quotas = {peer: max(1, int(exact[peer])) for peer in peers}
    left = total - sum(quotas.values())
    for peer in sorted(peers, key=lambda name: (quotas[name] - exact[name], name))[: max(0, left)]:
        quotas[peer] += 1
    for _ in range(min(-left, sum(quotas.values()) - len(peers))):
        quotas[max(peers, key=lambda name: quotas[name])] -= 1
    return quotas
