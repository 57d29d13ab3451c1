"""Power laws with an offset, a·T^b + c, in a form that is stable for b near 0.

    c' + s·((T/T₀)^b − 1)/b:   a = (s/b)·T₀^−b,   c = c' − s/b

c' is the value at T₀, the middle of the data, and s the slope there per log-token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spt_fast.laws.columns import Array, Columns
from spt_fast.laws.fitting import Parameter


def power(base: Array, exponent: Array) -> Array:
    """base^exponent of a base above 0, by its logarithm: NumPy's complex power takes twice as long."""
    return np.exp(exponent * np.log(base))


def rising(b: Array, x: Array) -> Array:
    """((T/T₀)^b − 1)/b at x = log(T/T₀); x itself at b = 0."""
    b = np.where(b == 0, 1e-9, b)
    return np.expm1(b * x) / b


def offset_power(unknowns: Sequence[Array], columns: Columns) -> Array:
    """The curve of `power_parameters`, at the column x = log(T/T₀)."""
    c, s, b = unknowns
    return c + s * rising(b, columns["x"])


def power_parameters(low: float, high: float, a: str = "a", b: str = "b", c: str = "c") -> tuple[Parameter, ...]:
    """c', s, and b between `low` and `high`, under their names in the law."""
    offset, slope = (Parameter(name, -20, 20, log=False, linear=True) for name in (c, a))
    return offset, slope, Parameter(b, low, high, log=False)


def in_tokens(slope: float, exponent: float, middle: float) -> tuple[float, float, float]:
    """(a, b, c − c') of a·T^b + c. They grow without bounds as b approaches 0, a logarithm: b is then 1e-9."""
    b = exponent if abs(exponent) > 1e-9 else 1e-9
    return slope / b * middle**-b, b, -slope / b
