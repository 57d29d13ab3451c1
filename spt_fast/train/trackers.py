"""Trackers, which get the figures of a run besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow, a CSV table.

    record of metrics.jsonl → Entry → the queue of each tracker → its own thread → its own library

`log: {to: [...]}` names them. Each has its own thread, so that no step waits for a network. What a tracker raises while
the run trains is reported once, and training continues. trackers.json in the run's folder keeps the ids of the
trackers' runs, so that a resumed run continues them. The arms of a grid are also separate series, over the steps of
the arm.
"""

from __future__ import annotations

import csv
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import Any, Protocol

import torch
import yaml

from spt_fast.config import TRACKERS, Recipe, flat
from spt_fast.errors import RecipeError
from spt_fast.files import replacing, write_text
from spt_fast.model.flops import parameters
from spt_fast.train.engine import EngineInterface
from spt_fast.train.plan import Plan
from spt_fast.train.recorded import records_of
from spt_fast.train.world import dtype_name

PROJECT = "spt-fast"
"""The project in W&B and the experiment in MLflow, unless the environment names another."""
IDS = "trackers.json"
FOLDERS = "folders"
"""In that file, by tracker the run's folder when its run began there."""
MOST_WAITING = 10_000
"""Entries that wait for a slow tracker; further ones are dropped."""
PATIENCE_S = 10
"""Time for a tracker to take its last entries: a run that is asked to stop has to end soon."""
OF_A_STEP = ("loss", "lr", "grad_norm", "tokens_per_s", "mfu", "skipped")
OF_AN_EVALUATION = ("heldout", "select", "train")
PLACE = ("kind", "phase", "arm", "step", "tokens", "average")
"""The position of a record."""


@dataclass(frozen=True)
class Followed:
    """The run that trackers follow."""

    folder: Path
    recipe: Recipe
    facts: Mapping[str, Any]
    """Settings that the recipe doesn't have."""
    resumed_at: int | None
    """Finished steps of a resumed run."""

    @property
    def settings(self) -> dict[str, Any]:
        return {**self.recipe.plain(), **self.facts}

    @property
    def arms(self) -> dict[str, dict[str, Any]]:
        """The values of the arms of all grids, by the names of their series."""
        phases = [phase for phase in self.recipe.phases if len(phase.arms()) > 1]
        return {series(phase.name, i): arm for phase in phases for i, arm in enumerate(phase.arms())}


def followed(folder: Path, plan: Plan, engine: EngineInterface, resumed_at: int | None) -> Followed:
    facts = {
        "parameters": parameters(plan.model),
        "runs_on": engine.describe(),
        "computed_in": dtype_name(engine.dtype),
    }
    return Followed(folder, plan.recipe, facts, resumed_at)


def series(phase: str, arm: int) -> str:
    return f"{phase}-{arm + 1}"


@dataclass(frozen=True)
class Entry:
    """A record of metrics.jsonl in the form for trackers."""

    record: dict[str, Any]
    figures: dict[str, float]
    step: int
    """Steps of the whole run."""
    arm: str | None
    """Its series, if the phase has a grid."""

    @property
    def samples(self) -> dict[str, list[dict[str, str]]]:
        return self.record.get("samples", {})


def figures_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a record, by tags such as train/loss and heldout/SOURCE."""
    if record["kind"] == "train":
        found = {f"train/{key}": record[key] for key in OF_A_STEP}
    else:
        found = {f"{split}/{of}": loss for split in OF_AN_EVALUATION for of, loss in record[split].items()}
    return {tag: value for tag, value in found.items() if value is not None}


def is_own(record: Mapping[str, Any], recipe: Recipe) -> bool:
    """Whether a record belongs to this run, and not to one that shares its training and has another average."""
    averages = {phase.name: float(phase.average) for phase in recipe.phases}
    return record.get("average", 0.0) in (0.0, averages.get(record["phase"]))


class Tracker(Protocol):
    place: str
    """The place where its run can be viewed."""

    def write(self, entry: Entry) -> None: ...

    def close(self, status: str) -> None:
        """status: how the run ended, as in summary.json."""


# ------------------------------------------------------------------------------------------------ the trackers


class TensorBoard:
    """Event files in tensorboard/; each arm of a grid in a folder below, which TensorBoard shows as a run."""

    def __init__(self, run: Followed) -> None:
        from torch.utils.tensorboard import SummaryWriter

        def writer(folder: Path, purge_step: int | None) -> Any:
            return SummaryWriter(str(folder), purge_step=purge_step)

        self._writer, self._folder, self._resumed = writer, run.folder / "tensorboard", run.resumed_at is not None
        self.place = str(self._folder)
        self._whole = writer(self._folder, None if run.resumed_at is None else run.resumed_at + 1)
        self._arms: dict[str, Any] = {}
        written = yaml.safe_dump(run.settings, sort_keys=False, allow_unicode=True)
        self._whole.add_text("recipe", _verbatim(written), run.resumed_at or 0)

    def write(self, entry: Entry) -> None:
        self._add(self._whole, entry, entry.step)
        if entry.arm is not None:
            step = entry.record["step"]
            if entry.arm not in self._arms:
                self._arms[entry.arm] = self._writer(self._folder / entry.arm, step if self._resumed else None)
            self._add(self._arms[entry.arm], entry, step)

    def _add(self, writer: Any, entry: Entry, step: int) -> None:
        for tag, value in entry.figures.items():
            writer.add_scalar(tag, value, step)
        for source, samples in entry.samples.items():
            writer.add_text(f"samples/{source}", "\n\n".join(_verbatim(_shown(sample)) for sample in samples), step)

    def close(self, status: str) -> None:
        for writer in (self._whole, *self._arms.values()):
            writer.close()


class WandB:
    """A run in the project of WANDB_PROJECT; its own files in wandb/. It records the machine's figures itself."""

    def __init__(self, run: Followed) -> None:
        import wandb

        self._library = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=os.environ.get("WANDB_NAME") or run.folder.name,
            id=_known(run.folder, "wandb"),
            resume="allow",
            dir=str(run.folder),
            config={**run.settings, "arms": run.arms},
            allow_val_change=True,
            settings=wandb.Settings(console="off", silent=True, finish_timeout=PATIENCE_S),
        )
        _remember(run.folder, "wandb", self._run.id)
        offline = str(Path(self._run.dir).parent)
        self.place = offline if self._run.offline else self._run.url or offline
        for split in ("system", *OF_AN_EVALUATION):
            self._run.define_metric(f"{split}/*", step_metric="step")
        for arm in run.arms:
            self._run.define_metric(f"{arm}/*", step_metric=f"{arm}/step")

    def write(self, entry: Entry) -> None:
        values: dict[str, Any] = dict(entry.figures)
        for source, samples in entry.samples.items():
            rows = [[sample["prompt"], sample["text"]] for sample in samples]
            values[f"samples/{source}"] = self._library.Table(columns=["prompt", "text"], data=rows)
        arm = entry.arm
        of_arm = {f"{arm}/{tag}": value for tag, value in entry.figures.items()} if arm else {}
        self._run.log({"step": entry.step} | values | of_arm | ({f"{arm}/step": entry.record["step"]} if arm else {}))

    def close(self, status: str) -> None:
        self._run.summary["status"] = status
        self._run.finish(exit_code=int(status == "failed"))


MLFLOW_ENDINGS = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
MLFLOW_PARAMS = 100
"""Limit for one request."""


class MLflow:
    """A run in the experiment of MLFLOW_EXPERIMENT_NAME, at MLFLOW_TRACKING_URI."""

    def __init__(self, run: Followed) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # the user named a folder on purpose
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        place = os.environ.get("MLFLOW_TRACKING_URI")
        if not place and find_spec("sqlalchemy") is None:  # mlflow-skinny cannot open the default database
            place = Path("mlruns").absolute().as_uri()
        self._client = MlflowClient(place)
        known = _known(run.folder, "mlflow")
        if known is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._client.create_experiment(name)
            known = self._client.create_run(experiment, run_name=run.folder.name).info.run_id
            _remember(run.folder, "mlflow", known)
        self._id, self.place = known, f"run {known} at {self._client.tracking_uri}"
        before = self._client.get_run(self._id).data.params
        self._client.update_run(self._id, status="RUNNING")
        settings = {_plain(name): str(value) for name, value in flat({**run.settings, "arms": run.arms}).items()}
        new = [Param(name, value) for name, value in settings.items() if name not in before]  # existing ones are fixed
        for i in range(0, len(new), MLFLOW_PARAMS):
            self._client.log_batch(self._id, params=new[i : i + MLFLOW_PARAMS])

    def write(self, entry: Entry) -> None:
        now_ms = int(1000 * time.time())
        found = [self._metric(_plain(tag), value, now_ms, entry.step) for tag, value in entry.figures.items()]
        for tag, value in entry.figures.items() if entry.arm else ():
            found.append(self._metric(_plain(f"{entry.arm}/{tag}"), value, now_ms, entry.record["step"]))
        self._client.log_batch(self._id, metrics=found)
        for source, samples in entry.samples.items():
            file = f"samples/{re.sub(r'[^0-9A-Za-z_.-]', '_', source)}/step-{entry.step:010d}.txt"
            self._client.log_text(self._id, "\n\n".join(map(_shown, samples)), file)

    def close(self, status: str) -> None:
        self._client.set_terminated(self._id, MLFLOW_ENDINGS[status])


def _plain(name: str) -> str:
    """The text with only characters that MLflow allows in names."""
    return re.sub(r"[^\w/. :-]", "_", name)[:250]


class Table:
    """metrics.csv: a row for each record of metrics.jsonl, cut back with it when a run is resumed."""

    def __init__(self, run: Followed) -> None:
        path, sources = run.folder / "metrics.csv", run.recipe.sources
        self.place = str(path)
        heldout = [name for name, source in sources.items() if source.heldout]
        losses = [f"{split}/{of}" for split in OF_AN_EVALUATION for of in (sources if split == "train" else heldout)]
        columns = dict.fromkeys([*PLACE, *(f"train/{key}" for key in OF_A_STEP), *losses, *SYSTEM])
        before: list[dict[str, Any]] = []
        if path.exists():
            with path.open(encoding="utf-8", newline="") as file:
                before = list(csv.DictReader(file))
        records = records_of(run.folder)
        with replacing(path) as whole, whole.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            for i, record in enumerate(records):  # without the figures of the machine
                system = {name: before[i].get(name) for name in SYSTEM} if i < len(before) else {}
                writer.writerow(self._row(record) | system)
        self._file = path.open("a", encoding="utf-8", newline="")
        self._writer = csv.DictWriter(self._file, columns)

    def _row(self, record: Mapping[str, Any]) -> dict[str, Any]:
        return {name: record.get(name) for name in PLACE} | figures_of(record)

    def write(self, entry: Entry) -> None:
        self._writer.writerow(self._row(entry.record) | entry.figures)
        self._file.flush()

    def close(self, status: str) -> None:
        self._file.close()


KINDS: dict[str, Callable[[Followed], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "csv": Table,
}
assert KINDS.keys() == {*TRACKERS}


def check_installed(names: Sequence[str]) -> None:
    """RecipeError if the library of a tracker isn't installed."""
    for name in names:
        found = find_spec(name)
        if found is None or found.origin is None:  # a folder of that name, such as W&B leaves behind, isn't a package
            raise RecipeError(
                f"log.to: {name} is not installed; pip install 'spt-fast[{name}]', or leave it out of the list"
            )


def _ids(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return json.loads((folder / IDS).read_text(encoding="utf-8"))
    return {}


def _known(folder: Path, name: str) -> str | None:
    """The id of the tracker's run, if one was started. None in a copy of a run that is still in its place: both would
    write to one."""
    mine = _ids(folder)
    known, began = mine.get(name), Path(mine.get(FOLDERS, {}).get(name, folder))
    copied = known is not None and _ids(began).get(name) == known and not began.samefile(folder)
    return None if copied else known


def _remember(folder: Path, name: str, id_: str) -> None:
    known = _ids(folder)
    folders = {**known.get(FOLDERS, {}), name: str(folder.resolve())}
    write_text(folder / IDS, json.dumps({**known, name: id_, FOLDERS: folders}))


def _shown(sample: Mapping[str, str]) -> str:
    return f"{sample['prompt']} → {sample['text']}"


def _verbatim(text: str) -> str:
    """As a Markdown code block, so that nothing in it is markup."""
    return "".join(f"    {line}\n" for line in text.splitlines())


# ------------------------------------------------------------------------------------------------ all of them


class Trackers:
    """The trackers that a run's recipe names."""

    def __init__(self, run: Followed, say: Callable[[str], None]) -> None:
        """RecipeError if one can't be started; for a resumed run only a warning."""
        self._recipe, self._arms, self._system, self._feeds = run.recipe, run.arms, System(), list[_Feed]()
        for name in run.recipe.log.to:
            try:
                tracker = KINDS[name](run)
            except Exception as error:
                problem = f"log.to: {name} cannot be started ({_reason(error)})"
                if run.resumed_at is None:
                    self.close("failed")
                    raise RecipeError(f"{problem}; fix that, or leave it out of the list") from error
                say(f"warning: {problem}; training continues without it")
                continue
            self._feeds.append(_Feed(name, tracker, say))
            if not tracker.place.startswith(str(run.folder)):
                say(f"{name}: {tracker.place}")

    def write(self, record: dict[str, Any], step: int) -> None:
        """Send a record of metrics.jsonl after `step` steps of the whole run. Those of other runs' averages go to
        metrics.csv only, which has a column for the average: elsewhere they would be the run's last losses."""
        if not self._feeds:
            return
        arm = series(record["phase"], record["arm"])
        system = self._system.figures() if record["kind"] == "train" else {}
        entry = Entry(record, figures_of(record) | system, step, arm if arm in self._arms else None)
        own = is_own(record, self._recipe)
        for feed in self._feeds:
            if own or feed.name == "csv":
                feed.put(entry)

    def close(self, status: str) -> None:
        for feed in self._feeds:
            feed.put(status)
        until = time.monotonic() + PATIENCE_S + 1
        for feed in self._feeds:
            feed.wait(until)


class _Feed:
    """The thread of one tracker."""

    def __init__(self, name: str, tracker: Tracker, say: Callable[[str], None]) -> None:
        self.name, self._tracker, self._say, self._complained = name, tracker, say, False
        self._waiting: Queue[Entry | str] = Queue(MOST_WAITING)
        self._thread = Thread(target=self._feed, name=name, daemon=True)
        self._thread.start()

    def put(self, what: Entry | str) -> None:
        try:
            self._waiting.put_nowait(what)
        except Full:
            self._complain("does not keep up")

    def wait(self, until_s: float) -> None:
        self._thread.join(max(0.0, until_s - time.monotonic()))
        if self._thread.is_alive():
            self._complain("has not taken the last figures in time")

    def _feed(self) -> None:
        for what in self._arriving():
            try:
                if isinstance(what, str):
                    self._tracker.close(what)
                else:
                    self._tracker.write(what)
            except Exception as error:
                self._complain(f"failed ({_reason(error)})")

    def _arriving(self) -> Iterator[Entry | str]:
        """The entries, then how the run ended."""
        what: Entry | str | None = None
        while not isinstance(what, str):
            yield (what := self._waiting.get())

    def _complain(self, what: str) -> None:
        if not self._complained:
            self._complained = True
            self._say(f"warning: log.to: {self.name} {what}; training continues, and metrics.jsonl has every figure")


def _reason(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


# ------------------------------------------------------------------------------------------------ the machine

SYSTEM = (
    "system/cpu_cores",
    "system/memory_gb",
    "system/gpu_memory_gb",
    "system/gpu_utilization",
    "system/gpu_power_w",
)


class System:
    """The figures of the first process's machine."""

    def __init__(self) -> None:
        self._at_s, self._cpu_s = time.monotonic(), time.process_time()

    def figures(self) -> dict[str, float]:
        """Busy processor cores since the previous call, memory and, if there is one, the GPU."""
        now_s, cpu_s = time.monotonic(), time.process_time()
        found: list[Callable[[], float]] = [
            lambda: (cpu_s - self._cpu_s) / max(now_s - self._at_s, 1e-9),
            _memory_gb,
        ]
        if torch.cuda.is_available():
            found += [
                lambda: torch.cuda.max_memory_allocated() / 1e9,
                torch.cuda.utilization,
                lambda: torch.cuda.power_draw() / 1e3,
            ]
        figures = {}
        for name, figure in zip(SYSTEM, found, strict=False):
            with suppress(Exception):  # a driver without this figure
                figures[name] = float(figure())
        self._at_s, self._cpu_s = now_s, cpu_s
        return figures


def _memory_gb() -> float:
    pages = int(Path("/proc/self/statm").read_bytes().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9
