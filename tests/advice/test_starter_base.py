"""`spt-fast init --init BASE`: a recipe and a study that start from a base, with its size, tokenizer and context."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from spt_fast import cli
from spt_fast.advice import sizing, starter
from spt_fast.advice.sizing import Corpus, Device
from spt_fast.advice.starter_base import Base, FromBase
from spt_fast.config import load_recipe, recipe_from
from spt_fast.data.base_tokenizer import BaseTokenizer
from spt_fast.data.prepare import prepare
from spt_fast.data.shards import TokenDataset
from spt_fast.data.tokenizer import train_tokenizer
from spt_fast.errors import CheckpointError, DataError, RecipeError, SptWarning
from spt_fast.model.config import GPTConfig
from spt_fast.model.gpt import GPT
from spt_fast.model.memory import Step
from spt_fast.model.presets import PRESETS
from spt_fast.study.costs import price
from spt_fast.study.load import load_study
from spt_fast.train.run import run
from tests import hf_tokenizers
from tests.advice.test_starter import write_text

CONTEXT = 128
SHAPE = GPTConfig(layers=1, width=16, heads=2, kv_heads=1, ffn=32, context=CONTEXT, vocab_size=448)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose documents have a begin token, and two corpora."""
    folder = tmp_path_factory.mktemp("bases")
    GPT(SHAPE).save_hf(hf_tokenizers.write(folder / "base"))
    write_text(folder / "general.jsonl", 600, 7)
    write_text(folder / "chem.jsonl", 200, 11)
    return folder


def begun(place: Path, out: Path, seconds: float, monkeypatch: pytest.MonkeyPatch, **given: Any) -> starter.Begun:
    """The files of `init` for this many seconds of training on a slow machine."""
    monkeypatch.setattr(sizing, "flops_per_s", lambda device: 2e9)
    given = {"init": place / "base", "hours": seconds / 3600, "progress": False} | given
    return starter.begin(place / "general.jsonl", place / "chem.jsonl", out, **given)


@pytest.mark.filterwarnings("ignore::spt_fast.errors.SptWarning")
def test_a_base_becomes_a_recipe_that_passes_a_dry_run_and_a_study_that_can_be_priced(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sizing, "flops_per_s", lambda device: 2e9)
    words = ["init", "--init", place / "base", "--general", place / "general.jsonl", "--domain", place / "chem.jsonl"]
    words += ["--out", tmp_path, "--hours", "1", "--json"]
    cli.app(list(map(str, words)), standalone_mode=False)
    said = json.loads(capsys.readouterr().out)
    assert (said["model"], said["parameters"], said["domain_share"]) == ("base", 9520, 0.99)
    recipe = load_recipe(said["recipe"])
    (phase,) = recipe.phases
    assert (recipe.init, recipe.tokenizer, recipe.model.preset) == (str(place / "base"), None, None)
    assert {source: float(share) for source, share in phase.mixture.items()} == {"chem": 0.99, "general": 0.01}
    assert phase.tokens == pytest.approx(5 * TokenDataset.open(recipe.sources["chem"].train).num_tokens, rel=0.05)
    assert (phase.schedule.name, phase.stop and phase.stop.on, len(phase.arms())) == ("constant", "chem", 3)
    assert phase.batch.context == CONTEXT
    for command in ("plan", "train --dry-run"):
        cli.app([*command.split(), said["recipe"]], standalone_mode=False)
    assert "chem" in capsys.readouterr().out
    tokenizer = hf_tokenizers.build("byte_level")
    for source in recipe.sources.values():
        data = TokenDataset.open(source.train)
        assert (data.eos_id, data.bos_id) == tuple(map(tokenizer.token_to_id, (hf_tokenizers.EOS, hf_tokenizers.BOS)))
    study = load_study(said["study"])
    (cost,) = price(study, jobs=1, gpu="H100", mfu=0.4).stages
    assert cost.runs == 3 * 2 * 2 * 2
    assert study.domain_tokens[0] == pytest.approx(phase.tokens / 5 / 8, rel=0.1)


def test_a_base_without_weights_is_refused_before_text_is_prepared(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(shutil.copytree(place / "base", tmp_path / "base"))
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"^init: .*pytorch_model\.bin is a pickle"):
        begun(place, tmp_path / "out", 8.0, monkeypatch, init=base)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::spt_fast.errors.SptWarning")
def test_continued_pretraining_is_planned_if_time_allows_less_than_two_epochs(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = begun(place, tmp_path, 8.0, monkeypatch)
    (phase,) = load_recipe(first.recipe).phases
    assert first.epochs["chem"] < 2
    assert (float(phase.mixture["general"]), phase.schedule.name, phase.stop, phase.grid) == (
        0.05,
        "cosine",
        None,
        None,
    )
    assert first.study is not None
    study = load_study(str(first.study))
    assert len(study.stages[0].axes.shares) == 6
    assert "average" not in first.study.read_text()


@pytest.mark.filterwarnings("ignore::spt_fast.errors.SptWarning")
def test_a_run_as_the_base_keeps_its_own_end_and_begin_tokens(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(place / "chem.jsonl", tmp_path / "data" / "chem", place / "base", workers=1, progress=False)
    raw = {"run": str(tmp_path / "run"), "init": str(place / "base")}
    raw |= {"sources": {"chem": {"train": str(tmp_path / "data" / "chem")}}}
    phase = {"name": "finetune", "tokens": "4K", "mixture": {"chem": 1}, "optimizer": {"lr": 1e-3}}
    run(recipe_from(raw | {"phases": [phase]}), progress=False)
    with pytest.warns(
        SptWarning, match=r"^hours: 0.1 s is short for 9.52K parameters on this machine \(cpu\): the minimum of 25.6K"
    ):
        first = begun(place, tmp_path / "out", 0.1, monkeypatch, init=tmp_path / "run")
    assert (first.model, first.parameters, first.tokens) == ("run", 9520, 200 * CONTEXT)
    assert first.study is None, "its runs would be nearly as long as the training"
    said = " ".join(first.recipe.read_text().replace("#", " ").split())
    assert "There is no study beside this recipe" in said
    assert "The study finds" not in said
    made = TokenDataset.open(load_recipe(first.recipe).sources["chem"].train)
    assert (made.eos_id is not None, made.bos_id) == (True, None), "as the run's, unlike the base's"


def changed(place: Path, folder: Path, **fields: Any) -> Path:
    """A copy of the base with another config.json."""
    shutil.copytree(place / "base", folder)
    described = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def test_an_unusable_base_or_tokenizer_is_refused_before_any_text_is_prepared(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(error: type[Exception], says: str, **given: Any) -> None:
        with pytest.raises(error, match=says):
            begun(place, tmp_path / "out", 1.0, monkeypatch, **given)
        assert not (tmp_path / "out").exists()

    gpt2 = changed(place, tmp_path / "gpt2", model_type="gpt2")
    refused(CheckpointError, r"^init: \S+: model_type 'gpt2' cannot be represented, since its positions", init=gpt2)
    refused(CheckpointError, r"^init: nowhere/SmolLM2: is not a folder", init="nowhere/SmolLM2")
    bare = tmp_path / "bare"
    GPT(SHAPE).save_hf(bare)
    refused(DataError, r"^tokenizer: \S+bare holds no tokenizer.json; name a folder or file that does", init=bare)
    train_tokenizer([place / "chem.jsonl"], 300, tmp_path / "other.tiktoken", progress=False)
    other = {"tokenizer": tmp_path / "other.tiktoken"}
    refused(RecipeError, r"^tokenizer: \S+ is invalid: the weights at \S+base were trained with another one", **other)
    GPT(GPTConfig(**vars(SHAPE) | {"vocab_size": 256})).save_hf(bare)
    refused(RecipeError, r"ends or begins documents has no row in the weights at \S+bare; name", init=bare, **other)
    endless = tmp_path / "endless"
    GPT(SHAPE).save_hf(hf_tokenizers.write(endless, eos=None))
    refused(DataError, r"names no end-of-text token; prepare both texts with `spt-fast prepare --eos", init=endless)


@pytest.mark.filterwarnings("ignore::spt_fast.errors.SptWarning")
def test_a_base_without_a_tokenizer_takes_the_named_one(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    GPT(SHAPE).save_hf(tmp_path / "bare")
    train_tokenizer([place / "chem.jsonl"], 300, ranks := tmp_path / "bpe.tiktoken", progress=False)
    first = begun(place, tmp_path / "out", 60.0, monkeypatch, init=tmp_path / "bare", tokenizer=ranks)
    assert load_recipe(first.recipe).tokenizer == str(ranks)
    assert first.study is not None
    assert load_study(str(first.study)).tokenizer == str(ranks)


GPU = Device("cuda", 1, 400e12, 80 * 10**9)


def sized(preset: str, device: Device = GPU, domain: int = 30 * 10**6, hours: float = 24.0) -> FromBase:
    corpora = [Corpus(name, Path(name), n, n // 20) for name, n in (("web", 10**9), ("chem", domain))]
    base = Base(Path("base"), GPTConfig(**PRESETS[preset]), cast(BaseTokenizer, None))
    return FromBase.of(corpora, base, device, hours)


def test_the_rate_falls_and_the_step_grows_with_the_size_of_the_base() -> None:
    small, middle, large = (sized(preset) for preset in ("124m", "1b", "8b"))
    assert [small.rate, middle.rate, large.rate] == [1e-4, 4e-5, 1e-5]
    assert small.sequences(small.tokens) <= middle.sequences(middle.tokens)
    assert (small.window, large.window) == (1024, 2048)
    assert sized("1b", domain=20_000).window == 128, "several windows of the held-out text"


def test_the_engine_is_the_fastest_one_that_fits_the_memory() -> None:
    assert [sized(preset)._engine() for preset in ("124m", "1b")] == ["", ""]
    said = (
        "engine: {stage: 2, offload: optimizer, checkpointing: full}  # so that a step fits the GPU's memory; it takes"
    )
    assert sized("8b")._engine().startswith(said)
    roomy, tight = (sized("8b", Device("cuda", 1, 400e12, memory), 3 * 10**8) for memory in (10**12, 80 * 10**9))
    assert tight.tokens == pytest.approx(0.75 * roomy.tokens, rel=0.02), "blocks are computed twice"
    node = sized("8b", Device("cuda", 8, 8 * 400e12, 80 * 10**9))
    assert node.way.offload == "none"
    assert node.sequences(node.tokens) % (8 * node.micro(node.sequences(node.tokens))) == 0
    written = node.recipe(Path("out"), None)
    assert "torchrun --standalone --nproc_per_node=8 -m spt_fast.train out/recipe.yaml" in written
    assert "spt-fast plan out/recipe.yaml --gpus 8" in written
    assert "offload: optimizer" in str(node.study(Path("out"), None)), "each run of a study has one GPU"
    assert sized("8b", Device("cpu", 1, 1e12, None), hours=10_000)._engine() == ""


def test_a_step_from_a_base_leaves_room_for_the_anchor_that_the_study_tries() -> None:
    one = sized("1b")
    without, with_anchor = (
        Step(one.config, 1, dtype=torch.bfloat16, context=one.window, anchor=anchor).memory().total
        for anchor in (False, True)
    )
    for needed, fits in ((without, False), (with_anchor, True)):
        gpu = replace(GPU, memory_bytes=round(1.01 * needed / sizing.MEMORY_SHARE))
        assert replace(one, device=gpu).fits(1) is fits


def test_hours_decide_between_a_finetune_with_three_rates_or_one_and_continued_pretraining() -> None:
    week, day, hour = (sized("1b", hours=hours) for hours in (24 * 7, 1.0, 0.1))
    assert [(one.finetunes, one.arms) for one in (week, day, hour)] == [(True, 3), (True, 1), (False, 1)]
