"""One thread for each test process: three of them share two cores, since tests that start processes often wait;
tiny tensors gain nothing from more.

Modules marked `long` are started first, so that at the end no worker is left alone with one of them.

Triton's interpreter patches all of `triton.language` anew whenever a kernel calls a function, a quarter of the time of
a launch. The launch itself has patched what our functions use, and what Triton's own use stays patched for ever.

What is measured here is kept apart from what the user's own runs have measured.
"""

import os
import tempfile
from contextlib import suppress
from typing import Any

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("MPLCONFIGDIR", os.path.expanduser("~/.cache/matplotlib"))
os.environ["XDG_CACHE_HOME"] = os.path.join(tempfile.gettempdir(), f"spt-fast-tests-{os.getuid()}")

with suppress(ImportError):
    from triton.runtime.interpreter import InterpretedFunction

    patch_and_call, patched = InterpretedFunction.__call__, {"spt_fast"}

    def call(self: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        package = self.fn.__module__.partition(".")[0]
        if package in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(package)
        return patch_and_call(self, *args, **kwargs)

    InterpretedFunction.__call__ = call


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
