"""A study on one HTML page. `spt_fast.report(runs)` is `spt_fast.library.report`."""

import sys

from spt_fast import CallableRoom

sys.modules[__name__].__class__ = CallableRoom
