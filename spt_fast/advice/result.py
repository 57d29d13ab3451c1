"""What `advise` returns. `spt-fast advise --json` prints it, field by field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from spt_fast.advice.prior import Prior
from spt_fast.study.finetunes import Interval


@dataclass(frozen=True)
class Asked:
    domain_tokens: int
    budget: int
    model: str | int | None
    params: int | None
    inference_tokens: int | None
    max_general_rise: float | None


@dataclass(frozen=True)
class Choice:
    regime: str
    """"FT", "SPT", "SCPT", or "SPT or SCPT" where nothing is published."""
    delta: float
    """The domain's share of all pretraining tokens."""
    basis: Literal["laws", "seen", "published"]


@dataclass(frozen=True)
class Decision(Choice):
    epochs: float
    """How often pretraining reads the domain corpus."""
    replay: float
    says: str


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What runs that differ by seed only ended with. Losses are None where they were not measured."""

    delta: float
    tokens: int
    epochs: float
    seeds: int
    domain: Interval
    general: Interval | None
    forgetting: Interval | None

    @staticmethod
    def losses(runs: pd.DataFrame) -> dict[str, Any]:
        """The last four, of rows of the runs table."""
        domain = Interval.of(runs["domain_heldout"])
        assert domain is not None
        return {
            "seeds": len(runs),
            "domain": domain,
            "general": Interval.of(runs["general_heldout"]),
            "forgetting": Interval.of(runs["general_heldout"] - runs["general_before"]),
        }


@dataclass(frozen=True, kw_only=True)
class Arm(Ended):
    """Of finetunes; see arms.py."""

    regime: str
    injected: float


@dataclass(frozen=True)
class Outcome:
    """Losses after the finetune; None where they were not measured."""

    domain: Interval
    general: Interval | None
    forgetting: float | None
    """The general loss after it − before."""


@dataclass(frozen=True)
class Share(Outcome):
    """A share that was run, as the laws expect it at the budget."""

    delta: float
    epochs: float
    allowed: bool
    """Whether some replay that was run keeps the limit on the general loss."""
    best_in: float
    """The part of resamplings in which its domain loss is the lowest."""


@dataclass(frozen=True)
class Of:
    """The runs whose losses are expected."""

    params: int
    domain_tokens: int
    tokens: int
    injected: float | None


@dataclass(frozen=True)
class Expected:
    """Losses with the decided replay where it was run, else with the least that was."""

    domain: Interval
    general: Interval | None
    r_gain: float | None
    """Below the domain loss of FT, in percent."""
    of: Of


@dataclass(frozen=True)
class Seen:
    """The run budget nearest to what is asked, and its arms, best first."""

    tokens: int
    arms: list[Arm]


@dataclass(frozen=True)
class Regimes:
    best: dict[str, Arm | None]
    """The best arm of FT, SPT and SCPT."""
    says: list[str]

    def as_json(self) -> dict[str, Any]:
        return {**self.best, "says": self.says}


@dataclass(frozen=True)
class Effect:
    """Of a share of general data in the finetune: mean factors on the losses after it, against the smallest share."""

    injected: float
    general: float
    domain: float
    domain_error: float
    """The standard error."""
    pairs: int


@dataclass(frozen=True)
class Replay:
    share: float
    basis: Literal["seen", "law", "published"]
    says: str
    effects: list[Effect]


@dataclass(frozen=True)
class Distance:
    divergence: dict[str, float] | None
    domain_after_plain_finetuning: float | None
    """The domain loss."""


@dataclass(frozen=True)
class AtBudget:
    """A law's domain losses against those after one budget: the best share as `predicted` and as `seen`."""

    tokens: int
    mre: float
    predicted: float
    seen: float


@dataclass(frozen=True)
class HeldOut(AtBudget):
    by: int
    """That budget is predicted from those up to so many tokens."""


@dataclass(frozen=True)
class Standing:
    """How laws fared; without runs, or without laws, nothing of it is known."""

    laws: str | None = None
    """Which they are."""
    heldout: HeldOut | None = None
    """At the largest budget that was run, predicted from the others; None where they are too few."""
    largest: AtBudget | None = None
    """The same when it is fitted too."""
    before_finetuning: float | None = None
    """The share with the lowest domain loss then, also between those run."""
    warnings: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Support(Standing):
    """How far the runs support the answer."""

    outside: dict[str, float] | None
    """The factor by which the question lies outside of the runs; 1 is within. None without runs."""
    verdict: str
    next: str | None
    """What to run to be surer."""


@dataclass(frozen=True)
class Larger:
    """How many times as many parameters, finetuned only, end with the loss of SPT."""

    factor: Interval
    basis: Literal["runs", "published"]
    says: str


@dataclass(frozen=True)
class Account:
    """FLOPs."""

    what: str
    params: float
    pretraining: float
    finetuning: float
    serving: float

    @property
    def training(self) -> float:
        return self.pretraining + self.finetuning

    @property
    def total(self) -> float:
        return self.training + self.serving

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "total": self.total}


@dataclass(frozen=True)
class BreakEven:
    """Tokens served from which the small model has cost less, by the factor and its ends; 0 from the start, None
    never."""

    mean: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Tax:
    """The finetuner's tax; see tax.py."""

    larger: Larger
    served: int
    accounts: list[Account]
    break_even: dict[str, BreakEven]
    """"both paid", "larger one for free": whether the larger one's pretraining is paid too."""


@dataclass(frozen=True)
class Advice:
    asked: Asked
    decision: Decision
    missing: list[str]
    """Why runs, or some of them, were not used."""
    shares: list[Share] | None
    """Those that were run; None without laws."""
    expected: Expected | None
    """Of the decision; None without runs."""
    seen: Seen | None
    regimes: Regimes | None
    replay: Replay
    distance: Distance
    support: Support
    prior: Prior
    """What the papers say of the same question."""
    tax: Tax | None
    learning_rates: str
    """Whose they are."""
    recipe: str
    """Phases to paste, YAML."""
