"""One thread for each test process: two of them run side by side, and tiny tensors gain nothing from more.

Modules marked `long` are started first, so that at the end no worker is left alone with one of them.
"""

import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
