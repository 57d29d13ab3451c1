"""A name from another trainer is answered with ours, wherever in a recipe it stands."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from spt_fast import config
from spt_fast.config import Recipe, recipe_from
from spt_fast.errors import RecipeError
from spt_fast.fields import key_of
from spt_fast.model.config import GPTConfig
from spt_fast.optimizers.adamw import AdamW
from spt_fast.synonyms import SYNONYMS

SECTIONS: dict[str, Any] = {
    "": Recipe,
    "model": config.Model,
    "sources.NAME": config.Source,
    "phases[…]": config.Phase,
    "phases[…].batch": config.BatchSize,
    "phases[…].optimizer": AdamW,
    "phases[…].schedule": config.Schedule,
    "phases[…].eval": config.EvalSettings,
    "checkpoint": config.Checkpoints,
    "log": config.Log,
    "engine": config.Engine,
}


def keys(section: Any) -> set[str]:
    return {key_of(item) for item in dataclasses.fields(section)}


@pytest.mark.parametrize("path", SYNONYMS)
def test_what_it_is_called_here_exists(path: str) -> None:
    section, _, key = path.rpartition(".")
    assert key in keys(SECTIONS[section])


def test_no_name_means_two_things_or_is_a_key_in_the_same_place() -> None:
    names = [name for group in SYNONYMS.values() for name in group.split()]
    assert len(names) == len(set(names))
    for path, group in SYNONYMS.items():
        assert not set(group.split()) & keys(SECTIONS[path.rpartition(".")[0]])


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"model": {"hidden_size": 64}}, "model.hidden_size: unknown key; here it is width"),
        ({"model": {"max-seq-len": 64}}, "model.max-seq-len: unknown key; here it is context"),
        ({"phases": [{"name": "a", "seq_len": 64}]}, r"seq_len: unknown key; here it is context in batch"),
        ({"phases": [{"name": "a", "context": 64}]}, r"context: unknown key; here it is context in batch"),
        ({"context": 64}, r"context: unknown key; here it is context in model"),
        ({"batch_size": 8}, r"batch_size: unknown key; here it is sequences in batch"),
        (
            {"phases": [{"name": "a", "batch": {"micro_batch_size": 4}}]},
            r"micro_batch_size: unknown key; here it is micro, the windows of one forward pass",
        ),
        ({"phases": [{"name": "a", "learning_rate": 1}]}, r"here it is lr in optimizer"),
        ({"phases": [{"name": "a", "lr": 1}]}, r"phases\[a\]\.lr: unknown key; here it is lr in optimizer"),
        ({"width": 64}, r"width: unknown key; here it is width in model"),
        ({"mixture": {"a": 1}}, r"mixture: unknown key; here it is mixture in a phase"),
        ({"model": {"seed": 1}}, r"model\.seed: unknown key; here it is seed at the top of the recipe"),
        ({"phases": [{"name": "a", "optimizer": {"lr": 1, "wd": 1}}]}, r"wd: unknown key; here it is weight_decay"),
        ({"phases": [{"name": "a", "optimizer": {"LearningRate": 1}}]}, r"LearningRate: unknown key; (?!here)"),
    ],
)
def test_the_message_says_what_it_is_called_here(raw: dict[str, Any], said: str) -> None:
    phases = [{"tokens": 1, "mixture": {"a": 1}, "optimizer": {"lr": 1}, **phase} for phase in raw.get("phases", [{}])]
    with pytest.raises(RecipeError, match=said):
        recipe_from({"run": "r", "model": {"preset": "1m"}, "sources": {"a": {"train": "a"}}, **raw, "phases": phases})


def test_presets_answer_too() -> None:
    with pytest.raises(RecipeError, match=r"model\.n_embd: unknown key; here it is width"):
        GPTConfig.preset("1m", n_embd=64)
