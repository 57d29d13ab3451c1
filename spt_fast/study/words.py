"""Counts and shares in words."""

from __future__ import annotations

from spt_fast.quantities import amount, percent

__all__ = ["amount", "number", "percent", "three_digits", "times"]


def number(value: float) -> str:
    """Three digits without an exponent: 0.0547, 13.3, 6,670."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= 1000 else f"{rounded:g}"


def times(count: float) -> str:
    """ "once" or "13.3 times"."""
    said = number(count)
    return "once" if said == "1" else f"{said} times"


def three_digits(share: float) -> float:
    """A share rounded to three digits: an achieved share differs from the requested one by a window."""
    return float(f"{share:.3g}")
