"""The earlier name of spt_fast.evaluation.score, which is above this room; nothing in spt_fast imports it."""

import sys
from importlib import import_module

sys.modules[__name__] = import_module("spt_fast.evaluation.score")
