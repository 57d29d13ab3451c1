"""Finished run folders, read for comparison: what was pretrained, how it was finetuned, what came out.

A run is some phases of pretraining and, as its last phase, a finetune. Its *domain* is the source with the largest
share of the finetune, its *general* source the other one with the largest share of the pretraining.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from spt_fast.config import Phase, Recipe
from spt_fast.errors import CheckpointError, RecipeError
from spt_fast.train.folder import recipe_of, summary_of

FinetunePath = list[tuple[int, float, float]]
"""A finetune's evaluations in order: tokens finetuned, domain loss, general loss (held out, nats per token)."""


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    recipe: Recipe
    summary: dict[str, Any]
    evaluations: list[dict[str, Any]]
    """The "eval" records of metrics.jsonl."""

    @classmethod
    def read(cls, folder: str | Path) -> Run:
        """Read recipe.yaml, summary.json and metrics.jsonl; CheckpointError for a run that has nothing to compare."""
        folder = Path(folder)
        summary = summary_of(folder)
        if summary is None:
            raise CheckpointError(f"{folder}: holds no summary.json; give the folder of a finished run")
        if summary["status"] != "done":
            raise CheckpointError(
                f"{folder}: its status is {summary['status']!r}; finish it with `spt-fast train RECIPE --resume`"
            )
        recipe = recipe_of(folder)
        if len(recipe.phases) == 1:
            raise CheckpointError(
                f"{folder}: {recipe.phases[0].name!r} is its only phase; what is compared is a finetune, the last "
                "phase, after pretraining, the phases before it"
            )
        metrics = folder / "metrics.jsonl"
        lines = enumerate(_text(metrics).splitlines(), start=1)
        records = [_json(f"{metrics}, line {number}", line) for number, line in lines]
        return cls(folder, recipe, summary, [record for record in records if record["kind"] == "eval"])

    @property
    def finetune(self) -> Phase:
        return self.recipe.phases[-1]

    @property
    def pretraining(self) -> list[dict[str, Any]]:
        """What summary.json says of each phase before the finetune."""
        return [self.summary["phases"][phase.name] for phase in self.recipe.phases[:-1]]

    @property
    def finetuned(self) -> dict[str, Any]:
        """What summary.json says of the finetune."""
        return self.summary["phases"][self.finetune.name]

    @property
    def domain(self) -> str:
        return max(sorted(self.finetune.mixture), key=lambda source: self.finetune.mixture[source])

    @property
    def general(self) -> str:
        others = sorted(self.recipe.sources.keys() - {self.domain})
        if not others:
            raise RecipeError(
                f"{self.folder}: {self.domain!r} is its only source; a comparison needs a general one too"
            )
        return max(others, key=self.pretraining_share)

    @property
    def delta(self) -> Fraction:
        """The domain's exact share of all pretraining tokens."""
        return self.pretraining_share(self.domain)

    def pretraining_share(self, source: str) -> Fraction:
        """The exact share of `source` in the pretraining tokens that the recipe asks for, over all its phases."""
        phases = self.recipe.phases[:-1]
        from_source = sum((phase.mixture.get(source, Fraction(0)) * phase.tokens for phase in phases), Fraction(0))
        return from_source / sum(phase.tokens for phase in phases)

    def heldout(self, losses: dict[str, float]) -> tuple[float, float]:
        """(domain, general) of held-out losses by source; CheckpointError where one is missing or not a number."""
        for source in (self.domain, self.general):
            if source not in losses:
                raise CheckpointError(
                    f"{self.folder}: has no held-out loss of {source!r}; name sources.{source}.heldout in its recipe"
                )
            if losses[source] is None or not math.isfinite(losses[source]):
                raise CheckpointError(
                    f"{self.folder}: a held-out loss of {source!r} is not a number; lower the learning rate"
                )
        return losses[self.domain], losses[self.general]

    def finetune_path(self, arm: int) -> FinetunePath:
        """The evaluations of one arm of the finetune's grid, from the common start on."""
        evaluations = [record for record in self.evaluations if record["phase"] == self.finetune.name]
        start = [record for record in evaluations if record["step"] == 0][:1]
        if not start:
            raise CheckpointError(
                f"{self.folder}/metrics.jsonl: no evaluation at the start of {self.finetune.name!r}; "
                "train the run again"
            )
        later = [record for record in evaluations if record["arm"] == arm and record["step"] > 0]
        return [(record["tokens"], *self.heldout(record["heldout"])) for record in start + later]


def delta_key(delta: float) -> str:
    """How a delta is written where it is a key: "0", "0.05"."""
    return f"{delta:.12g}"


def arm_name(delta: float) -> str:
    """What an arm is called in tables and pictures: "NPT", "SPT 5%"."""
    return f"SPT {100 * delta:.4g}%" if delta else "NPT"


def check_comparable(runs: Sequence[Run]) -> None:
    """RecipeError, naming two runs and what differs, where losses cannot be held against each other."""

    def facts(run: Run) -> dict[str, object]:
        return {
            "domain (the largest share of the last phase)": run.domain,
            "general source": run.general,
            "tokenizer": run.recipe.tokenizer,
            "model": {key: value for key, value in vars(run.recipe.model).items() if value is not None},
            f"sources.{run.domain}.heldout": run.recipe.sources[run.domain].heldout,
            f"sources.{run.general}.heldout": run.recipe.sources[run.general].heldout,
            f"phases[{run.finetune.name}].eval.tokens": run.finetune.evaluation.tokens,
        }

    for run in runs[1:]:
        for (what, first), other in zip(facts(runs[0]).items(), facts(run).values(), strict=True):
            if first != other:
                raise RecipeError(
                    f"{runs[0].folder} and {run.folder} cannot be compared: {what} is {first} in one and {other} in "
                    "the other; compare runs that differ in mixture, budget and seed only"
                )


def differences(runs: Sequence[Run]) -> list[str]:
    """Warnings: what differs besides mixture, budget and seed, so that it may be why the losses differ."""

    def settings(run: Run) -> dict[str, object]:
        plain = run.recipe.plain()
        first, last = plain["phases"][0], plain["phases"][-1]
        return (
            {f"sources.{source}": plain["sources"][source] for source in (run.domain, run.general)}
            | {f"pretraining's {key}": first[key] for key in ("batch", "optimizer", "schedule", "documents")}
            | {f"finetune's {key}": value for key, value in last.items() if key != "name"}
        )

    found: dict[str, str] = {}
    for run in runs[1:]:
        ours, theirs = settings(runs[0]), settings(run)
        for what, value in ours.items():
            if theirs[what] != value:
                found.setdefault(
                    what,
                    f"the {what} differs, {runs[0].folder} has {value}, {run.folder} has {theirs[what]}: "
                    "the mixture need not be what makes the difference",
                )
    return list(found.values())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; give the folder of a finished run") from None


def _json(where: Path | str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{where}: is not JSON ({error.msg}); train the run again") from None
