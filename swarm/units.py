"""Amounts that people write with a unit: data rates such as `10Mbit/s`, volumes such as `200GB`."""

from __future__ import annotations

import re
from collections.abc import Mapping

AMOUNT = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z/]*)\s*", re.ASCII)
BYTES = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
}
BITS_PER_S = {"bit/s": 1, "kbit/s": 10**3, "Mbit/s": 10**6, "Gbit/s": 10**9}
RATES = {name: bits / 8 for name, bits in BITS_PER_S.items()} | {f"{name}/s": float(size) for name, size in BYTES.items()}
SLOWEST_RATE = 64_000 / 8
LARGEST = float(1 << 60)


def parse_rate(text: object) -> int:
    """Bytes per second; 0 means that there is no limit. Raises `ValueError` that says what can be written."""
    rate = _parse(text, RATES, "a rate is a number with one of the units")
    if 0 < rate < SLOWEST_RATE:
        raise ValueError(f"{text} is too slow to take part in a run: at least 64kbit/s, or 0 for no limit")
    return rate


def parse_size(text: object) -> int:
    """Bytes; 0 means that there is no limit. Raises `ValueError` that says what can be written."""
    return _parse(text, BYTES, "a volume is a number with one of the units")


def format_rate(bytes_per_s: float) -> str:
    """In decimal bits per second."""
    return _format(bytes_per_s * 8, BITS_PER_S)


def format_size(size_bytes: float) -> str:
    """In decimal bytes."""
    return _format(size_bytes, {name: size for name, size in BYTES.items() if not name.endswith("iB")})


def _parse(text: object, units: Mapping[str, float], rule: str) -> int:
    match = AMOUNT.fullmatch(str(text))
    if match is None:
        raise ValueError(f"{str(text)[:32]!r} can't be read: {rule} {', '.join(units)}, or 0 for no limit")
    number, unit = float(match[1]), match[2]
    if number == 0 and not unit:
        return 0
    if unit not in units:
        problem = f"the unit {unit[:16]!r} is not known" if unit else "the unit is missing"
        raise ValueError(f"{str(text)[:32]!r}: {problem}: {rule} {', '.join(units)}{_meant(unit, units)}")
    if number * units[unit] > LARGEST:
        raise ValueError(f"{str(text)[:32]!r} is too much")
    return round(number * units[unit])


def _meant(unit: str, units: Mapping[str, float]) -> str:
    """Units that differ in upper and lower case only; `b` may be meant as bit or as byte."""
    spelled = {unit.lower(), unit.lower().replace("b/s", "bit/s")}
    found = [name for name in units if name.lower() in spelled]
    return f"; is {' or '.join(found)} meant?" if found else ""


def _format(amount: float, units: Mapping[str, float]) -> str:
    name, size = next(((name, size) for name, size in reversed(list(units.items())) if amount >= size), next(iter(units.items())))
    number = amount / size
    return f"{number:.0f} {name}" if number >= 1000 else f"{number:.4g} {name}"
