"""One page with the mixture to use and the evidence for it.

    runs table → usable rows → decision, figures → one HTML file
                             → fits, advice     ↗

The page is self-contained, and its Content-Security-Policy allows nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import re
import warnings
from collections.abc import Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from spt_fast.advice.advise import advise_pretraining
from spt_fast.advice.bases import BaseAdvice, advise_base, of_bases
from spt_fast.advice.result import Advice
from spt_fast.files import write_text
from spt_fast.laws import LawWarning
from spt_fast.outputs import check_output, head
from spt_fast.quantities import amount
from spt_fast.report import sections
from spt_fast.report.decision import answer, best_by_budget, by_sizes, compared, decide, with_shares
from spt_fast.report.tables import behind, law_rows, provenance, run_columns, run_rows
from spt_fast.report.terms import TERMS
from spt_fast.study.crossover import asks_for_crossover
from spt_fast.study.curves import Curve, curves_of
from spt_fast.study.finetunes import after_pretraining, plainest
from spt_fast.study.fits import Fitted, fit_laws
from spt_fast.study.runs_table import read_table
from spt_fast.study.tasks import TaskTable, task_tables, with_results
from spt_fast.study.usable import UsableRows, usable


def report(
    runs: Sequence[str | Path],
    out: Path,
    *,
    domain_source: str | None = None,
    general_source: str | None = None,
    model: str | int | None = None,
    domain_tokens: int | None = None,
    budget: int | None = None,
) -> None:
    """Write the page of `runs` (study folders, tables, run folders) to `out`.

    domain_source, general_source  the sources' names in runs that belong to no study
    model, domain_tokens, budget   the question for the advice; by default the runs' size, corpus and largest budget

    Raises DataError, RecipeError or CheckpointError.
    """
    check_output(out, "out", lambda file: b"spt-fast report</title>" in head(file))
    table = read_table(runs, domain_source=domain_source, general_source=general_source)
    used = usable(table)
    advice = _advice(used, model, domain_tokens, budget)
    tasks = task_tables(with_results([Path(run) for run in runs]))
    curves = curves_of([Path(run) for run in runs])
    html = page(table, fit_laws(used), advice, [str(run) for run in runs], tasks, curves)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, html)


def _advice(
    table: UsableRows, model: str | int | None, domain_tokens: int | None, budget: int | None
) -> Advice | BaseAdvice | None:
    """Advice for these values, by default the runs' own; None if they are incomplete."""
    if of_bases(table):
        corpus, most = (int(table.rows[column].max()) for column in ("domain_tokens", "tokens"))
        found = advise_base(table=table, model=model, domain_tokens=domain_tokens or corpus, budget=budget or most)
        return found if found.arms else None
    comparable = with_shares(plainest(after_pretraining(table.rows)))
    if comparable:
        sizes, own = next(iter(comparable.items()))
        model, domain_tokens = model or sizes.params, domain_tokens or sizes.domain_tokens
        budget = budget or int(own["pretrain_tokens"].max())
    if domain_tokens is None or budget is None:
        return None
    return advise_pretraining(table=table, model=model, domain_tokens=domain_tokens, budget=budget)


def page(
    table: pd.DataFrame,
    fits: Sequence[Fitted],
    advice: Advice | BaseAdvice | None,
    sources: Sequence[str] = (),
    tasks: Sequence[TaskTable] = (),
    curves: Sequence[Curve] = (),
) -> str:
    """The page of a runs table, as HTML."""
    used = usable(table)
    rows, finetunes = used.rows, after_pretraining(used.rows)
    ordinary = plainest(finetunes)
    comparable = {sizes: compared(own, rows) for sizes, own in by_sizes(finetunes).items()}
    decisions = [decided for sizes, own in comparable.items() if (decided := decide(sizes, own))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LawWarning)
        evidence = [
            sections.finetuning(ordinary, decisions),
            sections.laws(fits),
            sections.forgetting(finetunes),
            sections.plane(decisions, ordinary),
            sections.pretraining(rows),
            sections.training(curves, rows),
        ]
        if tasks:
            evidence.insert(1, sections.tasks(tasks))
        if (tried := sections.settings(used)).tables:
            evidence.insert(1, tried)
        if asks_for_crossover(rows):
            evidence.insert(0, sections.crossover(rows))
    script, style = _asset("report.js"), _asset("report.css")
    environment = Environment(
        loader=PackageLoader("spt_fast.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    render = partial(
        environment.get_template("report.html").render,
        answer=answer(advice, decisions[0] if decisions else None, fits),
        behind={corpus: behind(rows, corpus) for corpus in ("domain", "general")},
        shown=decisions[0] if decisions and advice else None,
        arms=decisions[0].arms if decisions else [],
        arms_of=f"{decisions[0].sizes.name}, {amount(decisions[0].budget)} tokens" if decisions else "",
        budgets=[line for sizes, own in comparable.items() for line in best_by_budget(sizes, own, ordinary)],
        sections=evidence,
        laws=law_rows(fits),
        law_warnings=dict.fromkeys(said for fit in fits for said in fit.warnings),
        columns=run_columns(table),
        runs=run_rows(table),
        provenance=provenance(table, sources),
        left_out=used.notes,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=style,
    )
    shown = re.sub(r"<(style|script|svg)\b.*?</\1>|<[^>]*>", " ", render(terms={}), flags=re.DOTALL)
    return render(terms={term: says for term, (looks, says) in TERMS.items() if re.search(looks, shown)})


def _asset(name: str) -> Markup:
    return Markup((files("spt_fast.report") / "templates" / name).read_text(encoding="utf-8"))
