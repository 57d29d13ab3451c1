"""A corpus repeated endlessly and cut into windows: which tokens the k-th window of a source holds.

A corpus of D tokens is a ring. Epoch e lays W = floor(D / T) windows of T tokens end to end, from where epoch e - 1
stopped: window j begins at (e·W + j)·T mod D. No token is dropped, and since the windows of all epochs together are
contiguous on the endless repetition, the visits of any two tokens differ by at most 1 whenever an epoch ends. If T
doesn't divide D, the cuts fall elsewhere in each epoch. If it does, a keyed rotation r_e moves epoch e: window j begins
at (r_e + j·T) mod D, and each epoch visits each token exactly once.

Windows of another length T form another ring over the same corpus, with its own epochs: the part of an epoch that was
read in windows of one length can't be removed from those of another length without reading tokens twice.

Within an epoch the windows come in the order of a keyed permutation, a new one for each epoch. A window reads T + 1
tokens, the last as a target only: a *visit* of a token is one reading of it as an input.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from spt_fast import native
from spt_fast.data.shuffle import MAX_SIZE, ROUNDS, Permutation, derive_key, epoch_key
from spt_fast.errors import DataError, counted


class Ring:
    """The windows of `source_name`, a corpus of `num_tokens` tokens, for a context of T = `context` tokens.

    Raises DataError for a corpus shorter than one window of T + 1 tokens.
    """

    def __init__(self, num_tokens: int, context: int, seed: int, source_name: str) -> None:
        if num_tokens <= context:
            or_less = f", or the batch a context of at most {num_tokens - 1:,}" if num_tokens > 1 else ""
            raise DataError(
                f"source {source_name!r} has {counted(num_tokens, 'token')}: a corpus shorter than one window of "
                f"{context + 1:,} (context {context:,} and the next token); give it more text{or_less}"
            )
        assert context >= 1
        assert num_tokens <= MAX_SIZE
        self.num_tokens, self.context, self.source_name = num_tokens, context, source_name
        self.windows_per_epoch = num_tokens // context
        self._key = derive_key(seed, "ring", source_name)

    def epochs(self, count: int) -> Fraction:
        """How many times the first `count` windows go through the corpus: visits per token."""
        return Fraction(count * self.context, self.num_tokens)

    def epoch_start(self, epoch: int) -> int:
        """The token at which window 0 of `epoch` begins."""
        if self.num_tokens % self.context == 0:
            return epoch_key(self._key, epoch)[ROUNDS] * self.num_tokens >> 64
        return epoch * self.windows_per_epoch * self.context % self.num_tokens

    def order(self, epoch: int) -> Permutation:
        """The order of the windows of `epoch`."""
        return Permutation(self.windows_per_epoch, epoch_key(self._key, epoch))

    def start(self, k: int) -> int:
        """The token at which the k-th window of the endless repetition begins."""
        epoch, place = divmod(k, self.windows_per_epoch)
        return (self.epoch_start(epoch) + self.order(epoch).at(place) * self.context) % self.num_tokens

    def starts(self, k: np.ndarray) -> np.ndarray:
        """`start` of each of `k` int64 [N] (0 <= k < 2^63), in C++: int64 [N]."""
        return native.ring_starts(k, self.num_tokens, self.context, self._key)
