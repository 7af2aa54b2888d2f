"""One `hivemind.DecentralizedAverager` with a vector of a given length in fp16, for the time that one round of it takes."""

from __future__ import annotations

import tempfile
import time

import hivemind
import torch
from hivemind.compression import Float16Compression

from bench.children import arguments, say, wait_for_go

MATCHMAKING_S, REQUEST_S = 3.0, 2.0
PATIENCE_S = 3600.0


def main() -> None:
    """Average once and say how long that took."""
    given = arguments()
    torch.set_num_threads(1)
    hivemind.p2p.P2P._UNIX_SOCKET_PREFIX = f"/unix{tempfile.gettempdir()}/hivemind-"
    dht = hivemind.DHT(initial_peers=given["initial_peers"], host_maddrs=[f"/ip4/{given['address']}/tcp/0"], start=True)
    averager = hivemind.DecentralizedAverager(
        [torch.randn(given["parameters"])],
        dht,
        prefix="bench",
        target_group_size=given["peers"],
        min_group_size=given["peers"],
        min_matchmaking_time=MATCHMAKING_S,
        request_timeout=REQUEST_S,
        compression=Float16Compression(),
        start=True,
    )
    say(addresses=[str(address) for address in dht.get_visible_maddrs()])
    wait_for_go()
    started = time.monotonic()
    averager.step(timeout=PATIENCE_S)
    say(seconds=time.monotonic() - started)


if __name__ == "__main__":
    main()
