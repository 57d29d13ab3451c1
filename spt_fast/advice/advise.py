"""Decide from runs how much domain data goes into pretraining, how often it is read, and how to finetune.

    the runs nearest to the question  →  losses of each share that was run, at the budget  →  share, regime, replay

Without suitable runs the answer is a prior from the papers, and says so. The losses that were measured are returned
beside those that the laws predict.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from spt_fast.advice import replay as replays
from spt_fast.advice.arms import REGIMES
from spt_fast.advice.bases import BaseAdvice, advise_base, of_bases
from spt_fast.advice.evidence import Evidence, gather
from spt_fast.advice.next_step import next_step, rates_of
from spt_fast.advice.prior import FINETUNE_EPOCHS, SCPT_LAST, Prior, outside, prior
from spt_fast.advice.question import NO_GENERAL, NO_GENERAL_BEFORE, RISE_UNKNOWN, Size, ask, nearest_preset, size_of
from spt_fast.advice.result import (
    Advice,
    Arm,
    Asked,
    Choice,
    Decision,
    Distance,
    Effect,
    Expected,
    Of,
    Outcome,
    Regimes,
    Seen,
    Share,
    Tax,
)
from spt_fast.advice.support import support
from spt_fast.advice.tax import factor_of, published_factor, tax
from spt_fast.data.divergence import divergence
from spt_fast.errors import DataError, RecipeError
from spt_fast.quantities import amount, percent, times
from spt_fast.study.finetunes import plainest
from spt_fast.study.usable import UsableRows, usable

SEEN_WITHIN = 2.0
"""Without a law, the best arm of the nearest budget is used if the budget asked for is within this factor of it."""


def advise(
    *,
    domain_tokens: int | str,
    budget: int | str,
    model: str | int | None = None,
    table: pd.DataFrame | UsableRows | None = None,
    general: str | Path | None = None,
    domain: str | Path | None = None,
    inference_tokens: int | str | None = None,
    max_general_rise: float | Fraction | str | None = None,
    base: str | None = None,
) -> Advice | BaseAdvice:
    """Advise how to use a domain corpus: how to continue from a base (`advise_base`) if `base` is given or all runs
    start from one, else how to pretrain (`advise_pretraining`).

    domain_tokens     unique tokens of the domain corpus
    budget            tokens to train on
    model             a preset, or a number of parameters; without it, runs of any size are used
    table             runs, as returned by `read_table`
    general, domain   dataset prefixes, to measure the distance of the domain from the general corpus
    inference_tokens  tokens that will be served, for the finetuner's tax
    max_general_rise  how far the final general loss may be above the lowest one before finetuning at that budget: 0.03
                      is 3%
    base              weights to start from: a Hugging Face folder, or a run

    Raises RecipeError, or DataError for a table that cannot be used.
    """
    rows = None if table is None else usable(table)
    own: dict[str, Any] = {"domain_tokens": domain_tokens, "budget": budget, "model": model, "table": rows}
    own |= {"general": general, "domain": domain, "max_general_rise": max_general_rise}
    if base is None and (rows is None or not of_bases(rows)):
        return advise_pretraining(**own, inference_tokens=inference_tokens)
    if inference_tokens is not None:
        raise RecipeError(
            "inference_tokens: the finetuner's tax is computed for pretraining only; leave it out for a base",
            argument=True,
        )
    return advise_base(**own, base=base)


def advise_pretraining(
    *,
    domain_tokens: int | str,
    budget: int | str,
    model: str | int | None = None,
    table: pd.DataFrame | UsableRows | None = None,
    general: str | Path | None = None,
    domain: str | Path | None = None,
    inference_tokens: int | str | None = None,
    max_general_rise: float | Fraction | str | None = None,
) -> Advice:
    """Advise a mixture for pretraining. Arguments and errors are those of `advise`."""
    size = size_of(model)
    asked = ask(
        domain_tokens=domain_tokens,
        budget=budget,
        model=model,
        params=size.params,
        max_general_rise=max_general_rise,
        inference_tokens=inference_tokens,
    )
    domain_tokens, budget, max_general_rise = asked.domain_tokens, asked.budget, asked.max_general_rise
    _check_distance(general, domain)
    papers = prior(domain_tokens=domain_tokens, budget=budget, params=size.params)
    rows = None if table is None else usable(table)
    evidence, missing = gather(rows, domain_tokens=domain_tokens, budget=budget, params=size.params)
    mean_epochs = most_epochs = float(FINETUNE_EPOCHS)
    limit, effects, allowed = None, [], dict[float, bool]()
    domain_from = 1 - SCPT_LAST if papers["regime"] == "SCPT" else 0.0
    chosen = published = Choice(papers["regime"], papers["delta"], "published", domain_from=domain_from)
    if evidence is not None:
        limit = _limit(evidence, max_general_rise)
        effects = replays.effects(evidence.rows)
        allowed = _allowed(evidence, effects, limit)
        chosen = _choose(evidence, effects, allowed, limit, chosen)
        late_within = chosen.regime == "SCPT" and chosen.basis == "seen"
        if allowed and not any(allowed.values()) and not late_within:
            missing.append(
                f"no pair of share and replay that was run keeps the general loss within {max_general_rise:.3g} of the "
                "lowest one before finetuning; the answer is the "
                + ("published share, whose rise is unknown" if chosen == published else "pair that comes nearest")
            )
        elif max_general_rise is not None and chosen == published:
            missing.append(RISE_UNKNOWN)
        epochs = plainest(evidence.rows)["epochs"]
        mean_epochs, most_epochs = float(epochs.mean()), float(epochs.max())
    elif max_general_rise is not None:
        missing.append(RISE_UNKNOWN)
    replay = replays.choose(chosen, evidence, effects, limit, rows, size.params, domain_tokens)
    rates = rates_of(rows, None if evidence is None else evidence.params, size.params, chosen.delta)
    decision = _decision(chosen, chosen.delta * budget / domain_tokens, replay.share, budget)
    shares = None if evidence is None else _shares(evidence, allowed, budget / domain_tokens)
    return Advice(
        asked=asked,
        decision=decision,
        missing=missing,
        shares=shares,
        expected=None if evidence is None else _expected(decision, evidence, effects),
        seen=None if evidence is None else Seen(evidence.arms[0].tokens, evidence.arms),
        regimes=None if evidence is None else _regimes(evidence, papers),
        replay=replay,
        distance=_distance(general, domain, evidence),
        support=support(decision, evidence, shares, asked),
        prior=papers,
        tax=_tax(asked, size, evidence, mean_epochs),
        learning_rates=rates.of,
        recipe=next_step(
            decision,
            preset=size.preset or nearest_preset(size.params or _trained_size(evidence, rows)),
            budget=budget,
            finetune_tokens=most_epochs * domain_tokens / (1 - decision.replay),
            rates=rates,
            general=general,
            domain=domain,
        ),
    )


def _trained_size(evidence: Evidence | None, rows: UsableRows | None) -> float:
    """Parameters of the models in the runs; 1B, as in the papers, without runs."""
    if evidence is not None:
        return evidence.params
    return 1e9 if rows is None or rows.rows.empty else float(rows.rows["params"].max())


def _check_distance(general: object, domain: object) -> None:
    if (general is None) != (domain is None):
        given, other = ("general", "domain") if domain is None else ("domain", "general")
        raise RecipeError(f"{given}: a distance needs two datasets; add `{other}=PREFIX`", argument=True)


# ------------------------------------------------------------------------------------------------ the decision


def _limit(evidence: Evidence, max_general_rise: float | None) -> float | None:
    """The highest general loss that the answer may end with; None without `max_general_rise`."""
    if max_general_rise is None:
        return None
    general = evidence.general()
    if not general:
        measured = evidence.rows["general_heldout"].notna().any()
        raise DataError(NO_GENERAL_BEFORE if measured else NO_GENERAL, argument=True)
    return (1 + max_general_rise) * min(before for before, _ in general.values())


def _allowed(evidence: Evidence, effects: list[Effect], limit: float | None) -> dict[float, bool]:
    """By share, whether at least one replay that was run keeps the general loss within the limit."""
    general = evidence.general()
    return {
        delta: limit is None
        or (delta in general and replays.least_within(effects, general[delta][1], limit) is not None)
        for delta in evidence.outcomes()
    }


def _choose(
    evidence: Evidence, effects: list[Effect], allowed: dict[float, bool], limit: float | None, published: Choice
) -> Choice:
    """The regime and share with the lowest domain loss among the allowed ones, or with the lowest general loss if none
    is allowed; the published ones if no law and no arm is near enough."""

    def within(arm: Arm) -> bool:
        loss = arm.general
        return limit is None or (loss is not None and replays.least_within(effects, loss.mean, limit) is not None)

    general = {delta: after for delta, (_, after) in evidence.general().items()}
    domain = {delta: outcome.domain.mean for delta, outcome in evidence.outcomes().items()}
    near = outside(evidence.budget, *([evidence.arms[0].tokens] * 2)) <= SEEN_WITHIN
    steady = [arm for arm in evidence.steady() if allowed.get(arm.delta, within(arm))]
    late = [arm for arm in evidence.late() if within(arm)]
    if near and late and (not steady or _clear(late[0], steady[0])):
        return Choice("SCPT", late[0].delta, "seen", domain_from=late[0].domain_from)
    if not domain or not (evidence.forecast or near):
        return published
    if any(allowed.values()):
        delta = min((d for d in domain if allowed[d]), key=lambda d: domain[d])
    elif measured := domain.keys() & general.keys():
        delta = min(measured, key=lambda d: general[d])
    else:
        return published
    return Choice("SPT" if delta else "FT", delta, "laws" if evidence.forecast else "seen")


def _clear(ours: Arm, theirs: Arm) -> bool:
    """Whether every seed of `ours` has a lower domain loss than every seed of `theirs`."""
    return ours.domain.high < theirs.domain.low


def _decision(chosen: Choice, epochs: float, replay: float, budget: int) -> Decision:
    finetune = "finetune on the domain" + (f" with {percent(replay)} of general data" if replay else "")
    if chosen.regime == "FT":
        says = f"pretrain on general data alone, {amount(budget)} tokens"
    elif chosen.regime == "SCPT":
        late, last = percent(chosen.late_share), percent(1 - chosen.domain_from)
        says = f"pretrain on general data, with {late} domain data in the last {last} of {amount(budget)} tokens"
    else:
        says = f"pretrain with {percent(chosen.delta)} domain data in all of {amount(budget)} tokens"
    read = "" if chosen.regime == "FT" else f", which reads the domain {times(epochs)}"
    says += f"{read}, then {finetune}"
    name = "FT only" if chosen.regime == "FT" else chosen.regime
    return Decision(**vars(chosen), epochs=epochs, replay=replay, says=f"{name}: {says}")


# ------------------------------------------------------------------------------------------------ the evidence


def _shares(evidence: Evidence, allowed: dict[float, bool], per_token: float) -> list[Share] | None:
    known = evidence.forecast
    if known is None:
        return None
    best_in = known.best_in(np.array([allowed[delta] or not any(allowed.values()) for delta in known.outcomes]))
    return [
        Share(**vars(outcome), delta=delta, epochs=delta * per_token, allowed=allowed[delta], best_in=best)
        for (delta, outcome), best in zip(known.outcomes.items(), best_in.tolist(), strict=True)
    ]


def _expected(decision: Decision, evidence: Evidence, effects: list[Effect]) -> Expected | None:
    known, delta = evidence.forecast, decision.delta
    own: Outcome | Arm
    if decision.basis == "published":
        return None
    if decision.basis == "laws":
        assert known is not None
        tokens, own = known.tokens, known.outcomes[delta]
    else:
        own = evidence.arm_of(decision)
        tokens = own.tokens
    without = evidence.outcomes() if decision.basis == "laws" else evidence.seen()
    domain, general, finetuned = own.domain, own.general, without.get(0.0)
    gain = 100 * (finetuned.domain.mean - domain.mean) / finetuned.domain.mean if finetuned else None
    effect = next((e for e in effects if e.injected == decision.replay), effects[0] if effects else None)
    if effect:
        domain, general = domain.times(effect.domain), general and general.times(effect.general)
    of = Of(evidence.params, evidence.domain_tokens, int(tokens), effect.injected if effect else None)
    return Expected(domain, general, gain, of)


def _regimes(evidence: Evidence, papers: Prior) -> Regimes:
    best = {regime: next((arm for arm in evidence.arms if arm.regime == regime), None) for regime in REGIMES}
    first, *others = sorted((arm for arm in best.values() if arm), key=lambda arm: arm.domain.mean)
    losses = ", ".join(f"{_name(arm)} {arm.domain.mean:.4f}" for arm in (first, *others))
    says = [f"after {amount(first.tokens)} tokens and a finetune, domain losses are {losses}"]
    for other in others:
        seeds = min(first.seeds, other.seeds)
        if seeds < 2:
            says.append(
                f"with one seed it is unknown whether {_name(first)} and {_name(other)} differ by more than chance"
            )
        elif not _clear(first, other):
            says.append(f"the seeds of {_name(first)} and {_name(other)} overlap: the difference may be chance")
    if not best["SCPT"] and papers["regime"] != "SPT":
        says.append(f"SCPT was not run; by the papers: {papers['why']}")
    return Regimes(best, says)


def _name(arm: Arm) -> str:
    return "FT only" if arm.regime == "FT" else f"{arm.regime} {percent(arm.delta)}"


def _distance(general: str | Path | None, domain: str | Path | None, evidence: Evidence | None) -> Distance:
    arms = evidence.arms if evidence else ()
    return Distance(
        divergence=None if general is None or domain is None else divergence(domain, general),
        domain_after_plain_finetuning=next((arm.domain.mean for arm in arms if arm.regime == "FT"), None),
    )


def _tax(asked: Asked, size: Size, evidence: Evidence | None, finetune_epochs: float) -> Tax | None:
    if asked.inference_tokens is None or size.params is None or size.multiplied is None:
        return None
    return tax(
        params=size.multiplied,
        budget=asked.budget,
        finetune_tokens=finetune_epochs * asked.domain_tokens,
        served=asked.inference_tokens,
        larger=(evidence and factor_of(plainest(evidence.all_sizes), size.params)) or published_factor(),
    )
