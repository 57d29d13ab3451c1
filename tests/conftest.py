"""One thread for each test process: three of them share two cores, since tests that start processes often wait;
tiny tensors gain nothing from more.

Modules marked `long` are started first, so that at the end no worker is left alone with one of them.

Python's garbage collector would search all modules and tests again and again, a third of the time in which they are
imported and collected. It is off until then, and passes over them afterwards.

Bytecode is kept, whatever the variable says that many containers set: otherwise each of the hundred processes that
tests start compiles the package again, and pytest rewrites every test and every plugin.

Hypothesis has no deadlines: on a busy machine any example may take long. Its examples are the same in every run.

What is measured here is kept apart from what the user's own runs have measured.
"""

import gc
import os
import sys
import tempfile
from importlib.util import find_spec

import pytest

from tests.seed import SEED

gc.disable()

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("MPLCONFIGDIR", os.path.expanduser("~/.cache/matplotlib"))
os.environ["XDG_CACHE_HOME"] = os.path.join(tempfile.gettempdir(), f"spt-fast-tests-{os.getuid()}")

if find_spec("hypothesis"):
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=SEED == 0
    )
    settings.load_profile("busy machine")

if os.environ["TRITON_INTERPRET"] == "1" and find_spec("triton"):
    from tests.interpreter import speed_up

    speed_up()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    gc.freeze()
    gc.enable()
