"""From a step to its windows: the data of a run as a pure function, without state or an index.

Sample n of a phase is `mixture.locate(n)` = (source, k), and its window is number start_counts[source] + k of the
source's ring, so that a phase continues where the last phase with equally long windows stopped. Step t holds the
samples [t·B, (t + 1)·B) of a global batch of B sequences. Inside the batch they are permuted, with a separate key for
each step: otherwise the mixture's period and the stride of the ranks could alias, and one rank would get all samples
of a rare source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from spt_fast.data.mixture import Mixture
from spt_fast.data.ring import Ring
from spt_fast.data.shuffle import Permutation, derive_key
from spt_fast.errors import RecipeError


@dataclass(frozen=True)
class SampleOrder:
    """The global batches of one phase: `sequences` windows a step of `mixture`, from `rings`.

    start_counts: windows of each source that were consumed before the phase; seed and phase key the order in a batch.
    """

    mixture: Mixture
    rings: Mapping[str, Ring]
    sequences: int
    start_counts: Mapping[str, int]
    seed: int
    phase: int

    def windows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The global batch of `step`, two arrays [sequences]: source (int32, index into mixture.sources), and the token
        of that source at which the window starts (int64)."""
        source, k = self.mixture.locate_many(step * self.sequences, self.sequences)
        start = np.empty_like(k)
        for i in np.unique(source):
            name, drawn = self.mixture.sources[i], source == i
            start[drawn] = self.rings[name].starts(self.start_counts[name] + k[drawn])
        key = derive_key(self.seed, "batch", self.phase, step)
        order = Permutation(self.sequences, key).at_many(np.arange(self.sequences))
        return source[order], start[order]

    def counts(self, step: int) -> dict[str, int]:
        """Windows of each source consumed before `step` starts, earlier phases included, also of sources that only
        earlier phases read."""
        drawn = self.mixture.counts(step * self.sequences)
        return {**self.start_counts, **{name: self.start_counts[name] + drawn[name] for name in self.mixture.sources}}


def check_every_source_is_drawn(mixture: Mixture, samples: int) -> None:
    """Raise RecipeError if a source with a share above 0 gets none of a phase's `samples` (steps x sequences)."""
    for source, drawn in mixture.counts(samples).items():
        if drawn == 0 and mixture.weights[source] > 0:
            needed = mixture.index(source, 0) + 1
            raise RecipeError(
                f"source {source!r} has a share of {mixture.weights[source]} and would get none of the phase's "
                f"{samples:,} sequences; train at least {needed:,} sequences, raise its share, or leave it out"
            )
