"""The regimes of training on two corpora as recipes: replay, specialized continued pretraining as one run, continual
pretraining from a Hugging Face folder. What was read is counted in the windows that reached the engine."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spt_fast.config import recipe_from
from spt_fast.data.loader import Batch
from spt_fast.data.shards import DatasetWriter
from spt_fast.model.gpt import GPT, GPTConfig
from spt_fast.train import checkpoint
from spt_fast.train.evaluate import evaluation_texts, measure
from spt_fast.train.local import LocalEngine
from spt_fast.train.lr import learning_rate
from spt_fast.train.plan import make_plan
from tests import tiny
from tests.train.test_start import SHAPE, phase, raw_recipe, trained

SEQUENCES = 4
FIRST_ID_OF_CHEM = 32


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two corpora without a common id, so that a window shows its source."""
    folder = tmp_path_factory.mktemp("apart")
    for seed, (name, first, tokens) in enumerate(
        (("general", 0, 9000), ("general.heldout", 0, 800), ("chem", 32, 900), ("chem.heldout", 32, 800))
    ):
        ids = np.random.default_rng(seed).integers(first, first + 31, tokens)
        with DatasetWriter(folder / name, vocab_size=tiny.VOCAB, eos_id=tiny.EOS, tokenizer_digest=None) as writer:
            writer.write(ids, np.full(tokens // 50, 50), num_bytes=tokens)
    return folder


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Windows of `chem` in every step that the engine makes."""
    seen: list[int] = []
    step = LocalEngine.step

    def watched(self: LocalEngine, micro_batches: Sequence[Batch], *rest: Any) -> Any:
        windows = torch.cat([batch.tokens for batch in micro_batches])
        of_chem = (windows >= FIRST_ID_OF_CHEM).any(1)
        assert torch.equal(of_chem, (windows >= FIRST_ID_OF_CHEM).all(1))
        seen.append(int(of_chem.sum()))
        return step(self, micro_batches, *rest)

    monkeypatch.setattr(LocalEngine, "step", watched)
    return seen


def assert_exact(read: Sequence[int], share: Fraction) -> None:
    """At most half a window off at every step, and exact where the share is a whole number of windows."""
    for steps, windows in enumerate(np.cumsum(read), start=1):
        assert abs(windows - share * steps * SEQUENCES) <= Fraction(1, 2)


@pytest.mark.parametrize("p", ["1%", "1/8"])
def test_replay_injects_exactly_its_share_of_general_windows(data: Path, read: list[int], p: str) -> None:
    injected = Fraction(1, 100) if p == "1%" else Fraction(p)
    raw = raw_recipe(
        data,
        f"replay-{injected.denominator}",
        phase("pretrain", 10, {"general": 1}),
        phase("finetune", 50, {"chem": str(1 - injected), "general": p}),
    )
    summary = trained(raw)
    assert read[:10] == [0] * 10
    assert_exact(read[10:], 1 - injected)
    assert sum(read[10:]) == (1 - injected) * 50 * SEQUENCES
    windows = summary["phases"]["finetune"]["windows"]
    assert windows["general"] == [10 * SEQUENCES, 10 * SEQUENCES + injected * 50 * SEQUENCES]


def test_scpt_changes_the_mixture_and_nothing_else(data: Path, read: list[int]) -> None:
    """Learning rate and optimizer state continue; the windows read add up to the shares of both phases."""
    schedule = {"name": "cosine", "warmup": "4 steps", "horizon": 40 * SEQUENCES * tiny.CONTEXT}
    raw = raw_recipe(
        data,
        "scpt",
        phase("general", 25, {"general": "98%", "chem": "2%"}, schedule=schedule),
        phase("special", 10, {"general": "3/4", "chem": "1/4"}, schedule={"continue": True}, optimizer_state="keep"),
        checkpoint={"every": "1 steps", "keep": 99},
        log={"every": "1 steps"},
    )
    trained(raw)
    assert_exact(read[:25], Fraction(2, 100))
    assert_exact(read[25:], Fraction(1, 4))
    assert sum(read) == Fraction(2, 100) * 25 * SEQUENCES + Fraction(1, 4) * 10 * SEQUENCES

    first = recipe_from(raw).phases[0]
    rates = [record["lr"] for record in tiny.metrics(Path(raw["run"])) if record["kind"] == "train"]
    tokens_per_step = SEQUENCES * tiny.CONTEXT
    assert rates == [learning_rate(first.schedule, 1e-2, step, 25, tokens_per_step) for step in range(35)]
    assert all(later < rate for rate, later in pairwise(rates[4:])), "warmed up no more"

    folders = {path.name: path for path in checkpoint.listed(Path(raw["run"]) / "checkpoints")}
    before, after = (
        checkpoint.load(folders[f"step-00000000{at}-a000"])["current"].tensors() for at in ("24-p00", "25-p01")
    )
    assert (before["count"], after["count"]) == (24, 25)
    for name, moment in after.items():
        if name.startswith("exp_avg_sq/"):
            assert (moment >= 0.9499 * before[name]).all(), "one step on from the moments of the phase before"
            assert moment.any()


@pytest.mark.parametrize("qk_norm", [False, True], ids=["llama", "qwen3"])
def test_continual_pretraining_of_a_hugging_face_folder(data: Path, read: list[int], qk_norm: bool) -> None:
    given = GPT(GPTConfig(**SHAPE, qk_norm=qk_norm), seed=5)
    folder = data / f"given-{qk_norm}"
    given.save_hf(folder)
    r = Fraction(1, 5)
    raw = raw_recipe(data, f"dcpt-{qk_norm}", phase("dcpt", 25, {"general": "4/5", "chem": "1/5"}))
    raw |= {"init": str(folder), "model": {}, "precision": "fp32"}
    summary = trained(raw)
    assert_exact(read, r)
    assert sum(read) == r * 25 * SEQUENCES
    begin = tiny.metrics(Path(raw["run"]))[0]["heldout"]
    plan = make_plan(recipe_from(raw))
    for source, text in evaluation_texts(plan, plan.phases[0].phase)["heldout"].items():
        expected = measure(partial(given, reduction="none"), text, 8).loss
        assert begin[source] == pytest.approx(expected, rel=1e-5)
        assert summary["phases"]["dcpt"]["heldout"][source] < begin[source] - 0.1
    result = GPT.from_hf(Path(raw["run"]) / "weights" / "dcpt")
    assert result.config == given.config
    assert all(not torch.equal(a, b) for a, b in zip(result.parameters(), given.parameters(), strict=True))
