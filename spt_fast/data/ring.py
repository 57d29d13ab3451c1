"""A corpus repeated endlessly, cut into windows: which tokens the k-th window of a source holds.

A corpus of D tokens is a ring. Epoch e lays W = floor(D / T) windows of T tokens end to end, from where epoch e - 1
stopped: window j begins at (e·W + j)·T mod D. No token is cropped away, and since the windows of all epochs together
lie end to end on the endless repetition, the visits of any two tokens differ by at most 1 whenever an epoch ends. Where
T doesn't divide D the cuts fall elsewhere in each epoch by themselves. Where it does, epoch e is turned by a keyed
rotation r_e instead: window j begins at (r_e + j·T) mod D, and each epoch visits each token exactly once.

Windows of another length T are another ring over the same corpus, with epochs of its own: the part of an epoch that was
read in some windows can't be taken out of longer or shorter ones without seeing tokens twice.

Within an epoch the windows come in the order of a keyed permutation, another one in each epoch. A window reads T + 1
tokens, the last as a target only: a *visit* of a token is its being read as an input.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from spt_fast import native
from spt_fast.data.shuffle import MAX_SIZE, ROUNDS, Permutation, derive_key, epoch_key
from spt_fast.errors import DataError


class Ring:
    """The windows of `source_name`, a corpus of `num_tokens` tokens, for a context of T = `context` tokens.

    Raises DataError for a corpus shorter than one window of T + 1 tokens.
    """

    def __init__(self, num_tokens: int, context: int, seed: int, source_name: str) -> None:
        if num_tokens <= context:
            raise DataError(
                f"source {source_name!r} has {num_tokens:,} tokens: a corpus shorter than one window of "
                f"{context + 1:,} (context {context:,} and the next token); give it more text, or the batch a context "
                f"of at most {num_tokens - 1:,}"
            )
        assert context >= 1
        assert num_tokens <= MAX_SIZE
        self.num_tokens, self.context, self.source_name = num_tokens, context, source_name
        self.windows_per_epoch = num_tokens // context
        self._key = derive_key(seed, "ring", source_name)

    def epochs(self, count: int) -> Fraction:
        """How often the first `count` windows go through the corpus: visits per token."""
        return Fraction(count * self.context, self.num_tokens)

    def epoch_start(self, epoch: int) -> int:
        """The token at which window 0 of `epoch` begins."""
        if self.num_tokens % self.context == 0:
            return epoch_key(self._key, epoch)[ROUNDS] * self.num_tokens >> 64
        return epoch * self.windows_per_epoch * self.context % self.num_tokens

    def order(self, epoch: int) -> Permutation:
        """The order in which `epoch` takes its windows."""
        return Permutation(self.windows_per_epoch, epoch_key(self._key, epoch))

    def start(self, k: int) -> int:
        """The token at which the k-th window of the endless repetition begins."""
        epoch, place = divmod(k, self.windows_per_epoch)
        return (self.epoch_start(epoch) + self.order(epoch).at(place) * self.context) % self.num_tokens

    def starts(self, k: np.ndarray) -> np.ndarray:
        """`start` of each of `k` int64 [N] (0 <= k < 2^63), in C++: int64 [N]."""
        return native.ring_starts(k, self.num_tokens, self.context, self._key)
