"""Finetunes after pretraining, and how they are compared: one definition for tables, comparisons, advice and pages.

treatment   the domain's share of all pretraining tokens; the finetune's replay, anchor and average
arm         a treatment at one pretraining budget; its runs differ by seed
setting     the values of its optimizers' fields; an arm's best setting has the lowest mean `domain_select` over
            seeds
plainest    the finetunes with the least replay, of these the ones with the least anchor, then the least average.
            Replay comes first because it changes the training text: the papers' figures and the laws are for
            finetunes on the domain alone. An anchor and an average only change how far they go.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import numpy as np
import pandas as pd

from spt_fast.study.settings import beaten
from spt_fast.study.words import percent, three_digits

SETTING = ["params", "domain_tokens"]
"""What finetunes must share to be compared, and laws of them to be fitted."""


class Treatment(NamedTuple):
    """How an arm uses the domain: the same in all its runs, which differ by budget and seed."""

    delta: float
    """The domain's share of all pretraining tokens."""
    replay: float
    """The share of all other sources in the finetune."""
    anchor: float
    """The finetune's decay toward the weights that it started from."""
    average: float = 0.0
    """The share of these in its final weights."""

    @property
    def key(self) -> str:
        """Its form as a key: "0", "0.05", "0.05 replay 0.01"."""
        more = f" replay {self.replay:.12g}" if self.replay else ""
        more += f" anchor {self.anchor:g}" if self.anchor else ""
        more += f" average {self.average:g}" if self.average else ""
        return f"{self.delta:.12g}{more}"

    @property
    def name(self) -> str:
        """Its name in tables and pictures: "NPT", "SPT 5%", "NPT, 1% replay"."""
        name = f"SPT {percent(self.delta)}" if self.delta else self.without
        name += f", {percent(self.replay)} replay" if self.replay else ""
        name += f", anchor {self.anchor:g}" if self.anchor else ""
        return name + (f", {percent(self.average)} averaged" if self.average else "")

    @property
    def without(self) -> str:
        """Its name without domain text in pretraining."""
        return "NPT"

    @property
    def finetune(self) -> tuple[float, float, float]:
        """(replay, anchor, average); the least is the plainest."""
        return self.replay, self.anchor, self.average


class OfBase(Treatment):
    """The treatment of a base with unknown pretraining: `delta` counts as 0."""

    __slots__ = ()

    @property
    def without(self) -> str:
        return "finetune"


@dataclass(frozen=True)
class Interval:
    """A figure and its ends: over seeds the least and the largest, for a law those of its interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, seeds: Iterable[float]) -> Interval | None:
        """Over the seeds of an arm; None if there are none, or if one was not measured."""
        given = [float(value) for value in seeds]
        if not given or not all(map(math.isfinite, given)):
            return None
        return Interval(fmean(given), min(given), max(given))

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + (f" ({self.low:.4f} to {self.high:.4f})" if self.low < self.high else "")

    def times(self, factor: float) -> Interval:
        return Interval(self.mean * factor, self.low * factor, self.high * factor)


def plainest(finetunes: pd.DataFrame) -> pd.DataFrame:
    """The finetunes of a table with the least replay, of these those with the least anchor, then the least average."""
    for name in ("injected", "anchor", "average"):
        finetunes = finetunes[finetunes[name] == finetunes[name].min()]
    return finetunes


def held_against(treatment: Treatment, arms: Iterable[Treatment]) -> Treatment | None:
    """NPT with the same finetune, else with the plainest; None for that one itself, and without NPT."""
    npt = sorted((other for other in arms if other.delta == 0), key=lambda other: other.finetune)
    same = treatment._replace(delta=0.0)
    found = same if treatment.delta and same in npt else next(iter(npt), None)
    return None if found == treatment else found


ARM = [*SETTING, "pretrain_tokens", "pretrain_delta", "injected", "anchor", "average"]


def after_pretraining(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per finetune, mostly on the domain, with final weights after pretraining on a known mixture, for the best
    setting, one for each seed of an arm. Adds `regime`, FT or SPT.

    Shares are rounded to three digits, since runs achieve the requested shares only approximately.
    """
    found = every_finetune(rows)
    found = found[~beaten(found, ARM)]
    return found.sort_values("domain_select").drop_duplicates([*ARM, "seed"]).sort_index()


def every_finetune(rows: pd.DataFrame) -> pd.DataFrame:
    """The same for every setting."""
    kept = rows["handed_on"] & (rows["stage"] > 0) & (rows["start"] == "pretrained") & (rows["injected"] < 0.5)
    found = rows[kept & (rows["pretrain_tokens"] > 0) & rows["pretrain_delta"].notna()]
    shares = {name: found[name].map(three_digits) for name in ("pretrain_delta", "injected")}
    return found.assign(**shares, regime=np.where(shares["pretrain_delta"] > 0, "SPT", "FT"))
