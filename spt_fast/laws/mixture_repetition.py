"""Pretraining on general text and a small repeated domain corpus: the effect of the mixture on the domain loss.

    L = E + A/((1 − h)·D + τ·D_T)^α + γ·h
    D_T = D_t·(1 + r1·(1 − e^(−(r − 1)/r1))),   r = h·D/D_t;   D_T = h·D where r < 1

arXiv 2605.12715, from more than 2,000 runs: D pretraining tokens, h the domain's share of them, D_t the domain corpus.
τ is the value of a domain token in general ones; the value of repeats decays with r1 as in the data-constrained law;
γ·h is the cost of a large share at any budget. One law per domain corpus and model size (our reading), for the held-out
domain loss before finetuning, as the overfitting law. Huber loss on log-losses. Decision: the best share at a budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from spt_fast.errors import RecipeError
from spt_fast.laws.base import FormulaLaw, Units, decision
from spt_fast.laws.chinchilla import IRREDUCIBLE, coefficient, exponent
from spt_fast.laws.columns import POSITIVE, SHARE, Array, Column, Columns, numbers
from spt_fast.laws.data_constrained import worth
from spt_fast.laws.fitting import Parameter
from spt_fast.laws.overfitting import lowest_share
from spt_fast.laws.powers import power


class MixtureRepetitionLaw(FormulaLaw):
    """Columns: `tokens` D, `fraction` h, `unique_tokens` D_t, `loss`. Parameters: E, A, alpha, tau, r1 (in repeats),
    gamma (nats). If fitted to one corpus, it predicts for that one unless `unique_tokens` says otherwise."""

    inputs: ClassVar[dict[str, Column]] = {"tokens": POSITIVE, "fraction": SHARE, "unique_tokens": POSITIVE}
    parameters: ClassVar[tuple[Parameter, ...]] = (
        IRREDUCIBLE,
        coefficient("A"),
        exponent("alpha"),
        Parameter("tau", 0.1, 1e4),
        Parameter("r1", 0.1, 1000),
        Parameter("gamma", -10, 10, log=False, linear=True),
    )
    units: ClassVar[Units] = {"A": {"tokens": "alpha"}}

    def _features(self, columns: Columns, unit: dict[str, float]) -> Columns:
        tokens, share = columns["tokens"], columns["fraction"]
        read, given = share * tokens, columns.get("unique_tokens")
        seen = np.minimum(read, self._corpus if given is None else given)
        size = unit.get("tokens", 1.0)
        return {
            "general": (1 - share) * tokens / size,
            "seen": seen / size,
            "repeats": np.where(read > seen, read / np.where(seen > 0, seen, 1) - 1, 0.0),
            "fraction": share,
        }

    @staticmethod
    def formula(unknowns: Sequence[Array], columns: Columns) -> Array:
        E, A, alpha, tau, r1, gamma = unknowns
        domain = worth(columns["seen"], columns["repeats"], r1)
        return E + A * power(columns["general"] + tau * domain, -alpha) + gamma * columns["fraction"]

    @property
    def _corpus(self) -> float:
        """The fitted corpus size. RecipeError if there are several."""
        self._require("_rows", "give unique_tokens, or fit it to a table")
        sizes = np.unique(self._rows.columns["unique_tokens"])
        if len(sizes) > 1:
            raise RecipeError("a prediction needs unique_tokens: the law was fitted to corpora of several sizes")
        return float(sizes[0])

    @decision
    def best_fraction(
        self, *, tokens: float, unique_tokens: float | None = None, within: tuple[float, float] | None = None
    ) -> float:
        """The share h with the lowest domain loss after `tokens`, before finetuning, between the smallest and the
        largest fitted share, or those of `within`."""
        unique_tokens = self._corpus if unique_tokens is None else unique_tokens
        self._require("params_", "fit it to a table")
        at = numbers({"tokens": tokens, "unique_tokens": unique_tokens}, self.inputs)

        def loss(share: Array) -> Array:
            given = np.broadcast_arrays(at["tokens"], share, at["unique_tokens"])
            return self._mean(dict(zip(self.inputs, given, strict=True)), "loss")

        share = lowest_share(loss, self._range("fraction", (0.0, 1.0)) if within is None else within)
        self._warn_beyond(fraction=share, **at)
        return share
