"""Running recipes in parallel: progress, devices, and failures."""

from __future__ import annotations

import io
import json
import re
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from spt_fast.config import load_recipe
from spt_fast.errors import RecipeError
from spt_fast.study import jobs
from spt_fast.study.jobs import Job, Local, progress_of, train_all, train_side_by_side, visible_gpus
from tests.study.fake_runs import fake_run

PATH = [(6.0, 5.0), (5.0, 6.0), (4.0, 7.0)]  # a finetune of two steps of 1000 tokens


def test_progress_counts_tokens_over_phases_and_grid_arms(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", [PATH, PATH], tokens=6000)
    recipe = load_recipe(run / "recipe.yaml")
    assert progress_of(recipe) == (1.0, "done")
    (run / "summary.json").unlink()

    def after(**record: object) -> float:
        with (run / "metrics.jsonl").open("a") as metrics:
            metrics.write(json.dumps(record) + "\n" + '{"half of a lin')
        share = progress_of(recipe)[0]
        (run / "metrics.jsonl").write_text("")
        return share

    assert after(phase="pretrain", arm=0, step=1, tokens=3000) == 0.3
    assert after(phase="finetune", arm=0, step=0, tokens=0) == 0.6
    assert after(phase="finetune", arm=1, step=1, tokens=1000) == 0.9
    assert after(phase="a recipe's before it was edited", arm=0, step=1, tokens=3000) == 0.0
    assert after(arm=0, step=1, tokens=3000) == 0.0
    assert after(phase="pretrain", arm="0", step=1, tokens=3000) == 0.0
    assert progress_of(recipe) == (0.0, "")  # an empty file
    (run / "metrics.jsonl").unlink()
    assert progress_of(recipe) == (0.0, "")


def test_finished_runs_are_not_started_and_edited_recipes_are_refused(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", PATH)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((run / "recipe.yaml").read_text())
    assert train_side_by_side([recipe], tmp_path / "logs", Console(file=io.StringIO()))
    assert list((tmp_path / "logs").iterdir()) == []
    recipe.write_text(recipe.read_text().replace("seed: 0", "seed: 1").replace("lr:", "weight_decay: 0.2\n    lr:"))
    recipe.write_text(re.sub(r"tokens: \d+", "tokens: 5000", recipe.read_text()))
    with pytest.raises(RecipeError, match=r"was started with another recipe(.|\n)*seed: 0 → 1"):
        train_side_by_side([recipe], tmp_path / "logs", Console(file=io.StringIO()))


def test_a_recipe_that_fails_is_named_with_the_end_of_its_output(tmp_path: Path) -> None:
    run, recipe = fake_run(tmp_path / "run", PATH), tmp_path / "recipe.yaml"
    text = (run / "recipe.yaml").read_text().replace("data/code", str(tmp_path / "nowhere"))
    recipe.write_text(text.replace(str(run), str(tmp_path / "other")))
    with pytest.raises(RecipeError, match=r"recipe\.yaml: failed with exit code 2(.|\n)*nowhere|bpe\.tiktoken"):
        train_side_by_side([recipe], tmp_path / "logs", Console(file=io.StringIO()))
    assert (tmp_path / "logs" / "recipe.log").stat().st_size > 0


@pytest.mark.parametrize("cores", [1, 2, 8])
def test_cores_are_divided_evenly_among_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    """Each stand-in for a training process records its threads and the number of others that are running."""
    script = tmp_path / "python"
    script.write_text(
        f"#!{sys.executable}\n"
        "import os, pathlib, sys, time\n"
        f"here = pathlib.Path({str(tmp_path)!r}, 'ran', pathlib.Path(sys.argv[3]).parent.name)\n"
        "here.parent.mkdir(exist_ok=True)\n"
        "here.write_text('')\n"
        "time.sleep(0.5)\n"
        "others = sum(not f.read_text() for f in here.parent.iterdir())\n"
        "here.write_text(os.environ['OMP_NUM_THREADS'] + ' ' + str(others))\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(jobs.sys, "executable", str(script))
    monkeypatch.setattr(jobs.os, "sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS")
    recipes = [fake_run(tmp_path / f"run{i}", PATH) / "recipe.yaml" for i in range(3)]
    for recipe in recipes:
        (recipe.parent / "summary.json").unlink()
    assert train_side_by_side(recipes, tmp_path / "logs", Console(file=io.StringIO()))
    notes = [note.read_text().split() for note in (tmp_path / "ran").iterdir()]
    assert len(notes) == 3
    assert {threads for threads, _ in notes} == {str(cores // min(cores, 3))}
    assert max(int(others) for _, others in notes) <= min(cores, 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert train_side_by_side(recipes[:1], tmp_path / "logs", Console(file=io.StringIO()))
    assert any(note.read_text()[0] == "5" for note in (tmp_path / "ran").iterdir()), "the user's own number holds"


@pytest.mark.parametrize(
    ("named", "count", "gpus"),
    [
        (None, 2, ["0", "1"]),
        ("3, 5", 2, ["3", "5"]),
        ("GPU-8f2a,GPU-91cc", 2, ["GPU-8f2a", "GPU-91cc"]),
        ("2,-1,3", 1, ["2"]),
        ("0,", 1, ["0"]),
        ("", 0, []),
        ("-1", 0, []),
    ],
)
def test_visible_gpus_are_those_that_cuda_uses(
    monkeypatch: pytest.MonkeyPatch, named: str | None, count: int, gpus: list[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    monkeypatch.setattr(jobs.torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(jobs.torch.cuda, "device_count", lambda: count)
    assert visible_gpus() == gpus


def test_every_gpu_has_one_run_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is used again only after its run has ended."""
    code = "import os, sys, time; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(float(sys.argv[1]))"
    monkeypatch.setattr(jobs, "command", lambda recipe: [sys.executable, "-c", code, recipe.stem])
    monkeypatch.setattr(jobs, "visible_gpus", lambda: ["GPU-a", "GPU-b"])
    workers = Local(5)
    running = [workers.start(Path(name), tmp_path / str(i)) for i, name in enumerate(["0", "600"])]
    assert workers.jobs == 2
    running[0].wait()
    assert workers.free == 1
    running.append(workers.start(Path("0"), tmp_path / "2"))
    running[2].wait()
    while not (tmp_path / "1").read_text() and running[1].poll() is None:
        time.sleep(0.01)
    running[1].terminate()
    running[1].wait()
    assert [(tmp_path / str(i)).read_text().strip() for i in (0, 2)] == ["GPU-a", "GPU-a"]
    assert (tmp_path / "1").read_text().strip() == "GPU-b"


def test_a_run_of_a_sweep_in_a_launcher_is_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it waits for the launcher's other processes, which run no sweep."""
    launched = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {**launched, "SLURM_STEP_NUM_TASKS": "2"}.items():
        monkeypatch.setenv(name, value)
    code = "from spt_fast.train.world import join_world; print(join_world(process_group=False).size)"
    monkeypatch.setattr(jobs, "command", lambda recipe: [sys.executable, "-c", code])
    process = Local(1).start(Path("recipe.yaml"), tmp_path / "log")
    until = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.terminate()
    process.wait()
    assert (tmp_path / "log").read_text().strip() == "1"


def test_running_processes_are_asked_to_save_all_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stand-in, asked to stop, waits until the other has been asked too."""
    code = (
        "import pathlib, signal, sys, time\n"
        "mine = pathlib.Path(sys.argv[1])\n"
        "signal.signal(signal.SIGTERM, lambda *_: mine.with_suffix('.asked').touch())\n"
        "if mine.stem == 'recipe0':\n"
        "    while len(list(mine.parent.glob('*.ready'))) < 2: time.sleep(0.02)\n"
        "    sys.exit(1)\n"
        "mine.with_suffix('.ready').touch()\n"
        "until = time.monotonic() + 300\n"
        "while len(list(mine.parent.glob('*.asked'))) < 2 and time.monotonic() < until: time.sleep(0.02)\n"
        "if time.monotonic() < until: mine.with_suffix('.saved').touch()\n"
    )
    monkeypatch.setattr(jobs, "command", lambda recipe: [sys.executable, "-c", code, str(recipe)])
    listed = []
    for i in range(3):
        run = fake_run(tmp_path / f"run{i}", PATH)
        (run / "summary.json").unlink()
        listed.append(Job((run / "recipe.yaml").rename(tmp_path / f"recipe{i}.yaml")))
    workers = Local(3, jobs=3)
    with pytest.raises(RuntimeError, match="recipe0"):
        train_all(listed, tmp_path / "logs", Console(file=io.StringIO()), workers, keep_going=False)
    assert sorted(path.stem for path in tmp_path.glob("*.saved")) == ["recipe1", "recipe2"]
