"""Figures as text."""
from __future__ import annotations

import math
from typing import Any


def percent(share: float, digits: int = 1) -> str:
    """A share from 0 to 1; "-" for nan."""
    return "-" if math.isnan(share) else f"{100 * share:.{digits}f} %"


def duration(seconds: float) -> str:
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}" if seconds else "-"


def size(nbytes: int) -> str:
    """Bytes in binary units; "-" for none."""
    if not nbytes:
        return "-"
    power = min(3, int(math.log2(nbytes) // 10))
    return f"{nbytes} B" if not power else f"{nbytes / 1024**power:.1f} {'KMG'[power - 1]}iB"


def shape(sizes: tuple[int, ...]) -> str:
    return " × ".join(map(str, sizes))


def setting(value: Any) -> str:
    """A value of a run's record: "-" for None, and yes or no."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def flat(record: dict[str, Any], before: str = "") -> dict[str, Any]:
    """A record without records inside: "versions.numpy"."""
    found: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            found |= flat(value, f"{before}{key}.")
        else:
            found[before + str(key)] = value
    return found
