"""How often any token, document or source was read, computed by the functions that choose the windows.

A *visit* of a token is one reading of it as an input; the last token of a window is a target only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spt_fast.data.ring import Ring

_STRETCH_WINDOWS = 1 << 20


@dataclass(frozen=True)
class Visits:
    """Visits of a stretch of a source: its tokens, the total of their visits, and the fewest and most of any one."""

    tokens: int
    token_visits: int
    min_visits: int
    max_visits: int


def document_visits(read: Sequence[tuple[Ring, int]], start: int, end: int) -> Visits:
    """Visits of tokens [start, end) of a source by `read`: for each of its rings, one per window length, the number of
    windows read from the endless repetition.

    Exact, and cheap at any count: whole epochs in closed form; in the last, unfinished one, only the windows that touch
    the stretch are looked up in its order. Time grows only with end - start; memory is constant.
    """
    assert all(0 <= start <= end <= ring.num_tokens for ring, _ in read)
    stretch_tokens = _STRETCH_WINDOWS * min(ring.context for ring, _ in read)
    parts = [_visits(read, a, min(a + stretch_tokens, end)) for a in range(start, end, stretch_tokens)]
    return Visits(
        tokens=end - start,
        token_visits=sum(part.token_visits for part in parts),
        min_visits=min((part.min_visits for part in parts), default=0),
        max_visits=max((part.max_visits for part in parts), default=0),
    )


def _visits(read: Sequence[tuple[Ring, int]], start: int, end: int) -> Visits:
    """Sweep over the places where the number of visits changes. start < end."""
    everywhere = -1  # the sweep's two ends add a visit that is subtracted here
    rises, falls = [np.array([start])], [np.array([end])]
    for ring, count in read:
        epoch, drawn = divmod(count, ring.windows_per_epoch)
        rounds, rest = divmod(epoch * ring.windows_per_epoch * ring.context, ring.num_tokens)
        everywhere += rounds
        if rest > start:  # whole epochs visited [0, rest) once more than the other tokens
            rises.append(np.array([start]))
            falls.append(np.array([min(rest, end)]))
        first = ring.epoch_start(epoch)  # the unfinished epoch's windows are contiguous and go at most once around
        for copy in (0, ring.num_tokens):
            low, high = max(start + copy - first, 0), end + copy - first
            windows = np.arange(low // ring.context, min(-(-high // ring.context), ring.windows_per_epoch))
            starts = windows[ring.order(epoch).positions_of(windows) < drawn] * ring.context + first - copy
            rises.append(np.maximum(starts, start))
            falls.append(np.minimum(starts + ring.context, end))
    places = np.concatenate(rises + falls)
    steps = np.repeat([1, -1], [sum(map(len, rises)), sum(map(len, falls))])
    order = np.argsort(places, kind="stable")
    lengths = np.diff(places[order])
    visits = (everywhere + np.cumsum(steps[order])[:-1])[lengths > 0]
    return Visits(end - start, int(visits @ lengths[lengths > 0]), int(visits.min()), int(visits.max()))
