"""The training window is a separate setting: shorter than the model's context, and different in each phase if needed;
exported weights keep the model's context."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from spt_fast.config import load_recipe, recipe_from
from spt_fast.data.shards import DatasetWriter, TokenDataset
from spt_fast.errors import DataError, RecipeError
from spt_fast.evaluation.score import score, scored
from spt_fast.model.flops import train_flops_per_token
from spt_fast.model.gpt import GPT, GPTConfig
from spt_fast.model.memory import Step
from spt_fast.train.audit import audit_document, audit_run
from spt_fast.train.doubts import doubts
from spt_fast.train.evaluate import EvalSet, measure
from spt_fast.train.plan import make_plan
from spt_fast.train.price import Machine, Speed, phase_memory, phase_time, price
from spt_fast.train.release import export
from spt_fast.train.run import run
from spt_fast.train.weights import load_model, read_config
from spt_fast.train.world import ALONE
from tests import tiny
from tests.train.test_loop import StopAfter

CONTEXT, VOCAB = 64, 512
IDS = {"general": np.arange(300), "chem": np.arange(300, 390)}
"""Every token of the corpora has its own id, so that batches show which ones they read."""
SHAPE = GPTConfig(layers=1, width=16, heads=2, kv_heads=1, ffn=32, context=CONTEXT, vocab_size=VOCAB)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of long context, beside the corpora."""
    folder = tmp_path_factory.mktemp("base")
    for source, ids in IDS.items():
        for name in (source, f"{source}.heldout"):
            with DatasetWriter(folder / name, vocab_size=VOCAB, eos_id=VOCAB - 1, tokenizer_digest=None) as writer:
                writer.write(ids if name == source else ids[::-1], np.full(len(ids) // 10, 10), num_bytes=len(ids))
    GPT(SHAPE, seed=1).save_hf(folder / "base")
    return folder


def raw_recipe(base: Path, name: str, windows: list[int | None]) -> dict[str, Any]:
    """Phases with windows of these lengths, starting from the model."""
    raw = tiny.raw_recipe(base, name) | {"init": str(base / "base"), "model": {}, "precision": "fp32"}
    raw["sources"]["chem"].pop("limit_tokens")
    phase = raw["phases"][0] | {"tokens": 7 * 8 * 16, "eval": {"every": "50%", "tokens": 100}}
    raw["phases"] = [
        phase | {"name": f"p{i}", "batch": {"sequences": 8, "micro": 4, "context": window}}
        for i, window in enumerate(windows)
    ]
    return raw


def visits(raw: dict[str, Any]) -> np.ndarray:
    """Visits of every id, counted in the batches."""
    plan, counts, seen = make_plan(recipe_from(raw)), dict[int, dict[str, int]](), np.zeros(VOCAB, int)
    for planned in plan.phases:
        before = counts.get(planned.context, dict.fromkeys(IDS, 0))
        with plan.loader(planned.index, before, ALONE) as loader:
            for _, micro_batches in loader:
                for batch in micro_batches:
                    assert batch.tokens.shape == (4, planned.context)
                    seen += np.bincount(batch.tokens.flatten().numpy(), minlength=VOCAB)
        counts[planned.context] = {source: n + before[source] for source, n in planned.windows(planned.steps).items()}
    return seen


def test_windows_of_several_lengths_are_trained_audited_evaluated_and_resumed(base: Path) -> None:
    raw = raw_recipe(base, "whole", [16, 8, 16])
    summary = run(recipe_from(raw), progress=False)
    assert [phase["steps"] for phase in summary["phases"].values()] == [7, 14, 7]
    assert [phase["context"] for phase in summary["phases"].values()] == [16, 8, 16]
    assert summary["phases"]["p1"]["flops_per_token"] == train_flops_per_token(SHAPE, 8)

    folder, seen, readings = Path(raw["run"]), visits(raw), audit_run(Path(raw["run"]))
    for source, ids in IDS.items():
        reading, own = readings[source], seen[ids]
        assert (reading.tokens, reading.min_visits, reading.max_visits) == (own.sum(), own.min(), own.max())
        assert reading.epochs == pytest.approx(own.sum() / len(ids))
        third = audit_document(folder, source, 3)
        assert (third.token_visits, third.max_visits) == (own[30:40].sum(), own[30:40].max())
    assert any(
        "windows of 8 start 'chem' again after those of 16" in doubt for doubt in doubts(make_plan(recipe_from(raw)))
    )

    # A run that is made longer by phases with other windows equals one that was as long from the start.
    longer = raw_recipe(base, "longer", [16])
    run(recipe_from(longer), progress=False)
    longer["phases"] = raw["phases"]
    run(recipe_from(longer), resume=True, progress=False)
    ends = [load_file(base / name / "weights" / "p2" / "model.safetensors") for name in ("whole", "longer")]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())

    # The exported model has the context of the base, and is scored in the training windows.
    export(folder, base / "out")
    for weights in (folder / "weights" / "p2", base / "out"):
        assert json.loads((weights / "config.json").read_text())["max_position_embeddings"] == CONTEXT
        short = scored(weights, base / "general.heldout")
        text = EvalSet.of_tokens(TokenDataset.open(base / "general.heldout").tokens, 16)
        own = measure(partial(load_model(weights), reduction="none"), text, 4).loss
        assert (short.context, short.loss) == (16, pytest.approx(own, rel=1e-5))
    whole = scored(folder, base / "general.heldout", context=CONTEXT)
    assert score(folder, base / "general.heldout", context=CONTEXT)["loss"] == whole.loss
    assert (whole.context, whole.loss != short.loss) == (CONTEXT, True)
    assert scored(base / "base", base / "general.heldout").context == CONTEXT
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    assert scored(newest, base / "general.heldout").context == 16
    with pytest.raises(DataError, match=r"^context: 65 is invalid: write 1 to 64, the model's own"):
        scored(folder, base / "general.heldout", context=CONTEXT + 1)


def test_an_unfinished_run_is_audited_and_resumed_in_its_window(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = raw_recipe(base, "stopped", [16, 8])
    with monkeypatch.context() as patch:
        patch.setattr("spt_fast.train.run.StopRequest", StopAfter)
        StopAfter.looks = 75
        assert run(recipe_from(raw), progress=False)["status"] == "stopped"
    cut = visits(raw_recipe(base, "x", [16]))[IDS["general"]].sum()
    under_way = audit_run(Path(raw["run"]))["general"].tokens
    assert cut < under_way < visits(raw)[IDS["general"]].sum()
    assert run(recipe_from(raw), resume=True, progress=False)["status"] == "done"
    assert audit_run(Path(raw["run"]))["general"].tokens == visits(raw)[IDS["general"]].sum()


def test_a_run_with_a_shortened_context_continues_with_it(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier versions used `model.context` as the window, and wrote it into the weights."""
    raw = raw_recipe(base, "before", [None]) | {"model": {"context": 16}, "init": str(base / "cut")}
    GPT(SHAPE, seed=1).save_hf(base / "cut")
    config = base / "cut" / "config.json"
    whole = config.read_text()
    config.write_text(whole.replace(f'"max_position_embeddings": {CONTEXT}', '"max_position_embeddings": 16'))
    with monkeypatch.context() as patch:
        patch.setattr("spt_fast.train.run.StopRequest", StopAfter)
        StopAfter.looks = 20
        assert run(recipe_from(raw), progress=False)["status"] == "stopped"
    config.write_text(whole)
    assert run(recipe_from(raw), resume=True, progress=False)["status"] == "done"
    assert read_config(Path(raw["run"])).context == 16


@pytest.mark.parametrize(
    ("model", "windows", "said"),
    [
        ({"context": 16}, [None], r"^model.context: 16 is invalid: .*`batch.context: 16`"),
        ({"context": 128}, [16], r"^model.context: 128 is invalid: the weights at .* have 64; leave it out$"),
        ({}, [65], r"^phases\[p0\].batch.context: 65 is invalid: the model's context is 64 tokens"),
        ({}, [16, 0], r"^phases\[p1\].batch.context: 0 is invalid"),
    ],
)
def test_an_impossible_window_is_refused_with_a_remedy(
    base: Path, model: dict[str, int], windows: list[int | None], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        make_plan(recipe_from(raw_recipe(base, "x", windows) | {"model": model}))


def test_a_window_longer_than_a_corpus_says_what_to_set(base: Path) -> None:
    raw = raw_recipe(base, "x", [16, None])
    raw["sources"]["chem"]["limit_tokens"] = 40
    with pytest.raises(DataError, match=r"^phases\[p1\].batch.context: source 'chem' has 40 tokens.*at most 39$"):
        make_plan(recipe_from(raw))
    with pytest.raises(RecipeError, match=r"^phases\[p0\].batch.context: 256 is invalid: the model's context is 128"):
        recipe_from(raw_recipe(base, "x", [256]) | {"init": None, "model": {"preset": "1m", "context": 128}})


def test_flops_and_memory_are_those_of_the_window(base: Path) -> None:
    raw = raw_recipe(base, "x", [16, 8])
    plan, speed = make_plan(recipe_from(raw)), Speed(1e9, None, "")
    machine = Machine.of(plan.recipe, gpu="H100")
    for index, window in enumerate((16, 8)):
        assert phase_time(plan, index, speed).step_s == pytest.approx(
            train_flops_per_token(SHAPE, window) * 8 * window / 1e9
        )
        own = {"dtype": torch.float32, "micro_batches": 2}
        assert phase_memory(plan, index, machine) == Step(SHAPE, 4, context=window, **own).memory()
    assert phase_memory(plan, 0, machine).activations < Step(SHAPE, 4, **own).memory().activations
    assert price(plan, machine, speed).flops == 7 * 128 * sum(train_flops_per_token(SHAPE, w) for w in (16, 8))
    assert [figures.context for figures in plan.describe()] == [16, 8]


def test_a_window_is_inherited_set_by_override_and_the_default_is_no_change(tmp_path: Path) -> None:
    raw = tiny.raw_recipe(tmp_path)
    recipe = load_recipe(tiny.write_recipe(tmp_path, raw), ["phases.0.batch.context=8"])
    assert [phase.batch.context for phase in recipe.phases] == [8, 8]
    assert [phase.steps(tiny.CONTEXT) for phase in recipe.phases] == [60, 32]
    assert len(recipe_from(raw).changes(recipe)) == 2
    raw["phases"][0]["batch"]["context"] = tiny.CONTEXT
    assert tiny.recipe(tmp_path).changes(recipe_from(raw)) == []
