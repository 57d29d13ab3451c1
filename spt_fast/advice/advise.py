"""From runs to a decision: how much domain data goes into pretraining, how often, and what is left to finetuning.

    the runs nearest to what is asked  →  losses over the shares that were run, at the budget  →  share, regime, replay

Without runs that can say it the answer is a prior from the papers, and says so. What was seen, without any law, stands
beside what the laws make of it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from spt_fast.advice import replay as replays
from spt_fast.advice.arms import REGIMES
from spt_fast.advice.evidence import Evidence, gather
from spt_fast.advice.next_step import next_step, rates_of
from spt_fast.advice.prior import FINETUNE_EPOCHS, SCPT_LAST, outside, prior
from spt_fast.advice.support import support
from spt_fast.advice.tax import factor_of, published_factor, tax
from spt_fast.data.divergence import divergence
from spt_fast.errors import DataError, RecipeError, nearest
from spt_fast.fields import parse_count
from spt_fast.model.flops import matmul_parameters, parameters
from spt_fast.model.gpt import GPTConfig
from spt_fast.model.presets import PRESETS
from spt_fast.study.finetunes import plainest
from spt_fast.study.usable import UsableRows, usable
from spt_fast.study.words import amount, percent

SEEN_WITHIN = 2.0
"""A factor from the nearest budget that was run, up to which its best arm is taken where no law can be fitted."""

Row = dict[str, Any]


def advise(
    *,
    domain_tokens: int,
    budget: int,
    model: str | int | None = None,
    table: pd.DataFrame | UsableRows | None = None,
    general: str | Path | None = None,
    domain: str | Path | None = None,
    inference_tokens: int | None = None,
    max_general_rise: float | None = None,
) -> dict[str, Any]:
    """What to do with `domain_tokens` unique domain tokens and `budget` pretraining tokens: plain data for JSON.

    model             a preset, or a number of parameters; without it the nearest runs of any size count
    table             runs, as read_table gives them
    general, domain   dataset prefixes, for how far the domain lies from the general corpus
    inference_tokens  tokens that will be served, for the finetuner's tax
    max_general_rise  how far the general loss may end above the lowest one before finetuning at that budget: 0.03 is 3%

    decision    regime, delta, epochs, replay, basis ("laws" | "seen" | "published"), and `says`
    missing     why runs, or some of them, were not used
    shares      a row per share that was run: delta, epochs, domain and general {mean, low, high}, forgetting, allowed,
                and best_in, the part of resamplings in which its domain loss is the lowest; None without laws
    expected    of the decision: domain, general, r_gain, and `of`, the runs whose losses these are; None without runs
    seen        tokens, and the arms at that budget, the run one nearest to what is asked, best first; None without runs
    regimes     the best arm of FT, SPT and SCPT there, and `says`
    replay      share, basis, says, and effects: the factors on both losses of each share of general data that was run
    distance    divergence, and the domain loss after plain finetuning
    support     how far the question lies outside of the runs, a verdict, and what to run next; see support.py
    prior       what the papers say of the same question
    tax         see tax.py; None without inference_tokens
    recipe      phases to paste; learning_rates, whose they are

    Raises RecipeError or DataError.
    """
    _check(domain_tokens, budget, general, domain, inference_tokens, max_general_rise)
    preset, params, multiplied = size_of(model)
    if inference_tokens is not None and params is None:
        raise RecipeError("model: missing; what serving costs depends on it: name a preset such as 1b, or its size")
    papers = prior(domain_tokens=domain_tokens, budget=budget, params=params)
    rows = None if table is None else usable(table)
    evidence, missing = gather(rows, domain_tokens=domain_tokens, budget=budget, params=params)
    if evidence is None:
        limit, effects, allowed = None, [], {}
        chosen: Row = {"regime": papers["regime"], "delta": papers["delta"], "basis": "published"}
        mean_epochs = most_epochs = float(FINETUNE_EPOCHS)
    else:
        limit = _limit(evidence, max_general_rise)
        effects = replays.effects(evidence.rows)
        allowed = _allowed(evidence, effects, limit)
        chosen = _choose(evidence, allowed, papers)
        if allowed and not any(allowed.values()):
            missing.append(
                f"no share and replay that were run keep the general loss within {max_general_rise:.3g} of the lowest "
                "before finetuning; taken are those that come nearest"
            )
        epochs = plainest(evidence.rows)["epochs"]
        mean_epochs, most_epochs = float(epochs.mean()), float(epochs.max())
    replay = replays.choose(chosen, evidence, effects, limit, rows, params, domain_tokens)
    rates = rates_of(rows, None if evidence is None else evidence.params, params)
    decision = chosen | {"epochs": chosen["delta"] * budget / domain_tokens, "replay": replay["share"]}
    shares = None if evidence is None else _shares(evidence, allowed, budget / domain_tokens)
    regimes = None if evidence is None else _regimes(evidence, papers)
    return {
        "asked": {
            "domain_tokens": domain_tokens,
            "budget": budget,
            "model": model,
            "params": params,
            "inference_tokens": inference_tokens,
            "max_general_rise": max_general_rise,
        },
        "decision": decision | {"says": _says(decision, budget)},
        "missing": missing,
        "shares": shares,
        "expected": None if evidence is None else _expected(decision, evidence, effects),
        "seen": None if evidence is None else {"tokens": evidence.arms[0]["tokens"], "arms": evidence.arms},
        "regimes": regimes,
        "replay": replay,
        "distance": _distance(general, domain, evidence),
        "support": support(decision, evidence, shares, params, domain_tokens),
        "prior": papers,
        "tax": None
        if inference_tokens is None or params is None or multiplied is None
        else tax(
            params=multiplied,
            budget=budget,
            finetune_tokens=mean_epochs * domain_tokens,
            served=inference_tokens,
            larger=(evidence and factor_of(plainest(evidence.all_sizes), params)) or published_factor(),
        ),
        "learning_rates": rates.of,
        "recipe": next_step(
            regime=decision["regime"],
            delta=decision["delta"],
            replay=decision["replay"],
            preset=preset or nearest_preset(params or (evidence.params if evidence else 1e9)),
            budget=budget,
            finetune_tokens=most_epochs * domain_tokens / (1 - decision["replay"]),
            rates=rates,
            general=general,
            domain=domain,
        ),
    }


def size_of(model: str | int | None) -> tuple[str | None, int | None, int | None]:
    """(preset, parameters, those that multiply every token) of a preset, or of a number of parameters."""
    if model is None:
        return None, None, None
    if model in PRESETS:
        config = GPTConfig(**PRESETS[str(model)])
        return str(model), parameters(config), matmul_parameters(config)
    try:
        params = parse_count(model, "model")
    except RecipeError:
        raise RecipeError(
            f"model: {model!r} is neither a preset ({nearest(str(model), PRESETS)}) nor a count"
        ) from None
    return None, params, params


def nearest_preset(params: float) -> str:
    return min(PRESETS, key=lambda name: abs(math.log(parameters(GPTConfig(**PRESETS[name])) / params)))


def _check(
    domain_tokens: int,
    budget: int,
    general: object,
    domain: object,
    inference_tokens: int | None,
    max_general_rise: float | None,
) -> None:
    counts = {"domain_tokens": domain_tokens, "budget": budget, "inference_tokens": inference_tokens}
    for name, count in counts.items():
        if count is not None and not count >= 1:
            raise RecipeError(f"{name}: {count!r} is no count; give a positive number of tokens")
    if (general is None) != (domain is None):
        given, other = ("general", "domain") if domain is None else ("domain", "general")
        raise RecipeError(f"{given}: given without {other}; how far they lie apart takes both datasets: add --{other}")
    if max_general_rise is not None and not 0 < max_general_rise <= 1:
        raise RecipeError(f"max_general_rise: {max_general_rise!r} is no fraction above 0 and up to 1; 0.03 is 3%")


# ------------------------------------------------------------------------------------------------ the decision


def _limit(evidence: Evidence, max_general_rise: float | None) -> float | None:
    """The highest general loss to end with."""
    if max_general_rise is None:
        return None
    general = evidence.general()
    if not general:
        raise DataError("max_general_rise: these runs have no general losses; give the general source a `heldout`")
    return (1 + max_general_rise) * min(before for before, _ in general.values())


def _allowed(evidence: Evidence, effects: list[Row], limit: float | None) -> dict[float, bool]:
    """Whether a share can keep the limit, with some replay that was run."""
    deltas = evidence.forecast.deltas if evidence.forecast else [arm["delta"] for arm in evidence.steady()]
    general = evidence.general()
    return {
        delta: limit is None
        or (delta in general and replays.least_within(effects, general[delta][1], limit) is not None)
        for delta in deltas
    }


def _choose(evidence: Evidence, allowed: dict[float, bool], papers: Row) -> Row:
    """Regime, share, and on what basis: the lowest domain loss that is allowed, or the lowest general loss where none
    is."""
    general = {delta: after for delta, (_, after) in evidence.general().items()}
    if evidence.forecast:
        domain = dict(zip(evidence.forecast.deltas, evidence.forecast.domain[:, 0].tolist(), strict=True))
        basis = "laws"
    else:
        domain = {arm["delta"]: arm["domain"]["mean"] for arm in evidence.steady()}
        basis = "seen"
    near = outside(evidence.budget, *([evidence.arms[0]["tokens"]] * 2)) <= SEEN_WITHIN
    steady, late = evidence.steady(), [arm for arm in evidence.arms if arm["regime"] == "SCPT"]
    if near and late and (not steady or _clear(late[0], steady[0])):
        return {"regime": "SCPT", "delta": late[0]["delta"], "basis": "seen"}
    if not domain or (basis == "seen" and not near):
        return {"regime": papers["regime"], "delta": papers["delta"], "basis": "published"}
    if any(allowed.values()):
        delta = min((d for d in domain if allowed[d]), key=lambda d: domain[d])
    else:
        delta = min(general, key=lambda d: general[d])
    return {"regime": "SPT" if delta else "FT", "delta": delta, "basis": basis}


def _clear(ours: Row, theirs: Row) -> bool:
    """Whether every seed of one arm has a lower domain loss than every seed of another."""
    return ours["domain"]["high"] < theirs["domain"]["low"]


def _says(decision: Row, budget: int) -> str:
    delta, epochs, replay = percent(decision["delta"]), decision["epochs"], decision["replay"]
    with_replay = "finetune on the domain" + (f" with {percent(replay)} of general data" if replay else "")
    if decision["regime"] == "FT":
        return f"FT only: pretrain on general data alone, {amount(budget)} tokens, then {with_replay}"
    if decision["regime"] == "SCPT":
        late, last = percent(decision["delta"] / SCPT_LAST), percent(SCPT_LAST)
        return (
            f"SCPT: pretrain on general data, mix {late} of the domain into the last {last} of {amount(budget)} "
            f"tokens, which reads it {epochs:.3g} times, then {with_replay}"
        )
    return (
        f"{decision['regime']}: mix {delta} of the domain into all of {amount(budget)} pretraining tokens, which reads "
        f"it {epochs:.3g} times, then {with_replay}"
    )


# ------------------------------------------------------------------------------------------------ what it rests on


def _shares(evidence: Evidence, allowed: dict[float, bool], per_token: float) -> list[Row] | None:
    known = evidence.forecast
    if known is None:
        return None
    best_in = known.best_in(np.array([allowed[delta] or not any(allowed.values()) for delta in known.deltas]))
    return [
        {
            "delta": delta,
            "epochs": delta * per_token,
            "domain": _interval(known.domain[i]),
            "general": None if known.general is None else _interval(known.general[i]),
            "forgetting": None if known.forgetting is None else float(known.forgetting[i]),
            "allowed": allowed[delta],
            "best_in": float(best_in[i]),
        }
        for i, delta in enumerate(known.deltas)
    ]


def _interval(values: np.ndarray) -> dict[str, float]:
    return dict(zip(("mean", "low", "high"), values.tolist(), strict=True))


def _expected(decision: Row, evidence: Evidence, effects: list[Row]) -> Row | None:
    """Losses with the decided replay where it was run, else with the least that was."""
    known, delta = evidence.forecast, decision["delta"]
    if decision["basis"] == "published":
        return None
    if decision["basis"] == "laws":
        assert known is not None
        tokens, i = known.tokens, known.deltas.index(delta)
        domain = _interval(known.domain[i])
        general = None if known.general is None else _interval(known.general[i])
        finetuned = float(known.domain[0, 0]) if known.deltas[0] == 0 else None
    else:
        arm = next(a for a in evidence.arms if (a["regime"], a["delta"]) == (decision["regime"], delta))
        tokens, domain, general = arm["tokens"], arm["domain"], arm["general"]
        finetuned = next((a["domain"]["mean"] for a in evidence.arms if a["regime"] == "FT"), None)
    gain = 100 * (finetuned - domain["mean"]) / finetuned if finetuned else None
    effect = next((e for e in effects if e["injected"] == decision["replay"]), effects[0] if effects else None)
    if effect:
        domain = {edge: loss * effect["domain"] for edge, loss in domain.items()}
        general = general and {edge: loss * effect["general"] for edge, loss in general.items()}
    return {
        "domain": domain,
        "general": general,
        "r_gain": gain,
        "of": {
            "params": evidence.params,
            "domain_tokens": evidence.domain_tokens,
            "tokens": int(tokens),
            "injected": effect["injected"] if effect else None,
        },
    }


def _regimes(evidence: Evidence, papers: Row) -> Row:
    best = {regime: next((arm for arm in evidence.arms if arm["regime"] == regime), None) for regime in REGIMES}
    run = {regime: arm for regime, arm in best.items() if arm}
    first, *others = sorted(run.values(), key=lambda arm: arm["domain"]["mean"])
    losses = ", ".join(f"{_name(arm)} {arm['domain']['mean']:.4f}" for arm in (first, *others))
    says = [f"after {amount(first['tokens'])} tokens and a finetune, domain losses are {losses}"]
    for other in others:
        seeds = min(first["seeds"], other["seeds"])
        if seeds < 2:
            says.append(
                f"with one seed nobody can say whether {_name(first)} and {_name(other)} differ by more than chance"
            )
        elif not _clear(first, other):
            says.append(f"{_name(first)} and {_name(other)} overlap between seeds: that may be chance")
    if "SCPT" not in run and papers["regime"] != "SPT":
        says.append(f"SCPT was not run; by the papers: {papers['why']}")
    return best | {"says": says}


def _name(arm: Row) -> str:
    return "FT only" if arm["regime"] == "FT" else f"{arm['regime']} {percent(arm['delta'])}"


def _distance(general: str | Path | None, domain: str | Path | None, evidence: Evidence | None) -> Row:
    finetuned = evidence and next((arm for arm in evidence.arms if arm["regime"] == "FT"), None)
    return {
        "divergence": None if general is None or domain is None else divergence(domain, general),
        "domain_after_plain_finetuning": finetuned and finetuned["domain"]["mean"],
    }
