"""One page that says which mixture to pay for, and shows why.

    runs table → usable rows → decision, figures → one HTML file
                             → fits, advice     ↗

The page holds everything in itself, and its Content-Security-Policy allows nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib.axes import Axes

from spt_fast import __version__
from spt_fast.advice.advise import advise
from spt_fast.files import write_text
from spt_fast.laws import LawWarning
from spt_fast.report import panels
from spt_fast.report.decision import (
    Decision,
    answer,
    best_by_budget,
    by_setting,
    compared,
    decide,
    setting_name,
    titled,
    with_shares,
)
from spt_fast.report.panels import Panel, panel
from spt_fast.study.crossover import asks_for_crossover, crossovers
from spt_fast.study.figures import draw_plane
from spt_fast.study.findings import error_of, group_name, r2_of
from spt_fast.study.finetunes import after_pretraining, plainest
from spt_fast.study.fits import Fitted, fit_laws
from spt_fast.study.runs_table import read_table
from spt_fast.study.usable import UsableRows, usable
from spt_fast.study.words import amount, percent


@dataclass(frozen=True)
class Figure:
    caption: str
    panels: list[Panel]


@dataclass
class Section:
    """Evidence: figures, and a line for each thing that could not be drawn."""

    id: str
    title: str
    says: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------ the evidence


def finetuning_section(finetunes: pd.DataFrame, decisions: Sequence[Decision]) -> Section:
    section = Section("finetuning", "Domain loss after finetuning")
    best = {decision.setting: decision for decision in decisions}
    drawn = []
    for setting, own in with_shares(finetunes).items():
        chosen = best[setting].best.delta if setting in best else None
        lowest = f"; lowest at δ = {percent(chosen)} for {amount(best[setting].budget)}" if chosen is not None else ""
        drawn.append(
            panel(
                titled("After finetuning", setting, finetunes),
                f"Domain loss after finetuning against δ, a line per budget, {setting_name(setting)}{lowest}.",
                partial(panels.loss_after_finetuning, finetunes=own, chosen=chosen),
            )
        )
    if drawn:
        section.figures.append(
            Figure(
                "Lower is better. Rings are seeds, lines go through their means, one for each pretraining budget; the "
                "dashed line marks the best share at the largest budget. Look for how far down the curve the best "
                "share lies below δ = 0, compared with how far apart the rings are, and whether it moves left as the "
                "budget grows. Shares are spaced by their square roots.",
                drawn,
            )
        )
    else:
        section.missing.append("No finetunes after pretraining at two shares or more.")
    return section


def pretraining_section(rows: pd.DataFrame) -> Section:
    section = Section("pretraining", "Pretraining")
    rows = rows[rows["stage"] == 0]
    if not len(rows):
        section.missing.append("No run here was pretrained from scratch.")
        return section
    colours = panels.colours_of(rows["delta"])
    specialized = rows[(rows["delta"] > 0) | (rows.groupby("params")["delta"].transform("max") == 0)]
    drawn = []
    for setting in by_setting(specialized):
        # what reads no domain text belongs to every corpus
        of_corpus = (rows["domain_tokens"] == setting[1]) | (rows["delta"] == 0)
        own = rows[(rows["params"] == setting[0]) & of_corpus]
        for corpus in ("domain", "general"):
            if own[f"{corpus}_heldout"].notna().any():
                drawn.append(
                    panel(
                        titled(f"{corpus.capitalize()} loss", setting, specialized),
                        f"Held-out {corpus} loss over pretraining tokens, a line per run, coloured by δ.",
                        partial(panels.losses_in_pretraining, rows=own, column=f"{corpus}_heldout", colours=colours),
                    )
                )
    section.figures.append(
        Figure(
            "A line for each run, named by δ at its end. A domain line that turns up has overfitted the repeated "
            "corpus; a general line above that of δ = 0 is what the domain's share costs.",
            drawn,
        )
    )
    return section


def forgetting_section(finetunes: pd.DataFrame) -> Section:
    section = Section("forgetting", "Forgetting")
    finetunes = finetunes.dropna(subset=["general_before", "general_heldout"])
    colours = panels.colours_of(finetunes["pretrain_delta"])
    drawn = []
    for setting, own in by_setting(finetunes).items():
        budget = own["pretrain_tokens"].max()
        own = own[own["pretrain_tokens"] == budget]
        arms = [
            (_treatment(delta, injected, anchor), colours[delta], rows)
            for (delta, injected, anchor), rows in own.groupby(["pretrain_delta", "injected", "anchor"])
        ]
        rises = ", ".join(
            f"{name} {(rows['general_heldout'] - rows['general_before']).mean():+.3f}" for name, _, rows in arms
        )
        drawn.append(
            panel(
                titled(f"After {amount(budget)} tokens of pretraining", setting, finetunes),
                f"General loss before and after finetuning; mean rise in nats: {rises}.",
                partial(panels.general_before_and_after, arms=arms),
                height_in=panels.height_of_rows(len(arms)),
            )
        )
    if drawn:
        section.figures.append(
            Figure(
                "General loss before (○) and after (●) finetuning, a point for each seed, with the mean rise beside "
                "it. Shorter is less forgotten; further left is the better general model in the end.",
                drawn,
            )
        )
    else:
        section.missing.append("No finetune here has a general held-out loss before and after.")
    return section


def _treatment(delta: float, injected: float, anchor: float) -> str:
    return (
        f"δ = {percent(delta)}"
        + (f", {percent(injected)} replay" if injected else "")
        + (f", anchor {anchor:g}" if anchor else "")
    )


def crossover_section(table: pd.DataFrame) -> Section:
    section = Section("crossover", "To pretrain or not")
    drawn = []
    for found in crossovers(table):
        size = f"{amount(found.params)} parameters"
        section.says.append(found.says)
        drawn += [
            panel(
                f"Domain loss, {size}",
                f"Domain loss over the size of the domain's corpus, a line per start: {found.says}",
                partial(panels.draw_losses, arms=found.arms),
            ),
            panel(
                f"Gap to training from scratch, {size}",
                f"By how much the loss from scratch is higher, over the corpus: {found.says}",
                partial(panels.draw_gap, found=found),
            ),
        ]
    section.figures.append(
        Figure(
            "The same finetune from pretrained weights, from nothing, and from the pretrained embeddings alone, on "
            "nested subsets of the domain. Where the gap meets the dashed threshold, pretraining makes no difference "
            "any more.",
            drawn,
        )
    )
    return section


def plane_section(decisions: Sequence[Decision], finetunes: pd.DataFrame) -> Section:
    section = Section("plane", "Domain against general loss")
    drawn = [
        panel(
            titled(f"After {amount(decision.budget)} tokens of pretraining", decision.setting, finetunes),
            "Paths of finetunes in the plane of domain loss and general loss, coloured by δ.",
            partial(_plane, decision=decision),
            height_in=4.4,
        )
        for decision in decisions
    ]
    if drawn:
        section.figures.append(
            Figure(
                "Every finetune from where pretraining left it (○) to the weights that it hands on (●); down and left "
                "is better. Where paths cross the dashed line their domain losses are equal: the lower one has "
                "forgotten less for it.",
                drawn,
            )
        )
    else:
        section.missing.append("No finetunes to draw.")
    return section


def _plane(axes: Axes, decision: Decision) -> None:
    compared = decision.comparison.compared
    arms = {arm: list(compared[arm].values()) for arm in decision.plainest}
    by_share = panels.colours_of(arm.delta for arm in arms)
    draw_plane(axes, decision.comparison, arms, {arm: by_share[arm.delta] for arm in arms})
    axes.set_title("", loc="left")


def laws_section(fits: Sequence[Fitted]) -> Section:
    """Curves against points for the laws that have curves over tokens or shares; all of them are in the table."""
    section = Section("laws", "Scaling laws against the runs")
    fitted = [fit for fit in fits if fit.law is not None]
    for caption, curves in DRAWN:
        drawn = [
            panel(
                " · ".join(filter(None, (title, group_name(fit.group)))),
                f"{title}, fitted curves against runs, {group_name(fit.group)}.",
                partial(draw, law=fit.law, rows=fit.table),
            )
            for law_name, title, draw in curves
            for fit in fitted
            if fit.law_name == law_name
        ]
        if drawn:
            section.figures.append(Figure(caption, drawn))
    problems: dict[str, list[Fitted]] = {}
    for fit in fits:
        if fit.problem is not None:
            problems.setdefault(fit.law_name, []).append(fit)
    for law_name, groups in problems.items():
        most = max(groups, key=lambda fit: fit.rows)
        of = f" ({group_name(most.group)})" if most.group else ""
        others = f" Nor is there one of {len(groups) - 1} other groups of runs." if len(groups) > 2 else ""
        others = " Nor is there one of another group of runs." if len(groups) == 2 else others
        section.missing.append(f"No {law_name} law{of}: {most.problem}.{others}")
    return section


DRAWN: tuple[tuple[str, tuple[tuple[str, str, Callable[..., None]], ...]], ...] = (
    (
        "The overfitting law for domain text, trained on and held out, over pretraining tokens: curves with their 90% "
        "intervals for a new run, and the runs as rings. Rings outside of the bands are what the law does not explain; "
        "where two held-out curves cross, the better share changes.",
        (
            ("overfitting", "Domain text trained on", partial(panels.law_over_tokens, of="train_loss")),
            ("overfitting", "Domain text held out", partial(panels.law_over_tokens, of="heldout_loss")),
        ),
    ),
    (
        "The domain loss after finetuning over pretraining tokens, for each share, with 90% intervals for a new run. "
        "The lowest curve at your budget is the share to pay for.",
        (("post-finetuning", "After finetuning", partial(panels.law_over_tokens, of="finetuned_loss")),),
    ),
    (
        "The D-CPT law: loss against the domain's share of continual pretraining, at the most tokens that were run, a "
        "line per model size, with 90% intervals for a new run. What the domain gains to the right, the general loss "
        "pays.",
        (
            ("dcpt-domain", "Domain loss", partial(panels.law_over_ratio, of="domain")),
            ("dcpt-general", "General loss", partial(panels.law_over_ratio, of="general")),
        ),
    ),
)
"""Of each figure: its caption, and its panels as (law, title, how it is drawn)."""


def law_rows(fits: Sequence[Fitted]) -> list[list[str]]:
    return [
        [
            fit.law_name,
            group_name(fit.group),
            str(fit.runs),
            r2_of(fit.score).replace("-", "−"),
            error_of(fit.score),
            "; ".join(f"{error_of(errors)} ({what})" for what, errors in fit.holdout.items()),
        ]
        for fit in fits
        if fit.law is not None
    ]


# ------------------------------------------------------------------------------------------------ runs and provenance

RUN_COLUMNS: dict[str, Callable[[float], str] | None] = {
    "run": None,
    "phase": None,
    "status": None,
    "params": amount,
    "seed": "{:.0f}".format,
    "share": percent,
    "tokens": amount,
    "epochs": "{:.3g}".format,
    "domain": "{:.3f}".format,
    "general": "{:.3f}".format,
    "pretrain δ": percent,
    "pretrain tokens": amount,
    "domain before": "{:.3f}".format,
    "general before": "{:.3f}".format,
    "lr": "{:g}".format,
    "anchor": "{:g}".format,
    "start": None,
}
"""Of the table of runs, with how a number is written; text where None."""


def run_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A row per phase of a run: the weights that it handed on, or that it failed."""
    failed = table["status"] != "done"
    rows = table[table["handed_on"] | failed].sort_values(["stage", "params", "run", "tokens"])
    later = rows["stage"] > 0
    shown = rows.assign(
        **{
            "share": rows["delta"],
            "domain": rows["domain_heldout"],
            "general": rows["general_heldout"],
            "pretrain δ": rows["pretrain_delta"].where(later),
            "pretrain tokens": rows["pretrain_tokens"].where(later),
            "domain before": rows["domain_before"],
            "general before": rows["general_before"],
            "anchor": rows["anchor"].where(later),
        }
    )[list(RUN_COLUMNS)]
    return [
        {"failed": bad, "cells": [_cell(value, RUN_COLUMNS[name]) for name, value in row.items()]}
        for bad, row in zip(failed[rows.index], shown.to_dict("records"), strict=True)
    ]


def _cell(value: Any, written: Callable[[float], str] | None) -> dict[str, Any]:
    """What a cell shows and, where that is a number, what it is sorted by."""
    if written is None:
        return {"text": str(value)}
    known = not pd.isna(value)
    return {"text": written(value) if known else "", "sort": f"{value:.7g}" if known else "", "number": True}


def provenance(table: pd.DataFrame, sources: Sequence[str]) -> dict[str, str]:
    done = table[table["status"] == "done"]
    stages = done.drop_duplicates(["run", "stage"])
    flops = done.groupby(["run", "stage"])["flops"].agg(lambda of_stage: of_stage.max() - of_stage.min()).sum()

    def values(column: str, write: Callable[[Any], str] = str) -> str:
        return ", ".join(write(value) for value in sorted(done[column].dropna().unique())) or "none"

    return {
        "Read from": ", ".join(sources),
        "Runs": f"{done['run'].nunique()} done, {table.loc[table['status'] != 'done', 'run'].nunique()} failed",
        "Stages": f"{(stages['stage'] == 0).sum()} of pretraining, {(stages['stage'] > 0).sum()} of adaptation",
        "Evaluations": f"{len(done):,}",
        "Seeds": values("seed"),
        "Model sizes": values("params", lambda n: f"{n:,}"),
        "Domain corpora": values("domain_tokens", lambda n: f"{int(n):,} tokens"),
        "Tokenizer": values("tokenizer"),
        "Held-out text": values("heldout"),
        "Training FLOPs": f"{flops:.3g}",
        "Versions": f"spt-fast {__version__}, "
        + ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "scipy", "pandas", "matplotlib"))
        + f", Python {platform.python_version()}",
    }


# ------------------------------------------------------------------------------------------------ the page


def report(
    runs: Sequence[str | Path],
    out: Path,
    *,
    domain: str | None = None,
    general: str | None = None,
    model: str | int | None = None,
    domain_tokens: int | None = None,
    budget: int | None = None,
) -> None:
    """Write the page of `runs` (study folders, tables, run folders) to `out`.

    domain, general               the sources' names in runs that belong to no study
    model, domain_tokens, budget  what the advice is for; by default the size, corpus and largest budget of the runs

    Raises DataError, RecipeError or CheckpointError.
    """
    table = read_table(runs, domain=domain, general=general)
    used = usable(table)
    advice = _advice(used, model, domain_tokens, budget)
    html = page(table, fit_laws(used), advice, [str(run) for run in runs])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, html)


def _advice(
    table: UsableRows, model: str | int | None, domain_tokens: int | None, budget: int | None
) -> dict[str, Any] | None:
    """For what was asked, filled up with the runs' own; None where neither says enough."""
    settings = with_shares(plainest(after_pretraining(table.rows)))
    if settings:
        (params, corpus), own = next(iter(settings.items()))
        model, domain_tokens = model or params, domain_tokens or corpus
        budget = budget or int(own["pretrain_tokens"].max())
    if domain_tokens is None or budget is None:
        return None
    return advise(table=table, model=model, domain_tokens=domain_tokens, budget=budget)


def page(
    table: pd.DataFrame, fits: Sequence[Fitted], advice: Mapping[str, Any] | None, sources: Sequence[str] = ()
) -> str:
    """The page of a runs table, as HTML."""
    used = usable(table)
    rows, finetunes = used.rows, after_pretraining(used.rows)
    ordinary = plainest(finetunes)
    comparable = {setting: compared(own, rows) for setting, own in by_setting(finetunes).items()}
    decisions = [decided for setting, own in comparable.items() if (decided := decide(setting, own))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LawWarning)
        sections = [
            finetuning_section(ordinary, decisions),
            laws_section(fits),
            forgetting_section(finetunes),
            plane_section(decisions, ordinary),
            pretraining_section(rows),
        ]
        if asks_for_crossover(table):
            sections.insert(0, crossover_section(table))
    script, style = _asset("report.js"), _asset("report.css")
    environment = Environment(
        loader=PackageLoader("spt_fast.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html").render(
        answer=answer(advice, decisions[0] if decisions else None, fits),
        shown=decisions[0] if decisions and advice else None,
        arms=decisions[0].arms if decisions else [],
        arms_of=f"{setting_name(decisions[0].setting)}, {amount(decisions[0].budget)} tokens" if decisions else "",
        budgets=[line for setting, own in comparable.items() for line in best_by_budget(setting, own, ordinary)],
        sections=sections,
        laws=law_rows(fits),
        law_warnings=dict.fromkeys(said for fit in fits for said in fit.warnings),
        columns=RUN_COLUMNS,
        runs=run_rows(table),
        provenance=provenance(table, sources),
        left_out=used.notes,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=style,
    )


def _asset(name: str) -> Markup:
    return Markup((files("spt_fast.report") / "templates" / name).read_text(encoding="utf-8"))
