from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from spt_fast import cli
from spt_fast.config import Recipe, load_recipe, recipe_from
from spt_fast.data.mixture import Mixture
from spt_fast.data.shards import DatasetWriter
from spt_fast.errors import CheckpointError, DataError, RecipeError
from spt_fast.kernels.adamw import adamw_step
from spt_fast.study import doge
from spt_fast.study.doge import Reweighting, Stopped, mixture_line, percentages, reweight, reweighted
from spt_fast.train.health import Diverged
from spt_fast.train.lr import learning_rate
from spt_fast.train.plan import make_plan
from spt_fast.train.world import ALONE
from tests.tiny import CONTEXT, EOS, VOCAB, write_dataset, write_recipe

SEQUENCES = 4


def raw_recipe(folder: Path, sources: Sequence[str], steps: int, **changes: Any) -> dict[str, Any]:
    return {
        "run": str(folder / "run"),
        "precision": "fp32",
        "model": {"layers": 1, "width": 32, "heads": 2, "kv_heads": 1, "ffn": 64, "context": CONTEXT},
        "checkpoint": {"every": "3 steps"},
        "log": {"every": "1 steps"},
        "sources": {source: {"train": str(folder / source)} for source in sources},
        "phases": [
            {
                "name": "pretrain",
                "tokens": steps * SEQUENCES * CONTEXT,
                "mixture": dict.fromkeys(sources, 1),
                "batch": {"sequences": SEQUENCES, "micro": 2},
                "optimizer": {"lr": 1e-2},
                "schedule": {"name": "cosine", "warmup": f"{min(2, steps - 1)} steps"},
                **changes,
            }
        ],
    }


def recipe(folder: Path, sources: Sequence[str], steps: int, **changes: Any) -> Recipe:
    return recipe_from(raw_recipe(folder, sources, steps, **changes))


def write_sources(folder: Path) -> None:
    """`like` and `alike` are samples of one language, `other` of another; `noise` is random."""
    for name, seed in (("like", 0), ("alike", 3), ("other", 1)):
        write_dataset(folder / name, seed, 4000)
    with DatasetWriter(folder / "noise", vocab_size=VOCAB, eos_id=EOS, tokenizer_digest=None) as writer:
        writer.write(np.random.default_rng(9).integers(0, VOCAB, 4000), np.array([4000]), num_bytes=4000)


def by_brute_force(recipe: Recipe, target: str | None, steps: int) -> list[dict[str, Any]]:
    """Weights, scores and losses of every step by the paper's formulas, one parameter at a time."""
    plan = make_plan(recipe)
    phase, settings = plan.phases[0], plan.phases[0].phase.optimizer
    rows = sorted(recipe.sources)
    trained = [source for source in rows if source != target]
    helped = trained if target is None else [target]
    mu = 0.01 if target is None else 0.05
    model = plan.starting_model()
    params = list(model.parameters())
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    weights = dict.fromkeys(trained, 1 / len(trained))
    history = []
    for step in range(steps):
        lr = learning_rate(phase.phase.schedule, settings.lr, step, phase.steps, phase.tokens_per_step)
        gradients, losses = {}, {}
        for source in rows:
            starts = plan.phases[0].rings[source].starts(np.arange(step * SEQUENCES, (step + 1) * SEQUENCES))
            text = np.resize(plan.train[source].tokens, plan.train[source].num_tokens + CONTEXT + 1).astype(np.int64)
            windows = torch.from_numpy(np.stack([text[start : start + CONTEXT + 1] for start in starts]))
            loss = model(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())
            losses[source] = loss.item()
            gradient = torch.autograd.grad(loss, params)
            norm = sum(float(g.double().square().sum()) for g in gradient) ** 0.5
            gradients[source] = [g * min(1.0, (settings.clip or norm) / (norm + 1e-6)) for g in gradient]

        def inner(a: str, b: str, gradients: dict[str, list[torch.Tensor]] = gradients) -> float:
            pairs = zip(gradients[a], gradients[b], strict=True)
            return sum(float((x.double() * y.double()).sum()) for x, y in pairs)

        mean_norm = sum(inner(source, source) ** 0.5 for source in trained) / len(trained)
        scores = {j: lr * sum(inner(j, i) for i in helped if i != j) / mean_norm for j in trained}
        raised = {j: weights[j] * np.exp(min(max(scores[j], 0), 5 * lr) / mu) for j in trained}
        weights = {j: raised[j] / sum(raised.values()) for j in trained}
        history.append({"step": step + 1, "lr": lr, "weights": weights, "scores": scores, "losses": losses})
        for i, (param, (first, second)) in enumerate(zip(params, moments, strict=True)):
            gradient_ = torch.stack([weights[j] * gradients[j][i] for j in trained]).sum(0)
            with torch.no_grad():
                decay = settings.weight_decay if param.ndim > 1 else 0.0
                adamw_step(param, gradient_, first, second, step=step + 1, lr=lr, eps=1e-8, weight_decay=decay)
    return history


@pytest.mark.parametrize("target", [None, "other"])
@pytest.mark.parametrize("clip", [0.3, None])
def test_every_figure_follows_the_papers_formulas(tmp_path: Path, target: str | None, clip: float | None) -> None:
    write_sources(tmp_path)
    steps = 6
    study = recipe(tmp_path, ["alike", "like", "noise", "other"], steps, optimizer={"lr": 3e-2, "clip": clip})
    result = reweight(study, tmp_path / "out", target=target, progress=False)
    expected = by_brute_force(study, target, steps)
    assert len(result.trajectory) == steps
    for found, wanted in zip(result.trajectory, expected, strict=True):
        assert (found.step, found.lr) == (wanted["step"], wanted["lr"])
        for key, tolerance in (("weights", 2e-4), ("losses", 2e-5)):
            assert getattr(found, key) == pytest.approx(wanted[key], rel=tolerance)
        assert found.scores == pytest.approx(wanted["scores"], rel=1e-3, abs=1e-3 * wanted["lr"])
    for source, weight in result.weights.items():
        assert weight == pytest.approx(np.mean([record["weights"][source] for record in expected]), rel=2e-4)
        assert result.scores[source] == pytest.approx(
            np.mean([record["scores"][source] for record in expected]), rel=1e-3, abs=1e-5
        )
        out_of_bounds = [not 0 <= record["scores"][source] <= 5 * record["lr"] for record in expected]
        assert result.clipped[source] == np.mean(out_of_bounds)
    assert result.reach == pytest.approx(sum(r["lr"] for r in expected) / (0.01 if target is None else 0.05))
    assert result.published_reach == pytest.approx(297.5 if target is None else 59.5)
    assert result.last_weights == pytest.approx(expected[-1]["weights"], rel=2e-4)
    assert set(result.epochs) == set(study.sources)
    assert max(result.weights.values()) > 1.02 / len(result.weights)  # they have changed


def test_noise_gets_less_than_sources_that_help_each_other(tmp_path: Path) -> None:
    write_sources(tmp_path)
    weights = reweight(recipe(tmp_path, ["alike", "like", "noise"], 40), tmp_path / "out", progress=False).weights
    assert weights["noise"] < 0.1
    assert min(weights["like"], weights["alike"]) > 0.3


def test_the_source_that_is_like_the_target_gets_the_most_weight(tmp_path: Path) -> None:
    write_sources(tmp_path)
    study = recipe(tmp_path, ["alike", "like", "other"], 40)
    result = reweight(study, tmp_path / "out", target="like", progress=False)
    assert set(result.weights) == {"alike", "other"}
    assert result.weights["alike"] > 0.6
    losses = result.trajectory[-1].losses
    assert losses["like"] == pytest.approx(losses["alike"], rel=0.1)
    other = reweight(study, tmp_path / "other", target="other", progress=False)
    assert other.weights["alike"] == pytest.approx(0.5, abs=0.05)


def test_the_target_may_be_outside_the_mixture_and_sources_without_a_share_are_ignored(tmp_path: Path) -> None:
    write_sources(tmp_path)
    sources = ["alike", "like", "noise", "other"]
    inside = recipe(tmp_path, sources, 3, mixture={"alike": 5, "like": 2, "other": 1, "noise": 0})
    outside = recipe(tmp_path, sources, 3, mixture={"alike": 1, "other": 1})
    results = [
        reweight(study, tmp_path / name, target="like", progress=False)
        for name, study in (("in", inside), ("out", outside))
    ]
    assert results[0].weights == results[1].weights
    assert set(results[0].weights) == {"alike", "other"}


def same(result: Reweighting | Stopped) -> Reweighting:
    """The result without the fields that depend on the clock."""
    return replace(result, seconds=0.0)


@pytest.mark.parametrize(("precision", "target"), [("fp32", None), ("bf16", "other")])
def test_a_reweighting_that_is_stopped_or_killed_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, target: str | None
) -> None:
    write_sources(tmp_path)
    study = recipe_from(raw_recipe(tmp_path, ["alike", "like", "other"], 12) | {"precision": precision})
    whole = reweight(study, tmp_path / "whole", target=target, progress=False)

    measure, calls = doge._Proxy.measure, {"left": 5}

    def struck(self: doge._Proxy, *arguments: Any) -> Any:
        calls["left"] -= 1
        if calls["left"] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        if calls["left"] == -100:
            raise OSError("the machine died")
        return measure(self, *arguments)

    out = tmp_path / "out"
    monkeypatch.setattr(doge._Proxy, "measure", struck)
    assert reweight(study, out, target=target, progress=False) == Stopped("SIGTERM")
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-0000000003", "step-0000000004"]
    calls["left"] = -94  # dies during step 10
    with pytest.raises(OSError, match="died"):
        reweight(study, out, target=target, resume=True, progress=False)
    assert not (out / "weights.json").exists()
    calls["left"] = -1000
    resumed = reweight(study, out, target=target, resume=True, progress=False)
    assert same(resumed) == same(whole)
    assert json.loads((out / "weights.json").read_text()) == asdict(resumed)
    assert sorted(path.name for path in out.iterdir()) == ["reweight.json", "weights.json"]
    assert reweight(study, out, target=target, resume=True, progress=False) == resumed


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_gradients_of_micro_batches_add_up_in_fp32(tmp_path: Path, precision: torch.dtype) -> None:
    write_sources(tmp_path)
    plan = make_plan(recipe(tmp_path, ["like", "other"], 4))
    proxy = doge._Proxy(plan, 2, precision, None)
    with plan.loader(0, {"like": 0, "other": 0}, ALONE) as loader:
        batches = [micro_batches for _, micro_batches in loader][:2]
    measured = proxy.measure(batches, lambda: False)
    assert measured is not None
    flat = []
    for micro_batches in batches:
        proxy.engine.optimizer.zero_grad()
        for batch in micro_batches:
            (proxy.engine.model(batch.tokens, batch.targets) / len(micro_batches)).backward()
        flat.append(torch.cat([p.grad.flatten() for p in proxy.params if p.grad is not None]))
    assert all(torch.equal(row, gradient) for row, gradient in zip(proxy.gradients_RN, flat, strict=True))
    gram = np.array([[float((a.double() * b.double()).sum()) for b in flat] for a in flat])
    assert measured[0] == pytest.approx(gram, rel=1e-5)


def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sources(tmp_path)
    study = recipe(tmp_path, ["like", "other"], 4)
    measure, bad_steps = doge._Proxy.measure, [2]

    def sometimes_bad(self: doge._Proxy, *arguments: Any) -> Any:
        calls.append(self)
        gram, losses = measure(self, *arguments)  # type: ignore[misc]
        before = [param.clone() for param in self.params]
        seen.append(before)
        return (gram * np.nan, losses) if len(calls) in bad_steps else (gram, losses)

    monkeypatch.setattr(doge._Proxy, "measure", sometimes_bad)
    calls: list[Any] = []
    seen: list[list[torch.Tensor]] = []
    result = reweight(study, tmp_path / "out", progress=False)
    assert result.skipped == 1
    assert [point.step for point in result.trajectory] == [1, 3, 4]
    assert all(torch.equal(a, b) for a, b in zip(seen[1], seen[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[2], seen[3], strict=True))
    assert sum(result.weights.values()) == pytest.approx(1, abs=1e-12)

    calls.clear()
    bad_steps[:] = [1, 3]
    with pytest.raises(Diverged, match="2 of 4 steps were skipped"):
        reweight(study, tmp_path / "half", progress=False)

    calls.clear()
    bad_steps[:] = [1, 2, 3, 4]
    with pytest.raises(RuntimeError, match="not finite in the 4 steps up to 4"):
        reweight(study, tmp_path / "bad", progress=False)


def test_the_trajectory_has_the_first_and_last_step_and_one_per_log_interval(tmp_path: Path) -> None:
    write_sources(tmp_path)
    raw = raw_recipe(tmp_path, ["like", "other"], 8) | {"log": {"every": "3 steps"}}
    result = reweight(recipe_from(raw), tmp_path / "out", progress=False)
    assert [point.step for point in result.trajectory] == [1, 3, 6, 8]


def test_weights_follow_the_softmax_and_never_vanish() -> None:
    weights, scores = np.array([0.2, 0.5, 0.3]), np.array([0.01, 0.0, 0.02])
    expected = torch.softmax(torch.log(torch.from_numpy(weights)) + torch.from_numpy(scores) / 0.01, 0)
    assert reweighted(weights, scores, 0.01) == pytest.approx(expected.numpy(), rel=1e-12)
    for _ in range(300):
        weights = reweighted(weights, np.array([0.1, 0.0, 0.0]), 0.01)
    assert weights.min() > 0
    for _ in range(300):
        weights = reweighted(weights, np.array([0.0, 0.1, 0.0]), 0.01)
    assert weights[1] > 0.9


@given(st.lists(st.floats(1e-9, 1), min_size=1, max_size=12))
def test_percentages_sum_to_100_and_are_rounded_to_a_tenth(parts: list[float]) -> None:
    weights = {f"s{i}": part / sum(parts) for i, part in enumerate(parts)}
    shares = Mixture(percentages(weights)).weights  # refuses shares that don't sum to exactly 1
    assert all(abs(float(shares[source]) - weights[source]) < 1e-3 for source in weights)


def test_the_printed_line_is_valid_in_a_recipe(tmp_path: Path) -> None:
    assert percentages({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}) == {"a": "33.4%", "b": "33.3%", "c": "33.3%"}
    line = mixture_line({"general": "61.2%", "on: air": "38.8%"})
    assert line == "mixture: {general: 61.2%, 'on: air': 38.8%}"
    assert Mixture(yaml.safe_load(line)["mixture"]).weights["general"] == Mixture({"x": 612, "y": 388}).weights["x"]


def test_recipes_that_cannot_be_reweighted_are_refused(tmp_path: Path) -> None:
    write_sources(tmp_path)
    two, out = recipe(tmp_path, ["like", "other"], 2), tmp_path / "out"
    with pytest.raises(RecipeError, match=r"target: 'lik' is invalid: name a source; did you mean 'like'\?"):
        reweight(two, out, target="lik")
    with pytest.raises(RecipeError, match=r"phases\[pretrain\].mixture: names 1 source besides the target 'like'"):
        reweight(two, out, target="like")
    with pytest.raises(RecipeError, match=r"names 1 source; weighting needs at least two"):
        reweight(recipe(tmp_path, ["like"], 2), out)
    with pytest.raises(DataError, match="absent"):
        reweight(recipe(tmp_path, ["like", "absent"], 2), out)
    assert not out.exists()


def test_a_folder_of_another_recipe_or_target_is_refused(tmp_path: Path) -> None:
    write_sources(tmp_path)
    study, out = recipe(tmp_path, ["alike", "like", "other"], 2), tmp_path / "out"
    result = reweight(study, out, progress=False)
    with pytest.raises(RecipeError, match=r"out: folder .* exists; add `resume=True`"):
        reweight(study, out)
    with pytest.raises(RecipeError, match=r"target: None → like"):
        reweight(study, out, target="like", resume=True)
    with pytest.raises(RecipeError, match=r"phases.0.tokens: 128 → 192"):
        reweight(recipe(tmp_path, ["alike", "like", "other"], 3), out, resume=True)
    (out / "reweight.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        reweight(study, out, resume=True)
    for name in ("file", "run"):
        (tmp_path / "file").write_text("")
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "recipe.yaml").write_text("")
        with pytest.raises(RecipeError, match="out: "):
            reweight(study, tmp_path / name, resume=True)
    assert json.loads((out / "weights.json").read_text()) == asdict(result)


def test_replaced_text_is_refused_on_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sources(tmp_path)
    study, out = recipe(tmp_path, ["like", "other"], 4), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(doge._Proxy, "measure", lambda *_: None)
        assert isinstance(reweight(study, out, progress=False), Stopped)
    for path in tmp_path.glob("like.*"):
        path.unlink()
    write_dataset(tmp_path / "like", 2, 4000)
    with pytest.raises(DataError, match=r"sources\.like\.train: holds other text"):
        reweight(study, out, resume=True, progress=False)


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int, *words: Any) -> str:
    monkeypatch.setattr(sys, "argv", ["spt-fast", "reweight", *map(str, words)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == code
    return capsys.readouterr().out


def test_the_command_stops_continues_and_prints_a_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sources(tmp_path)
    raw = raw_recipe(tmp_path, ["alike", "like", "other"], 4)
    words = (write_recipe(tmp_path, raw), "--set", "seed=3", "--target", "like")
    with monkeypatch.context() as patch:
        patch.setattr(doge._Proxy, "measure", lambda *_: None)
        assert said(patch, capsys, 75, *words) == ""
    printed = said(monkeypatch, capsys, 0, *words, "--resume")
    result = json.loads((tmp_path / "run-reweight" / "weights.json").read_text())
    assert printed.splitlines()[-1] == mixture_line(result["mixture"])
    assert json.loads(said(monkeypatch, capsys, 0, *words, "--resume", "--json")) == result
    assert result["settings"]["seed"] == 3

    row = next(line for line in printed.splitlines() if "│ like " in line).split("│")
    assert [cell.strip() for cell in row[2:5]] == ["target"] * 3
    first, last = (f"{result['trajectory'][i]['losses']['like']:.4g}" for i in (0, -1))
    assert [cell.strip() for cell in row[6:8]] == [first, last]

    raw["phases"][0]["mixture"] = yaml.safe_load(printed.splitlines()[-1])["mixture"]
    load_recipe(write_recipe(tmp_path, raw))
