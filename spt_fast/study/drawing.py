"""matplotlib for the pictures: drawn to files, without a backend, and with names as they are.

Jupyter passes its backend in MPLBACKEND to every process that it starts, and matplotlib can't be imported if the
package of that backend isn't installed.
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
"""For `mpl.rc_context`: a dollar in a name does not begin a formula."""
