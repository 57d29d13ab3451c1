"""Generated text: many prompts, files of prompts, and the end of a text."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import spt_fast as spt
from spt_fast import cli
from spt_fast.errors import CheckpointError, DataError
from spt_fast.evaluation.likelihood import TextModel
from spt_fast.model.gpt import GPT, GPTConfig
from spt_fast.train import release
from spt_fast.train.prompts import read_prompts
from tests.train.test_identity import byte_tokenizer


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Weights with large logits, which often end a text."""
    shape = GPTConfig(layers=1, width=16, heads=2, kv_heads=1, ffn=32, context=64, vocab_size=257)
    model = GPT(shape, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() == 2 else 1)
        model.embedding[256] *= 5
    model.save_hf(tmp_path / "hf", byte_tokenizer(0))
    return tmp_path / "hf"


def test_prompts_are_continued_as_each_alone(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["ab", "", "a longer prompt", "ab", "c"]
    alone = [spt.generate(weights, prompt, 30, temperature=1.0, top_k=9, seed=2)[0].text for prompt in prompts]
    monkeypatch.setattr(release, "AT_A_TIME", 2)
    together = list(release.generate_texts(weights, iter(prompts), 30, top_k=9, seed=2))
    assert release.generate_text(weights, prompts[0], 30, top_k=9, seed=2) == together[0].text
    assert [one.text for one in together] == alone
    assert [one.prompt for one in together] == prompts
    assert all(one.ended == (one.new_tokens < 30) for one in together)
    assert any(one.ended for one in together)
    assert all("<|endoftext|>" not in one.text for one in together)
    numpy: dict[str, Any] = {"tokens": np.int64(30), "top_k": np.int64(9), "seed": np.uint32(2)}
    assert spt.generate(weights, prompts[:1], temperature=1.0, **numpy) == together[:1]
    file = weights / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts[1:]))
    words = ["generate", weights, "--prompt", "ab", "--prompts", file, "--tokens", 30, "--top-k", 9, "--seed", 2]
    words += ["--temperature", "1"]

    def said(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["spt-fast", *map(str, words), *flags])
        cli.app(standalone_mode=False)
        return capsys.readouterr().out

    found: list[dict[str, Any]] = json.loads(said("--json"))
    assert found == [vars(one) for one in together]
    assert said() == "\n---\n\n".join(f"{text}\n" for text in alone)


def test_the_settings_of_a_base_end_a_text_as_in_transformers(weights: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, tokenizer, given = GPT.from_hf(weights), byte_tokenizer(0), b"ab"
    model.untie()
    with torch.no_grad():
        model.get_parameter("head").copy_(torch.randn(257, 16, generator=torch.Generator().manual_seed(1)))
    model.save_hf(weights, tokenizer)
    whole = model.generate([*given], 9, temperature=0)[len(given) :]
    assert len({*whole[:6], 256}) == 7
    (before,) = release.generate_texts(weights, [given.decode()], 9, temperature=0)
    assert not before.ended
    (weights / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, whole[5]]}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(weights)
    assert (
        theirs.generate(torch.tensor([[*given]]), do_sample=False, max_new_tokens=9)[0, len(given) :].tolist()
        == whole[:6]
    )
    (ended,) = release.generate_texts(weights, [given.decode()], 9, temperature=0)
    assert (ended.text, ended.new_tokens, ended.ended) == (tokenizer.decode([*given, *whole[:5]]), 6, True)
    ends = release.ends_of(weights, tokenizer)
    asked = TextModel(model, tokenizer, stops=ends)
    assert asked.continuations([given.decode()], [], 9) == [tokenizer.decode(whole[:5])]
    assert TextModel.load(weights)._stops == asked._stops
    (weights / "generation_config.json").write_text('{"eos_token_id": [256, "<end>"]}')
    with pytest.raises(
        CheckpointError, match=r"generation_config.json: eos_token_id: .* a token id, or a list of some"
    ):
        spt.generate(weights, "ab", 1)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\r\n\n two \n", ["one", " two "]),
        ("a.jsonl", '\ufeff{"prompt": "a\\nb"}\n\n{"prompt": "", "id": 3}\n', ["a\nb", ""]),
        ("a.txt", "\n", r"^prompts: \S+ is empty"),
        ("a.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', r"^prompts: \S+, line 2: has no text under 'prompt'"),
        ("a.jsonl", '["a"]\n', r"line 1: has no text under 'prompt'"),
        ("a.jsonl", "a\n", r"line 1: is not JSON"),
        ("a.txt", b"\xff\xfe", r"^prompts: \S+ cannot be read"),
        ("a.txt", None, r"^prompts: \S+ cannot be read"),
        ("a\ud800", None, r"^prompts: \S+ cannot be read"),
        ("a\0", None, r"^prompts: \S+ cannot be read"),
    ],
)
def test_files_of_prompts(tmp_path: Path, name: str, content: Any, expected: Any) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if isinstance(expected, list):
        assert read_prompts(tmp_path / name) == expected
    else:
        with pytest.raises(DataError, match=expected):
            read_prompts(tmp_path / name)
