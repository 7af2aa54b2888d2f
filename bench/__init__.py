"""Benchmarks: `python -m bench.NAME [--quick] [--json FILE]`. Each prints a table and writes the figures as JSON."""

import os

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # read when grpc is imported; it notes every fork of a process that uses it
