"""`import spt_fast as spt`: from text to a report by the calls that the commands make."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import pickle
import pydoc
import re
import sys
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import spt_fast as spt
from spt_fast import cli, library
from spt_fast.cli import flags
from spt_fast.config import recipe_from
from spt_fast.errors import DataError, RecipeError, SptError
from spt_fast.printing import as_json
from spt_fast.study import sweep as sweeping
from tests import tiny
from tests.study.tiny_study import HereAlone, raw_study

CALLS = (
    *("init", "prepare", "tokenizer", "plan", "train", "evaluate", "compare", "audit", "sweep", "load_study"),
    *("fit", "advise", "report", "export", "generate"),
)
CONTEXT = 16


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """The exit code of a command, and what it printed."""
    monkeypatch.setattr(sys, "argv", ["spt-fast", *map(str, words)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    captured = capsys.readouterr()
    return int(exit_.value.code or 0), captured.out + captured.err


def test_from_text_to_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {"general": "the cat sat on the mat {} and looked at the dog", "chem": "mol {} melts at {} kelvin"}
    for name, text in texts.items():
        lines = (json.dumps({"text": text.format(i, i * i)}) for i in range(300))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    ranks = tmp_path / "bpe.tiktoken"
    bpe = spt.tokenizer([tmp_path / f"{name}.jsonl" for name in texts], 270, ranks, progress=False)
    assert "tokenizer" not in capsys.readouterr().err
    assert (bpe.vocab_size, bpe.decode(bpe.encode("mol 7"))) == (270, "mol 7")
    for name in texts:
        made = spt.prepare(tmp_path / f"{name}.jsonl", tmp_path / name, bpe, heldout="20%", workers=1, progress=False)
        assert made.heldout is not None
        assert made.documents + made.heldout.documents == 300

    begun = spt.init(tmp_path / "general", str(tmp_path / "chem"), tmp_path / "begun", tokenizer=ranks, hours=0.001)
    assert (begun.recipe, begun.study) == (tmp_path / "begun" / "recipe.yaml", tmp_path / "begun" / "study.yaml")
    assert spt.load_recipe(begun.recipe).model.preset == begun.model

    raw = tiny.raw_recipe(tmp_path)
    raw["tokenizer"] = str(ranks)
    raw["phases"][0]["tokens"] = 6 * 8 * CONTEXT
    raw["phases"][1] |= {"tokens": 4 * 4 * CONTEXT, "grid": None, "anchor": 0}
    recipes = {}
    for name, mixture in (("npt", {"general": "100%"}), ("spt", {"general": "3/4", "chem": "1/4"})):
        raw["phases"][0]["mixture"] = mixture
        recipes[name] = tmp_path / f"{name}.yaml"
        recipes[name].write_text(yaml.safe_dump(raw | {"run": str(tmp_path / name)}))
    planned = spt.plan(recipes["spt"], gpus=1, gpu="H100", mfu="40%", gpu_memory="80GB", per_gpu_hour=2.5)
    assert [phase.name for phase in planned.phases] == ["pretrain", "finetune"]
    assert planned.price.cost == pytest.approx(planned.price.hours * 2.5)
    npt, run = (spt.train(spt.load_recipe(recipe), progress=False) for recipe in recipes.values())
    assert (run.status, run.reason, run.run) == ("done", None, tmp_path / "spt")
    assert run.phases["pretrain"].tokens == 6 * 8 * CONTEXT
    assert run.summary == json.loads((run.run / "summary.json").read_text())
    assert spt.train(recipes["spt"], resume=True) == run, "it is done"

    scored = spt.evaluate(run.run, tmp_path / "chem.heldout", progress=False)
    loss = scored.losses[str(tmp_path / "chem.heldout")]
    assert loss.reported == pytest.approx(run.phases["finetune"].heldout["chem"])
    with pytest.raises(SptError, match=f"^context: 0 is invalid: write 1 to {CONTEXT}"):
        spt.evaluate(run.run, tmp_path / "chem.heldout", context=0)
    with pytest.raises(SptError, match=r"^gpus: 0 is invalid"):
        spt.plan(recipes["spt"], gpus=0)
    with pytest.raises(SptError, match=r"^per_gpu_hour: -1 is invalid: write a number of at least 0"):
        spt.plan(recipes["spt"], per_gpu_hour=-1)
    assert spt.compare(npt.run) == spt.compare([npt.run])
    assert scored == spt.evaluate(run.phases["finetune"].weights, [tmp_path / "chem.heldout"], progress=False)
    compared = spt.compare([npt.run, str(run.run)], out=tmp_path / "compared")
    assert [arm.treatment.name for arm in compared.arms] == ["NPT", "SPT 25%"]
    assert json.loads((tmp_path / "compared" / "comparison.json").read_text()) == as_json(compared)
    read = spt.audit(run.run)["chem"]
    assert read.epochs == pytest.approx(sum(phase.epochs["chem"] for phase in run.phases.values()))
    visits = spt.audit(run.run, source="chem", document=0)
    assert read.min_visits <= visits.min_visits <= visits.max_visits <= read.max_visits

    raw_sweep = raw_study(tmp_path, tokenizer=str(ranks), domain_tokens="all")
    del raw_sweep["models"][0]["vocab_size"]
    raw_sweep["stages"] = raw_sweep["stages"][:1]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(raw_sweep))
    workers = HereAlone()
    monkeypatch.setattr(sweeping, "workers_of", lambda *_: workers)
    swept = spt.sweep(tmp_path / "study.yaml", progress=False)
    assert (swept.runs, swept.done, swept.failed, swept.interrupted) == (2, 2, {}, False)
    fits = spt.fit(swept.table, "chinchilla")
    assert as_json(fits) == as_json(spt.fit(swept.folder, "chinchilla", out=tmp_path / "fits"))
    advice = spt.advise(domain_tokens="30M", budget="20B", model="1b")
    assert as_json(advice) == as_json(spt.advise(domain_tokens=30_000_000, budget=20 * 10**9, model="1b"))
    assert spt.report([npt.run, run.run], tmp_path / "r.html").read_text().startswith("<!DOCTYPE html>")

    assert (spt.export(run.run, tmp_path / "hf") / "model.safetensors").exists()
    texts_drawn = spt.generate(run.run, ["mol 1", ""], 5, seed=3)
    assert [text.prompt for text in texts_drawn] == ["mol 1", ""]
    code, out = said(monkeypatch, capsys, *_words("generate", run.run), "--prompt", "mol 1", "--prompt=", "--json")
    assert (code, json.loads(out)) == (0, as_json(texts_drawn))
    results = (bpe, made, begun, planned, run, scored, compared, read, visits, swept, fits, advice, texts_drawn[0])
    assert [type(result) for result in results[1:] if not is_dataclass(result)] == []


def _words(command: str, given: object) -> list[object]:
    flags: dict[str, list[object]] = {
        "generate": ["--tokens", 5, "--seed", 3],
        "tokenizer train": ["--vocab-size", 300, "--out", "o"],
        "prepare": ["--out", "o", "--tokenizer", "gpt2"],
        "eval": ["--data", "d"],
        "export": ["--out", "o"],
        "init": ["--general", "g", "--domain", "d"],
        "advise": ["--domain-tokens", "1M", "--budget", "1B"],
    }
    return [*command.split(), *([] if command in ("advise", "init") else [given]), *flags.get(command, [])]


COMMANDS = {"tokenizer": "tokenizer train", "evaluate": "eval", "load_study": "sweep"}
"""By call, where the names differ."""


@pytest.mark.parametrize("name", [name for name in CALLS if name != "generate"])
def test_a_command_is_a_call_of_the_library(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def called(*args: Any, **kwargs: Any) -> None:
        inspect.signature(own).bind(*args, **kwargs)
        raise SptError(f"this is {name}")

    own = getattr(library, name)
    monkeypatch.setattr(library, name, called)
    monkeypatch.chdir(tmp_path)
    given = {
        "plan": tiny.write_recipe(tmp_path, tiny.raw_recipe(tmp_path)),
        "train": tmp_path / "recipe.yaml",
        "sweep": tmp_path / "study.yaml",
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(raw_study(tmp_path)))
    code, out = said(monkeypatch, capsys, *_words(COMMANDS.get(name, name), given.get(name, "x")))
    assert (code, out) == (2, f"spt-fast: this is {name}\n")


def test_errors_name_the_argument_or_its_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RecipeError, match=r"^domain_tokens: '3X' is invalid: write a positive whole number") as error:
        spt.advise(domain_tokens="3X", budget="1B")
    assert error.value.argument
    code, out = said(monkeypatch, capsys, "advise", "--domain-tokens", "3X", "--budget", "1B")
    assert (code, out) == (2, f"spt-fast: --domain-tokens{str(error.value).removeprefix('domain_tokens')}\n")
    with pytest.raises(RecipeError, match=r"^heldout: '50' is invalid: write a share between 0 and 1; did you mean"):
        spt.prepare("x", tmp_path / "y", "gpt2", heldout="50")
    for call in (spt.train, spt.plan, spt.run):
        with pytest.raises(RecipeError, match=r"^recipe: is of type int; give the path of its file, or what `spt.load"):
            call(7)  # type: ignore[operator]
    with pytest.raises(RecipeError, match=r"^jobs: 0 is invalid: write a whole number, at least 1"):
        spt.sweep("spt", jobs=0)
    with pytest.raises(RecipeError, match=r"^tokens: -1 is invalid: write a whole number"):
        spt.generate("x", tokens=-1)
    with pytest.raises(RecipeError, match=r"^hours: inf is invalid: write a number above 0"):
        spt.init("a.jsonl", "b.jsonl", tmp_path / "begun", hours=math.inf)
    with pytest.raises(RecipeError, match=r"^data: missing; give `data=PREFIX`, `tasks=TASK`"):
        spt.evaluate("x")
    assert "missing; give --data PREFIX, --tasks TASK or both" in said(monkeypatch, capsys, "eval", "x")[1]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: spt.tokenizer("x", "4K", "t"), "vocab_size: '4K' is invalid: write a whole number"),
        (lambda: spt.prepare("x", "y", "gpt2", workers="two"), "workers: 'two' is invalid: write a whole number"),
        (lambda: spt.tokenizer("x", -1, "t"), "vocab_size: -1 is invalid: at least 257"),
        (lambda: spt.prepare("x", "y", "gpt2", workers=-1), "workers: -1 is invalid: at least 1; leave it out"),
        (lambda: spt.evaluate("x", tasks="none.jsonl", limit=-1), "limit: -1 is invalid: write a whole number of at l"),
        (lambda: spt.init("g", "d", "o", hours="an hour"), "hours: 'an hour' is invalid: write a number above 0"),
        (
            lambda: spt.plan(recipe_from(tiny.raw_recipe(Path())), gpu_memory=80),
            "gpu_memory: 80 is invalid: write a size",
        ),
        (lambda: spt.run("none.yaml"), "none.yaml: "),
        (lambda: spt.evaluate("x", "d", context="long"), "context: 'long' is invalid: write a whole number"),
        (lambda: spt.evaluate("x", tasks="none.jsonl"), "none.jsonl: doesn't exist"),
        (
            lambda: spt.evaluate("x", tasks=[Path("none.jsonl")], limit=2.5),
            "limit: 2.5 is invalid: write a whole number",
        ),
        (
            lambda: spt.load_study("dcpt", general="g", domain="d", out="o", init="nobase"),
            "init: nobase: is not a folder",
        ),
        (
            lambda: spt.load_study("spt", "seeds", general="g", domain="d", out="o", tokenizer="t"),
            "overrides: 'seeds' is",
        ),
        (lambda: spt.prepare("x", "y", "gpt2", eos=50256), "eos: 50256 is invalid: give its name, as text"),
        (lambda: spt.plan(recipe_from(tiny.raw_recipe(Path())), gpu=100), "gpu: 100 is invalid: give its name"),
        (lambda: spt.evaluate("x", tasks="none.jsonl", bos=1), "bos: 1 is invalid: give its name, as text"),
        (lambda: spt.audit("x", source=["chem"]), "source: ['chem'] is invalid: give its name, as text"),
        (lambda: spt.fit("x", ["overfitting"]), "law: ['overfitting'] is invalid: give its name, as text"),
        (lambda: spt.fit("x", domain_source=1), "domain_source: 1 is invalid: give its name, as text"),
        (lambda: spt.report("x", general_source={}), "general_source: {} is invalid: give its name, as text"),
        (lambda: spt.advise(domain_tokens=1, budget=1, model=["1b"]), "model: ['1b'] is invalid: give a preset"),
        (lambda: spt.generate("x", temperature="hot"), "temperature: 'hot' is invalid: write a number"),
        (lambda: spt.generate("x", None), "prompts: None is invalid: give a text, or a list of texts"),
        (lambda: spt.generate("x", ["a", 5]), "prompts: ['a', 5] is invalid: give a text, or a list of texts"),
        (lambda: spt.generate("x", b"a"), "prompts: b'a' is invalid: give a text, or a list of texts"),
        (lambda: spt.generate("x", top_k=2.5), "top_k: 2.5 is invalid: write a whole number"),
    ],
)
def test_values_of_another_type_are_refused_with_the_argument(call: Callable[[], object], says: str) -> None:
    with pytest.raises(SptError, match=f"^{re.escape(says)}"):
        call()


def test_every_path_of_the_library_is_expanded_as_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    (tmp_path / "here").mkdir()
    home.mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NOTHING", "")
    (home / "text.txt").write_text("the cat sat on the mat\n" * 20)
    bpe = spt.tokenizer("~/text.txt", 260, "~/data/bpe.tiktoken", progress=False)
    spt.prepare([Path("~/text.txt")], Path("~/data/text"), "~/data/bpe.tiktoken", workers=1, progress=False)
    assert spt.TokenDataset.open("~/data/text").num_tokens == spt.TokenDataset.open(["$HOME/data/text"]).num_tokens > 0
    bpe.save("~/data/again.tiktoken")
    assert spt.Tokenizer.load("~/data/again.tiktoken").digest == bpe.digest
    model = spt.GPT(spt.GPTConfig(1, 16, 2, 1, 16, 16, 64))
    model.save_hf("~/models/small")
    assert spt.GPT.from_hf(Path("~/models/small")).config == model.config
    assert spt.export("~/models/small", "~/models/again") == home / "models" / "again"
    (home / "r.yaml").write_text(yaml.safe_dump(tiny.raw_recipe(Path("~"), "run")))
    assert spt.load_recipe("~/r.yaml").run == str(home / "run")
    assert not list((tmp_path / "here").iterdir())

    for empty in ("", "$NOTHING"):
        with pytest.raises(SptError, match=rf"out: '{re.escape(empty)}' is invalid: the path is empty; name a file"):
            spt.export("~/models/small", empty)
    with pytest.raises(SptError, match=r"folder: '~nobody-has-it/x' is invalid: this machine has no such user"):
        model.save_hf("~nobody-has-it/x")
    for read in (spt.load_recipe, spt.load_study):
        with pytest.raises(RecipeError, match="'' is invalid: the path is empty"):
            read("")
    for opened in (spt.Tokenizer.load, spt.TokenDataset.open, lambda path: spt.TokenDataset.open([path]), bpe.save):
        with pytest.raises(DataError, match="this machine has no such user"):
            opened("~nobody-has-it/x")
    with pytest.raises(SptError, match="weights: None is invalid: give a path"):
        spt.export(None, "x")  # type: ignore[arg-type]
    with pytest.raises(typer.BadParameter, match="this machine has no such user"):
        flags.path("~nobody-has-it/x")
    literal = str(tmp_path / "here" / "~" / "x")
    assert str(flags.path("./~/x")) == str(spt.export("~/models/small", flags.path("./~/x"))) == literal
    assert recipe_from(tiny.raw_recipe(tmp_path) | {"run": "./~/x"}).run == literal
    assert recipe_from(tiny.raw_recipe(tmp_path) | {"run": "./x"}).run == "./x"


def test_a_file_named_as_a_ready_study_is_read_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("spt").write_text("phases: []")
    with pytest.raises(RecipeError, match="is a recipe, not a study"):
        spt.load_study("./spt")
    with pytest.raises(RecipeError, match="a ready study needs your data"):
        spt.load_study(Path("spt"))


def test_every_call_is_documented_with_all_its_arguments() -> None:
    for name in CALLS:
        call = getattr(library, name)
        assert ">>>" in call.__doc__ or name == "load_study", name
        unnamed = [argument for argument in inspect.signature(call).parameters if argument not in call.__doc__]
        assert unnamed == [], f"{name}: {unnamed}"
        assert inspect.signature(getattr(spt, name)) == inspect.signature(call)
        assert name in spt.__all__
        assert name in dir(spt)
    assert sys.modules["spt_fast.train"] is spt.train, "the package as well"
    for room in ("kernels", "laws"):
        assert spt.__getattr__(room) is importlib.import_module(f"spt_fast.{room}")
        assert room in spt.__all__


@pytest.mark.parametrize("name", ["train", "report"])
def test_a_call_that_is_also_a_package_shows_its_own_help_and_goes_to_another_process(name: str) -> None:
    call = getattr(library, name)
    shown = pydoc.plain(pydoc.render_doc(getattr(spt, name)))
    assert f"{name}{inspect.signature(call)}" in shown
    assert all(line.strip() in shown for line in call.__doc__.splitlines())
    assert pickle.loads(pickle.dumps(getattr(spt, name))) is getattr(spt, name)
