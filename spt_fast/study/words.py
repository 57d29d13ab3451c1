"""Counts and shares as people write them."""

from __future__ import annotations

UNITS = {1e12: "T", 1e9: "B", 1e6: "M", 1e3: "K"}


def amount(count: float) -> str:
    """20B, 1.5M, 300; three digits."""
    for size, unit in UNITS.items():
        if count >= 0.9995 * size:
            return f"{float(f'{count / size:.3g}'):,g}{unit}"
    return f"{count:.3g}"


def number(value: float) -> str:
    """0.0547, 13.3, 6,670; three digits, and never a power of ten."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= 1000 else f"{rounded:g}"


def three_digits(share: float) -> float:
    """A share as it was asked for: what was achieved differs from that by a window."""
    return float(f"{share:.3g}")


def percent(share: float) -> str:
    return f"{100 * share:.4g}%"
