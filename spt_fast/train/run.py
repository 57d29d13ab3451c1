"""A run from the outside: its processes, its folder, where it resumes, and how it ends."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from spt_fast.config import Model, Recipe, as_recipe
from spt_fast.data.base_tokenizer import BaseTokenizer
from spt_fast.data.tokenizer import Tokenizer
from spt_fast.errors import CheckpointError, DataError, RecipeError
from spt_fast.fields import naming
from spt_fast.files import write_text
from spt_fast.model import hf
from spt_fast.printing import print_note, print_table
from spt_fast.train import checkpoint
from spt_fast.train.engines import join
from spt_fast.train.evaluate import Interrupted
from spt_fast.train.folder import is_begun, is_run, owned, recipe_of, summary_of
from spt_fast.train.health import Diverged
from spt_fast.train.introduction import Resumed
from spt_fast.train.loop import Trainer
from spt_fast.train.origin import carrier_of, tokenizer_file
from spt_fast.train.plan import Plan, make_plan, not_the_same, recorded_texts
from spt_fast.train.recorded import Recorded
from spt_fast.train.resume import changes, refused, rounding, shape_of
from spt_fast.train.signals import StopRequest
from spt_fast.train.state import SavedState
from spt_fast.train.trackers import check_installed
from spt_fast.train.watch import Watch
from spt_fast.train.weights import digest_of, locate, read_config
from spt_fast.train.world import World, before_joining, use_deterministic_algorithms


def run(
    recipe: Recipe | str | os.PathLike[str], *, resume: bool = False, verify: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Train every phase of a recipe, or of the one in the file at a path; returns summary.json as a dict.

    `resume` continues from the newest whole checkpoint in the run folder, or starts without one; a finished run
    continues if the recipe has become longer (`spt_fast.train.resume`). Datasets are compared with their hashes
    first: some blocks of each, or with `verify` all. Every process of a launcher calls this. SIGTERM, SIGINT, SIGUSR1
    or SIGUSR2 in any of them ends the run at the next safe place with a checkpoint and `status: stopped`; a phase that
    diverges ends it with `status: failed` and the reason. Raises RecipeError, DataError or CheckpointError for what a
    user can fix.
    """
    recipe = before_joining(lambda: as_recipe(recipe))
    if recipe.engine.deterministic:
        use_deterministic_algorithms()
    world = join(recipe.engine)
    world.on_first(lambda: check_installed(recipe.log.to))
    folder = Path(recipe.run)
    earlier = partial(summary_if_over, folder, recipe, resume)
    with ExitStack() as held:
        finished = world.on_first(earlier)
        if finished is None:
            world.on_first(lambda: held.enter_context(owned(folder, "run")))
            finished = world.on_first(earlier)  # another process may have ended it
        if finished:
            world.on_first(lambda: _check_inputs(folder, recipe, finished))
        return finished or _train(recipe, folder, world, resume=resume, verify=verify, progress=progress)


def _train(recipe: Recipe, folder: Path, world: World, *, resume: bool, verify: bool, progress: bool) -> dict[str, Any]:
    """`run` in a locked folder."""
    found = world.on_first(lambda: checkpoint.newest(folder / "checkpoints") if resume else None)
    state = SavedState.read(found.state, found.path) if found else None
    plan = world.everywhere(lambda: _plan(folder, recipe, state, world.size))
    world.everywhere(lambda: plan.check_alike(world))
    if found and state:
        where = found.path
        world.everywhere(lambda: plan.check_same_data(state.data, where))
    known = state.texts if state else None
    warnings = world.everywhere(lambda: [] if world.local_rank else plan.check_files(known, verify=verify))
    before = world.on_first(lambda: recipe_of(folder) if (folder / "recipe.yaml").exists() else recipe)
    resumed = None
    if found and state:
        resumed = Resumed(found, state, [*warnings, *plan.unrecorded(state.data), *rounding(before, recipe)])
        world.on_first(lambda: checkpoint.set_aside(resumed.checkpoint.skipped))
    with StopRequest() as stop, Watch(folder, world.rank, recipe.log.stall_s) as watch:
        world.on_first(lambda: _begin_folder(folder, recipe, plan.tokenizer))
        trainer = Trainer(plan, folder, stop, watch, resumed, world, progress=progress)
        ending: dict[str, str] = {"status": "done"}
        try:
            with world.telling():
                try:
                    trainer.train()
                except Interrupted:
                    ending = {"status": "stopped", "reason": next(filter(None, world.exchange(stop.signal)), "")}
                except Diverged as error:
                    ending = {"status": "failed", "reason": str(error)}
                trainer.writer.finish()
        except BaseException as error:
            ending = {"status": "failed", "reason": str(error) or type(error).__name__}
            with suppress(OSError):
                trainer.summarise(**ending)
            raise
        finally:
            trainer.log.close(ending["status"])
        return trainer.summarise(**ending)


def print_summary(recipe: Recipe, summary: Mapping[str, Any], console: Console) -> None:
    """Print a finished run's summary. CheckpointError for one that is damaged, or of another recipe."""
    summary = Recorded.of(summary, Path(recipe.run) / "summary.json")
    rows = [
        [phase, done["steps"], done["tokens"], source, done["epochs"].get(source, 0.0), done["heldout"].get(source)]
        for phase, done in summary["phases"].items()
        for source in {**done["heldout"], **done["epochs"]}
    ]
    print_table(console, recipe.run, ["phase", "steps", "tokens", "source", "epochs", "held-out loss"], rows)
    for phase in recipe.phases:
        arms, done = phase.arms(), summary["phases"].get(phase.name)
        if done and len(arms) > 1:
            values = ", ".join(f"{key} {value}" for key, value in arms[done.arm_of(phase)].items())
            print_note(
                console, f"{phase.name}: the best of its grid is {values}, by the select loss of {phase.chosen_by}"
            )
    for phase, done in summary["phases"].items():
        if (best := done["handed_on"]) < done["steps"]:
            print_note(console, f"{phase}: the weights and their losses are those after step {best:,}, the best")
    if skipped := summary["skipped_steps"]:
        print_note(console, f"skipped steps: {skipped}, because the loss or its gradient was not finite")


def summary_if_over(folder: Path, recipe: Recipe, resume: bool) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do: it is done, or it was asked to stop, and its launcher treated
    that as a failure and started it again. RecipeError for a folder in which this recipe cannot be trained."""
    if (folder / "recipe.yaml").exists() and not is_run(folder):
        says = f"run: folder {folder} holds a recipe.yaml, but no run; choose another name"
        raise RecipeError(says, argument=True)
    if not is_begun(
        folder, "run", "recipe.yaml", lambda: refused(recipe_of(folder), recipe, shape_of(recipe)), resume=resume
    ):
        return None
    if changes(folder, recipe):
        return None  # the recipe has become longer
    summary = summary_of(folder)
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    ended = ("done", "stopped") if restarted else ("done",)
    return summary if summary and summary["status"] in ended else None


def _check_inputs(folder: Path, recipe: Recipe, summary: Mapping[str, Any]) -> None:
    """RecipeError or DataError if the recipe now leads to another tokenizer, or to other text or starting weights, than
    the finished run was trained with. What is missing is not compared."""
    recorded, where = summary.get("data", {}), folder / "summary.json"
    if recipe_of(folder).tokenizer != recipe.tokenizer:
        _own_tokenizer(folder, recipe)
    recorded_texts(recipe, recorded, where)
    with suppress(CheckpointError):  # the base may be gone
        if recipe.init and "init" in recorded and digest_of(Path(recipe.init)) != recorded["init"]:
            raise not_the_same("init", where)


def _plan(folder: Path, recipe: Recipe, state: SavedState | None, world: int) -> Plan:
    """The recipe's plan; for a run resumed from `state`, with the tokenizer and shape that it began with."""
    if state is None:
        return make_plan(recipe, world=world)
    tokenizer = _own_tokenizer(folder, recipe)
    init = Path(recipe.init) if recipe.init and Path(recipe.init).exists() else None
    with naming("init"):
        digest = digest_of(init) if init else state.data.get("init")
    if recipe.init:  # the shape comes from the checkpoint's weights; the base's files may have changed
        untied = any(phase.untie for phase in recipe.phases[: state.train.phase + 1])
        untied = untied and (init is None or read_config(init).tied)
        shape = replace(state.model, tied=state.model.tied or untied)
        recipe = replace(recipe, init=None, init_only=None, model=Model(**vars(shape)))
    plan = make_plan(recipe, world=world, tokenizer=tokenizer)
    return replace(plan, init_digest=digest)


def _own_tokenizer(folder: Path, recipe: Recipe) -> BaseTokenizer | None:
    """The tokenizer in the run's folder; None if an earlier version, or a run without one, left none there."""
    if (place := tokenizer_file(folder)) is None:
        return None
    own = Tokenizer.load(place)
    with suppress(DataError):  # the recipe's may be missing
        if recipe.tokenizer and Tokenizer.load(recipe.tokenizer).digest != own.digest:
            raise RecipeError(
                f"tokenizer: {recipe.tokenizer} is not {place}, which the run began with; put "
                "the old one back, or start a run with another name"
            )
    return own


def _begin_folder(folder: Path, recipe: Recipe, tokenizer: BaseTokenizer | None) -> None:
    if recipe.init and (Path(recipe.init) / "recipe.yaml").exists():  # a run, which may continue: use these weights
        recipe = replace(recipe, init=str(locate(Path(recipe.init))))
    checkpoint.remove_unfinished(folder / "checkpoints")
    (folder / "summary.json").unlink(missing_ok=True)  # of an earlier start, with an outdated status
    write_text(folder / "recipe.yaml", recipe.as_yaml())
    if tokenizer and tokenizer_file(folder) is None:
        tokenizer.keep(folder)
    if recipe.init and not (folder / hf.BASE_CONFIG).exists() and (base := carrier_of(locate(Path(recipe.init)))):
        hf.carry(base, folder)
        config = base / (hf.BASE_CONFIG if (base / hf.BASE_CONFIG).exists() else hf.CONFIG)
        shutil.copyfile(config, folder / hf.BASE_CONFIG)
