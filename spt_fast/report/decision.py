"""The decision that a study's runs support, in words: the domain share, its certainty, and its cost in general loss.

    usable rows → finetunes by sizes → `decide`: figures of `compare`, arms, sentences → `answer`, with advice or the
                                                                                          D-CPT law if available

Figures are those of compare.py, on the *report* half of held-out text; the best share is chosen on the *select* half.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import pandas as pd

from spt_fast.advice.bases import BaseAdvice
from spt_fast.advice.result import Advice, Asked
from spt_fast.advice.words import BASIS, certainty, costs, headline, share_cells
from spt_fast.errors import RecipeError, counted
from spt_fast.laws import DCPTLaw, LawWarning, OpenError, best_ratio
from spt_fast.quantities import amount, percent, signed, three_digits, times
from spt_fast.study.behind import Behind, rests_on
from spt_fast.study.compare import Arms, Comparison, Finetune, Verdict, compare_finetunes, judge
from spt_fast.study.findings import arm_cells, error_of, later, multiplier
from spt_fast.study.finetunes import SIZES, Interval, Sizes, Treatment
from spt_fast.study.fits import Fitted
from spt_fast.study.settings import SETTINGS, with_settings

MAX_GENERAL_RISE = 0.03
"""The largest rise of the general loss that is allowed in continual pretraining; the D-CPT paper's limit."""


# ------------------------------------------------------------------------------------------------ finetunes


def compared(finetunes: pd.DataFrame, rows: pd.DataFrame) -> list[Finetune]:
    """The finetunes in the form that `compare` takes; those without losses on both corpora are left out."""
    finetunes = finetunes.dropna(subset=["domain_heldout", "domain_before", "general_heldout", "general_before"])
    behind = {corpus: Behind.of_rows(finetunes, corpus) for corpus in ("domain", "general")}
    paths = {}
    measured = rows.dropna(subset=["domain_heldout", "general_heldout"])
    for key, own in measured[measured["stage"] > 0].groupby(["run", "stage"]):
        path = own[(own["average"] == own["average"].max()) | (own["tokens"] == 0)].sort_values("tokens")
        paths[key] = list(path[["tokens", "domain_heldout", "general_heldout"]].itertuples(index=False))
    after = rows[(rows["other"] != "") & rows["handed_on"]].drop_duplicates("after").set_index("after")
    named = {"other": "later", "domain_heldout": "domain_later", "general_heldout": "general_later"}
    losses_later = after[[*named]].rename(columns=named).to_dict("index")
    settings = with_settings(rows)[["run", "stage", *SETTINGS, "grid"]].drop_duplicates(["run", "stage"])
    of = settings.set_index(["run", "stage"]).to_dict("index")
    return [
        Finetune(
            name=row.run,
            folder=row.run,
            treatment=Treatment(row.pretrain_delta, row.injected, row.anchor, row.average),
            seed=int(row.seed),
            tokens=int(row.pretrain_tokens),
            domain_epochs=row.pretrain_epochs,
            domain_before=row.domain_before,
            domain_after=row.domain_heldout,
            general_before=row.general_before,
            general_after=row.general_heldout,
            domain_select=row.domain_select,
            domain_behind=behind["domain"],
            general_behind=behind["general"],
            paths=[[tuple(point) for point in paths[row.run, row.stage]]],
            setting=of[row.run, row.stage],
            pretrain_setting=of.get((row.after, 0), {}),
            pretraining=row.after,
            **losses_later.get(row.run, {}),
        )
        for row in finetunes.itertuples()
    ]


def by_sizes(rows: pd.DataFrame) -> dict[Sizes, pd.DataFrame]:
    """The rows of each model size and domain corpus, the largest first."""
    groups = {Sizes(*map(int, sizes)): own for sizes, own in rows.groupby(SIZES)}
    return {sizes: groups[sizes] for sizes in sorted(groups, reverse=True)}


def with_shares(finetunes: pd.DataFrame) -> dict[Sizes, pd.DataFrame]:
    """The finetunes of each model size and domain corpus with which two shares or more were run."""
    return {sizes: own for sizes, own in by_sizes(finetunes).items() if own["pretrain_delta"].nunique() > 1}


def titled(what: str, sizes: Sizes, table: pd.DataFrame) -> str:
    """A panel's title: `what` it shows, and those of the sizes in which the runs of `table` differ."""
    words = zip(SIZES, sizes, ("parameters", "domain tokens"), strict=True)
    differing = [f"{amount(value)} {word}" for name, value, word in words if table[name].nunique() > 1]
    return " · ".join([what, *differing])


# ------------------------------------------------------------------------------------------------ the decision


@dataclass(frozen=True)
class TableRow:
    """The cells of a row of a table."""

    cells: list[str]
    best: bool = False


@dataclass(frozen=True)
class RunsDecision:
    """The findings of the runs of one model size and domain corpus at one budget, in words and in figures."""

    sizes: Sizes
    budget: int
    best: Treatment
    plainest: list[Treatment]
    """The arms that the best one was chosen from."""
    headline: str
    sure: list[str]
    costs: list[str]
    arms: list[TableRow]
    comparison: Comparison


def decide(sizes: Sizes, finetunes: Sequence[Finetune]) -> RunsDecision | None:
    """The δ with the lowest domain loss after the plainest finetune, at the largest budget at which arms can be
    compared; None if there is none."""
    if not finetunes:
        return None
    comparison = compare_finetunes(finetunes)
    arms = comparison.compared
    least = min(arm.finetune for arm in arms)
    arms = {arm: runs for arm, runs in arms.items() if arm.finetune == least}
    if len(arms) < 2:
        return None
    on_select = all(math.isfinite(run.domain_select) for runs in arms.values() for run in runs.values())
    chosen_by = "domain_select" if on_select else "domain_after"
    common = set.intersection(*map(set, arms.values()))  # an arm without a hard seed would seem better
    counted_runs = {arm: [own[seed] for seed in common or own] for arm, own in arms.items()}
    best = min(arms, key=lambda arm: fmean(getattr(run, chosen_by) for run in counted_runs[arm]))
    base = min(arms)
    against = {arm: judge("domain_after", best, arm, arms) for arm in arms if arm != best}
    at_budget = [arm for arm in comparison.arms if arm.tokens == comparison.tokens]
    return RunsDecision(
        sizes=sizes,
        budget=comparison.tokens,
        best=best,
        plainest=list(arms),
        headline=_headline(best, base, against),
        sure=_how_sure(best, base, against, _halves(arms, on_select)),
        costs=_costs(best, base, arms, comparison),
        arms=[TableRow(arm_cells(arm), best=arm.treatment == best) for arm in at_budget],
        comparison=comparison,
    )


def _headline(best: Treatment, base: Treatment, against: Mapping[Treatment, Verdict]) -> str:
    share = percent(best.delta)
    if best == base and base.delta == 0:
        return "No share beats NPT: use domain data in the finetune only."
    if best == base:
        return f"Give the domain {share} of the pretraining tokens, or less."
    difference, clear = against[base].difference, against[base].exceeds
    if difference is not None and difference > 0:
        return f"No decision: {share} is best on the select half, but {base.name} on the report half."
    if clear:
        return f"Give the domain {share} of the pretraining tokens."
    return f"A domain share of {share} is best so far, but that may be chance."


def _how_sure(
    best: Treatment, base: Treatment, against: Mapping[Treatment, Verdict], halves: Sequence[str]
) -> list[str]:
    """Sentences: the best share against NPT and against the others, the text behind it, whether it is the largest."""
    said = [_sentence(against[base].says)] if best != base else []
    rivals = [percent(arm.delta) for arm, verdict in against.items() if not verdict.exceeds and arm != base]
    if rivals:
        said.append(f"The runs cannot distinguish it from {_listed(rivals)}.")
    elif len(against) > 1:
        said.append("Every other share that was run is worse by more than the spread between seeds.")
    if base.delta > 0:
        said.append("Every run has domain text in pretraining, so the gain over NPT is unknown.")
    said += halves
    if best == max([best, *against]):
        said.append("It is the largest share that was run: a larger one may be better.")
    return said


def _halves(arms: Arms, on_select: bool) -> list[str]:
    """Sentences: the half of the held-out text that the share was chosen on, and the text behind the losses."""
    runs = [run for own in arms.values() for run in own.values()]
    rests = rests_on({"domain": runs[0].domain_behind, "general": runs[0].general_behind})
    return [
        "It was chosen on the select half of the held-out text; the losses are on the report half."
        if on_select
        else "It was chosen by the losses that are shown, so its gain may be overestimated.",
        _sentence(f"These are {counted(len(runs), 'run')}; {rests}"),
    ]


def _costs(best: Treatment, base: Treatment, arms: Arms, comparison: Comparison) -> list[str]:
    if best == base:
        return []
    before = {arm: fmean(run.general_before for run in arms[arm].values()) for arm in (best, base)}
    said = [
        f"Before finetuning the general loss is {before[best]:.3f}, {before[best] - before[base]:+.3f} against "
        f"{base.name}.".replace("-0.", "−0.")
    ]
    found = [judge(figure, best, base, arms).says for figure in ("general_after", "forgetting")]
    found += later(comparison)
    return said + [_sentence(says) for says in (*found, *multiplier(comparison, best))]


def _sentence(says: str) -> str:
    return f"{says[0].upper()}{says[1:]}."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def best_by_budget(sizes: Sizes, finetunes: Sequence[Finetune], table: pd.DataFrame) -> list[TableRow]:
    """A row per budget: its best δ."""
    rows = []
    for budget in sorted({run.tokens for run in finetunes}):
        decided = decide(sizes, [run for run in finetunes if run.tokens == budget])
        if decided is None:
            continue
        best, comparison = decided.best, decided.comparison
        gain = (comparison.r_gain or {}).get(best)
        verdict = comparison.verdict["domain_after"].get(best)
        clear = {True: "yes", False: "no", None: "one seed"}[verdict.exceeds] if verdict else ""
        title = titled(amount(budget), sizes, table)
        rows.append(TableRow([title, best.name, signed(gain.mean, 2) if gain else "", clear]))
    return rows


# ------------------------------------------------------------------------------------------------ the answer


@dataclass(frozen=True)
class Answer:
    """The first part of the page."""

    headline: str
    lead: str
    sure: list[str] = field(default_factory=list)
    costs: list[str] = field(default_factory=list)
    shares: list[TableRow] = field(default_factory=list)
    """A row for each share, with the laws' predictions."""
    recipe: str = ""


def answer(advice: Advice | BaseAdvice | None, decision: RunsDecision | None, fits: Sequence[Fitted]) -> Answer:
    """The answer of the advice on pretraining if there is any, else of the runs. For runs from a base it is that of the
    D-CPT law, or of the advice on the base without such a law."""
    if isinstance(advice, Advice):
        return _advised(advice)
    if decision is not None:
        lead = f"For {decision.sizes.name}, {amount(decision.budget)} tokens of pretraining and a finetune."
        return Answer(decision.headline, lead, decision.sure, decision.costs)
    pairs = [
        (domain, general)
        for domain in fits
        for general in fits
        if (domain.law_name, general.law_name) == ("dcpt-domain", "dcpt-general") and domain.group == general.group
    ]
    fitted = [(domain, general) for domain, general in pairs if domain.law is not None and general.law is not None]
    if fitted:
        asked = None if advice is None else advice.asked
        return _continual(*min(fitted, key=lambda pair: _distance(pair[0], asked)), asked)
    if advice is not None:
        return _on_a_base(advice)
    return Answer(
        "These runs do not decide the pretraining mixture yet.",
        "A decision needs finetunes after pretraining with two domain shares or more, of which one is 0, and held-out "
        "losses on both corpora.",
    )


def _distance(fit: Fitted, asked: Asked | None) -> float:
    """|log| of the factor between the corpus of a fit and the one asked for."""
    corpus = fit.group.get("domain_tokens")
    return 0.0 if asked is None or not corpus else abs(math.log(corpus / asked.domain_tokens))


def _continual(domain: Fitted, general: Fitted, asked: Asked | None) -> Answer:
    """The domain share of continual pretraining with the lowest domain loss within the limit on the general loss, for
    the model and budget asked for, by default the largest that were run."""
    params = float(asked.params if asked and asked.params else domain.table["params"].max())
    own = domain.table[domain.table["params"] == params]
    tokens = float(asked.budget if asked else own["tokens"].max())
    at: dict[str, Any] = {"params": params, "tokens": tokens}
    limit = f"a general loss at most {percent(MAX_GENERAL_RISE)} above that of general text alone"
    lead = f"For {amount(params)} parameters and {amount(tokens)} tokens of continual pretraining, by the D-CPT law."
    sure = [
        _sentence(f"{error_of(errors)} mean error of the {of} loss when predicting points that were left out ({what})")
        for of, fit in (("domain", domain), ("general", general))
        for what, errors in fit.holdout.items()
    ]
    assert isinstance(domain.law, DCPTLaw)
    assert isinstance(general.law, DCPTLaw)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            share = best_ratio(domain=domain.law, general=general.law, max_general_rise=MAX_GENERAL_RISE, **at)
            losses = {
                "domain": domain.law.predict(own_ratio=share, interval=0.9, **at),
                "general": general.law.predict(own_ratio=1 - share, interval=0.9, **at),
            }
    except RecipeError as error:
        answer = (
            "These runs do not determine the share." if isinstance(error, OpenError) else f"No share keeps {limit}."
        )
        return Answer(answer, lead, sure, [_sentence(str(error))])
    sure += dict.fromkeys(_sentence(str(one.message)) for one in caught if issubclass(one.category, LawWarning))
    costs = [f"{of.capitalize()} loss {Interval(*loss)}." for of, loss in losses.items()]
    costs += ["90% of new runs lie in the intervals.", *_read(share * tokens, domain, asked)]
    return Answer(
        f"Give the domain {percent(three_digits(share))} of the tokens.", f"{lead} It keeps {limit}.", sure, costs
    )


def _read(tokens: float, fit: Fitted, asked: Asked | None) -> list[str]:
    """A sentence on how often the domain corpus is read, if its size is known."""
    corpus = fit.group.get("domain_tokens")
    if not corpus:
        return []
    says = f"The runs' domain corpus of {amount(corpus)} tokens is then read {times(tokens / corpus)}"
    if asked and not math.isclose(corpus, asked.domain_tokens, rel_tol=0.01):
        says += f", yours of {amount(asked.domain_tokens)} {times(tokens / asked.domain_tokens)}"
    return [f"{says}."]


def _on_a_base(advice: BaseAdvice) -> Answer:
    decided = advice.decision
    headline = f"Continue with {percent(decided.delta)} of domain and {percent(decided.replay)} of general text."
    sure = [BASIS[decided.basis], *advice.missing, advice.general_text]
    return Answer(headline, _sentence(decided.says), [*map(_sentence, sure)], recipe=advice.recipe)


def _advised(advice: Advice) -> Answer:
    return Answer(
        headline(advice.decision),
        _sentence(advice.decision.says),
        [*map(_sentence, certainty(advice))],
        [*map(_sentence, costs(advice))],
        [TableRow(share_cells(row), best=row.delta == advice.decision.delta) for row in advice.shares or ()],
        advice.recipe,
    )
