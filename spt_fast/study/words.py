"""Counts and shares as people write them."""

from __future__ import annotations

from spt_fast.quantities import amount, percent

__all__ = ["amount", "percent", "three_digits"]


def number(value: float) -> str:
    """0.0547, 13.3, 6,670; three digits, and never a power of ten."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= 1000 else f"{rounded:g}"


def three_digits(share: float) -> float:
    """A share as it was asked for: what was achieved differs from that by a window."""
    return float(f"{share:.3g}")
