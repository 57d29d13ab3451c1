from __future__ import annotations

import timeit
from collections.abc import Callable
from time import process_time


def least_seconds(run: Callable[[], object]) -> float:
    """Processor time, since on a busy machine a call waits for others."""
    return min(timeit.repeat(run, timer=process_time, number=1, repeat=5))
