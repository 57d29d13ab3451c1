"""matplotlib for drawing to files: without a backend, and without formulas in names.

Jupyter passes its backend in MPLBACKEND to every process that it starts, and importing matplotlib fails if the package
of that backend is not installed.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any

if "matplotlib" not in sys.modules:
    backend = os.environ.pop("MPLBACKEND", "")
    import matplotlib

    if backend:
        os.environ["MPLBACKEND"] = backend
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

__all__ = ["PLAIN", "Axes", "Figure", "FuncFormatter", "LogLocator", "NullFormatter", "mpl"]

PLAIN: dict[Any, Any] = {"text.parse_math": False}
"""For `mpl.rc_context`: a dollar sign in a name does not start a formula."""
