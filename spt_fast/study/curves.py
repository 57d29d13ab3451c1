"""Curves over the tokens of a run's training: loss, learning rate, gradient norm and throughput."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from spt_fast.errors import CheckpointError
from spt_fast.study.runs import records_of
from spt_fast.train.folder import summary_of

FIGURES = ("loss", "lr", "grad_norm", "tokens_per_s")
MOST_POINTS = 150


@dataclass(frozen=True)
class Curve:
    """The logged steps of the kept arm of a finished phase, averaged over intervals."""

    run: str
    phase: str
    tokens: np.ndarray
    """Tokens of the phase, float64 [points]."""
    figures: Mapping[str, np.ndarray]
    """Each of FIGURES, float64 [points]; NaN if it is not finite."""
    trained: int
    """Tokens at the phase's last step, which is not logged if it stopped early."""

    def then(self, later: Curve) -> Curve:
        """This curve joined with one of a later phase of the same stage: pretraining has a phase per budget."""
        return replace(
            self,
            tokens=np.concatenate([self.tokens, self.trained + later.tokens]),
            figures={name: np.concatenate([self.figures[name], later.figures[name]]) for name in self.figures},
            trained=self.trained + later.trained,
        )


def curves_of(folders: Sequence[Path]) -> list[Curve]:
    """The curves of the runs in these folders, which are runs or studies. Runs without readable metrics are left out,
    since their losses may come from a table."""
    found = []
    for run in (run for folder in folders for run in (folder, *sorted(folder.glob("runs/*")))):
        try:
            found += _of_run(run)
        except CheckpointError:
            continue
    return found


def _of_run(run: Path) -> list[Curve]:
    found = []
    phases, steps = (summary_of(run) or {}).get("phases", {}), records_of(run, "train")
    for phase, done in phases.items():
        own = [step for step in steps if step["phase"] == phase and step.get("arm", 0) == done.get("arm", 0)]
        parts = np.array_split(np.arange(len(own)), min(len(own), MOST_POINTS)) if own else []
        values = {name: np.array([step[name] for step in own], float) for name in ("tokens", *FIGURES)}
        means = {name: np.array([each[part].mean() for part in parts]) for name, each in values.items()}
        if parts:
            trained = done.get("tokens", int(values["tokens"][-1]))
            found.append(Curve(run.name, phase, means.pop("tokens"), means, trained))
    return found
