"""Counts and shares as people write them."""

from __future__ import annotations

from spt_fast.quantities import amount, percent

__all__ = ["amount", "number", "percent", "three_digits", "times"]


def number(value: float) -> str:
    """0.0547, 13.3, 6,670; three digits, and never a power of ten."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= 1000 else f"{rounded:g}"


def times(count: float) -> str:
    """Once, or 13.3 times."""
    said = number(count)
    return "once" if said == "1" else f"{said} times"


def three_digits(share: float) -> float:
    """A share as it was asked for: what was achieved differs from that by a window."""
    return float(f"{share:.3g}")
