"""A study's YAML: its tree of runs, and the errors for an invalid one."""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from spt_fast.errors import RecipeError, SptWarning
from spt_fast.model.gpt import GPTConfig
from spt_fast.study import tree
from spt_fast.study.load import load_study, ready_studies
from spt_fast.study.study import study_from
from spt_fast.study.tree import PlannedRun, expand, naming_stage
from tests.study.tiny_study import STEP, raw_study


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    return raw_study(tmp_path)


def changed(raw: dict[str, Any], stage: int = 0, **changes: Any) -> dict[str, Any]:
    """The study with other keys in one of its stages; None removes a key."""
    raw = copy.deepcopy(raw)
    raw["stages"][stage] |= changes
    raw["stages"][stage] = {key: value for key, value in raw["stages"][stage].items() if value is not None}
    return raw


def runs_of(raw: dict[str, Any]) -> list[PlannedRun]:
    return expand(study_from(raw))


def test_finetunes_start_from_every_budget_of_one_pretraining_run(raw: dict[str, Any]) -> None:
    runs = {run.name: run for run in runs_of(raw)}
    assert Counter(run.stage for run in runs.values()) == {0: 2, 1: 4}
    pretrain = next(run for run in runs.values() if run.stage == 0 and "chem" in run.recipe.phases[0].mixture)
    first, second = pretrain.recipe.phases
    assert (first.tokens, second.tokens) == (10 * STEP, 10 * STEP)
    assert first.schedule.horizon == 2000 * STEP
    assert first.schedule.warmup.amount == 2 * STEP  # a tenth of the whole run, not of its first phase
    assert first.evaluation.every.amount == second.evaluation.every.amount == 5 * STEP
    assert second.schedule.carry_on
    assert second.optimizer_state == "keep"
    tunes = [run for run in runs.values() if run.after == pretrain.name]
    assert {run.recipe.init for run in tunes} == {
        f"{pretrain.recipe.run}/weights/{phase.name}" for phase in pretrain.recipe.phases
    }
    assert all(run.recipe.phases[0].mixture == {"chem": 1} for run in tunes)


def test_every_run_comes_after_the_one_that_it_starts_from(raw: dict[str, Any]) -> None:
    names = [run.name for run in runs_of(raw | {"seeds": 2, "domain_tokens": [300, 400]})]
    assert len(set(names)) == len(names)
    for run in runs_of(raw | {"seeds": 2, "domain_tokens": [300, 400]}):
        assert run.after is None or names.index(run.after) < names.index(run.name)


def test_pretraining_without_the_domain_is_shared_by_all_corpus_sizes(raw: dict[str, Any]) -> None:
    runs = runs_of(raw | {"domain_tokens": [300, 400]})
    pretraining = [run for run in runs if run.stage == 0]
    assert sorted(str(run.recipe.sources["chem"].limit_tokens) for run in pretraining) == ["300", "400", "None"]
    assert sum(run.stage == 1 for run in runs) == 2 * 2 * 2


def test_a_larger_grid_keeps_the_names_of_existing_runs(raw: dict[str, Any]) -> None:
    before = {run.name: run.recipe for run in runs_of(raw)}
    more = changed(raw, delta=[0, "1/4", "1/2"]) | {"seeds": [0, 7], "domain_tokens": [400, 500]}
    after = {run.name: run.recipe for run in runs_of(changed(more, 1, replay=[0, "1/10"], anchor=[0, 0.1]))}
    assert {name: after.get(name) for name in before} == before


def test_runs_are_named_after_their_settings(raw: dict[str, Any]) -> None:
    assert [run.name for run in runs_of(changed(raw, delta="1/4", budgets=[10 * STEP]))] == [
        "1x32_pretrain-d0.25-u400-1.28K_s0",
        "1x32_pretrain-d0.25-u400-1.28K_finetune-d1-u400-512_s0",
    ]
    models = [{"preset": "1m"}, {"preset": "1m", "context": 128}, {"preset": "3m"}]
    names = {run.name.split("_")[0] for run in runs_of(raw | {"models": models})}
    assert names == {"1m", "preset1m-context128", "3m"}


def test_nearly_equal_lengths_and_rates_are_separate_runs(raw: dict[str, Any]) -> None:
    lengths = [1_234_567_000, 1_234_568_000]
    raw = changed(raw, budgets=None, delta=0, tokens=lengths, lr=[0.12345678, 0.12345679], schedule=None)
    pretraining = [run for run in runs_of(raw) if run.stage == 0]
    assert {(run.recipe.phases[0].tokens, run.recipe.phases[0].optimizer.lr) for run in pretraining} == {
        (tokens, lr) for tokens in lengths for lr in (0.12345678, 0.12345679)
    }


def test_a_model_that_is_added_later_keeps_the_names_of_the_others(raw: dict[str, Any]) -> None:
    small = raw["models"][0]
    before = [run.name for run in runs_of(raw)]
    after = [run.name for run in runs_of(raw | {"models": [small, small | {"heads": 4}]})]
    assert set(before) < set(after)
    assert len(after) == 2 * len(before)


def test_every_combination_of_the_axes_is_a_run(raw: dict[str, Any]) -> None:
    raw = changed(raw, budgets=None, tokens=[10 * STEP, 20 * STEP], lr=[1e-3, 3e-3], optimizer=None)
    raw = changed(raw, 1, replay=[0, "1%"], anchor=[0, 0.1], grid=None)
    runs = runs_of(raw | {"seeds": 3})
    pretraining = [run for run in runs if run.stage == 0]
    assert len(pretraining) == 2 * 2 * 2 * 3
    assert {run.recipe.phases[0].optimizer.lr for run in pretraining} == {1e-3, 3e-3}
    tunes = [run for run in runs if run.stage == 1]
    assert len(tunes) == len(pretraining) * 2 * 2
    assert {(run.recipe.phases[0].mixture["chem"], run.recipe.phases[0].anchor) for run in tunes} == {
        (share, anchor) for share in (1, Fraction(99, 100)) for anchor in (0.0, 0.1)
    }


def test_averages_are_an_axis_only_of_stages_with_one_phase(raw: dict[str, Any]) -> None:
    tunes = [run for run in runs_of(changed(raw, 1, average=[0, "10%"])) if run.stage == 1]
    assert {run.name.split("_")[2] for run in tunes} == {"finetune-d1-u400-512", "finetune-d1-u400-512-average0.1"}
    assert {("average" in run.name, run.recipe.phases[0].average) for run in tunes} == {
        (False, 0),
        (True, Fraction(1, 10)),
    }
    for axes in ({"tokens": None, "budgets": [200, 400]}, {"domain_from": [0, "50%"]}):
        with pytest.raises(RecipeError, match=r"stages\[finetune\].average: this stage has several phases"):
            runs_of(changed(raw, 1, average=[0, "10%"], stop=None, grid=None, **axes))


def test_scpt_has_one_schedule_and_mixes_the_domain_in_late(raw: dict[str, Any]) -> None:
    raw = changed(raw, budgets=None, tokens=20 * STEP, delta=[0, "1/4"], domain_from=[0, "90%"])
    recipes = [run.recipe for run in runs_of(raw) if run.stage == 0]
    assert len(recipes) == 3  # without the domain, both values of domain_from are one run
    late = next(recipe for recipe in recipes if len(recipe.phases) == 2)
    general, domain = late.phases
    assert (general.tokens, domain.tokens) == (18 * STEP, 2 * STEP)
    assert general.mixture == {"general": 1}
    assert domain.mixture == {"general": Fraction(3, 4), "chem": Fraction(1, 4)}
    assert domain.schedule.carry_on


def test_without_the_domain_all_values_of_domain_from_share_one_run(raw: dict[str, Any]) -> None:
    raw = changed(raw, budgets=None, tokens=20 * STEP, delta=[0, "1/4"], domain_from=["50%", "90%"])
    runs = runs_of(raw)
    shares = [float(run.recipe.phases[-1].mixture.get("chem", 0)) for run in runs if run.stage == 0]
    assert shares == [0, 0.25, 0.25]
    assert sum(run.stage == 1 for run in runs) == 3


def test_a_base_sets_the_shape_in_every_stage(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Checking a stage needs no weights that an earlier stage has not trained yet."""
    monkeypatch.setattr(tree, "read_config", lambda path: {"foreign": GPTConfig.preset("1m")}[str(path)])
    raw = changed(raw | {"init": "foreign", "models": None}, budgets=None, tokens=1000)
    raw = changed(raw, 1, tokens=None, budgets=[50_000, 100_000], stop=None, grid=None)
    assert [run.recipe.init for run in runs_of(raw) if run.stage == 0] == ["foreign", "foreign"]
    with pytest.raises(RecipeError, match=r"stages\[finetune\]\.start: scratch needs a shape"):
        runs_of(changed(raw, 1, start="scratch"))


def test_scratch_arms_are_shared_and_start_from_random_weights(raw: dict[str, Any]) -> None:
    runs = runs_of(changed(raw, 1, start=["pretrained", "scratch"]))
    scratch = [run for run in runs if "scratch" in run.name]
    assert len(scratch) == 1
    assert scratch[0].after is None
    assert scratch[0].recipe.init is None
    assert scratch[0].recipe.model == next(run for run in runs if run.stage == 0).recipe.model


def test_embeddings_alone_are_copied_and_frozen_if_asked(raw: dict[str, Any]) -> None:
    raw = changed(raw, 1, start=["embeddings", "frozen embeddings"], untie=True)
    tunes = [run for run in runs_of(raw) if run.stage == 1]
    assert {(run.recipe.init_only, run.recipe.phases[0].freeze) for run in tunes} == {
        ("embeddings", "none"),
        ("embeddings", "embeddings"),
    }
    assert all(run.after and run.recipe.init for run in tunes)


def test_every_ready_study_is_valid() -> None:
    given = {"general": "data/general", "domain": "data/chem", "tokenizer": "data/bpe.tiktoken", "out": "studies/chem"}
    for name in ready_studies():
        runs = expand(load_study(name, given=given))
        assert all(run.recipe.sources["domain"].heldout == "data/chem.heldout" for run in runs)
    assert ready_studies() == ["dcpt", "forgetting", "scratch-vs-pretrained", "spt"]
    with pytest.raises(RecipeError, match="spt: a ready study needs your data; give `tokenizer=…`, `out=…`"):
        load_study("spt", given=given | {"tokenizer": None, "out": None})


def test_simulated_epoching_repeats_the_domain_as_often_as_the_large_run(raw: dict[str, Any]) -> None:
    del raw["domain_tokens"]
    simulate = {"budget": "2560M", "domain_tokens": "30M"}  # a million times the largest budget here
    run = next(run for run in runs_of(raw | {"simulate": simulate}) if "chem" in run.recipe.phases[0].mixture)
    assert run.recipe.sources["chem"].limit_tokens == 30
    assert 20 * STEP / 30 == 2560e6 / 30e6


def test_a_warning_names_the_stage(raw: dict[str, Any]) -> None:
    with (
        pytest.warns(SptWarning, match=r"^stages\[finetune\]\.eval: much, as stages\[finetune\]\.tokens is little$"),
        naming_stage(study_from(raw).stages[1]),
    ):
        warnings.warn("phases[finetune].eval: much, as phases[finetune].tokens is little", SptWarning, stacklevel=1)


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        (0, {"name": "pre train"}, r"stages\[pre train\]\.name: .pre train. is invalid: use letters, digits, dots"),
        (0, {"delta": [2]}, r"stages\[pretrain\]\.delta: 2 is invalid: write a share between 0 and 1; did you mean 2%"),
        (0, {"delta": [0, "1%", "1%"]}, r"stages\[pretrain\]\.delta\[2\]: '1%' is there twice"),
        (0, {"delta": []}, r"stages\[pretrain\]\.delta: is an empty list"),
        (0, {"replay": [0]}, r"stages\[pretrain\]: both are given, delta and replay"),
        (0, {"budgets": None}, r"stages\[pretrain\]: neither is given, tokens and budgets"),
        (0, {"budgets": None, "budget": ["1K"]}, r"stages\[pretrain\]\.budget: unknown key; did you mean 'budgets'"),
        (0, {"domain_form": [0]}, r"stages\[pretrain\]\.domain_form: unknown key; did you mean 'domain_from'"),
        (0, {"delta": None, "mixture": {"chem": 1}}, r"stages\[pretrain\]\.mixture: .* write delta or replay"),
        (1, {"also_average": []}, r"stages\[finetune\]\.also_average: .* write average, such as"),
        (0, {"shedule": {}}, r"stages\[pretrain\]\.shedule: unknown key; did you mean 'schedule'"),
        (0, {"start": "scratch"}, r"stages\[pretrain\]\.start: the first stage has no earlier weights"),
        (0, {"stop": {"on": "chem"}}, r"stages\[pretrain\]\.stop: the phases of this stage share one schedule"),
        (0, {"optimizer": None}, r"stages\[pretrain\]\.lr: missing"),
        (0, {"optimizer": 3e-3}, r"stages\[pretrain\]\.optimizer: 0\.003 is invalid: write a section"),
        (0, {"budgets": None, "tokens": 900, "domain_from": "100%"}, r"stages\[pretrain\]\.domain_from: after 100%"),
        (1, {"lr": [1e-3, 2e-3]}, r"stages\[finetune\]\.grid\.lr: lr is an axis too"),
        (1, {"start": "scratsh"}, r"stages\[finetune\]\.start: 'scratsh' is invalid: .*did you mean 'scratch'"),
        (1, {"name": "pretrain"}, r"stages: pretrain, pretrain: two have the same name"),
        (
            0,
            {"schedule": {"name": "cosine"}},
            r"stages\[pretrain\]\.budgets: at 1,280 tokens the learning rate is \d\d% of its peak, .*horizon",
        ),
        (
            0,
            {"schedule": {"name": "wsd", "decay": "20%"}},
            r"stages\[pretrain\]\.budgets: at 2,560 tokens the learning rate is 10% of its peak",
        ),
        (1, {"schedule": {"warmup": "900 steps"}}, r"^stages\[finetune\]\.schedule\.warmup: '900 steps' is invalid"),
        (0, {"schedule": {"warmup": "900 steps"}}, r"^stages\[pretrain\]\.schedule\.warmup: '900 steps' is invalid"),
        (1, {"batch": {"context": 4096}}, r"^stages\[finetune\]\.batch\.context: 4096 is invalid"),
        (1, {"batch": {"sequences": 4, "micro": 3}}, r"^stages\[finetune\]\.batch\.micro: 3 is invalid"),
        (1, {"stop": {"on": "no"}}, r"^stages\[finetune\]\.stop\.on: 'no' is invalid"),
    ],
)
def test_an_invalid_stage_is_refused(raw: dict[str, Any], stage: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        runs_of(changed(raw, stage, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domain": "chemistry"}, "domain: 'chemistry' is invalid: name a source; did you mean 'chem'"),
        ({"general": "chem"}, "general: 'chem' is the domain too"),
        ({"models": []}, "models: is an empty list"),
        ({"models": {"preset": "11m"}}, r"models\.preset: '11m' is invalid: write one of 1m, 3m"),
        ({"seeds": 2026}, r"seeds: 2026 is invalid: at most 1000 seeds; write \[2026\]"),
        ({"sources": {"general": "data/general", "chem": {}}}, r"sources\.general: 'data/general' is invalid"),
        ({"checkpoint": "500 steps"}, "checkpoint: '500 steps' is invalid"),
        ({"init": "weights"}, "models: both are given, models and init"),
        ({"models": None}, "models: neither is given, models and init; give exactly one of them"),
        ({"seeds": [1, 1]}, r"seeds\[1\]: 1 is there twice"),
        ({"simulate": {"budget": "1B", "domain_tokens": "1M"}}, "simulate: domain_tokens is given too"),
        ({"stage": []}, "stage: unknown key; did you mean 'stages'"),
        ({"stages": {}}, "stages: {} is invalid: write a list"),
    ],
)
def test_an_invalid_study_is_refused(raw: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        runs_of(raw | changes)


def test_any_wrong_value_is_a_recipe_error(raw: dict[str, Any]) -> None:
    """Every key of a study with values of every kind is either accepted or refused with a message."""
    raw = changed(raw | {"checkpoint": {"keep": 2}, "engine": {"name": "local"}}, lr=[1e-3], start="pretrained")
    raw = changed(raw, 1, budgets=[200, 400], tokens=None, stop=None, grid=None, anchor=[0, 1])
    values = [None, 0, -1, 1.5, math.nan, True, "", "x", "1%", "all", [], [None], [{}], {}, {"a": 1}, 10**30, [1, 2]]
    assert runs_of(raw)
    refused = 0
    for path in _paths(raw):
        for value in values:
            mutated = copy.deepcopy(raw)
            place = mutated
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
            try:
                runs_of(mutated)
            except RecipeError:
                refused += 1
    assert refused > 800


def _paths(node: Any) -> list[tuple[Any, ...]]:
    """The paths to all values of nested data."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path for key, item in items for path in [(key,), *((key, *below) for below in _paths(item))]]


def test_the_home_folder_in_paths_of_a_study_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    sources = {name: {"train": f"~/{name}", "heldout": f"~/{name}.heldout"} for name in ("web", "chem")}
    stage = {"name": "pretrain", "delta": [0], "tokens": ["1M"], "optimizer": {"lr": 1e-3}}
    raw = {"study": "~/study", "models": [{"preset": "1m"}], "general": "web", "domain": "chem", "stages": [stage]}
    study = study_from(raw | {"sources": sources, "tokenizer": "~/t"})
    recipe = expand(study)[0].recipe
    assert study.folder == Path("/home/me/study")
    assert recipe.run.startswith("/home/me/study/runs/")
    assert (recipe.tokenizer, recipe.sources["web"].train) == ("/home/me/t", "/home/me/web")
