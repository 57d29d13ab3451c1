"""Finetunes after pretraining, and the terms in which tables, comparisons, advice and reports compare them.

treatment   the domain's share of all pretraining tokens; the finetune's replay, anchor and average
arm         a treatment at one pretraining budget; its runs differ by seed
setting     the values of the optimizer fields; an arm's best setting has the lowest mean `domain_select` over seeds
plainest    the finetunes with the least replay, among these those with the least anchor, then the least average.
            Replay comes first because it changes the training text: the papers' figures and the laws are for
            finetunes on the domain alone. An anchor and an average only limit how far the weights move.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import numpy as np
import pandas as pd

from spt_fast.quantities import amount, percent, three_digits
from spt_fast.study.settings import beaten


class Sizes(NamedTuple):
    """What finetunes must have in common to be compared and to be fitted by one law."""

    params: int
    domain_tokens: int

    @property
    def name(self) -> str:
        return f"{amount(self.params)} parameters, {amount(self.domain_tokens)} domain tokens"


SIZES = list(Sizes._fields)
"""The columns of a runs table with these."""


class Treatment(NamedTuple):
    """How an arm uses the domain."""

    delta: float
    """The domain's share of all pretraining tokens."""
    replay: float
    """The share of all other sources in the finetune."""
    anchor: float
    """The strength of the finetune's decay toward its starting weights."""
    average: float = 0.0
    """The share of the starting weights in the final weights."""

    @property
    def key(self) -> str:
        """The treatment as a key: "0", "0.05", "0.05 replay 0.01"."""
        more = f" replay {self.replay:.12g}" if self.replay else ""
        more += f" anchor {self.anchor:g}" if self.anchor else ""
        more += f" average {self.average:g}" if self.average else ""
        return f"{self.delta:.12g}{more}"

    @property
    def name(self) -> str:
        """The name in tables and pictures: "NPT", "SPT 5%", "NPT, 1% replay"."""
        return (f"SPT {percent(self.delta)}" if self.delta else self.without) + self.finetuned

    @property
    def finetuned(self) -> str:
        """How the name ends: ", 1% replay, anchor 1, 10% averaged"; empty for a finetune without these."""
        replay = f", {percent(self.replay)} replay" if self.replay else ""
        anchor = f", anchor {self.anchor:g}" if self.anchor else ""
        return replay + anchor + (f", {percent(self.average)} averaged" if self.average else "")

    @property
    def without(self) -> str:
        """The name for delta = 0."""
        return "NPT"

    @property
    def finetune(self) -> tuple[float, float, float]:
        """(replay, anchor, average); the smallest tuple is the plainest finetune."""
        return self.replay, self.anchor, self.average


class OfBase(Treatment):
    """The treatment of a base with unknown pretraining: `delta` counts as 0."""

    __slots__ = ()

    @property
    def without(self) -> str:
        return "finetune"


@dataclass(frozen=True)
class Interval:
    """A mean with two ends: the smallest and largest value over seeds, or a law's interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, seeds: Iterable[float]) -> Interval | None:
        """Mean and range over the seeds of an arm; None without seeds, or if a value was not measured."""
        given = [float(value) for value in seeds]
        if not given or not all(map(math.isfinite, given)):
            return None
        return Interval(fmean(given), min(given), max(given))

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + (f" ({self.low:.4f} to {self.high:.4f})" if self.low < self.high else "")

    def times(self, factor: float) -> Interval:
        return Interval(self.mean * factor, self.low * factor, self.high * factor)


def plainest(finetunes: pd.DataFrame) -> pd.DataFrame:
    """The finetunes with the least replay, among these those with the least anchor, then the least average."""
    for name in ("injected", "anchor", "average"):
        finetunes = finetunes[finetunes[name] == finetunes[name].min()]
    return finetunes


def compared_with(treatment: Treatment, arms: Iterable[Treatment]) -> Treatment | None:
    """The NPT that a treatment is compared with: with the same finetune, else with the plainest one. None for that NPT
    itself, and without any NPT."""
    npt = sorted((other for other in arms if other.delta == 0), key=lambda other: other.finetune)
    same = treatment._replace(delta=0.0)
    found = same if treatment.delta and same in npt else next(iter(npt), None)
    return None if found == treatment else found


ARM = [*SIZES, "pretrain_tokens", "pretrain_delta", "injected", "anchor", "average"]


def after_pretraining(rows: pd.DataFrame) -> pd.DataFrame:
    """The finetunes on the domain after pretraining on a known mixture: a row, of the final weights, for each seed of
    each arm, in its best setting. Adds the column `regime`, FT or SPT.

    Shares are rounded to three digits, since runs achieve the requested shares only approximately.
    """
    found = every_finetune(rows)
    found = found[~beaten(found, ARM)]
    return found.sort_values("domain_select").drop_duplicates([*ARM, "seed"]).sort_index()


def every_finetune(rows: pd.DataFrame) -> pd.DataFrame:
    """The same as `after_pretraining`, for all settings."""
    kept = rows["handed_on"] & (rows["stage"] > 0) & (rows["start"] == "pretrained") & (rows["injected"] < 0.5)
    found = rows[kept & (rows["pretrain_tokens"] > 0) & rows["pretrain_delta"].notna()]
    shares = {name: found[name].map(three_digits) for name in ("pretrain_delta", "injected")}
    return found.assign(**shares, regime=np.where(shares["pretrain_delta"] > 0, "SPT", "FT"))
