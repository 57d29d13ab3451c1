"""The runs table: the measurements of a study, a row per evaluation, for laws, advice and reports.

A *stage* is training with one learning-rate schedule. Stage 0 is pretraining from scratch; later stages adapt its
result: a finetune, or continual pretraining. Phases with `continue: true` in their schedule belong to the stage that
they continue. So one run at a plateau of its rate has several budgets, and SCPT's change of mixture does not begin a
stage. A run that starts from another run's weights/<phase> comes after that one; one that starts from a base begins at
stage 1 with an unknown past.

`Row` documents each column. Losses are in nats per token, shares are fractions, tokens are those of the model's
windows. Only the kept arm of a phase's own grid is in the table, with its settings.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from spt_fast.config import Phase, Recipe, Schedule
from spt_fast.errors import DataError, SptWarning, invalid, nearest, some
from spt_fast.fields import naming
from spt_fast.files import replacing
from spt_fast.outputs import check_output, head
from spt_fast.study.behind import NAMES
from spt_fast.study.runs import evaluations_of
from spt_fast.study.settings import SETTINGS, setting_of
from spt_fast.study.usable import numbers, with_average
from spt_fast.train.folder import recipe_of, summary_of
from spt_fast.train.lineage import Trained, parent_of, trained_before
from spt_fast.train.lr import learning_rate
from spt_fast.train.recorded import Recorded

CONTENT = ("domain", "general", "domain_text", "general_text")
BEHIND = tuple(f"{corpus}_{name}" for name in NAMES for corpus in ("domain", "general"))
NEWER = (*CONTENT, *BEHIND, "base", "sequences", "window", "rate", *SETTINGS[1:], "grid", "other")
"""Columns that tables of earlier versions lack."""
_NAMES = ("run", "after", "phase", "status", "start", "tokenizer", "heldout", "base", "optimizer", "grid", "other")
TEXT = dict.fromkeys((*_NAMES, *CONTENT), str)
SPLITS = ("train", "heldout", "select")


@dataclass(frozen=True, kw_only=True)
class Row:
    """The columns of an evaluation; a failed run has only those without a default."""

    run: str
    """The name of the run's folder."""
    phase: str
    """The name of the phase."""
    stage: int
    """0: pretraining from scratch; 1, 2 …: later stages."""
    status: str
    """done or failed; a failed run has one row without losses."""
    base: str | None = None
    """The base that the run, or the first run before it, started from; None for a start from scratch."""
    after: str
    """The run whose weights the stage started from; empty if there is none, or if it is unknown."""
    start: str | None = None
    """scratch, pretrained, embeddings (only these were copied) or frozen embeddings."""
    params: int
    seed: int
    lr: float = math.nan
    """Peak learning rate of the stage."""
    optimizer: str | None = None
    weight_decay: float = math.nan
    beta1: float = math.nan
    beta2: float = math.nan
    eps: float = math.nan
    clip: float = math.nan
    momentum: float = math.nan
    """From `optimizer` on, the optimizer fields of the stage. `clip` is infinite without clipping; NaN stands for
    fields that the optimizer does not have."""
    grid: str = ""
    """The fields chosen by the phase's own grid, with spaces between them; empty without one."""
    anchor: float = math.nan
    """Strength of the decay toward the stage's starting weights."""
    average: float = 0.0
    """The share of the stage's starting weights in the evaluated weights; 0 without averaging."""
    tokens: float = math.nan
    """Tokens of this stage up to this evaluation."""
    delta: float = math.nan
    """The domain's share of `tokens`: δ in pretraining, 1 − p in finetuning, r in D-CPT."""
    injected: float = math.nan
    """1 − delta."""
    other: str = ""
    """The source with the largest share of the stage's first phase if that is neither the domain nor the general
    source, as in a later finetune; else empty."""
    domain_tokens: int
    """Unique tokens of the domain that training may read."""
    epochs: float = math.nan
    """How often this stage has read the domain so far."""
    sequences: float = math.nan
    """Windows of a step; NaN in tables of earlier versions."""
    window: float = math.nan
    """Tokens of a window; NaN in tables of earlier versions."""
    rate: float = math.nan
    """The learning rate here, as a share of the stage's peak; NaN in tables of earlier versions."""
    pretrain_tokens: float = math.nan
    """Tokens of the earlier stages; NaN if unknown."""
    pretrain_delta: float = math.nan
    """The domain's share of `pretrain_tokens`; NaN if there are none or if it is unknown."""
    pretrain_epochs: float = math.nan
    """How often the earlier stages read the domain, in the size that it had there."""
    domain_train: float = math.nan
    general_train: float = math.nan
    """Losses on fixed training windows."""
    domain_heldout: float = math.nan
    general_heldout: float = math.nan
    """Losses on the report half of the held-out text, which are the results."""
    domain_select: float = math.nan
    general_select: float = math.nan
    """Losses on the select half, by which weights and learning rates are chosen."""
    domain_before: float = math.nan
    general_before: float = math.nan
    """`domain_heldout` and `general_heldout` at the stage's start."""
    handed_on: bool
    """Whether these are the phase's final weights."""
    flops: float = math.nan
    """Training FLOPs of all stages up to this evaluation."""
    tokenizer: str
    """Digest of the tokenizer."""
    heldout: str | None = None
    """Digest of the held-out text."""
    domain: str | None = None
    general: str | None = None
    """The sources' names."""
    domain_text: str | None = None
    general_text: str | None = None
    """Digests of the sources' training text."""
    domain_error: float = math.nan
    general_error: float = math.nan
    """Standard errors of `domain_heldout` and `general_heldout`."""
    domain_documents: float = math.nan
    general_documents: float = math.nan
    """Documents that the held-out losses are measured on; NaN if that is not recorded."""
    domain_scored: float = math.nan
    general_scored: float = math.nan
    """Tokens that the held-out losses are measured on; NaN if that is not recorded."""


COLUMNS = tuple(column.name for column in fields(Row))
NUMBERS = tuple(column.name for column in fields(Row) if column.type in ("int", "float"))


def read_table(
    paths: Sequence[str | Path], *, domain_source: str | None = None, general_source: str | None = None
) -> pd.DataFrame:
    """The rows of studies (their folders), saved tables (.parquet or .csv) and runs (their folders), in one table.

    `domain_source` and `general_source` name the sources of runs that belong to no study. By default the domain is the
    source with the largest share of the last phase of the runs that have a phase after pretraining, as in `compare`.
    Studies record their own.

    Raises DataError or CheckpointError, which name the file and the remedy.
    """
    if not paths:
        raise DataError("runs: none given; give a study's folder, its table.parquet or table.csv, or folders of runs")
    tables: dict[str, pd.DataFrame] = {}
    folders = []
    for path in map(Path, paths):
        if path.suffix in (".parquet", ".csv"):
            tables[str(path)] = load_table(path)
        elif (path / "table.parquet").exists():
            tables[str(path)] = load_table(path / "table.parquet")
        elif (path / "recipe.yaml").exists():
            folders.append(path)
        else:
            raise DataError(
                f"{path}: is neither a study with a table.parquet, nor a table (.parquet, .csv), nor the folder of a "
                "run; `spt-fast sweep` writes a study's table after its first run"
            )
    for name, rows in tables.items():
        for field, asked in (("domain_source", domain_source), ("general_source", general_source)):
            if asked is not None:
                _check_source(name, rows, field, asked)
    if folders:
        tables["runs"] = table_of(folders, *_domain_and_general(folders, domain_source, general_source))
    return _in_one(tables)


def _check_source(path: str, rows: pd.DataFrame, field: str, asked: str) -> None:
    """Raises DataError if a study's source is not the requested one; warns if the study's is unknown."""
    known = rows[field.removesuffix("_source")].dropna().unique()
    if len(known) == 0:
        warnings.warn(
            f"{field}: {path} is of an earlier version, so its study's own source is used",
            SptWarning,
            stacklevel=3,
        )
    for own in known:
        if own != asked:
            says = f"{path} is a study with the source {own!r}; leave it out, or give the folders of runs"
            raise DataError(invalid(field, asked, says), argument=True)


def _in_one(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The tables joined, without duplicate rows. Different runs of one name in several tables get their table's name as
    a prefix."""
    table = pd.concat([rows.assign(of=name) for name, rows in tables.items()], ignore_index=True)
    table = table.drop_duplicates([column for column in COLUMNS if column not in NEWER], ignore_index=True)
    several = table.groupby("run")["of"].nunique() > 1
    for column in ("run", "after"):
        ambiguous = table[column].isin(several.index[several])
        table[column] = table[column].where(~ambiguous, table["of"] + ":" + table[column])
    return table[list(COLUMNS)]


def _domain_and_general(runs: Sequence[Path], domain: str | None, general: str | None) -> tuple[str, str]:
    """The names of the domain and the general source: as given, or by the runs, whose finetune is mostly on the domain.
    Raises DataError if the runs do not determine them."""
    sources, guessed = set[str](), set[str]()
    for run in runs:
        recipe = recipe_of(run)
        sources |= recipe.sources.keys()
        if recipe.init or len(recipe.phases) > 1:
            guessed.add(recipe.phases[-1].largest_source)
    if domain is None:
        if len(guessed) != 1:
            says = ", ".join(sorted(guessed)) or "nothing"
            raise DataError(
                f"domain_source: the last phases of these runs give {says}; name one of {', '.join(sorted(sources))}",
                argument=True,
            )
        (domain,) = guessed
    others = sorted(sources - {domain})
    for field, given in (("domain_source", domain), ("general_source", general)):
        if given is not None and given not in sources:
            raise DataError(invalid(field, given, f"name a source; {nearest(given, sources)}"), argument=True)
    if general is None:
        if len(others) != 1:
            raise DataError(f"general_source: missing; name one of {', '.join(others)}", argument=True)
        (general,) = others
    return domain, general


def load_table(path: Path) -> pd.DataFrame:
    """Read a table that `save_table` wrote; DataError for any other file."""
    try:
        table = (
            pd.read_parquet(path)
            if path.suffix == ".parquet"
            else pd.read_csv(path, dtype=TEXT, float_precision="round_trip")
        )
        empty = [name for name in ("after", "grid", "other") if name in table]
        table = table.assign(**{name: table[name].astype(object).fillna("") for name in empty})
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a table ({error}); give a table.parquet or table.csv") from None
    lacking: dict[str, Any] = {column: None if column in TEXT else math.nan for column in NEWER if column not in table}
    lacking |= dict.fromkeys({"grid", "other"} & lacking.keys(), "")
    own, table = list(table.columns), with_average(table.assign(**lacking))
    for column in COLUMNS:
        if column not in table:
            raise DataError(
                f"{path}: has no column {column!r}; {nearest(column, own)}; tables of runs are "
                "written by `spt-fast sweep`"
            )
    with naming(path):
        return table.assign(**{name: numbers(table[name]) for name in NUMBERS if table[name].dtype.kind not in "iuf"})


def last_runs(folder: Path) -> tuple[list[Path], list[str]]:
    """The finished runs of a study's last stage so far, and a sentence on those that failed; another folder itself."""
    if not (folder / "table.parquet").exists():
        return [folder], []
    table = load_table(folder / "table.parquet")
    done, failed = (table[table["status"] == status] for status in ("done", "failed"))
    if done.empty:
        raise DataError(f"{folder}: the study has no finished run; train one first")
    last = done.loc[done["stage"] == done["stage"].max(), "run"].unique()
    said = [f"left out, because they failed: {some(failed['run'].unique())}"] if len(failed) else []
    return [folder / "runs" / run for run in last], said


def check_place(folder: Path) -> None:
    """Raises SptError if a study's folder holds a table that is not a study's."""
    check_output(folder / "table.csv", "study", lambda file: head(file).startswith(b"run,phase,stage,"))
    check_output(folder / "table.parquet", "study", lambda file: "handed_on" in pq.read_schema(file).names)


def save_table(table: pd.DataFrame, folder: Path) -> None:
    """Write table.parquet and table.csv."""
    with replacing(folder / "table.parquet") as path:
        table.to_parquet(path, index=False)
    with replacing(folder / "table.csv") as path:
        table.to_csv(path, index=False)


def table_of(runs: Sequence[Path], domain: str, general: str) -> pd.DataFrame:
    """The table of the finished and failed runs; others are left out. Raises CheckpointError for a damaged folder."""
    return in_columns(row for run in runs for row in rows_of(run, domain, general))


def in_columns(rows: Iterable[Row]) -> pd.DataFrame:
    """Rows as a table."""
    return pd.DataFrame([vars(row) for row in rows], columns=list(COLUMNS)).astype(
        dict.fromkeys(("tokens", "domain_tokens", "pretrain_tokens", "sequences", "window"), "float")
    )


Exact = int | Fraction | float
"""A count or a share without rounding; NaN if unknown."""


@dataclass(frozen=True)
class Past:
    """The training before a point of a run: in the earlier stages, and in the current one."""

    stage: int = -1
    before_tokens: Exact = 0
    before_domain: Exact = 0
    """Tokens of the domain among `before_tokens`, by the requested shares."""
    before_epochs: float = 0.0
    tokens: Exact = 0
    domain: Exact = 0
    epochs: float = 0.0
    flops: float = 0.0
    setting: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The columns that all rows of the current stage share, by name."""

    def begin_stage(self, setting: Mapping[str, Any]) -> Past:
        return Past(
            stage=self.stage + 1,
            before_tokens=self.before_tokens + self.tokens,
            before_domain=self.before_domain + self.domain,
            before_epochs=self.before_epochs + self.epochs,
            flops=self.flops,
            setting=setting,
        )

    def after(self, tokens: int, share: Fraction, domain_tokens: float, flops_per_token: float) -> Past:
        """The training up to `tokens` later, `share` of them from the domain."""
        return replace(
            self,
            tokens=self.tokens + tokens,
            domain=self.domain + share * tokens,
            epochs=self.epochs + float(share * tokens) / domain_tokens,
            flops=self.flops + flops_per_token * tokens,
        )


UNKNOWN = Past(stage=0, tokens=math.nan, domain=math.nan, epochs=math.nan, flops=0.0)
"""The training before the weights of a base."""


def rows_of(folder: Path, domain: str, general: str) -> list[Row]:
    """The rows of a run; none if it has neither finished nor failed. Raises CheckpointError for a damaged folder."""
    summary = summary_of(folder)
    if summary is None or summary["status"] == "stopped":
        return []
    recipe = recipe_of(folder)
    ancestors = trained_before(folder, recipe)
    base = (ancestors[0].recipe if ancestors else recipe).init
    past = _past_of_start(ancestors, base, domain)
    row = replace(_first_row(folder, recipe, summary, domain, general), stage=past.stage + 1, base=base)
    if summary["status"] == "failed":
        return [row]
    if parent := parent_of(folder, recipe):
        row = replace(row, after=parent[0].name)
    evaluations, rows = evaluations_of(folder), list[Row]()
    for phase in recipe.phases:
        done = summary["phases"][phase.name]
        if rows and not phase.schedule.carry_on:
            row = replace(row, after=row.run)
        row = replace(row, **_of_phase(phase, done, summary, domain, general))
        if not phase.schedule.carry_on:
            decay = _Decay.of(phase, done, row.window)
        past = _entering(past, phase, recipe, done, (domain, general))
        share = Fraction(phase.mixture.get(domain, 0))
        flops_per_token = done.get("flops_per_token", summary["flops_per_token"])
        for record in _own_evaluations(evaluations, phase, done):
            losses = _losses(record, domain, general)
            if record["step"] == 0 and past.stage > 0:
                row = replace(row, domain_before=losses["domain_heldout"], general_before=losses["general_heldout"])
            here = past.after(record["tokens"], share, row.domain_tokens, flops_per_token)
            average = record.get("average", 0.0)
            handed_on = record["step"] == done["handed_on"] and average == float(phase.average)
            at = _after_training(row, here, share)
            rows.append(replace(at, handed_on=handed_on, average=average, rate=decay.rate(int(here.tokens)), **losses))
        past = past.after(done["tokens"], share, row.domain_tokens, flops_per_token)
    return rows


def _own_evaluations(evaluations: Iterable[dict[str, Any]], phase: Phase, done: Recorded) -> Iterator[dict[str, Any]]:
    """The evaluations of the kept arm of a phase, without those of other runs' averages, and without the first one of a
    phase that continues a stage, which repeats the last one of the phase before."""
    for record in evaluations:
        repeats = record["step"] == 0 and phase.schedule.carry_on
        own = record.get("average", 0.0) in (0.0, float(phase.average))
        if record["phase"] == phase.name and record["arm"] == done["arm"] and own and not repeats:
            yield record


def _of_phase(phase: Phase, done: Recorded, summary: dict[str, Any], domain: str, general: str) -> dict[str, Any]:
    """The columns that all rows of a phase share, by name."""
    scored = done.get("scored", {}).get("heldout", {})
    return {
        "phase": phase.name,
        "heldout": _heldout(summary, phase, domain, general),
        "sequences": phase.batch.sequences,
        "window": done.get("context") or phase.batch.context or summary.get("context", math.nan),
        **{
            f"{corpus}_{column}": scored.get(source, {}).get(of) or math.nan
            for column, of in (("documents", "documents"), ("scored", "tokens"))
            for corpus, source in (("domain", domain), ("general", general))
        },
    }


def _losses(record: Mapping[str, Any], domain: str, general: str) -> dict[str, Any]:
    """The losses of an evaluation and their standard errors, by column."""
    errors, losses = record.get("standard_errors", {}).get("heldout", {}), dict[str, Any]()
    for corpus, source in (("domain", domain), ("general", general)):
        losses |= {f"{corpus}_{split}": record[split].get(source, math.nan) for split in SPLITS}
        losses[f"{corpus}_error"] = errors.get(source) or math.nan
    return losses


@dataclass(frozen=True)
class _Decay:
    """The learning-rate schedule of a stage, in steps of the phase that it began with."""

    schedule: Schedule
    steps: int
    """0 if unknown."""
    tokens_per_step: int

    @classmethod
    def of(cls, phase: Phase, done: Recorded, window: float) -> _Decay:
        """window: NaN if it is unknown."""
        schedule = phase.with_overrides(phase.arms()[done.arm_of(phase)]).schedule
        if math.isnan(window):
            return cls(schedule, 0, 0)
        return cls(schedule, phase.steps(int(window)), phase.tokens_per_step(int(window)))

    def rate(self, tokens: int) -> float:
        """As a share of the peak, after this many tokens of the stage."""
        if not self.steps:
            return math.nan
        return learning_rate(self.schedule, 1.0, tokens // self.tokens_per_step, self.steps, self.tokens_per_step)


def _after_training(row: Row, past: Past, share: Fraction) -> Row:
    delta = Fraction(past.domain) / Fraction(past.tokens) if past.tokens else share
    known = past.before_tokens > 0
    return replace(
        row,
        stage=past.stage,
        **past.setting,
        tokens=float(past.tokens),
        delta=float(delta),
        injected=float(1 - delta),
        epochs=past.epochs,
        pretrain_tokens=float(past.before_tokens),
        pretrain_delta=float(past.before_domain / Fraction(past.before_tokens)) if known else math.nan,
        pretrain_epochs=past.before_epochs,
        flops=past.flops,
    )


def _first_row(folder: Path, recipe: Recipe, summary: dict[str, Any], domain: str, general: str) -> Row:
    """A row with the columns that all rows of a run share."""
    for source in (domain, general):
        if source not in recipe.sources:
            raise DataError(f"{folder}: has no source {source!r}; {nearest(source, recipe.sources)}")
    return Row(
        run=folder.resolve().name,
        phase=recipe.phases[0].name,
        stage=0,
        status=summary["status"],
        after="",
        params=summary["parameters"],
        seed=summary["seed"],
        domain_tokens=summary["train_tokens"][domain],
        handed_on=False,
        tokenizer=(summary["tokenizer"] or "unknown")[:16],
        domain=domain,
        general=general,
        domain_text=summary["data"].get(f"sources.{domain}.train", "")[:16] or None,
        general_text=summary["data"].get(f"sources.{general}.train", "")[:16] or None,
    )


def _heldout(summary: dict[str, Any], phase: Phase, domain: str, general: str) -> str:
    """A digest of a phase's held-out text and of how it is evaluated."""
    text = [summary["data"].get(f"sources.{source}.heldout") for source in (domain, general)]
    how: list[object] = [phase.evaluation.tokens, phase.documents]
    how += [phase.batch.context] if phase.batch.context else []
    how += [halves] if (halves := summary.get("heldout_halves", "documents")) != "documents" else []
    return hashlib.sha256(json.dumps([*text, *how]).encode()).hexdigest()[:16]


def _entering(past: Past, phase: Phase, recipe: Recipe, done: Recorded, known: Sequence[str] = ()) -> Past:
    """The training before a phase, at the start of a new stage or within the one that its schedule continues. known:
    the names of the domain and the general source."""
    if phase.schedule.carry_on:
        return past
    start = "scratch" if past.stage < 0 else "pretrained"
    if recipe.init_only and phase is recipe.phases[0]:
        start = "frozen embeddings" if phase.freeze == "embeddings" else "embeddings"
    other = "" if phase.largest_source in known else phase.largest_source
    of_stage = {"start": start, "anchor": phase.anchor, "other": other}
    return past.begin_stage(setting_of(phase, done.arm_of(phase)) | of_stage)


def _past_of_start(ancestors: Sequence[Trained], base: str | None, domain: str) -> Past:
    """The training before the run's first step."""
    past = Past() if base is None else UNKNOWN
    for at in ancestors:
        past = _entering(past, at.phase, at.recipe, at.done).after(
            at.done["tokens"],
            Fraction(at.phase.mixture.get(domain, 0)),
            at.summary["train_tokens"].get(domain, math.nan),
            at.done.get("flops_per_token", at.summary["flops_per_token"]),
        )
    return past
