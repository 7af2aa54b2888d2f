"""Benchmarks: `python -m bench.NAME [--quick] [--json FILE]`. Each prints a table and writes the figures as JSON."""
