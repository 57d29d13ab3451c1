"""One thread for each test process: three of them share two cores, since tests that start processes often wait;
tiny tensors gain nothing from more.

Modules marked `long` are started first, so that at the end no worker is left alone with one of them.

What is measured here is kept apart from what the user's own runs have measured.
"""

import os
import tempfile
from importlib.util import find_spec

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("MPLCONFIGDIR", os.path.expanduser("~/.cache/matplotlib"))
os.environ["XDG_CACHE_HOME"] = os.path.join(tempfile.gettempdir(), f"spt-fast-tests-{os.getuid()}")

if os.environ["TRITON_INTERPRET"] == "1" and find_spec("triton"):
    from tests.interpreter import speed_up

    speed_up()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
