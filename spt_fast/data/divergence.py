"""The distance of one corpus from another: the Jensen-Shannon divergence of their n-grams of token ids.

    JS(P, Q) = H((P + Q)/2) - (H(P) + H(Q))/2      in bits: 0 for equal distributions, 1 for those that share no n-gram

P and Q are measured on samples. Two samples of one distribution already differ, and the more n-grams are rare the more
they do: for n = 3 by most of the scale. No sample of a natural text is large enough to avoid that. So the samples are
equally large, and two disjoint samples of the general corpus are compared in the same way: their divergence is the
*floor*, the value for "no difference" at this sample size. Only a value well above the floor says something about the
domain (a handful of long documents gives a value a little above it without being of another kind), and divergences are
comparable only at equal numbers of tokens.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from spt_fast.data.shards import TokenDataset, check_same_tokenizer
from spt_fast.errors import DataError, counted

NGRAMS = {"unigrams": 1, "bigrams": 2, "trigrams": 3}
MAX_TOKENS = 5_000_000

_STRETCH = 1 << 14  # longer than most documents, so that samples in turns share few; short enough to spread well


def divergence(
    domain: str | os.PathLike[str],
    general: str | os.PathLike[str],
    *,
    max_tokens: int = MAX_TOKENS,
    dtype: str | None = None,
) -> dict[str, Any]:
    """The divergence of the datasets at two prefixes, JSON-able; every call gives the same values.

    Returns {"with": general, "tokens": of each sample, and per "unigrams", "bigrams", "trigrams": bits, 0 … 1, and
    under the same name with "_floor" the bits between two samples of `general`}. A sample consists of stretches of
    16,384 tokens, spread evenly over its text (the two samples of the general corpus take turns). It has at most
    `max_tokens`, the domain's tokens, or half of the general corpus's. Its n-grams may cross the end of a document, as
    training windows do. It needs about 60 bytes of memory per token of a sample, and about 2 s for 5M on one core.

    dtype: of both, for headerless files. DataError: datasets of different tokenizers, or too short for two samples of
    three tokens.
    """
    a, b = TokenDataset.open(domain, dtype), TokenDataset.open(general, dtype)
    check_same_tokenizer(a, b)
    most = min(max_tokens, a.num_tokens, b.num_tokens // 2)
    longest = max(NGRAMS.values())
    if most < longest:
        raise DataError(
            f"{a.path} has {counted(a.num_tokens, 'token')} and {b.path} {b.num_tokens:,}: too few to compare; the "
            f"first needs at least {longest}, the second {2 * longest}"
        )
    length = min(_STRETCH, most)
    count = most // length
    ours = _stretches(a.tokens, count, length)
    theirs = _stretches(b.tokens, 2 * count, length)
    base = int(max(ours.max(), theirs.max())) + 1
    report: dict[str, Any] = {"with": str(general), "tokens": count * length}
    for name, n in NGRAMS.items():
        one, other = (_counts(theirs[half::2], n, base) for half in (0, 1))
        report[name] = _jensen_shannon(_counts(ours, n, base), one)
        report[f"{name}_floor"] = _jensen_shannon(one, other)
    return report


def _stretches(tokens: np.ndarray, count: int, length: int) -> np.ndarray:
    """[count, length] ids, spread evenly over `tokens`, without duplicates."""
    starts = [i * len(tokens) // count for i in range(count)]
    return np.stack([tokens[start : start + length] for start in starts])


def _counts(stretches: np.ndarray, n: int, base: int) -> tuple[np.ndarray, np.ndarray]:
    """(ascending uint64 keys of the n-grams inside stretches, how often each occurs, fp64).

    A key is the n-gram as a number in base `base`, made odd; where that exceeds 64 bits, from ids of 2.6M for
    trigrams, it is a hash.
    """
    places = stretches.shape[1] - n + 1
    keys = np.zeros((len(stretches), places), np.uint64)
    for i in range(n):
        keys *= np.uint64(base | 1)
        keys += stretches[:, i : i + places].astype(np.uint64)
    found, counts = np.unique(keys, return_counts=True)
    return found, counts.astype(np.float64)


def _jensen_shannon(p: tuple[np.ndarray, np.ndarray], q: tuple[np.ndarray, np.ndarray]) -> float:
    """Bits between the counts of two equally large samples: an n-gram that only one has adds nothing to `shared`."""
    _, at_p, at_q = np.intersect1d(p[0], q[0], assume_unique=True, return_indices=True)
    ours, theirs = p[1][at_p], q[1][at_q]
    shared = np.sum(ours * np.log2(1 + theirs / ours) + theirs * np.log2(1 + ours / theirs))
    return float(1 - shared / (p[1].sum() + q[1].sum()))
