"""Held-out text and what is scored of it.

Effects here are about 1%, so picking the best checkpoint or learning rate and reporting the figures on one text would
fake them. The held-out text is therefore cut in two disjoint halves: `select` is for picking, `report` for the figures.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np

from spt_fast.data.shards import TokenDataset
from spt_fast.errors import DataError

Half = Literal["select", "report"]

_SMALLEST_HALF = 0.1  # of the tokens; below it, documents are too few or too unequal to be dealt out
_HASH_PERSON = b"heldout halves"  # keeps this hash apart from the one that held the text out


def split_heldout(dataset: TokenDataset) -> tuple[np.ndarray, np.ndarray]:
    """The stretches of tokens, int64 [stretches, 2] of (start, end), of the `select` and of the `report` half.

    Each document goes by a hash of its ids, so that duplicates stay together and neither order nor dtype nor seed
    matters. Where that leaves either half below 10% of the tokens (few documents, or one that outweighs the others),
    or the format records no documents, the text is cut in the middle: the first half selects, the second reports.
    """
    if dataset.document_ends is not None:
        edges = np.concatenate([[0], dataset.document_ends])
        documents = np.stack([edges[:-1], edges[1:]], axis=1)
        reports = np.fromiter((_reports(dataset.tokens[start:end]) for start, end in documents), bool, len(documents))
        select, report = documents[~reports], documents[reports]
        if min(_count(select), _count(report)) >= _SMALLEST_HALF * dataset.num_tokens:
            return select, report
    middle = dataset.num_tokens // 2
    return np.array([[0, middle]]), np.array([[middle, dataset.num_tokens]])


def heldout_stretches(dataset: TokenDataset, half: Half, limit_tokens: int | None = None) -> np.ndarray:
    """Where the documents of one half lie, in the dataset's order, cut off at `limit_tokens`: int64 [stretches, 2].

    Raises DataError where they hold fewer than the two tokens that one prediction takes.
    """
    stretches = split_heldout(dataset)[("select", "report").index(half)].astype(np.int64)
    if limit_tokens is not None:
        left = limit_tokens - np.cumsum(stretches[:, 1] - stretches[:, 0])  # after each stretch
        stretches[:, 1] += np.minimum(left, 0)
        stretches = stretches[stretches[:, 1] > stretches[:, 0]]
    if _count(stretches) < 2:
        raise DataError(
            f"{dataset.path}: the {half} half of this held-out text has {_count(stretches)} tokens, too few to score "
            "one; hold more text out"
        )
    return stretches


def training_stretches(dataset: TokenDataset, context: int, limit_tokens: int | None = None) -> np.ndarray:
    """Fixed windows of training text, spread evenly over it, none sharing a target.

    Returns int64 [windows, 2] of (first input, last target), the same ones at every call: as many as `limit_tokens`
    targets hold, at least one. Raises DataError where the text is shorter than one window.
    """
    most = (dataset.num_tokens - 1) // context
    if most < 1:
        raise DataError(
            f"{dataset.path} has {dataset.num_tokens:,} tokens; a window of context {context:,} takes {context + 1:,}: "
            "give more text or a shorter context"
        )
    windows = most if limit_tokens is None else min(most, max(1, limit_tokens // context))
    last_start = dataset.num_tokens - (context + 1)
    starts = np.arange(windows) * last_start // max(1, windows - 1)
    return np.stack([starts, starts + context], axis=1)


def tokens_in(dataset: TokenDataset, stretches: np.ndarray) -> np.ndarray:
    """The tokens of stretches, int64 [stretches, 2], one after the other: ids [tokens] in the dataset's dtype."""
    return np.concatenate([dataset.tokens[start:end] for start, end in stretches])


def begins(dataset: TokenDataset, stretches: np.ndarray) -> np.ndarray:
    """Which tokens of stretches, int64 [stretches, 2], one after the other, begin a document or a stretch.

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
