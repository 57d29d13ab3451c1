"""How much of a dataset another one holds too.

Held-out text that is also in the training set fakes every gain, so overlap is measured at two lengths:

* documents: the same ids from the first to the last (the tokens that begin and end them aside). Exact: documents of
  equal length and equal ids at eight places are compared by a 128-bit hash of all their ids.
* n-grams of 32 ids inside one document. 32 tokens are about 20 words: longer than phrases and names that independent
  texts share, short enough to find a copied paragraph. At most 65,536 of them, spread evenly over the text, are looked
  up at *every* position of the other text, so a share has a standard error below 0.2% at any size.

The search reads the other text once, in chunks that fit the cache. A rolling 32-bit hash of 16 ids finds, through a
table, the few positions where one of the n-grams may start; only there is the whole n-gram compared (by a 64-bit
multilinear hash). Memory is bounded, apart from about 100 bytes per document of the text and per shared document.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from spt_fast.data.shards import TokenDataset, check_same_tokenizer

NGRAM = 32
MAX_NGRAMS = 1 << 16

_HEAD = 16  # ids that the rolling hash sees
_TABLE_BITS = 22
_CHUNK = 1 << 18
_STRETCH = 1 << 20
_PLACES = 8

# Odd multipliers: one per id, and those that join hashes of 1, 2, 4 and 8 ids to hashes of twice as many.
_SPREAD = np.uint32(0x9E3779B1)
_DOUBLING = {1: np.uint32(0x85EBCA6B), 2: np.uint32(0xC2B2AE35), 4: np.uint32(0x27D4EB2F), 8: np.uint32(0x165667B1)}
_MULTILINEAR = np.random.Generator(np.random.PCG64(32)).integers(0, 1 << 64, NGRAM, np.uint64) | np.uint64(1)


@dataclass(frozen=True)
class Overlap:
    """Shares of a text that another one also holds."""

    documents: float | None
    """Share of the non-empty documents; None if either text records no documents."""
    ngrams: float | None
    """Share of the 32-token n-grams; None if there are none."""
    searched: float
    """Share of the other text that was searched."""


def overlap_share(heldout: TokenDataset, train: TokenDataset, *, max_train_tokens: int | None = 100_000_000) -> Overlap:
    """How much of `heldout` is in `train`.

    If `train` is larger than `max_train_tokens`, only stretches of about a million tokens, spread evenly over it, are
    searched (about a second on one core), and the shares are lower bounds. None searches it all, at about 100M tokens a
    second. Raises DataError if the two come from different tokenizers.
    """
    check_same_tokenizer(heldout, train)
    stretches = _stretches(train.num_tokens, max_train_tokens)
    searched = sum(end - start for start, end in stretches) / max(1, train.num_tokens)
    return Overlap(_document_share(heldout, train, stretches), _ngram_share(heldout, train, stretches), searched)


def _stretches(num_tokens: int, limit: int | None) -> list[tuple[int, int]]:
    """Consecutive (start, end) that cover the text, or `limit` tokens of it, evenly spread."""
    count = -(-num_tokens // _STRETCH)
    kept = count if limit is None else min(count, max(1, limit // _STRETCH))
    starts = [i * count // kept * _STRETCH for i in range(kept)]
    return [(start, min(num_tokens, start + _STRETCH)) for start in starts]


def _document_share(heldout: TokenDataset, train: TokenDataset, stretches: list[tuple[int, int]]) -> float | None:
    if heldout.document_ends is None or train.document_ends is None:
        return None
    around = _ids_around(heldout, train)
    documents = _documents(heldout, 0, len(heldout.document_ends), around)
    if len(documents) == 0:
        return None
    keys = np.unique(_fingerprints(heldout.tokens, documents))
    found: set[bytes] = set()
    for stretch in stretches:
        first, last = np.searchsorted(train.document_ends, np.array(stretch), side="right")  # those that end in it
        candidates = _documents(train, first, last, around)
        candidates = candidates[_is_in(_fingerprints(train.tokens, candidates), keys)]
        found.update(_document_hash(train.tokens[start:end]) for start, end in candidates)
    return sum(_document_hash(heldout.tokens[start:end]) in found for start, end in documents) / len(documents)


def _ngram_share(heldout: TokenDataset, train: TokenDataset, stretches: list[tuple[int, int]]) -> float | None:
    starts = _ngram_starts(heldout, _ids_around(heldout, train))
    if len(starts) == 0:
        return None
    hashes = _multilinear(heldout.tokens[starts[:, None] + np.arange(NGRAM)])
    wanted = np.unique(hashes)
    table = np.zeros(1 << _TABLE_BITS, bool)
    table[_rolling(heldout.tokens[starts[:, None] + np.arange(_HEAD)])[:, 0]] = True
    seen = np.zeros(len(wanted), bool)
    for start, end in stretches:
        for i in range(start, end, _CHUNK):
            tokens = np.asarray(train.tokens[i : min(end, i + _CHUNK) + NGRAM - 1])
            if len(tokens) < NGRAM:
                continue
            likely = np.flatnonzero(table.take(_rolling(tokens[: len(tokens) - NGRAM + _HEAD])))
            found = _multilinear(tokens[likely[:, None] + np.arange(NGRAM)])
            seen[np.searchsorted(wanted, found[_is_in(found, wanted)])] = True
    return float(seen[np.searchsorted(wanted, hashes)].mean())


def _ids_around(*datasets: TokenDataset) -> list[int]:
    """The ids that end or begin documents in any of them; foreign formats record none."""
    return [id_ for dataset in datasets for id_ in (dataset.eos_id, dataset.bos_id) if id_ is not None]


def _documents(dataset: TokenDataset, first: int, last: int, around: list[int]) -> np.ndarray:
    """(start, end), int64 [documents, 2], of documents first ... last - 1 without an id of `around` at either end; no
    empty ones."""
    ends = dataset.document_ends
    assert ends is not None
    edges = np.concatenate([[ends[first - 1] if first else 0], ends[first:last]])
    documents = np.stack([edges[:-1], edges[1:]], axis=1)
    documents = documents[documents[:, 0] < documents[:, 1]]
    documents[:, 1] -= np.isin(dataset.tokens[documents[:, 1] - 1], around)
    documents = documents[documents[:, 0] < documents[:, 1]]
    documents[:, 0] += np.isin(dataset.tokens[documents[:, 0]], around)
    return documents[documents[:, 0] < documents[:, 1]]


def _ngram_starts(dataset: TokenDataset, around: list[int]) -> np.ndarray:
    """Starts of up to MAX_NGRAMS n-grams, int64 [n-grams], spread evenly over all that are inside a document."""
    if dataset.document_ends is None:
        documents = np.array([[0, dataset.num_tokens]])
    else:
        documents = _documents(dataset, 0, len(dataset.document_ends), around)
    counts = np.maximum(0, documents[:, 1] - documents[:, 0] - (NGRAM - 1))
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    kept = min(total, MAX_NGRAMS)
    ranks = np.arange(kept) * total // max(1, kept)
    document = np.searchsorted(ends, ranks, side="right")
    return documents[document, 0] + ranks - (ends - counts)[document]


def _fingerprints(tokens: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """uint64 [documents]: hashes of each document's length and its ids at eight places, first and last included."""
    lengths = documents[:, 1] - documents[:, 0]
    places = documents[:, :1] + (lengths[:, None] - 1) * np.arange(_PLACES) // (_PLACES - 1)
    return _multilinear(np.concatenate([tokens[places].astype(np.int64), lengths[:, None]], axis=1))


def _document_hash(tokens: np.ndarray) -> bytes:
    return hashlib.blake2b(tokens.astype("<u4").tobytes(), digest_size=16).digest()


def _multilinear(ids: np.ndarray) -> np.ndarray:
    """uint64 [rows]: a hash of each row of ids [rows, up to NGRAM]."""
    return ids.astype(np.uint64) @ _MULTILINEAR[: ids.shape[1]]


def _rolling(tokens: np.ndarray) -> np.ndarray:
    """Indices [..., n - 15] into a table of 2^22: a hash of each 16 consecutive ids along the last axis."""
    h = tokens.astype(np.uint32) * _SPREAD
    for step, multiplier in _DOUBLING.items():
        h = h[..., :-step] * multiplier + h[..., step:]
    return h >> np.uint32(32 - _TABLE_BITS)


def _is_in(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Which of `values` are among `ordered` (ascending, not empty)."""
    return ordered[np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)] == values
