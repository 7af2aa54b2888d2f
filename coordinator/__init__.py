"""The coordinator: admission, ledger, credits, web page and metrics. No tensor ever passes through it."""

import swarm.rpc  # noqa: F401 - before anything here imports grpc, as it decides what that reads from its environment
