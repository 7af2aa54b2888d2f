"""Who passes whose parts on, where everybody wants everybody's: pure, and the same on every peer that knows the same commits.

A slow uplink sends each of its parts once, to a peer with a faster one, which passes it on to the others. That takes a hop more:
a peer whose uplink isn't much slower than the others' sends its parts itself.
"""

from __future__ import annotations

import hashlib
import statistics
from bisect import bisect_right
from collections.abc import Collection, Mapping
from itertools import accumulate

LEAST_SHARE = 0.25


def relayed_share(author: str, uploads: Mapping[str, int], authors: Collection[str]) -> float:
    """The share of an author's parts that others should pass on: 0 where its own uplink is fast enough.

    `uploads` are bytes per second of everybody who wants the parts, 0 = unknown, which counts as the median. If all uplinks are
    to be busy for the same time, each sends in proportion to its speed; what that leaves an author unable to send itself is
    passed on.
    """
    copies = len(uploads) - 1
    if copies < 2 or author not in uploads:
        return 0.0
    share = (copies - _fair_load(author, uploads, authors)) / (copies - 1)
    return min(1.0, share) if share >= LEAST_SHARE else 0.0


def relays_of(
    round_index: int, author: str, parts: Collection[int], uploads: Mapping[str, int], authors: Collection[str]
) -> dict[int, str]:
    """Part to the peer that passes it on, for those parts of `author` that aren't better had from the author itself.

    Relays are drawn by hash, in proportion to what their uplinks have to spare.
    """
    share = relayed_share(author, uploads, authors)
    spare = {
        peer: max(0.0, _fair_load(peer, uploads, authors) - (len(uploads) - 1) * (peer in authors))
        for peer in sorted(uploads)
        if peer != author
    }
    if not share or not any(spare.values()):
        return {}
    peers, edges = list(spare), list(accumulate(spare.values()))
    found = {}
    for part in parts:
        seed = hashlib.blake2b(f"{round_index} {author} {part}".encode(), digest_size=16).digest()
        relayed, drawn = (int.from_bytes(half, "big") / 2**64 for half in (seed[:8], seed[8:]))
        if relayed < share:
            found[part] = peers[min(bisect_right(edges, drawn * edges[-1]), len(peers) - 1)]
    return found


def _fair_load(peer: str, uploads: Mapping[str, int], authors: Collection[str]) -> float:
    """How many updates a peer should send in all, if everybody's uplink is to be busy equally long."""
    known = [rate for rate in uploads.values() if rate > 0]
    if not known:
        return float(len(uploads) - 1)
    middle = statistics.median(known)
    rates = {name: rate or middle for name, rate in uploads.items()}
    return len(authors) * (len(uploads) - 1) * rates[peer] / sum(rates.values())
