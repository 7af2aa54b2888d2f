"""What a peer can be proven to have done, by name; the proofs are in `peer.evidence`. No torch: who waits counts them, too."""

from __future__ import annotations

BAD_PART = "bad_part"
WRONG_MERGE = "wrong_merge"
EQUIVOCATION = "equivocation"
FALSE_PASS = "false_pass"  # noqa: S105 - no password
FRAUDS = (BAD_PART, WRONG_MERGE, EQUIVOCATION, FALSE_PASS)
