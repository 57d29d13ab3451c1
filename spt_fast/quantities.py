"""Numbers as people read them: 110M, 1.78e18 FLOPs, 12 min, $3.14, 1.5 GB, 41.2%. JSON keeps the exact ones.

A field's name gives its unit (`step_s`, `memory_bytes`, `hours`): `read` formats a value by it, and `heading` is the
name without the unit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

UNITS = {1e12: "T", 1e9: "B", 1e6: "M", 1e3: "K"}
EXACT_BELOW = 100_000


def amount(count: float) -> str:
    """20B, 1.5M, 300; three digits."""
    for size, unit in UNITS.items():
        if count >= 0.9995 * size:
            return f"{float(f'{count / size:.3g}'):,g}{unit}"
    return f"{count:.3g}"


def count(number: float) -> str:
    """A number of tokens or parameters: exact if it is short, else three digits."""
    return f"{number:,}" if isinstance(number, int) and number < EXACT_BELOW else amount(number)


def number(value: float) -> str:
    """Three digits without an exponent: 0.0547, 13.3, 6,670."""
    rounded = three_digits(value)
    return f"{rounded:,.0f}" if rounded >= 1000 else f"{rounded:g}"


def three_digits(value: float) -> float:
    """Rounded to three digits, as an achieved share, which differs from the requested one by a window."""
    return float(f"{value:.3g}")


def times(value: float) -> str:
    """ "once" or "13.3 times"."""
    said = number(value)
    return "once" if said == "1" else f"{said} times"


def percent(share: float) -> str:
    return f"{100 * share:.4g}%"


def signed(figure: float, digits: int) -> str:
    """With decimals, and a true minus sign below 0."""
    return f"{figure:.{digits}f}".replace("-", "−")


def flops(number: float) -> str:
    """1.78e18 FLOPs."""
    digits, _, exponent = f"{number:.2e}".partition("e")
    return f"{digits}e{int(exponent)} FLOPs" if number else "0 FLOPs"


def duration(seconds: float) -> str:
    """85 ms, 12 s, 1.7 min, 12 min, 4.1 h, 12 days; two digits."""
    for longest, unit_s, unit in ((0.0995, 1e-3, "ms"), (99.5, 1, "s"), (5970, 60, "min"), (172_800, 3600, "h")):
        if seconds < longest:
            return f"{_two_digits(seconds / unit_s)} {unit}"
    return f"{_two_digits(seconds / 86_400)} days"


def _two_digits(number: float) -> str:
    return f"{number:.2g}" if number < 9.95 else f"{number:,.0f}"


def money(dollars: float) -> str:
    """$3.14, $1,234."""
    return f"${dollars:,.2f}" if dollars < 999.995 else f"${dollars:,.0f}"


_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))


def size(size_bytes: float) -> str:
    """1 byte, 300 bytes, 1.2 kB, 80 GB; powers of ten."""
    unit_bytes, unit = _unit_of(size_bytes)
    return f"{float(f'{size_bytes / unit_bytes:.3g}'):,g} {'byte' if size_bytes == 1 else unit}"


def size_so_far(done_bytes: float, all_bytes: float) -> str:
    """41.2/82.1 kB."""
    unit_bytes, unit = _unit_of(all_bytes)
    digits = 0 if unit_bytes == 1 else 1
    return f"{done_bytes / unit_bytes:.{digits}f}/{all_bytes / unit_bytes:.{digits}f} {unit}"


def _unit_of(size_bytes: float) -> tuple[float, str]:
    return next((pair for pair in _BYTES if size_bytes >= 0.9995 * pair[0]), _BYTES[-1])


_READ: dict[str, Callable[[float], str]] = {
    "tokens": count,
    "parameters": count,
    "flops": flops,
    "peak_flops": lambda per_s: f"{per_s / 1e12:,.4g} TFLOP/s",
    "s": duration,
    "seconds": duration,
    "hours": lambda hours: duration(3600 * hours),
    "cost": money,
    "bytes": size,
    "mb_per_s": lambda rate: f"{rate:,.3g} MB/s",
    "tokens_per_s": lambda rate: f"{amount(rate)} tok/s",
    "flops_per_token": flops,
    "mfu": percent,
    "share": percent,
}
_HEADINGS = {"mb_per_s": "speed", "hours": "time", "seconds": "time", "bytes": "size", "flops": "compute"}


def read(name: str, value: Any) -> str:
    """A value of the field `name`; n/a for None."""
    if value is None:
        return "n/a"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (int, float)):
        return str(value)
    known = _READ.get(name) or _READ.get(name.rpartition("_")[2] if "_per_" not in name else "")
    if known and value == value:
        return known(value)
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"


def heading(name: str) -> str:
    """step_s → step, evaluation_hours → evaluation, hours → time."""
    before, _, unit = name.rpartition("_")
    if before and unit in ("s", "hours", "bytes", "flops") and not before.endswith("_per"):
        return before.replace("_", " ")
    return _HEADINGS.get(name, name.replace("_", " "))
