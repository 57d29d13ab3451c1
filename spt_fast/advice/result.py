"""What `advise` returns. `spt-fast advise --json` prints it, field by field."""

from __future__ import annotations

from dataclasses import dataclass, field
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
    domain_from: float = field(default=0.0, kw_only=True)
    """The part of pretraining before the domain is mixed in; above 0 for SCPT."""

    @property
    def late_share(self) -> float:
        """The domain's share of the tokens from then on."""
        return self.delta / (1 - self.domain_from)


@dataclass(frozen=True)
class Decision(Choice):
    epochs: float
    """How often pretraining reads the domain corpus."""
    replay: float
    says: str


@dataclass(frozen=True, kw_only=True)
class Ended:
    """Final losses of runs that differ only in their seed; None if they were not measured."""

    delta: float
    tokens: int
    epochs: float
    seeds: int
    domain: Interval
    general: Interval | None
    forgetting: Interval | None

    @staticmethod
    def losses(runs: pd.DataFrame) -> dict[str, Any]:
        """The fields `seeds`, `domain`, `general` and `forgetting`, from rows of the runs table."""
        domain = Interval.of(runs["domain_heldout"])
        assert domain is not None
        return {
            "seeds": int(runs["seed"].nunique()),
            "domain": domain,
            "general": Interval.of(runs["general_heldout"]),
            "forgetting": Interval.of(runs["general_heldout"] - runs["general_before"]),
        }


@dataclass(frozen=True, kw_only=True)
class Arm(Ended):
    """An arm of finetunes; see arms.py."""

    regime: str
    injected: float
    domain_from: float
    """The part of pretraining before the domain is mixed in; above 0 for SCPT."""


@dataclass(frozen=True)
class Outcome:
    """Losses after the finetune; None if they were not measured."""

    domain: Interval
    general: Interval | None
    forgetting: float | None
    """The general loss after the finetune minus that before."""


@dataclass(frozen=True)
class Share(Outcome):
    """A share that was run, with the losses that the laws predict at the budget."""

    delta: float
    epochs: float
    allowed: bool
    """Whether at least one replay that was run keeps the general loss within the limit."""
    best_in: float
    """The part of the refits, with errors as large as those of the runs, in which this share has the lowest domain
    loss."""


@dataclass(frozen=True)
class Of:
    """The runs that the expected losses are of."""

    params: int
    domain_tokens: int
    tokens: int
    injected: float | None


@dataclass(frozen=True)
class Expected:
    """Losses with the decided replay if it was run, else with the least replay that was."""

    domain: Interval
    general: Interval | None
    r_gain: float | None
    """By how many percent the domain loss is below that of FT."""
    of: Of


@dataclass(frozen=True)
class Seen:
    """The budget nearest to the question that was run, and its arms, the lowest domain loss first."""

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
    """The effect of a share of general data in the finetune: mean ratios of final losses to those with the smallest
    share."""

    injected: float
    general: float
    domain: float
    domain_error: float | None
    """The standard error of `domain`; None for one pair."""
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
    """The domain loss of FT."""


@dataclass(frozen=True)
class AtBudget:
    """A law's domain losses compared with measured ones after one budget: their mean relative error, and the best share
    as `predicted` and as `seen`."""

    tokens: int
    mre: float
    predicted: float
    seen: float


@dataclass(frozen=True)
class HeldOut(AtBudget):
    by: int
    """The largest budget, in tokens, that the law was fitted to."""


@dataclass(frozen=True)
class Standing:
    """The laws and their accuracy; all None without runs or without laws."""

    laws: str | None = None
    """The names of the laws."""
    heldout: HeldOut | None = None
    """The error at the largest budget when it is held out; None if there are too few budgets."""
    largest: AtBudget | None = None
    """The error at the largest budget when it is fitted too."""
    before_finetuning: float | None = None
    """The share with the lowest domain loss before finetuning; it may lie between shares that were run."""
    warnings: list[str] | None = None
    assumed_spread: float | None = None
    """The standard deviation of domain losses between seeds, as a share of them, that is assumed because the runs have
    one seed; None if they show it."""


@dataclass(frozen=True, kw_only=True)
class Support(Standing):
    """How far the runs support the answer."""

    outside: dict[str, float] | None
    """The factor by which the question lies outside the runs; 1 within them. None without runs."""
    verdict: str
    next: str | None
    """Runs that would make the answer more certain."""


@dataclass(frozen=True)
class Larger:
    """The size, as a multiple of the SPT model's parameters, at which a model that is only finetuned has equal loss."""

    factor: Interval
    basis: Literal["runs", "published"]
    says: str


@dataclass(frozen=True)
class Account:
    """The FLOPs of one model: pretraining, finetuning and serving."""

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
    """Served tokens from which on the small model has cost less: by the mean factor and by its ends. 0: from the start;
    None: never."""

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
    """Keys: "both paid" and "larger one for free", by whether the larger model's pretraining is paid too."""


@dataclass(frozen=True)
class Advice:
    asked: Asked
    decision: Decision
    missing: list[str]
    """Why runs, or some of them, were not used."""
    shares: list[Share] | None
    """The shares that were run; None without laws."""
    expected: Expected | None
    """The losses to expect from the decision; None for a published answer."""
    seen: Seen | None
    regimes: Regimes | None
    replay: Replay
    distance: Distance
    support: Support
    prior: Prior
    """The papers' answer to the same question."""
    tax: Tax | None
    learning_rates: str
    """The source of the learning rates in `recipe`."""
    recipe: str
    """Phases to paste, YAML."""
