"""Held-out text, and the parts of it that are scored.

Effects here are about 1%, so choosing the best checkpoint or learning rate and reporting results on the same text would
bias them. The held-out text is therefore cut in two disjoint halves: `select` for choices, `report` for results.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Literal

import numpy as np

from spt_fast.data.shards import TokenDataset
from spt_fast.errors import DataError, counted

Half = Literal["select", "report"]

WINDOW_TOKENS = 1024
"""Longer documents are divided in windows of at most this many tokens."""
_SMALLEST_HALF = 0.1  # of the tokens; below it, documents are too few or too unequal to divide
_HASH_PERSON = b"heldout halves"  # keeps this hash apart from the one that held the text out


@lru_cache(maxsize=16)
def split_heldout(dataset: TokenDataset, *, windows: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """The stretches of tokens, int64 [stretches, 2] of (start, end), of the `select` and of the `report` half.

    A hash of its ids decides each document's half, so that duplicates stay together and neither order nor dtype nor
    seed matters. A document of more than WINDOW_TOKENS is cut into windows that alternate between the halves, since a
    handful of long documents would make halves of different text. A format without documents is one document. If either
    half is then below 10% of the tokens, the text is cut in the middle: the first half selects, the second reports.
    `windows=False` never cuts a document, as runs of earlier versions. The halves of an open dataset are cached: they
    need all of its text, and every phase, warning and price uses them.
    """
    ends = dataset.document_ends
    if ends is not None or windows:
        edges = np.concatenate([[0], [dataset.num_tokens] if ends is None else ends]).astype(np.int64)
        texts = np.stack([edges[:-1], edges[1:]], axis=1)
        known = () if ends is None else texts
        reports = np.fromiter((_reports(dataset.tokens[start:end]) for start, end in known), bool, len(known))
        stretches, document, place = _windows(texts, WINDOW_TOKENS if windows else dataset.num_tokens)
        reports = (reports[document] if len(reports) else False) ^ (place % 2 == 1)
        select, report = stretches[~reports], stretches[reports]
        if min(_count(select), _count(report)) >= _SMALLEST_HALF * dataset.num_tokens:
            return select, report
    middle = dataset.num_tokens // 2
    return np.array([[0, middle]]), np.array([[middle, dataset.num_tokens]])


def has_long_documents(dataset: TokenDataset) -> bool:
    """Whether windows give other halves than whole documents do."""
    ends = dataset.document_ends
    return bool(np.diff([dataset.num_tokens] if ends is None else ends, prepend=0).max(initial=0) > WINDOW_TOKENS)


def _windows(texts: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Texts [n, 2] of (start, end), cut into equal windows of at most `most` tokens: the windows, [windows, 2], and for
    each its text and its position in it."""
    length = texts[:, 1] - texts[:, 0]
    count = np.maximum(-(-length // max(most, 1)), 1)
    text = np.repeat(np.arange(len(texts)), count)
    place = np.arange(len(text)) - np.repeat(np.cumsum(count) - count, count)
    starts, ends = (texts[text, 0] + length[text] * at // count[text] for at in (place, place + 1))
    return np.stack([starts, ends], axis=1), text, place


def heldout_stretches(
    dataset: TokenDataset, half: Half, limit_tokens: int | None = None, *, windows: bool = True
) -> np.ndarray:
    """The stretches of one half, in the dataset's order, cut off at `limit_tokens`: int64 [stretches, 2].

    Raises DataError if they hold fewer than the two tokens that one prediction needs.
    """
    stretches = split_heldout(dataset, windows=windows)[("select", "report").index(half)].astype(np.int64)
    if limit_tokens is not None:
        left = limit_tokens - np.cumsum(stretches[:, 1] - stretches[:, 0])  # after each stretch
        stretches[:, 1] += np.minimum(left, 0)
    stretches = stretches[stretches[:, 1] > stretches[:, 0]]
    if _count(stretches) < 2:
        raise DataError(
            f"{dataset.path}: the {half} half of this held-out text has {counted(_count(stretches), 'token')}, too "
            "few to score one; hold out more text"
        )
    return stretches


def training_stretches(dataset: TokenDataset, context: int, limit_tokens: int | None = None) -> np.ndarray:
    """Fixed windows of training text, spread evenly over it, without a shared target.

    Returns int64 [windows, 2] of (first input, last target), the same at every call: as many as `limit_tokens` targets
    allow, at least one. Raises DataError if the text is shorter than one window.
    """
    most = (dataset.num_tokens - 1) // context
    if most < 1:
        raise DataError(
            f"{dataset.path} has {counted(dataset.num_tokens, 'token')}; a window of context {context:,} needs "
            f"{context + 1:,}: give more text or a shorter context"
        )
    windows = most if limit_tokens is None else min(most, max(1, limit_tokens // context))
    last_start = dataset.num_tokens - (context + 1)
    starts = np.arange(windows) * last_start // max(1, windows - 1)
    return np.stack([starts, starts + context], axis=1)


def tokens_in(dataset: TokenDataset, stretches: np.ndarray) -> np.ndarray:
    """The tokens of stretches, int64 [stretches, 2], concatenated: ids [tokens] in the dataset's dtype; a view if there
    is one stretch."""
    if len(stretches) == 1:
        return dataset.tokens[stretches[0, 0] : stretches[0, 1]]
    return np.concatenate([dataset.tokens[start:end] for start, end in stretches])


def documents_at(dataset: TokenDataset, stretches: np.ndarray, places: np.ndarray) -> np.ndarray | None:
    """The numbers of the documents of the tokens at `places`, int64 [n], in the concatenated stretches; None if the
    format records no documents."""
    if dataset.document_ends is None:
        return None
    before = np.cumsum(stretches[:, 1] - stretches[:, 0])
    stretch = np.searchsorted(before, places, "right")
    at = stretches[stretch, 1] - (before[stretch] - places)
    return np.searchsorted(dataset.document_ends, at, "right")


def documents_in(dataset: TokenDataset, stretches: np.ndarray) -> int | None:
    """The number of documents in the stretches, ascending int64 [stretches, 2]; None if none are recorded."""
    if dataset.document_ends is None:
        return None
    first, last = (np.searchsorted(dataset.document_ends, at, "right") for at in (stretches[:, 0], stretches[:, 1] - 1))
    return int((last - first + 1).sum() - (first[1:] == last[:-1]).sum())


def begins(dataset: TokenDataset, stretches: np.ndarray) -> np.ndarray:
    """Which tokens of the concatenated stretches, int64 [stretches, 2], begin a document or a stretch.

    Returns bool [tokens]. The dataset must record its documents.
    """
    ends = dataset.document_ends
    assert ends is not None, dataset.path
    marks = []
    for start, end in stretches:
        mark = np.zeros(end - start, bool)
        mark[:1] = True
        mark[ends[np.searchsorted(ends, start, "right") : np.searchsorted(ends, end, "left")] - start] = True
        marks.append(mark)
    return np.concatenate(marks)


def _reports(document: np.ndarray) -> bool:
    digest = hashlib.blake2b(document.astype("<u4").tobytes(), digest_size=8, person=_HASH_PERSON)
    return bool(digest.digest()[0] & 1)


def _count(stretches: np.ndarray) -> int:
    return int((stretches[:, 1] - stretches[:, 0]).sum())
