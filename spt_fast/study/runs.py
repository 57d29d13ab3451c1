"""Finished run folders, read for comparison: the pretraining, the finetune, and the results.

A run has one or more phases of pretraining, its own or those of the run whose weights it started from, and a finetune
as its last phase. The pretraining of a base is unknown and counts as 0 tokens. The *domain* is the source with the
largest share of the finetune; the *general* source is the other one with the largest share of pretraining, or without
pretraining of the finetune. A finetune on the domain may be followed by a *later* one on a source that the run has not
read before: the comparison is of the former, and has the losses after the latter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from spt_fast.config import Phase, Recipe
from spt_fast.errors import CheckpointError, RecipeError, some
from spt_fast.printing import plain
from spt_fast.quantities import percent
from spt_fast.study.finetunes import OfBase, Treatment
from spt_fast.train import recorded
from spt_fast.train.folder import recipe_of, summary_of
from spt_fast.train.lineage import Trained, parent_of, trained_before
from spt_fast.train.recorded import Recorded

PER_ARM = ("name", "mixture", "anchor", "average", "also_average")
"""The fields of a finetune that belong to its treatment, and its name."""

FinetunePath = list[tuple[int, float, float]]
"""A finetune's evaluations in order: tokens of the finetune, domain loss, general loss (held-out, nats per token)."""


@dataclass(frozen=True)
class Later:
    """A later, unrelated finetune."""

    folder: Path
    source: str
    """The source with the largest share."""
    tokens: int
    """The tokens in the recipe."""
    heldout: dict[str, float]
    """Losses of the final weights, by source."""


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, as its folder records it."""

    folder: Path
    recipe: Recipe
    summary: dict[str, Any]
    evaluations: list[dict[str, Any]]
    """The "eval" records of metrics.jsonl."""
    pretraining: list[Trained]
    """The phases before the finetune; empty for a base."""
    finetune: Phase
    later: Later | None = None

    @classmethod
    def read(cls, folder: str | Path) -> FinishedRun:
        """Read recipe.yaml, summary.json and metrics.jsonl. CheckpointError for a run that can't be compared."""
        folder = Path(folder)
        summary = summary_of(folder)
        if summary is None:
            problem = "holds no summary.json" if folder.exists() else "does not exist"
            raise CheckpointError(f"{folder}: {problem}; give the folder of a finished run, or of a study")
        if summary["status"] != "done":
            why = f" ({summary['reason']})" if summary.get("reason") else ""
            raise CheckpointError(
                f"{folder}: its status is {summary['status']!r}{why}; finish it with `resume=True` or, if it "
                "diverged, correct the recipe and train it again"
            )
        recipe = recipe_of(folder)
        ancestors = trained_before(folder, recipe)
        *own, last = (Trained(recipe, summary, phase) for phase in recipe.phases)
        pretraining = [*ancestors, *own]
        if not pretraining and (recipe.init is None or recipe.init_only):
            raise CheckpointError(
                f"{folder}: {recipe.phases[0].name!r} is its only phase; a comparison needs a finetune as the last "
                "phase, after pretraining in the same run or in the one that it starts from"
            )
        if not _is_unrelated(last, pretraining):
            return cls(folder, recipe, summary, evaluations_of(folder), pretraining, last.phase)
        *pretraining, tuned = pretraining
        later = Later(folder, last.phase.largest_source, last.phase.tokens, last.done["heldout"])
        if not own:
            parent = parent_of(folder, recipe)
            assert parent is not None
            folder = parent[0]
        return cls(folder, tuned.recipe, tuned.summary, evaluations_of(folder), pretraining, tuned.phase, later)

    @property
    def finetuned(self) -> Recorded:
        """The finetune's part of summary.json."""
        return self.summary["phases"][self.finetune.name]

    @property
    def domain(self) -> str:
        return self.finetune.largest_source

    @property
    def general(self) -> str:
        others = sorted(self.recipe.sources.keys() - {self.domain})
        if not others:
            raise RecipeError(
                f"{self.folder}: {self.domain!r} is its only source; a comparison needs a general source too"
            )
        return max(
            others, key=lambda name: (self.pretraining_share(name), self.finetune.mixture.get(name, Fraction(0)))
        )

    @property
    def treatment(self) -> Treatment:
        replay = 1 - self.finetune.mixture[self.domain]
        share = float(self.pretraining_share(self.domain))
        kind = OfBase if self.base else Treatment
        return kind(share, float(replay), self.finetune.anchor, float(self.finetune.average))

    @property
    def base(self) -> str | None:
        """The name of the base that was finetuned; None if the pretraining is known."""
        from spt_fast.train.origin import named  # imports torch, which takes a second

        return named(Path(self.recipe.init)) if self.recipe.init and not self.pretraining else None

    def pretraining_share(self, source: str) -> Fraction:
        """The exact share of `source` in the tokens of all pretraining phases, by their recipes."""
        phases = [trained.phase for trained in self.pretraining]
        from_source = sum((phase.mixture.get(source, Fraction(0)) * phase.tokens for phase in phases), Fraction(0))
        return from_source / sum(phase.tokens for phase in phases) if phases else Fraction(0)

    def heldout(self, losses: dict[str, float]) -> tuple[float, float]:
        """The (domain, general) losses among those by source. CheckpointError if one is missing or not a number
        above 0."""
        for source in (self.domain, self.general):
            if source not in losses:
                raise CheckpointError(
                    f"{self.folder}: has no held-out loss of {source!r}; name sources.{source}.heldout in its recipe"
                )
            if losses[source] is None or not math.isfinite(losses[source]):
                raise CheckpointError(
                    f"{self.folder}: a held-out loss of {source!r} is not a number; lower the learning rate"
                )
            if losses[source] <= 0:
                raise CheckpointError(
                    f"{self.folder}: a held-out loss of {source!r} is {losses[source]:g}, but a loss must be above 0 "
                    "nats; hold out text that is not the same throughout"
                )
        return losses[self.domain], losses[self.general]

    def finetune_path(self, arm: int) -> FinetunePath:
        """The evaluations of one arm of the finetune's grid, from the common start on; of an average only the first and
        the last."""
        evaluations = [record for record in self.evaluations if record["phase"] == self.finetune.name]
        start = [record for record in evaluations if record["step"] == 0][:1]
        if not start:
            raise CheckpointError(
                f"{self.folder}/metrics.jsonl: no evaluation at the start of {self.finetune.name!r}; "
                "train the run again"
            )
        own = [record for record in evaluations if record.get("average", 0.0) == float(self.finetune.average)]
        later = [record for record in own if record["arm"] == arm and record["step"] > 0]
        return [(record["tokens"], *self.heldout(record["heldout"])) for record in start + later]


def _is_unrelated(last: Trained, before: Sequence[Trained]) -> bool:
    """Whether the last phase is a later finetune: its largest source is in no earlier mixture, and the previous phase
    is a finetune, with another largest source than the first phase."""
    if len(before) < 2 or before[-1].phase.schedule.carry_on:
        return False
    general, domain, source = (trained.phase.largest_source for trained in (before[0], before[-1], last))
    return general != domain and not any(source in trained.phase.mixture for trained in before)


@dataclass(frozen=True, eq=False)
class Content:
    """The text behind a field of a recipe: identified by its digest or, if an earlier version recorded none, by the
    field's value."""

    field: object
    digest: str | None

    @classmethod
    def of(cls, run: FinishedRun | Trained, source: str, kind: str) -> Content:
        """The training or held-out text of a source."""
        given = run.recipe.plain()["sources"].get(source)
        field = given["heldout"] if given and kind == "heldout" else given
        return cls(field, run.summary.get("data", {}).get(f"sources.{source}.{kind}"))

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Content)
        if self.digest and other.digest:
            return self.digest == other.digest
        return self.field == other.field

    def __str__(self) -> str:
        return f"{self.field} ({self.digest[:12]})" if self.digest else str(self.field)


def check_comparable(runs: Sequence[FinishedRun]) -> None:
    """Raises RecipeError, which names two runs and their difference, if their losses cannot be compared."""

    def facts(run: FinishedRun) -> dict[str, object]:
        first: FinishedRun | Trained = run.pretraining[0] if run.pretraining else run
        base, shape = first.recipe.init, vars(first.recipe.model)
        tokenizer = run.recipe.tokenizer or ("the base's" if base else "not named")
        return {
            "domain (the largest share of the last phase)": run.domain,
            "general source": run.general,
            "tokenizer": Content(tokenizer, run.summary.get("tokenizer")),
            "model": {key: value for key, value in shape.items() if value is not None},
            "base": Content(base, first.summary.get("data", {}).get("init")) if base else None,
            f"sources.{run.domain}.heldout": Content.of(run, run.domain, "heldout"),
            f"sources.{run.general}.heldout": Content.of(run, run.general, "heldout"),
            f"phases[{run.finetune.name}].eval.tokens": run.finetune.evaluation.tokens,
            f"phases[{run.finetune.name}].batch.context": run.finetuned.get("context", run.summary.get("context")),
            "unit of the held-out halves": run.summary.get("heldout_halves", "documents"),
            "later finetune": run.later and (run.later.source, run.later.tokens),
        }

    for run in runs[1:]:
        for (what, mine), other in zip(facts(runs[0]).items(), facts(run).values(), strict=True):
            if mine != other:
                raise RecipeError(
                    f"{runs[0].folder} and {run.folder} cannot be compared: {what} is {mine} in one and {other} in "
                    "the other; compare runs that differ only in mixture, anchor, average, optimizer, budget and seed"
                )


def differences(runs: Sequence[FinishedRun], *, searched: bool = False) -> list[str]:
    """Warnings of differences between runs, other than treatment, budget and seed, that may explain their losses.
    searched: each arm has its best optimizer setting, so optimizers may differ."""

    def settings(run: FinishedRun) -> dict[str, object]:
        last = plain(run.finetune)
        start = run.pretraining[0] if run.pretraining else None
        first = plain(start.phase) if start else {}
        return (
            {f"sources.{source}": Content.of(run, source, "train") for source in (run.domain, run.general)}
            | {f"pretraining's {run.general}": start and Content.of(start, run.general, "train")}
            | {"precision": run.summary.get("precision")}
            | {f"pretraining's {key}": first.get(key) for key in ("batch", "optimizer", "schedule", "documents")}
            | {f"finetune's {key}": value for key, value in last.items() if key not in PER_ARM}
        )

    optimizers = ("pretraining's optimizer", "finetune's optimizer") if searched else ()

    found: dict[str, str] = {}
    unknown = [str(run.folder) for run in runs if not (run.recipe.tokenizer or run.summary.get("tokenizer"))]
    if unknown:
        found["tokenizer"] = (
            f"the tokenizer of {some(unknown)} is not recorded, so the losses may be of different tokens"
        )
    for run in runs[1:]:
        ours, theirs = settings(runs[0]), settings(run)
        for what, value in ours.items():
            if theirs[what] != value and what not in optimizers:
                found.setdefault(
                    what,
                    f"the {what} differs: {runs[0].folder} has {value}, {run.folder} has {theirs[what]}; "
                    "the mixture may not be the cause of a difference",
                )
    return [*found.values(), *_changing_shares(runs)]


def _changing_shares(runs: Sequence[FinishedRun]) -> list[str]:
    """Warnings of runs whose domain share changes in pretraining, such as SCPT: only its mean tells them from SPT."""
    by_shares: dict[tuple[Fraction, ...], list[FinishedRun]] = {}
    for run in runs:
        shares = [trained.phase.mixture.get(run.domain, Fraction(0)) for trained in run.pretraining]
        changes = tuple(share for i, share in enumerate(shares) if i == 0 or share != shares[i - 1])
        if len(changes) > 1:
            by_shares.setdefault(changes, []).append(run)
    return [
        f"the domain's share of pretraining is {', then '.join(percent(float(share)) for share in shares)} in "
        f"{some([str(run.folder) for run in own])}; their delta is the mean, by which they are named as SPT"
        for shares, own in by_shares.items()
    ]


def evaluations_of(folder: Path) -> list[dict[str, Any]]:
    return records_of(folder, "eval")


def records_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The "train" or "eval" records of a run's metrics.jsonl; CheckpointError for a damaged file, also later for a
    field that a record lacks."""
    return [recorded.with_nan(record) for record in recorded.records_of(folder, kind)]
