"""`train --dry-run`: what it reports, that it writes nothing, and what it advises when memory runs out."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from spt_fast import progress
from spt_fast.config import recipe_from
from spt_fast.errors import RecipeError, SptWarning
from spt_fast.train.dry_run import dry_run
from spt_fast.train.evaluate import evaluated_tokens
from spt_fast.train.local import LocalEngine
from spt_fast.train.plan import make_plan
from tests import tiny


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    tiny.write_corpora(tmp_path)
    return tiny.raw_recipe(tmp_path)


def test_the_dry_run_says_which_step_it_takes(
    raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a CPU a step of a large batch takes minutes."""
    monkeypatch.setattr(progress, "PLAIN_LINE_EVERY_S", 0.0)
    raw["phases"] = raw["phases"][:1]
    dry_run(recipe_from(raw))
    said = re.findall("dry run .*", capsys.readouterr().err)
    assert said == ["dry run pretrain · first step", "dry run pretrain · second step, which is timed"]


def test_every_phase_is_tried_as_it_will_be_trained(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second phase with its untied head, its frozen embedding, its anchor and its own optimizer state; an
    evaluation batch of each."""
    raw["phases"][1]["freeze"] = "embeddings"
    raw["engine"] = {"checkpointing": "full"}
    plan = make_plan(recipe_from(raw))
    seen: list[tuple[Any, ...]] = []
    step, loss = LocalEngine.step, LocalEngine.loss

    def watched_step(self: LocalEngine, micro_batches: Any, *rest: Any) -> Any:
        optimizer = self.optimizer
        state = (len(optimizer.masters), bool(optimizer.anchor), self.model.head is not None)
        seen.append(("step", len(micro_batches), tuple(micro_batches[0].tokens.shape), *state))
        return step(self, micro_batches, *rest)

    def watched_loss(self: LocalEngine, tokens: torch.Tensor, *rest: Any) -> Any:
        seen.append(("loss", tuple(tokens.shape), torch.is_grad_enabled()))
        return loss(self, tokens, *rest)

    monkeypatch.setattr(LocalEngine, "step", watched_step)
    monkeypatch.setattr(LocalEngine, "loss", watched_loss)
    before = sorted(tmp_path.iterdir())
    results = dry_run(recipe_from(raw))
    assert sorted(tmp_path.iterdir()) == before
    tensors = seen[0][3]
    first = ("step", 2, (4, 16), tensors, False, False)
    second = ("step", 1, (4, 16), tensors + 1 - 1, True, True)
    evaluation = ("loss", (4, 16), False)
    assert seen == [first, first, evaluation, second, second, evaluation]
    assert [result.phase for result in results] == ["pretrain", "finetune"]
    for planned, result in zip(plan.phases, results, strict=True):
        trained = planned.steps * len(planned.phase.arms())
        evaluated = evaluated_tokens(plan, planned.index) / planned.tokens_per_step
        # a step makes the forward pass twice, in a half of its time; an evaluation makes it once
        assert result.hours == pytest.approx((trained + evaluated / 4) * result.step_s / 3600)
        assert result.loss == pytest.approx(math.log(64), rel=0.1)
        assert result.step_s > 0
        assert result.estimated_bytes > 0


def test_running_out_of_memory_names_the_phase_and_the_knobs_in_order(
    raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The finetune of an 8-layer model with micro-batches of 16 sequences fails: each setting saves memory."""
    raw["model"] |= {"layers": 8, "width": 64, "ffn": 256}
    raw["phases"][1] |= {"batch": {"sequences": 24, "micro": 24}}
    step = LocalEngine.step

    def step_of_a_small_gpu(self: LocalEngine, micro_batches: Any, *rest: Any) -> Any:
        if len(micro_batches[0].tokens) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")
        return step(self, micro_batches, *rest)

    monkeypatch.setattr(LocalEngine, "step", step_of_a_small_gpu)
    with pytest.raises(RecipeError) as error:
        dry_run(recipe_from(raw))
    said = str(error.value)
    assert said.startswith("phases[finetune]: a step does not fit into memory")
    assert "Tried to allocate 2.00 GiB" in said
    assert "See the documentation" not in said
    knobs = re.findall(r"  (.*) saves about ([0-9.e-]+) GB", said)
    assert [knob for knob, _ in knobs] == [
        "phases.finetune.batch.micro=12",
        "engine.checkpointing=selective",
        "engine.checkpointing=full",
        "engine.name=deepspeed engine.stage=1 engine.offload=optimizer",
        "engine.name=deepspeed engine.stage=2 engine.offload=optimizer",
        "engine.name=deepspeed engine.stage=3 engine.offload=optimizer",
        "engine.name=deepspeed engine.stage=3 engine.offload=all",
    ]
    assert all(float(saved) > 0 for _, saved in knobs)
    assert float(knobs[2][1]) > float(knobs[1][1])


def test_a_model_is_too_large_when_no_setting_saves_memory(
    raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw["phases"] = raw["phases"][:1]
    raw["phases"][0]["batch"] = {"sequences": 8, "micro": 1}
    raw["engine"] = {"checkpointing": "full"}

    def no_memory(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(LocalEngine, "step", no_memory)
    monkeypatch.setattr("spt_fast.train.price.DISTRIBUTIONS", ((0, "none"),))
    with pytest.raises(RecipeError, match=r"phases\[pretrain\].*\n  a smaller model, a shorter batch.context"):
        dry_run(recipe_from(raw))


def test_a_folder_in_which_the_run_would_be_refused_is_told_before_a_step(raw: dict[str, Any]) -> None:
    folder = Path(raw["run"])
    folder.mkdir()
    (folder / "heartbeat.json").write_text('{"time": 1.0, "host": "here", "pid": 1}')
    (folder / "recipe.yaml").write_text(recipe_from(raw | {"seed": 1}).as_yaml())
    with pytest.warns(SptWarning, match=r"run: folder \S+ exists, so training will be refused; continue .* --resume"):
        assert dry_run(recipe_from(raw), resume=False)
    with pytest.raises(RecipeError, match=r"started with another recipe.*\n  seed: 1 → 0"):
        dry_run(recipe_from(raw), resume=True)
    (folder / "heartbeat.json").unlink()
    with pytest.raises(RecipeError, match=r"run: folder \S+ holds a recipe.yaml, but no run"):
        dry_run(recipe_from(raw), resume=False)
