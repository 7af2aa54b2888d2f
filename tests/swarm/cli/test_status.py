"""`swarm status`: what is shown of an answer."""

from __future__ import annotations

from dataclasses import asdict

from peer.routing import ExpertLoad
from swarm.cli import status


def test_the_use_of_experts_is_one_line() -> None:
    """For a mixture only, and for peers that tell it."""
    load = ExpertLoad.of([[6.0, 2.0, 0.0, 0.0]])
    assert status._experts(asdict(load)) == {
        "experts": "busiest 3.00, idlest 0.00 of an even share; 2 of 4 unused in the last round"
    }
    assert status._experts(None) == {}
