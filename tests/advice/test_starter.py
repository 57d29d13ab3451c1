"""`spt-fast init`: its files can be planned and priced, are sized for machine and text, and replace nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spt_fast import cli
from spt_fast.advice import sizing, starter
from spt_fast.advice.next_step import default_batch
from spt_fast.advice.sizing import TRAINING_SHARE, Corpus, Device
from spt_fast.config import load_recipe, recipe_from
from spt_fast.data.tokenizer import train_tokenizer
from spt_fast.errors import DataError, RecipeError, SptWarning
from spt_fast.fields import parse_yaml
from spt_fast.quantities import duration
from spt_fast.study import costs
from spt_fast.study.load import load_study
from spt_fast.train.plan import make_plan
from spt_fast.train.price import Machine, price, speed_of

WORDS = [
    "the",
    "reaction",
    "of",
    "an",
    "acid",
    "with",
    "a",
    "base",
    "gives",
    "salt",
    "and",
    "water",
    "while",
    "heat",
    "is",
    "set",
    "free",
    "at",
    "once",
]


def write_text(file: Path, documents: int, seed: int) -> Path:
    texts = (
        " ".join(f"{word}{(i * seed + j) % 997}" for j, word in enumerate(WORDS * 4)) for i in range(1, documents + 1)
    )
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return file


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("texts")
    return write_text(folder / "general.jsonl", 1500, 7), write_text(folder / "my chem.jsonl", 400, 11)


def test_the_rate_of_a_cpu_is_that_of_the_faster_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of each dtype's matmul is given, so that the machine's load does not matter."""
    seconds = {torch.float32: 4.0, torch.bfloat16: 1.0}
    monkeypatch.setattr(sizing, "medians", lambda rivals, **_: [seconds[rival.args[0].dtype] for rival in rivals])
    rates = {}
    for fast in (False, True):
        monkeypatch.setattr(sizing, "multiplies_bf16", lambda fast=fast: fast)
        rates[fast] = sizing.flops_per_s("cpu")
    assert rates[False] == pytest.approx(0.3 * 2 * 1024**3 / 4)
    assert rates[True] == pytest.approx(4 * rates[False])


def test_evaluations_ask_for_less_than_all_held_out_text() -> None:
    """Its halves are not exactly equal, and a recipe of `init` should not be warned of."""
    known = SimpleNamespace(corpora=[SimpleNamespace(heldout_tokens=tokens) for tokens in (67_000, 34_000)], window=256)
    assert sizing.Sizing.evaluation(known, 5_400_000) == "{every: 10%, tokens: 31K}"  # type: ignore[arg-type]


def slow_machine(monkeypatch: pytest.MonkeyPatch, flops_per_s: float) -> None:
    monkeypatch.setattr(sizing, "flops_per_s", lambda device: flops_per_s)


@pytest.mark.parametrize("hours", ["0.1", "0.2"])
def test_text_becomes_a_recipe_that_can_be_planned_and_a_study_that_can_be_priced(
    hours: str,
    texts: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    slow_machine(monkeypatch, 2e9)
    general, domain = map(str, texts)
    out = tmp_path / "first"
    words = ["init", "--general", general, "--domain", domain, "--out", str(out), "--hours", hours, "--json"]
    cli.app(words, standalone_mode=False)
    begun = json.loads(capsys.readouterr().out)
    recipe = load_recipe(begun["recipe"])
    plan = make_plan(recipe, world=1)
    priced = price(plan, machine := Machine.of(recipe, gpu="H100"), speed_of(plan, machine))
    for times in priced.times:
        flops = times.tokens * priced.flops_per_token
        assert times.evaluation_flops <= 0.1 * flops, times
    assert list(recipe.sources) == ["general", "my chem"]
    assert not [warning for warning in priced.warnings if "takes longer" in warning], priced.warnings
    assert recipe.phases[0].schedule.warmup.amount > 0
    study = load_study(begun["study"])
    assert sum(cost.runs for cost in costs.price(study, jobs=1, gpu="H100", mfu=0.4).stages) > 10
    assert study.domain == "my chem"
    with pytest.raises(RecipeError, match=r"^out: \S+recipe.yaml exists; choose another folder"):
        starter.begin(general, domain, out)
    prefixes = (out / "data" / "general", out / "data" / "my chem")
    train_tokenizer([general], 300, tmp_path / "other.tiktoken", progress=False)
    with pytest.raises(DataError, match=r"^sources.general.train: \S+ was made with another tokenizer"):
        starter.begin(*prefixes, tmp_path / "second", tokenizer=tmp_path / "other.tiktoken")
    with pytest.raises(DataError, match=r"^tokenizer: missing"):
        starter.begin(*prefixes, tmp_path / "second")
    with pytest.warns(SptWarning, match=r"are read \d+ times; beyond about 40"):
        starter.begin(
            prefixes[0],
            write_text(tmp_path / "few.jsonl", 5, 3),
            tmp_path / "second",
            tokenizer=out / "data" / "bpe.tiktoken",
            hours=0.1,
        )
    assert load_recipe(tmp_path / "second" / "recipe.yaml").tokenizer == str(out / "data" / "bpe.tiktoken")


def test_the_time_is_what_the_tokens_take_if_the_text_ends_before_the_hours(
    texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = 1e9
    slow_machine(monkeypatch, rate)
    begun = starter.begin(*texts, tmp_path / "long", hours=1000, progress=False)
    plan = make_plan(load_recipe(begun.recipe), world=1)
    assert begun.hours < 10
    assert begun.hours == pytest.approx(begun.tokens * plan.flops_per_token(0) / rate / TRAINING_SHARE / 3600)
    assert f" parameters for about {duration(3600 * begun.hours)} on this" in begun.recipe.read_text()
    short = starter.begin(*texts, tmp_path / "short", hours=begun.hours / 2, progress=False)
    assert short.hours == pytest.approx(begun.hours / 2, rel=0.06)  # tokens have two digits


def test_text_key_and_skip_bad_apply_to_the_text_of_init(
    texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow_machine(monkeypatch, 2e9)
    general, domain = (tmp_path / name for name in ("general.jsonl", "chem.jsonl"))
    for file, text in zip((general, domain), texts, strict=True):
        file.write_text(text.read_text().replace('"text":', '"content":') + "\n{broken\n")
    words = ["init", "--general", str(general), "--domain", str(domain), "--out", str(tmp_path / "first")]
    missing = r"\(the line has 'content'\); name .* with --text-key …, or skip .* --skip-bad; if the keys .* differ, "
    with pytest.raises(DataError, match=missing + "prepare each with `spt-fast prepare` and give the prefixes$"):
        cli.app(words, standalone_mode=False)
    with pytest.raises(DataError, match=r"broken JSON .*--skip-bad$"):
        cli.app([*words, "--text-key", "content"], standalone_mode=False)
    assert not capsys.readouterr().out
    cli.app([*words, "--text-key", "content", "--skip-bad", "--hours", "0.1"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert re.search(r"skipped broken JSON +│ 2 ", shown)
    assert f"next:\n  spt-fast plan {tmp_path / 'first' / 'recipe.yaml'}\n  spt-fast train " in shown
    assert "# The smallest preset: under 20 tokens per parameter" in (tmp_path / "first" / "recipe.yaml").read_text()
    assert list(load_recipe(tmp_path / "first" / "recipe.yaml").sources) == ["general", "chem"]


def corpora(general: int, domain: int) -> list[Corpus]:
    return [
        Corpus(name, Path("data") / name, tokens, tokens // 20) for name, tokens in (("web", general), ("chem", domain))
    ]


def sizes(flops_per_s: float, general: int, domain: int) -> starter.FromScratch:
    return starter.FromScratch.of(corpora(general, domain), 32_768, Device("cpu", 1, flops_per_s, None), 24.0)


def test_model_batch_and_rate_grow_with_machine_and_text() -> None:
    laptop = sizes(50e9, 2 * 10**9, 10**7)
    node = sizes(8 * 400e12, 10**11, 10**9)
    scarce = sizes(8 * 400e12, 10**8, 10**6)
    order = [starter.SIZES.index(one.name) for one in (laptop, scarce, node)]
    assert order == sorted(set(order))
    assert node.name in ("350m", "1b", "3b")
    assert scarce.tokens <= 4 * 10**8
    for one in (laptop, scarce, node):
        step = one.sequences(one.tokens) * one.config.context
        assert one.tokens // step >= 200
        assert 1e-4 < one.rate <= 4e-3
        assert 0.05 <= one.weight_decay(one.tokens // step) <= 0.5
    assert laptop.rate > node.rate
    assert laptop.sequences(laptop.tokens) * laptop.config.context < node.sequences(node.tokens) * node.config.context
    assert laptop.warmup(1000) == 50
    assert node.warmup(10**6) == sizing.WARMUP_STEPS
    assert 0 < laptop.papers["delta"] <= 0.1


@pytest.mark.parametrize("gpus", [1, 6])
def test_a_phase_has_at_least_200_steps_if_it_has_a_window_for_each_gpu_in_that_many(gpus: int) -> None:
    device = Device("cuda", gpus, gpus * 400e12, 80 * 10**9)
    made = starter.FromScratch.of(corpora(10**10, 10**8), 32_768, device, 24.0)
    for windows, each in ((0.4, 1), (1, 1), (1.9, 1), (3.6, 2), (7.9, 4), (8, 8)):
        tokens = round(windows * gpus * 200 * made.window)
        assert made.sequences(tokens) == each * gpus
        assert made.steps(tokens) >= (200 if windows >= 1 else 1)
        if gpus == 1:
            assert default_batch(32, made.window, tokens) == (each, made.window)


def test_a_step_divides_among_the_gpus() -> None:
    gpus = Device("cuda", 6, 6 * 400e12, 80 * 10**9)
    sized = starter.FromScratch.of(corpora(10**10, 10**8), 32_768, gpus, 24.0)
    recipe = recipe_from(parse_yaml(sized.recipe(Path("out"), "gpt2"), "it"))
    for phase in recipe.phases:
        assert phase.batch.sequences % (6 * (phase.batch.micro or 1)) == 0
