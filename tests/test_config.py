"""The recipe: units, exact shares, inheritance, round trip, and one clear message for each mistake."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from spt_fast.config import Model, load_recipe, recipe_from
from spt_fast.data.formats import ID_DTYPES
from spt_fast.data.text import find_files
from spt_fast.errors import RecipeError, SptError, shown
from spt_fast.fields import Span, apply_overrides, number, parse_count, parse_share, parse_yaml, setting, text
from spt_fast.model.config import GPTConfig
from spt_fast.optimizers import OPTIMIZERS
from spt_fast.optimizers.adamw import AdamW
from spt_fast.study.load import load_study


def raw_recipe(**changes: Any) -> dict[str, Any]:
    raw = {
        "run": "runs/x",
        "model": {"preset": "1m"},
        "tokenizer": "bpe.tiktoken",
        "sources": {
            "general": {"train": "data/general", "heldout": "data/general.heldout"},
            "chem": {"train": "data/chem", "heldout": "data/chem.heldout", "limit_tokens": "300K"},
        },
        "phases": [
            {
                "name": "pretrain",
                "tokens": "20M",
                "mixture": {"general": "98%", "chem": "2%"},
                "batch": {"sequences": 32, "micro": 8},
                "optimizer": {"lr": "1e-3"},
                "schedule": {"name": "cosine", "warmup": "2%", "horizon": "200M"},
                "eval": {"every": "2M", "tokens": "100K"},
            },
            {
                "name": "finetune",
                "tokens": "2M",
                "mixture": {"chem": "100%"},
                "untie": True,
                "optimizer": {"lr": 1e-4, "weight_decay": 1e-7},
                "schedule": {"name": "constant", "warmup": "50 steps"},
                "stop": {"on": "chem", "patience": 3},
                "grid": {"lr": ["1e-5", 4e-5], "warmup": ["50 steps", "2%"]},
            },
        ],
    }
    return raw | changes


@pytest.mark.parametrize(
    ("text", "count"),
    [("300", 300), (300, 300), ("300K", 300_000), ("1.5B", 1_500_000_000), ("2e6", 2_000_000), ("1T", 10**12)],
)
def test_counts_take_units(text: object, count: int) -> None:
    assert parse_count(text, "tokens") == count


@pytest.mark.parametrize(
    "bad", ["", "0", "-1", "1.0005K", "12Q", None, True, "nan", [1], "1e400", "1e999999999", "9" * 5000]
)
def test_counts_must_be_positive_whole_numbers(bad: object) -> None:
    with pytest.raises(RecipeError, match=r"phases\[x\]\.tokens"):
        parse_count(bad, "phases[x].tokens")


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("2%", Fraction(1, 50)),
        (0.02, Fraction(1, 50)),
        ("1/49", Fraction(1, 49)),
        ("0.1%", Fraction(1, 1000)),
        (1, 1),
        (0.1, Fraction(1, 10)),
    ],
)
def test_shares_are_exact(text: object, share: Fraction) -> None:
    assert parse_share(text, "final") == share


@pytest.mark.parametrize(
    "bad", ["two", "2", -0.1, "101%", None, True, "1/0", "nan", "1e-999999999", "1e-1_000_000_000%"]
)
def test_shares_outside_the_unit_interval_are_refused(bad: object) -> None:
    with pytest.raises(RecipeError, match="final"):
        parse_share(bad, "final")


@pytest.mark.parametrize(("given", "meant"), [("40", r"; did you mean 40%\?$"), ("400", "between 0 and 1$")])
def test_a_number_that_may_be_a_percent_gets_its_sign(given: str, meant: str) -> None:
    with pytest.raises(RecipeError, match=meant):
        parse_share(given, "mfu")


def test_spans_in_steps_tokens_and_share() -> None:
    steps = {
        text: Span.parse(text, "w").steps(tokens_per_step=1000, phase_steps=200)
        for text in ("50 steps", "1 step", "30K", "2%", "0", "1", "0%")
    }
    assert steps == {"50 steps": 50, "1 step": 1, "30K": 30, "2%": 4, "0": 0, "1": 1, "0%": 0}


def test_batch_eval_and_documents_are_inherited_optimizer_is_not() -> None:
    raw = raw_recipe()
    raw["phases"][0]["documents"] = True
    recipe = recipe_from(raw)
    first, second = recipe.phases
    assert second.batch == first.batch
    assert second.evaluation == first.evaluation
    assert second.documents is True
    assert second.optimizer.weight_decay == 1e-7
    assert second.optimizer.clip == 1.0
    del raw["phases"][1]["optimizer"]
    with pytest.raises(RecipeError, match=r"phases\[finetune\]\.optimizer: missing"):
        recipe_from(raw)


def test_a_partly_given_section_keeps_what_the_phase_before_says(tmp_path: Path) -> None:
    raw = raw_recipe()
    raw["phases"][0] |= {"batch": {"sequences": 48, "micro": 8}, "eval": {"every": "3 steps", "tokens": 1000}}
    raw["phases"][1] |= {"batch": {"sequences": 16}, "eval": {"every": "7 steps"}}
    second = recipe_from(raw).phases[1]
    assert (second.batch.sequences, second.batch.micro) == (16, 8)
    assert (str(second.evaluation.every), second.evaluation.tokens) == ("7 steps", 1000)
    path = tmp_path / "r.yaml"
    del raw["phases"][1]["batch"]
    path.write_text(yaml.safe_dump(raw))
    second = load_recipe(path, ["phases.finetune.batch.sequences=24"]).phases[1]
    assert (second.batch.sequences, second.batch.micro) == (24, 8)


@pytest.mark.parametrize("dtype", ID_DTYPES)
def test_a_source_may_have_every_type_of_id_that_datasets_can_have(dtype: str) -> None:
    assert recipe_from(change("sources.chem.dtype", dtype)).sources["chem"].dtype == dtype


def test_grid_is_every_combination_in_order() -> None:
    phase = recipe_from(raw_recipe()).phases[1]
    arms = phase.arms()
    assert [(arm["lr"], str(arm["warmup"])) for arm in arms] == [
        (1e-5, "50 steps"),
        (1e-5, "2%"),
        (4e-5, "50 steps"),
        (4e-5, "2%"),
    ]
    third = phase.with_overrides(arms[2])
    assert third.optimizer.lr == 4e-5
    assert third.schedule.warmup == Span.parse("50 steps", "")
    assert third.optimizer.weight_decay == 1e-7


def test_resolved_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = recipe_from(raw_recipe())
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.as_yaml())
    again = load_recipe(path)
    assert again == recipe
    assert recipe.changes(again) == []


def test_set_reaches_phases_by_name_and_by_position(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(raw_recipe()))
    recipe = load_recipe(
        path, ["phases.finetune.optimizer.lr=3e-4", "phases.0.tokens=40M", "seed=7", "checkpoint.keep=1"]
    )
    assert recipe.phases[1].optimizer.lr == 3e-4
    assert recipe.phases[0].tokens == 40_000_000
    assert (recipe.seed, recipe.checkpoint.keep) == (7, 1)
    with pytest.raises(RecipeError, match="finetun"):
        load_recipe(path, ["phases.finetun.tokens=1M"])
    with pytest.raises(RecipeError, match="KEY=VALUE"):
        load_recipe(path, ["seed"])


def test_changes_name_what_differs_and_ignore_what_changes_no_number(tmp_path: Path) -> None:
    raw = raw_recipe()
    before = recipe_from(raw)
    raw["phases"][1]["optimizer"]["lr"] = 5e-4
    raw["log"] = {"every": "1 steps"}
    raw["checkpoint"] = {"keep": 9}
    assert before.changes(recipe_from(raw)) == ["phases.1.optimizer.lr: 0.0001 → 0.0005"]


def change(path: str, value: Any) -> dict[str, Any]:
    raw: Any = raw_recipe()
    node = raw
    *head, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    for key in head:
        node = node[key]
    node[last] = value
    return raw


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("phases.0.optimiser", {}, r"phases\[pretrain\]\.optimiser: unknown key; did you mean 'optimizer'\?"),
        ("phases.0.optimizer.learning_rate", 1, r"phases\[pretrain\]\.optimizer\.learning_rate: unknown key"),
        ("sede", 1, "sede: unknown key; did you mean 'seed'"),
        ("phases.0.optimizer.LR", 1, r"optimizer\.LR: unknown key; did you mean 'lr'"),
        ("model.preset", "125m", r"model\.preset: '125m' is invalid: write one of 1m, .*did you mean '124m'"),
        ("phases.0.mixture", {"general": "98%", "chem": "3%"}, r"phases\[pretrain\]\.mixture.*101/100|1\.01"),
        ("phases.0.mixture", {"general": "98%", "chm": "2%"}, r"mixture\.chm: unknown source; did you mean 'chem'"),
        ("phases.0.tokens", "many", r"phases\[pretrain\]\.tokens: 'many' is invalid: write a positive whole number"),
        ("phases.0.batch.micro", 7, r"micro: 7 is invalid: write a divisor of sequences \(32\)"),
        ("phases.0.optimizer.lr", -1, r"optimizer\.lr: -1 is invalid"),
        ("phases.0.optimizer.lr", float("nan"), r"optimizer\.lr: nan is invalid"),
        ("phases.0.optimizer.lr", "1_0e-4", r"optimizer\.lr: '1_0e-4' is invalid: write a number"),
        ("phases.0.optimizer.lr", "\uff11e-4", r"optimizer\.lr: '.e-4' is invalid: write a number"),
        ("phases.0.schedule.final", "\uff11%", r"schedule\.final: '.%' is invalid: write a percent"),
        ("phases.0.optimizer.betas", [0.9, 1.0], r"optimizer\.betas"),
        ("phases.0.optimizer.name", "sgd", r"optimizer\.name: 'sgd' is invalid: write one of adamw"),
        (
            "phases.0.schedule.name",
            "cosin",
            r"schedule\.name: 'cosin' is invalid: write one of .*did you mean 'cosine'",
        ),
        ("phases.0.schedule.warmup", "soon", r"schedule\.warmup: 'soon' is invalid: write `500 steps`"),
        ("phases.0.schedule.continue", True, "first phase has no schedule to continue"),
        (
            "phases.1.schedule",
            {"continue": True, "final": "5%"},
            r"finetune\]\.schedule: `continue: true` takes the whole",
        ),
        ("phases.1.schedule", {"continue": True}, r"finetune\]\.grid\.warmup: a continued schedule has"),
        ("phases.0.eval.every", "0 steps", r"eval\.every: '0 steps' is invalid: write how often"),
        ("checkpoint", {"every": 0}, r"checkpoint\.every: 0 is invalid: write how often"),
        ("log", {"every": "0%"}, r"log\.every: '0%' is invalid: write how often"),
        ("seed", 2**63, r"seed: 9223372036854775808 is invalid"),
        ("phases.0.optimizer_state", "keep", "first phase has no optimizer state"),
        ("phases.1.stop", {"on": "chemistry"}, r"stop\.on: 'chemistry' is invalid: name a source; did you mean 'chem'"),
        ("phases.1.name", "pretrain", "names two phases"),
        ("phases.1.name", "../x", r"name: '\.\./x' is invalid"),
        ("phases.1.grid", {"lr": []}, r"grid\.lr: \[\] is invalid"),
        ("phases.1.grid", {"rl": [1]}, r"grid\.rl: unknown key; known: betas, clip, eps, lr, .*warmup, weight_decay"),
        (
            "phases.1.freeze",
            "embedding",
            r"freeze: 'embedding' is invalid: write one of none, embeddings; did you mean 'embeddi",
        ),
        ("init_only", "embeddings", "init_only: 'embeddings' is invalid: it needs `init`"),
        ("init_only", "head", "init_only: 'head' is invalid: write one of embeddings"),
        ("phases.1.untie", "yes please", r"untie: 'yes please' is invalid: write true or false"),
        ("sources.chem.train", None, r"sources\.chem\.train: None is invalid"),
        ("sources.chem.heldout", None, r"sources\.chem\.heldout: missing"),
        ("sources.chem.dtype", "float32", r"sources\.chem\.dtype"),
        ("model", {}, "model: missing"),
        ("model", {"layers": 0}, r"model\.layers: 0 is invalid"),
        ("phases", [], "phases: "),
        ("precision", "fp16", "precision: 'fp16' is invalid: write one of"),
        ("engine", {"fp8": "yes"}, r"engine\.fp8: 'yes' is invalid: write true or false"),
    ],
)
def test_each_mistake_gets_one_message_that_names_the_field(path: str, value: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_from(change(path, value))


def test_the_contract_recipe_as_a_user_writes_it(tmp_path: Path) -> None:
    """`on:` stays a word, 1e-3 a number, and every section of the documentation's example is taken."""
    path = tmp_path / "r.yaml"
    path.write_text(
        """
run: runs/chem-spt2
seed: 0
init: null
precision: auto
model: {preset: 10m}
tokenizer: data/bpe4096.tiktoken
checkpoint: {every: 500 steps, keep: 3}
log: {every: 10 steps}
engine: {name: local}
sources:
  general: {train: data/general, heldout: data/general.heldout}
  chem:    {train: data/chem, heldout: data/chem.heldout, limit_tokens: 300K}
phases:
  - name: pretrain
    tokens: 20M
    mixture: {general: 98%, chem: 2%}
    documents: false
    batch: {sequences: 32, micro: 8}
    optimizer: {name: adamw, lr: 1e-3, betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, clip: 1.0}
    schedule: {name: cosine, warmup: 2%, final: 10%, horizon: 200M}
    eval: {every: 2M, tokens: 200K}
  - name: finetune
    tokens: 2M
    mixture: {chem: 100%}
    untie: true
    anchor: 0.0
    optimizer: {name: adamw, lr: 1e-4, weight_decay: 1e-7}
    optimizer_state: reset
    schedule: {name: constant, warmup: 50 steps}
    stop: {on: chem, patience: 3}
    grid: {lr: [1e-5, 4e-5, 1e-4], warmup: [50 steps, 100 steps]}
"""
    )
    recipe = load_recipe(path)
    assert recipe.phases[0].optimizer.lr == 1e-3
    assert recipe.phases[0].mixture == {"chem": Fraction(1, 50), "general": Fraction(49, 50)}
    assert recipe.phases[1].stop is not None
    assert recipe.phases[1].stop.on == "chem"
    assert recipe.phases[1].untie is True
    assert len(recipe.phases[1].arms()) == 6


def test_a_key_given_twice_and_broken_yaml_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("run: a\nrun: b\n")
    with pytest.raises(RecipeError, match=r"r\.yaml: line 2: key 'run' is given twice"):
        load_recipe(path)
    path.write_text("run: [a\n")
    with pytest.raises(RecipeError, match=r"r\.yaml: is not valid YAML"):
        load_recipe(path)
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "absent.yaml")
    path.write_text("- 1\n")
    for overrides in ((), ("seed=1",)):
        with pytest.raises(RecipeError, match=r"r\.yaml: the recipe: \[1\] is invalid"):
            load_recipe(path, overrides)
    path.write_text("run: {{name}}\n")
    with pytest.raises(RecipeError, match=r"r\.yaml: line 1: a key must be a plain word"):
        load_recipe(path)
    path.write_text(yaml.safe_dump(raw_recipe()))
    for value in ("[1", "{a: 1, a: 2}", "{{x}}"):
        with pytest.raises(RecipeError, match=r"overrides: 'seed=.*: the value: "):
            load_recipe(path, [f"seed={value}"])


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("[" * 3000, "nested too deeply"),
        ("1" * 5000, "not valid YAML: Exceeds the limit"),
        ("9" * 30, "line 1: a whole number of 2\\^64 or more"),
    ],
)
def test_yaml_that_python_cannot_hold_is_refused(tmp_path: Path, value: str, why: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"run: {value}\n")
    with pytest.raises(RecipeError, match=rf"r\.yaml: .*{why}"):
        load_recipe(path)
    path.write_text(yaml.safe_dump(raw_recipe()))
    with pytest.raises(RecipeError, match=rf"overrides: 'run=.*: the value: .*{why}"):
        load_recipe(path, [f"run={value}"])


def test_yaml_says_what_it_means() -> None:
    """Octal and sexagesimal numbers, dates and the many names of true are text; a key is the text that is written."""
    words = "010 1:30 1_000 0x10 0b1 yes No on OFF True 2026-11-28 12:30:00 1e3 -0x1 190:20:30.15 +5 007 0o7"
    written = words.split()
    assert parse_yaml(f"[{', '.join(written)}]", "") == written
    keys = "no yes on 010 1:30 1.10 null ~ true 2026-11-28 0x10 5"
    assert list(parse_yaml("\n".join(f"{key}: 1" for key in keys.split()), "")) == keys.split()
    assert parse_yaml("[5, -1, 0, 1.5, 1.0e+3, .5, true, false, null, ~, ]", "") == [
        *(5, -1, 0, 1.5, 1000.0, 0.5, True, False, None, None)
    ]
    assert parse_yaml("{a: &x {lr: 1}, b: {<<: *x, wd: 2}, c: {<<: *x, lr: 3}}", "")["c"] == {"lr": 3}
    for value in (*written, *keys.split(), "a: b", "- x", "#", "", "é"):
        assert parse_yaml(yaml.safe_dump([value]), "") == [value]  # as resolved recipes are written


def test_numbers_that_yaml_1_1_would_have_changed_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(raw_recipe()))
    for override, said in [
        ("seed=010", "seed: '010' is invalid: write a whole number"),
        ("phases.pretrain.tokens=1:30", r"tokens: '1:30' is invalid: write a positive whole number"),
        ("phases.finetune.untie=yes", "untie: 'yes' is invalid: write true or false"),
        ("run=1.10", "run: 1.1 is invalid: write a name or path, in quotes"),
        ("run=true", "run: True is invalid: write a name or path, in quotes"),
        (r'run="a\0b"', r"run: 'a\\x00b' is invalid: write a name or path$"),
    ]:
        with pytest.raises(RecipeError, match=rf"r\.yaml: .*{said}"):
            load_recipe(path, [override])
    assert load_recipe(path, ["seed=1_000", "run=010"]).seed == 1000
    assert load_recipe(path, ["run=010"]).run == "010"
    assert load_recipe(path, ["run=2026-11-28"]).run == "2026-11-28"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("1e39", "above 0 and at most 3.4e+38"),
        (1e300, "above 0 and at most 3.4e+38"),
        (float("inf"), "above 0"),
        ("1e999", "above 0"),
        ("-1e39", "above 0"),
        (float("nan"), "above 0"),
    ],
)
def test_numbers_are_those_of_float32(given: object, expected: str) -> None:
    with pytest.raises(RecipeError, match=rf"^lr: .* is invalid: write a number {re.escape(expected)}$"):
        number(0.0, open_low=True)(given, "lr")
    assert number()("-3.3e38", "x") == -3.3e38


def test_numbers_of_numpy_are_numbers() -> None:
    """As a notebook has them that computes a recipe."""
    raw = raw_recipe()
    raw["seed"] = np.int64(3)
    raw["phases"][0] |= {"tokens": np.int64(10_000), "batch": {"sequences": np.int32(8), "micro": np.uint8(4)}}
    recipe = recipe_from(raw)
    assert (recipe.seed, recipe.phases[0].tokens, recipe.phases[0].batch.sequences) == (3, 10_000, 8)
    assert recipe_from(yaml.safe_load(yaml.safe_dump(recipe.plain()))) == recipe
    with pytest.raises(RecipeError, match=r"seed: .*-1.* is invalid: write a whole number"):
        recipe_from(raw | {"seed": np.int64(-1)})


def test_a_path_in_brackets_is_answered_with_one_in_dots(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(raw_recipe()))
    for given, write in [
        ("phases[1].tokens=1M", "phases.1.tokens or phases.finetune.tokens"),
        ("phases[finetune].tokens=1M", "phases.finetune.tokens"),
        ("phases[7].grid.lr[0]=1", "phases.7.grid.lr.0"),
        ("phases.0.grid[lr]=1", "phases.0.grid.lr"),
    ]:
        expected = rf"^overrides: '{re.escape(given.split('=')[0])}' is invalid: items go by position or name; write "
        with pytest.raises(RecipeError, match=f"{expected}{re.escape(write)}$"):
            load_recipe(path, [given])
    raw: dict[str, Any] = {"sources": {"a[0]": {}}}
    apply_overrides(raw, ["sources.a[0].train=x"])
    assert raw == {"sources": {"a[0]": {"train": "x"}}}, "a name that has them itself"
    other: Any
    for other in ([3], None, {"seed": 3}, b"seed=3"):
        with pytest.raises(RecipeError, match=rf"^overrides: {re.escape(str(other))} is invalid: give one or several"):
            load_recipe(path, other)


def test_sources_may_have_any_name_that_yaml_reads_otherwise(tmp_path: Path) -> None:
    names = ["no", "1.10", "null", "true", "010"]
    sources = "\n".join(f"  {name}: {{train: {name}}}" for name in names[:1] + names[4:])
    mixture = ", ".join(f"{name}: 20%" for name in names)
    sources += "".join(f"\n  {name}: {{train: x}}" for name in names[1:4])
    (tmp_path / "r.yaml").write_text(
        f"run: x\nmodel: {{preset: 1m}}\nsources:\n{sources}\nphases:\n"
        f"  - {{name: 1, tokens: 1K, mixture: {{{mixture}}}, optimizer: {{lr: 1e-3}}}}\n"
    )
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.sources.keys() == recipe.phases[0].mixture.keys() == set(names)
    assert (recipe.sources["no"].train, recipe.sources["010"].train, recipe.phases[0].name) == ("no", "010", "1")


def test_aliases_expand_to_little(tmp_path: Path) -> None:
    lines = ["k0: &k0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 10)}]" for i in range(1, 9)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    (tmp_path / "string.yaml").write_text(f"a: &a {'x' * 300_000}\nrun: [*a, *a, *a, *a]")
    for name in ("bomb", "string"):
        with pytest.raises(
            RecipeError, match=rf"{name}\.yaml: line \d: aliases expand to more than 1,000,000 characters"
        ):
            load_recipe(tmp_path / f"{name}.yaml")
    (tmp_path / "r.yaml").write_text("run: &a [x, *a]")
    with pytest.raises(RecipeError, match=r"r\.yaml: line 1: an alias refers to a node that contains it"):
        load_recipe(tmp_path / "r.yaml")
    for tagged in ("!!bool maybe", "!!timestamp never"):
        (tmp_path / "r.yaml").write_text(f"run: {tagged}")
        with pytest.raises(RecipeError, match=r"r\.yaml: is not valid YAML: a tag doesn't fit its value"):
            load_recipe(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text("x" * 2_000_000)
    with pytest.raises(RecipeError, match="holds more than 1,000,000 characters"):
        load_recipe(tmp_path / "r.yaml")


def test_every_message_names_the_file_and_cuts_what_is_long(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    for content, said in [
        ("a: [", "is not valid YAML: line 1: "),
        ("a: \x00", "is not valid YAML: unacceptable character"),
        (f"{'k' * 500}: 1", "k…: unknown key"),
        (yaml.safe_dump(raw_recipe() | {"seed": "x" * 5000}), "seed: 'x"),
        (
            yaml.safe_dump(raw_recipe() | {"sources": {"s" * 200: {"train": 1.5}}}),
            r"sources\.s+…\.train: 1.5 is invalid",
        ),
    ]:
        path.write_text(content)
        with pytest.raises(RecipeError) as error:
            load_recipe(path)
        assert re.match(rf"{re.escape(str(path))}: .*{said}", str(error.value))
        assert len(str(error.value)) < 400
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("read", "says"),
    [
        (load_recipe, ": cannot be read ("),
        (load_study, ": neither a file nor a ready study; give the path of a study in YAML; known: dcpt, "),
        (find_files, " doesn't exist; give files, folders"),
    ],
)
@pytest.mark.parametrize("lines", [3, 999])
def test_text_in_place_of_a_path_is_shown_by_its_beginning(read: Any, says: str, lines: int) -> None:
    given = "run: some text\n" * lines
    with pytest.raises(SptError) as error:
        read(given)
    assert str(error.value).startswith(shown(given) + says)


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_a_path_that_no_file_can_have_is_not_called_bad_yaml(name: str) -> None:
    with pytest.raises(RecipeError, match="cannot be read \\(no file can have that name\\); give the path") as error:
        load_recipe(name)
    assert str(error.value).startswith(repr(name))


@pytest.mark.parametrize("item", ["9" * 5000, "²"])
def test_an_item_that_no_list_has_is_refused(tmp_path: Path, item: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(raw_recipe()))
    with pytest.raises(RecipeError, match="no item"):
        load_recipe(path, [f"phases.{item}.tokens=1"])


def test_a_name_that_begins_like_a_boolean_is_a_name(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(raw_recipe()))
    for name in ("false-start", "trueno", "true.1"):
        assert load_recipe(path, [f"run={name}"]).run == name


def test_the_model_section_is_a_partial_shape() -> None:
    """A field of GPTConfig is one of the recipe, read the same way."""
    names = [item.name for item in dataclasses.fields(Model)]
    assert set(names) == {"preset", *(item.name for item in dataclasses.fields(GPTConfig))}
    # Names of a study's runs are made in this order, and a run is found again by its name.
    before = "preset layers width heads kv_heads head_dim ffn context vocab_size qk_norm tied rope_theta norm_eps"
    assert names[:13] == before.split()
    assert set(vars(Model()).values()) == {None}
    model = recipe_from(raw_recipe(model={"layers": 2, "norm_eps": "1e-6"})).model
    assert (model.layers, model.norm_eps, model.width) == (2, 1e-6, None)


def test_a_default_that_is_written_out_changes_nothing() -> None:
    shape = {"layers": 1, "width": 32, "heads": 2, "kv_heads": 1, "ffn": 48, "context": 16}
    first = recipe_from(raw_recipe(model=shape))
    assert (
        first.changes(recipe_from(raw_recipe(model=shape | {"tied": True, "qkv_bias": False, "rope_theta": 10_000})))
        == []
    )
    assert first.changes(recipe_from(raw_recipe(model=shape | {"tied": False}))) == ["model.tied: True → False"]
    preset = recipe_from(raw_recipe(model={"preset": "8b", "context": 64}))
    assert preset.changes(recipe_from(raw_recipe(model={"preset": "8b", "context": 64, "tied": False}))) == []
    assert preset.changes(recipe_from(raw_recipe(model={"preset": "8b", "context": 64, "tied": True}))) == [
        "model.tied: False → True"
    ]


def test_every_setting_of_the_optimizer_is_an_axis_of_a_grid() -> None:
    phase = raw_recipe()["phases"][0]
    axes = {"betas": [[0.9, 0.95], [0.9, 0.99]], "clip": [1.0, None], "eps": ["1e-8"]}
    grid = recipe_from(raw_recipe(phases=[phase | {"grid": axes}])).phases[0]
    arms = [grid.with_overrides(arm).optimizer for arm in grid.arms()]
    assert {(arm.betas, arm.clip, arm.eps) for arm in arms} == {
        ((0.9, second), clip, 1e-8) for second in (0.95, 0.99) for clip in (1.0, None)
    }
    assert {arm.lr for arm in arms} == {grid.optimizer.lr}


def test_the_state_of_another_optimizer_cannot_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Other(AdamW):
        name: str = setting(text, "other")

    monkeypatch.setitem(OPTIMIZERS, "other", Other)
    first, second = raw_recipe()["phases"]
    kept = second | {"optimizer": {"name": "other", "lr": 1e-4}, "optimizer_state": "keep"}
    with pytest.raises(RecipeError, match=r"phases\[finetune\]\.optimizer_state: 'keep' is invalid: adamw's state"):
        recipe_from(raw_recipe(phases=[first, kept]))


def test_the_home_folder_and_variables_are_expanded_in_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.delenv("UNSET", raising=False)
    raw = raw_recipe(run="~/runs/x", tokenizer="$SCRATCH/t", init="${SCRATCH}/w", engine={"config": "~/ds.json"})
    raw["sources"]["chem"] = {"train": "~/chem", "heldout": "$SCRATCH/chem.heldout"}
    recipe = recipe_from(raw)
    assert (recipe.run, recipe.tokenizer, recipe.init) == ("/home/me/runs/x", "/scratch/t", "/scratch/w")
    assert recipe.engine.config == "/home/me/ds.json"
    assert (recipe.sources["chem"].train, recipe.sources["chem"].heldout) == ("/home/me/chem", "/scratch/chem.heldout")
    assert recipe_from(recipe.plain()) == recipe
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(raw_recipe()))
    assert load_recipe(path, ["run=~/x"]).run == "/home/me/x"
    assert recipe_from(raw_recipe(run="runs/a $UNSET b")).run == "runs/a $UNSET b"
    for value, why in (
        ("$UNSET/x", "the environment has no UNSET; set it"),
        ("~nobody-has-it/x", "this machine has no such user"),
    ):
        with pytest.raises(RecipeError, match=rf"run: '{re.escape(value)}' is invalid: {why}"):
            recipe_from(raw_recipe(run=value))
