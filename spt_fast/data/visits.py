"""How often any token, document or source was seen, from the functions that chose the windows themselves.

A *visit* of a token is its being read as an input; the last token that a window reads is a target only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spt_fast.data.ring import Ring

_STRETCH_WINDOWS = 1 << 20


@dataclass(frozen=True)
class Visits:
    """Of a stretch of a source: its tokens, the visits to all of them, and the fewest and most of any one."""

    tokens: int
    token_visits: int
    min_visits: int
    max_visits: int


def document_visits(read: Sequence[tuple[Ring, int]], start: int, end: int) -> Visits:
    """Visits of tokens [start, end) of a source by what was `read` of it: of each of its rings, which differ in the
    length of their windows, the first so many of the endless repetition.

    Exact, and cheap at any count: whole epochs in closed form; of the last, unfinished one, the windows that touch the
    stretch are asked for their places in its order. Time grows with end - start alone, memory doesn't.
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
    everywhere = -1  # the sweep's two ends are a visit that is taken off here
    rises, falls = [np.array([start])], [np.array([end])]
    for ring, count in read:
        epoch, drawn = divmod(count, ring.windows_per_epoch)
        rounds, rest = divmod(epoch * ring.windows_per_epoch * ring.context, ring.num_tokens)
        everywhere += rounds
        if rest > start:  # whole epochs visited [0, rest) once more than the other tokens
            rises.append(np.array([start]))
            falls.append(np.array([min(rest, end)]))
        first = ring.epoch_start(epoch)  # of the unfinished epoch, whose windows lie end to end at most once around
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
