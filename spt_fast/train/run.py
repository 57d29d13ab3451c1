"""A run from the outside: its processes, its folder, where it goes on, and how it ends."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from spt_fast.config import Recipe
from spt_fast.files import write_text
from spt_fast.printing import print_table
from spt_fast.train import checkpoint
from spt_fast.train.engines import join
from spt_fast.train.evaluate import Interrupted
from spt_fast.train.folder import is_begun, recipe_of, summary_of
from spt_fast.train.introduction import Resumed
from spt_fast.train.loop import Trainer
from spt_fast.train.plan import make_plan
from spt_fast.train.signals import StopRequest
from spt_fast.train.state import SavedState
from spt_fast.train.watch import Watch
from spt_fast.train.world import use_deterministic_algorithms


def run(recipe: Recipe, *, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    """Train every phase of the recipe; returns summary.json as a dict.

    `resume` goes on from the newest whole checkpoint in the run folder, or starts afresh where there is nothing to
    resume. Every process that a launcher started calls this. SIGTERM, SIGINT, SIGUSR1 or SIGUSR2 in any of them ends
    the run at the next safe place with a checkpoint and `status: stopped`. Raises RecipeError, DataError or
    CheckpointError for what a user can mend.
    """
    if recipe.engine.deterministic:
        use_deterministic_algorithms()
    world = join(recipe.engine)
    folder = Path(recipe.run)
    finished = world.on_first(lambda: _check_folder(folder, recipe, resume))
    if finished:
        return finished
    plan = world.everywhere(lambda: make_plan(recipe, world=world.size))
    found = world.on_first(lambda: checkpoint.newest(folder / "checkpoints") if resume else None)
    resumed = Resumed(found, SavedState.read(found.state, found.path)) if found else None
    if resumed:
        world.everywhere(lambda: plan.check_same_data(resumed.state.data, resumed.checkpoint.path))
        world.on_first(lambda: checkpoint.set_aside(resumed.checkpoint.skipped))
    world.on_first(lambda: _begin_folder(folder, recipe))
    with StopRequest() as stop, Watch(folder, world.rank, recipe.log.stall_s) as watch:
        trainer = Trainer(plan, folder, stop, watch, resumed, world, progress=progress)
        ending: dict[str, str] = {"status": "done"}
        try:
            try:
                trainer.train()
            except Interrupted:
                ending = {"status": "stopped", "reason": next(filter(None, world.exchange(stop.signal)), "")}
            trainer.writer.finish()
        except BaseException as error:
            with suppress(OSError):
                trainer.summarise("failed", reason=str(error) or type(error).__name__)
            raise
        finally:
            trainer.log.close()
        return trainer.summarise(**ending)


def print_summary(name: str, summary: dict[str, Any], console: Console) -> None:
    rows = [
        [phase, done["steps"], done["tokens"], source, done["epochs"].get(source, 0.0), loss]
        for phase, done in summary["phases"].items()
        for source, loss in done["heldout"].items()
    ]
    print_table(console, name, ["phase", "steps", "tokens", "source", "epochs", "held-out loss"], rows)


def _check_folder(folder: Path, recipe: Recipe, resume: bool) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do: it is done, or it was asked to stop and its launcher takes that
    for a failure and starts it again. RecipeError for a folder that this recipe cannot be trained in."""
    if not is_begun(folder, "run", "recipe.yaml", lambda: recipe_of(folder).changes(recipe), resume=resume):
        return None
    summary = summary_of(folder)
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    ended = ("done", "stopped") if restarted else ("done",)
    return summary if summary and summary["status"] in ended else None


def _begin_folder(folder: Path, recipe: Recipe) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").unlink(missing_ok=True)  # of an earlier life, whose ending is not this one's
    write_text(folder / "recipe.yaml", yaml.safe_dump(recipe.plain(), sort_keys=False, allow_unicode=True))
