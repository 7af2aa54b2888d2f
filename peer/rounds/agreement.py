"""Which state the roster holds after a round: a pure count of signed results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["open", "agreed", "differs", "split"]


@dataclass(frozen=True)
class Agreement:
    """The outcome of a count. `root` is the majority's, if there is one."""

    verdict: Verdict
    root: bytes | None = None
    holders: tuple[str, ...] = ()


def count(roots: Mapping[str, bytes], voters: Sequence[str], mine: bytes | None) -> Agreement:
    """Count one vote per voter. A root needs more than half of all voters, whether or not they have voted.

    `agreed`: the majority holds `mine`; `differs`: it holds another root; `split`: all have voted and there is no majority.
    """
    root, holders = strongest(roots, voters)
    if root is not None and 2 * len(holders) > len(voters):
        return Agreement("agreed" if root == mine else "differs", root, holders)
    return Agreement("split" if voters and set(voters) <= set(roots) else "open")


def strongest(roots: Mapping[str, bytes], voters: Sequence[str]) -> tuple[bytes | None, tuple[str, ...]]:
    """The root with the most votes and who holds it; of equals the first in order, so that all choose the same."""
    votes = Counter(roots[peer] for peer in voters if peer in roots)
    if not votes:
        return None, ()
    root = min(votes, key=lambda item: (-votes[item], item))
    return root, tuple(peer for peer in voters if roots.get(peer) == root)


def newest(results: Sequence[tuple[int, bytes, str]]) -> tuple[int, bytes, tuple[str, ...]] | None:
    """What a joiner takes for the swarm's state, out of (round, root, signer): the newest round's most supported root.

    A newer round is preferred only if more than half as many peers vouch for it as for the best supported one, so that a single
    liar with a later round misleads nobody where two or more tell the truth.
    """
    signers: dict[tuple[int, bytes], set[str]] = {}
    for round_index, root, signer in results:
        signers.setdefault((round_index, root), set()).add(signer)
    if not signers:
        return None
    strongest = max(len(names) for names in signers.values())
    round_index, root = max(
        (key for key, names in signers.items() if 2 * len(names) > strongest), key=lambda key: (key[0], len(signers[key]), key[1])
    )
    return round_index, root, tuple(sorted(signers[round_index, root]))


def present_rounds(claims: Mapping[str, int]) -> list[int]:
    """Which round the swarm may be in, likeliest first, out of what each peer says of itself.

    Those who play together are at most one round apart, so a round is as likely as there are peers that claim it or the one
    before; of equally likely ones the newest comes first. With a majority of honest peers the first is theirs.
    """
    claimed = Counter(claims.values())
    return sorted(claimed, key=lambda index: (claimed[index] + claimed[index - 1], index), reverse=True)
