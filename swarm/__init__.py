"""What peers and the coordinator must agree on: identity, manifest, messages, ledger, credits, and the command line."""

__version__ = "0.1.0"
