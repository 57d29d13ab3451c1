"""Texts generated at evaluations: equal for equal weights, and without effect on the training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spt_fast.config import EvalSettings, recipe_from
from spt_fast.data.heldout import heldout_stretches, tokens_in
from spt_fast.data.shards import TokenDataset
from spt_fast.data.tokenizer import Tokenizer, train_tokenizer
from spt_fast.errors import RecipeError
from spt_fast.model.gpt import GPT
from spt_fast.train.evaluate import EvalSet
from spt_fast.train.plan import make_plan
from spt_fast.train.resume import refused
from spt_fast.train.run import run
from spt_fast.train.samples import samples
from tests import tiny
from tests.train.test_loop import StopAfter, weights


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe on tokenised corpora."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "words.txt").write_text("some words and more words of all kinds " * 50)
    tokenizer = train_tokenizer([str(folder / "words.txt")], 280, folder / "words.tiktoken")
    for seed, name in enumerate(("general", "chem", "general.heldout", "chem.heldout")):
        tiny.write_dataset(folder / name, seed, 900, vocab=280, tokenizer_digest=tokenizer.digest)
    raw = tiny.raw_recipe(folder) | {"tokenizer": str(folder / "words.tiktoken"), "precision": "fp32"}
    raw["phases"] = raw["phases"][:1]
    raw["phases"][0] |= {"tokens": 10 * 8 * tiny.CONTEXT, "eval": {"every": "5 steps", "tokens": 400, "samples": 2}}
    return raw


def named(raw: dict[str, Any], name: str) -> dict[str, Any]:
    return raw | {"run": f"{raw['run']}-{name}"}


def with_samples(raw: dict[str, Any], samples: int) -> dict[str, Any]:
    (phase,) = raw["phases"]
    return raw | {"phases": [phase | {"eval": phase["eval"] | {"samples": samples}}]}


def test_samples_are_kept_shown_and_tracked_and_change_nothing(
    raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.random.get_rng_state()
    with_them, without, stopped = (
        named(with_samples(raw, n), name) for n, name in ((2, "with"), (0, "without"), (2, "stopped"))
    )
    assert run(recipe_from(with_them))["status"] == "done"
    said = capsys.readouterr().err
    run(recipe_from(without), progress=False)
    with monkeypatch.context() as patch:
        patch.setattr("spt_fast.train.run.StopRequest", StopAfter)
        StopAfter.looks = 40
        assert run(recipe_from(stopped), progress=False)["status"] == "stopped"
    assert run(recipe_from(stopped), resume=True, progress=False)["status"] == "done"
    assert torch.equal(before, torch.random.get_rng_state())
    folders = [Path(each["run"]) for each in (with_them, without, stopped)]
    ours = tiny.metrics(folders[0])
    assert tiny.metrics(folders[2]) == ours
    assert tiny.metrics(folders[1]) == [{k: v for k, v in record.items() if k != "samples"} for record in ours]
    tensors = [weights(folder, "pretrain") for folder in folders]
    assert all(torch.equal(tensors[0][name], other[name]) for other in tensors[1:] for name in tensors[0])

    evaluated = [record for record in ours if record["kind"] == "eval"]
    assert all({source: len(of) for source, of in r["samples"].items()} == {"general": 2, "chem": 2} for r in evaluated)
    prompts = [[text["prompt"] for text in record["samples"]["chem"]] for record in evaluated]
    assert prompts == [prompts[0]] * len(evaluated)
    sample = evaluated[-1]["samples"]["general"][0]
    assert f"sample of general at step 10: {sample['prompt']!r} → {sample['text']!r}" in said
    board = EventAccumulator(str(folders[0] / "tensorboard")).Reload()
    assert "samples/chem/text_summary" in board.Tags()["tensors"]

    data, tokenizer = TokenDataset.open(f"{raw['sources']['general']['heldout']}"), Tokenizer.load(raw["tokenizer"])
    begin = tokens_in(data, heldout_stretches(data, "select", 200, windows=False))[: tiny.CONTEXT // 2]
    assert sample["prompt"] == tokenizer.decode(begin)
    model = GPT.from_hf(folders[0] / "weights" / "pretrain", torch.float32)
    written = model.generate(begin.tolist(), 8, temperature=0, vocab_size=tokenizer.vocab_size)[len(begin) :]
    ends = [i for i, token in enumerate(written) if token == tokenizer.eos_id] or [8]
    assert sample["text"] == tokenizer.decode(written[: ends[0]])


def test_the_base_of_a_run_ends_a_sample(raw: dict[str, Any], tmp_path: Path) -> None:
    def counting(ids_BT: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(ids_BT + 1, 280)

    tokenizer, texts = Tokenizer.load(raw["tokenizer"]), {"chem": EvalSet([(np.arange(100, 117)[None], None)])}
    phase = replace(tiny.phase(), evaluation=EvalSettings(samples=1))
    for stops, expected in (([], range(108, 116)), ([256, 110], [108, 109])):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
        (made,) = samples(counting, texts, phase, tokenizer, tmp_path)["samples"]["chem"]
        assert made == {"prompt": tokenizer.decode(range(100, 108)), "text": tokenizer.decode(expected)}


def test_samples_take_a_tokenizer_and_heldout_text(raw: dict[str, Any]) -> None:
    bare = raw | {"model": raw["model"] | {"vocab_size": 280}, "tokenizer": None}
    with pytest.raises(RecipeError, match=r"phases\[pretrain\]\.eval\.samples: needs a tokenizer to decode text with"):
        make_plan(recipe_from(bare))
    sources = {name: {"train": source["train"]} for name, source in raw["sources"].items()}
    with pytest.raises(RecipeError, match=r"phases\[pretrain\]\.eval\.samples: needs held-out text, or write 0"):
        make_plan(recipe_from(raw | {"sources": sources}))
    with pytest.raises(RecipeError, match=r"eval\.samples: -1 is invalid"):
        recipe_from(with_samples(raw, -1))
    assert refused(recipe_from(raw), recipe_from(with_samples(raw, 5))) == []
