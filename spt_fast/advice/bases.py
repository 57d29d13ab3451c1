"""Decide from runs of a base how to continue from it: shares of domain and general text, anchor, average.

    the runs of the base asked for, or nearest in size  →  arms  →  the lowest general loss at no cost in the domain
                                                        →  D-CPT laws, for a limit on the general loss

The pretraining of a base is unknown, so laws of pretraining do not apply. Without runs the answer is the published
share of replay.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import yaml

from spt_fast.advice.next_step import (
    PUBLISHED,
    batch_said,
    batch_section,
    default_batch,
    exact_count,
    in_windows,
    windows_said,
    with_comment,
)
from spt_fast.advice.prior import FACTS, REPLAY, outside, progress_lost
from spt_fast.advice.question import NO_GENERAL, NO_GENERAL_BEFORE, RISE_UNKNOWN, ask, size_of
from spt_fast.advice.result import Asked, Ended
from spt_fast.advice.support import NEAR, beyond
from spt_fast.errors import DataError, some
from spt_fast.laws import DCPTLaw, best_ratio
from spt_fast.laws.base import LawWarning
from spt_fast.model.flops import parameters
from spt_fast.quantities import amount, percent, three_digits
from spt_fast.study import views
from spt_fast.study.finetunes import SIZES
from spt_fast.study.load import WINDOW
from spt_fast.study.settings import fields_of, usual, usual_batch
from spt_fast.study.usable import UsableRows, usable
from spt_fast.train.weights import read_config

TREATMENT = ["injected", "anchor", "average"]
GENERAL_TEXT = (
    "replay uses the base's own text only where its pretraining data is open (SmolLM2, OLMo 2, Pythia); for other "
    "bases the general corpus is a stand-in, and forgetting is measured on the stand-in"
)
GIVEN_UP = 0.01
"""The rise in domain loss that is accepted for a lower general loss; `max_general_rise` replaces this rule."""
FEWEST_SHARES = 4
"""Shares that a fit of a D-CPT law needs."""


@dataclass(frozen=True, kw_only=True)
class BaseArm(Ended):
    """An arm of runs from one base; `tokens` are those of its longest run."""

    replay: float
    anchor: float
    average: float


@dataclass(frozen=True)
class BaseDecision:
    delta: float
    """The domain's share of the tokens."""
    replay: float
    """The general corpus's share."""
    anchor: float
    average: float
    epochs: float
    """How often the domain corpus is then read."""
    basis: Literal["laws", "seen", "published"]
    says: str


@dataclass(frozen=True)
class BaseAdvice:
    asked: Asked
    base: str | None
    """The base of the runs that were used, or without runs the one that was given."""
    decision: BaseDecision
    arms: list[BaseArm]
    """The arms of that base, the lowest domain loss first."""
    missing: list[str]
    general_text: str
    """How far replay and forgetting depend on the choice of the general text."""
    recipe: str
    """Phases to paste, YAML."""


def of_bases(table: UsableRows) -> bool:
    """Whether all runs started from a base."""
    return not table.rows.empty and bool(table.rows["base"].notna().all())


def advise_base(
    *,
    domain_tokens: int | str,
    budget: int | str,
    model: str | int | None = None,
    table: pd.DataFrame | UsableRows | None = None,
    base: str | None = None,
    general: str | Path | None = None,
    domain: str | Path | None = None,
    max_general_rise: float | Fraction | str | None = None,
) -> BaseAdvice:
    """Advise how to continue for `budget` tokens from `base`, by default from the base of the runs.

    model             by default as large as `base`
    max_general_rise  how far the final general loss may be above that of the base: 0.03 is 3%

    The other arguments are those of `advise`. Raises RecipeError, DataError for a table that cannot be used, or
    CheckpointError for a base that neither exists nor belongs to a run.
    """
    rows = None if table is None else usable(table)
    known = rows is not None and base in set(rows.rows["base"])
    shape = read_config(Path(base)) if base and not (known and not Path(base).is_dir()) else None
    model = parameters(shape) if model is None and shape else model
    asked = ask(
        domain_tokens=domain_tokens,
        budget=budget,
        model=model,
        params=size_of(model).params,
        max_general_rise=max_general_rise,
    )
    notes, own = ["no runs were given"], pd.DataFrame()
    if rows is not None:
        notes, own = list(rows.notes), _nearest(rows, asked, base)
        if own.empty:
            notes.append("no run was trained from a base on domain text, so there is nothing to compare")
    arms = _arms(own) if len(own) else []
    optimizer, batch = {"lr": PUBLISHED.finetune[1]}, None
    if arms and rows is not None:
        asked_for, base = base, str(own["base"].iloc[0])
        others = sorted({*rows.rows["base"].dropna()} - {base})
        if others and asked_for != base:
            notes.append(f"the answer is for {base}; for {some(others)}, name it as `init`")
        arm, decided, more = _decide(arms, own, rows, asked)
        ran = own[_is(own, arm)]
        optimizer = {"lr": float(ran["lr"].mode()[0]), **fields_of(usual(ran))}
        batch = usual_batch(ran)
        notes += [*more, *_far(own, decided, asked)]
    else:
        decided = _decision(REPLAY, 0.0, 0.0, asked, "published", _published(asked))
        notes += [] if asked.max_general_rise is None else [RISE_UNKNOWN]
    window = batch[1] if batch else WINDOW
    window = min(window, shape.context) if shape else window
    here = in_windows(batch, window) if batch else default_batch(16, window, asked.budget)
    steps = {"batch": batch_section(here), "optimizer": optimizer}
    unused = "the batch of the runs, which the learning rate belongs to, is not recorded" if arms else ""
    says = "" if batch == here else windows_said(batch, here) if batch else batch_said(unused)
    recipe = with_comment(_recipe(decided, asked, base, steps, general, domain), says)
    return BaseAdvice(asked, base, decided, arms, notes, GENERAL_TEXT, recipe)


def _nearest(table: UsableRows, asked: Asked, base: str | None) -> pd.DataFrame:
    """The final rows of runs of one base and corpus: those nearest in size, and in length if all arms have runs of
    several lengths."""
    rows = table.rows
    rows = rows[(rows["stage"] == 1) & rows["handed_on"] & (rows["start"] == "pretrained") & (rows["delta"] > 0)]
    rows = rows[rows["base"].notna()].dropna(subset=["domain_heldout"])
    if base is not None and (rows["base"] == base).any():
        rows = rows[rows["base"] == base]
    if rows.empty:
        return rows
    rows = rows.assign(injected=rows["injected"].map(three_digits))

    def distance(group: tuple[Any, pd.DataFrame]) -> float:
        (params, corpus, _), _ = group
        return abs(math.log(params / (asked.params or params))) + abs(math.log(corpus / asked.domain_tokens))

    _, own = min(rows.groupby([*SIZES, "base"]), key=distance)
    lengths = set.intersection(*(set(arm["tokens"]) for _, arm in own.groupby(TREATMENT)))
    if lengths:
        own = own[own["tokens"] == min(lengths, key=lambda tokens: abs(math.log(tokens / asked.budget)))]
    return own


def _arms(own: pd.DataFrame) -> list[BaseArm]:
    found = []
    for treatment, arm in own.groupby(TREATMENT):
        replay, anchor, average = map(float, treatment)  # NumPy's before pandas 3
        found.append(
            BaseArm(
                delta=_rest(replay),
                replay=replay,
                anchor=anchor,
                average=average,
                tokens=int(arm["tokens"].max()),
                epochs=float(arm["epochs"].mean()),
                **BaseArm.losses(arm),
            )
        )
    return sorted(found, key=lambda arm: arm.domain.mean)


def _far(own: pd.DataFrame, decided: BaseDecision, asked: Asked) -> list[str]:
    """A warning with the factors by which the question lies outside of the runs; empty if it lies within."""
    params, corpus = (float(own[name].iloc[0]) for name in SIZES)
    factors = {
        "tokens": outside(asked.budget, own["tokens"].min(), own["tokens"].max()),
        "domain_tokens": outside(asked.domain_tokens, corpus, corpus),
        "params": outside(asked.params or params, params, params),
        "epochs": outside(decided.epochs, own["epochs"].min(), own["epochs"].max()),
    }
    far = beyond(factors, NEAR)
    says = "the question is outside these runs, so losses and the best arm may differ; run the best arms nearer to it"
    return [f"{says}: {', '.join(far)}"] if far else []


def _is(own: pd.DataFrame, arm: BaseArm) -> pd.Series:
    return (own[TREATMENT] == [arm.replay, arm.anchor, arm.average]).all(axis=1)


def _decide(
    arms: list[BaseArm], own: pd.DataFrame, table: UsableRows, asked: Asked
) -> tuple[BaseArm, BaseDecision, list[str]]:
    """The chosen arm, the decision, and notes on it."""
    before, rise = float(own["general_before"].mean()), asked.max_general_rise
    chosen, why = _choose(arms, before, rise)
    plain = not (chosen.anchor or chosen.average)  # as the runs that the laws are fitted to
    share = _by_law(table, own, asked, before) if plain and rise is not None else None
    replay = chosen.replay if share is None else _rest(share)
    says = f"{_text(replay, chosen.anchor, chosen.average)}: "
    if share is None:
        says += f"{why}; domain loss {chosen.domain}"
        says += "" if chosen is arms[0] else f", {arms[0].domain.mean:.4f} in the arm with the lowest"
        says += f"; general loss {chosen.general}" if chosen.general else ""
        says += f", {before:.4f} before" if chosen.general and math.isfinite(before) else ""
        says += (
            f"; measured with {amount(float(own['params'].iloc[0]))} parameters after {amount(chosen.tokens)} tokens"
        )
    else:
        says += f"by the D-CPT laws the lowest domain loss while the general loss rises by at most {percent(rise or 0)}"
    decided = _decision(replay, chosen.anchor, chosen.average, asked, "seen" if share is None else "laws", says)
    one_seed = ["with one seed it is unknown how much of the differences is chance"]
    return chosen, decided, one_seed if min(arm.seeds for arm in arms) < 2 else []


def _choose(arms: list[BaseArm], before: float, rise: float | None) -> tuple[BaseArm, str]:
    """The arm to take, and why. before: the general loss of the base; rise: how far it may be exceeded, as a share."""
    measured = [arm for arm in arms if arm.general]
    if rise is not None and not (measured and math.isfinite(before)):
        raise DataError(NO_GENERAL_BEFORE if measured else NO_GENERAL, argument=True)
    if not measured:
        return arms[0], "the lowest domain loss; the general loss was not measured"
    if rise is None:
        most = max(arms[0].domain.high, (1 + GIVEN_UP) * arms[0].domain.mean)
        chosen = min((arm for arm in measured if arm.domain.low <= most), key=_general, default=arms[0])
        near = f"end within {percent(GIVEN_UP)} of the lowest domain loss"
        if chosen.domain.mean > (1 + GIVEN_UP) * arms[0].domain.mean:
            near += ", or have a seed that ends no higher than all seeds of the arm with the lowest"
        return chosen, f"the lowest general loss of the arms that {near}"
    limit = (1 + rise) * before
    if allowed := [arm for arm in measured if _general(arm) <= limit]:
        return allowed[0], f"the lowest domain loss of the arms whose final general loss is {limit:.4f} or less"
    return min(measured, key=_general), f"the lowest general loss, since no arm ends at {limit:.4f} or less"


def _by_law(table: UsableRows, own: pd.DataFrame, asked: Asked, before: float) -> float | None:
    """The domain's share that the D-CPT laws choose within the limit at the budget; None if they cannot be fitted."""
    fitted = {}
    base, params = own[["base", "params"]].iloc[0]
    others = table.rows.loc[(table.rows["params"] == params) & (table.rows["base"] != base), "run"]
    for of in ("domain", "general"):
        for group, rows in views.dcpt(table, of):
            rows = rows[~rows["run"].isin(others)]
            if group["domain_tokens"] == own["domain_tokens"].iloc[0] and rows["own_ratio"].nunique() >= FEWEST_SHARES:
                fitted[of] = rows
    if len(fitted) < 2:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LawWarning)
            share = best_ratio(
                domain=DCPTLaw().fit(fitted["domain"]),
                general=DCPTLaw().fit(fitted["general"]),
                params=float(params),
                tokens=asked.budget,
                max_general_rise=asked.max_general_rise or 0.0,
                general_before=before,
            )
    except ValueError:
        return None
    return three_digits(share) or None


def _general(arm: BaseArm) -> float:
    return arm.general.mean if arm.general else math.inf


def _text(replay: float, anchor: float, average: float) -> str:
    text = f"continue with {percent(_rest(replay))} of domain and {percent(replay)} of general text"
    text += f", anchor {anchor:g}" if anchor else ""
    return text + (f", and average with {percent(average)} of the base" if average else "")


def _rest(share: float) -> float:
    return round(1 - share, 9)


def _decision(
    replay: float, anchor: float, average: float, asked: Asked, basis: Literal["laws", "seen", "published"], says: str
) -> BaseDecision:
    delta = _rest(replay)
    return BaseDecision(delta, replay, anchor, average, delta * asked.budget / asked.domain_tokens, basis, says)


def _published(asked: Asked) -> str:
    says = f"{_text(REPLAY, 0.0, 0.0)}: {FACTS['replay'].says} ({FACTS['replay'].source})"
    if asked.params is not None:
        says += f"; without replay, about {progress_lost(asked.params):.0%} of the pretraining is undone at this size"
    return f"{says}. To measure it on your text, run the ready studies forgetting and dcpt from the base"


def _recipe(
    decided: BaseDecision,
    asked: Asked,
    base: str | None,
    steps: dict[str, Any],
    general: str | Path | None,
    domain: str | Path | None,
) -> str:
    prefixes = {"general": str(general or "data/general"), "domain": str(domain or "data/domain")}
    shares = {"general": decided.replay, "domain": decided.delta}
    treatment = {"anchor": decided.anchor, "average": decided.average}
    phase = {
        "name": "continue",
        "tokens": exact_count(asked.budget),
        "mixture": {name: f"{100 * share:.12g}%" for name, share in shares.items() if share},
        **steps,
        "schedule": {"name": "cosine", "warmup": "5%"},
        **{name: value for name, value in treatment.items() if value},
    }
    recipe = {
        "run": "runs/advised",
        "init": base or "BASE",
        "sources": {name: {"train": prefix, "heldout": f"{prefix}.heldout"} for name, prefix in prefixes.items()},
        "phases": [phase],
    }
    return yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=80)
