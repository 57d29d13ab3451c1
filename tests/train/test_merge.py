"""Averages of weights: their values, what they keep of their parts, and models that have none."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import spt_fast as spt
from spt_fast import cli
from spt_fast.errors import CheckpointError, RecipeError, SptWarning
from spt_fast.model import hf
from spt_fast.model.gpt import GPT, GPTConfig
from spt_fast.train import weights as stored
from spt_fast.train.card import model_card
from spt_fast.train.merge import merge
from spt_fast.train.origin import History, Origin, Part, PhaseFacts, origin_of
from spt_fast.train.release import export, take_over, tokenizer_of
from tests.train.test_identity import byte_tokenizer

SHAPE: dict[str, Any] = {
    **{"layers": 1, "width": 16, "heads": 2, "kv_heads": 1, "ffn": 32, "context": 32, "vocab_size": 257},
    "qk_norm": True,
}


def write(folder: Path, seed: int, origin: Origin | None = None, dtype: Any = None, **shape: Any) -> dict[str, Tensor]:
    model = GPT(GPTConfig(**SHAPE | shape), seed=seed).to(dtype)
    named = {name: param.detach().clone() for name, param in model.named_parameters()}
    known = (origin or Origin(byte_tokenizer().digest, documents=True, dtype="float32")).as_metadata()
    hf.save(model.config, named, folder, byte_tokenizer(), None, known)
    return named


def test_every_number_is_averaged_and_the_origin_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    a, b = write(Path("a"), 1), write(Path("b"), 2, Origin())
    words = ["merge", "a", "--weights", "0.9", "10%", "b", "--out", "out"]
    monkeypatch.setattr(sys, "argv", ["spt-fast", *words])
    cli.app(standalone_mode=False)
    assert "9/10" in capsys.readouterr().out
    config, found = hf.load("out")
    assert config == GPTConfig(**SHAPE)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, 0.9 * a[name] + 0.1 * b[name])
    origin = origin_of(Path("out"))
    assert (origin.tokenizer, origin.documents, origin.dtype) == (byte_tokenizer().digest, True, "float32")
    assert [(part.path, part.share) for part in origin.merged] == [("a", "9/10"), ("b", "1/10")]
    assert [part.digest for part in origin.merged] == [stored.digest_of(Path(name)) for name in ("a", "b")]
    card = Path("out/README.md").read_text()
    assert all(f"| `{part.path}` | {part.share} | `{part.digest}` |" in card for part in origin.merged)
    assert tokenizer_of(Path("out"))
    assert spt.generate(Path("out"), "ab", 3, temperature=0)[0].text.startswith("ab")

    merge([Path("a")] * 3, [1, 2, "5"], Path("same"))
    assert all(torch.equal(tensor, a[name]) for name, tensor in hf.load("same")[1].items())
    c = write(Path("c"), 3)
    merge([Path("a"), Path("b"), Path("c")], [1, 2, 5], Path("three"))
    for name, tensor in hf.load("three")[1].items():
        torch.testing.assert_close(tensor, (a[name] + 2 * b[name] + 5 * c[name]) / 8)
    assert merge([Path("a"), Path("out")], ["3/4", Fraction(1, 4)], Path("again"), dtype="bf16")[0] == Fraction(3, 4)
    assert {tensor.dtype for tensor in hf.load("again")[1].values()} == {torch.bfloat16}
    with pytest.raises(CheckpointError, match="of another model"):
        merge([Path("a"), Path("b")], [1, 1], Path("again"))
    with pytest.raises(CheckpointError, match=r"^dtype: 'int8' is invalid: write fp32, bf16, fp16"):
        merge([Path("a"), Path("b")], [1, 1], Path("other"), dtype="int8")
    assert not Path("other").exists()


def test_an_average_is_made_in_float32_and_stored_as_the_first(tmp_path: Path) -> None:
    a = write(tmp_path / "a", 1, dtype=torch.bfloat16)
    b = write(tmp_path / "b", 2)
    merge([tmp_path / "a", tmp_path / "b"], [0.9, 0.1], tmp_path / "out")
    for name, tensor in hf.load(tmp_path / "out")[1].items():
        assert torch.equal(tensor, a[name].float().lerp(b[name], 0.1).bfloat16())
    GPT.with_weights(GPTConfig(**SHAPE), {name: tensor * 1e7 for name, tensor in b.items()}).save_hf(tmp_path / "large")
    with pytest.raises(CheckpointError, match=r"^dtype: float16 is invalid: it cannot hold the .* in .*; use bf16"):
        merge([tmp_path / "large"] * 2, [1, 1], tmp_path / "half", dtype="fp16")
    assert not (tmp_path / "half").exists()


def test_numbers_that_are_not_finite_are_named_in_copies_and_not_averaged(tmp_path: Path) -> None:
    weights = write(tmp_path / "a", 1)
    for name, number in (("blocks.0.w_down", float("nan")), ("final_norm", float("-inf"))):
        weights[name].view(-1)[-1] = number
    known, says = (
        Origin(byte_tokenizer().digest).as_metadata(),
        "2 tensors hold .*, model.norm.weight first",
    )
    with pytest.warns(SptWarning, match=f"b: {says}"):
        hf.save(GPTConfig(**SHAPE), weights, tmp_path / "b", byte_tokenizer(), None, known)
    for copy, out in ((export, "exported"), (take_over, "taken")):
        with pytest.warns(SptWarning, match=f"{out}: {says}") as said:
            copy(tmp_path / "b", tmp_path / out)
        assert len(said) == 1
        assert hf.load(tmp_path / out)[1]["final_norm"][-1] == float("-inf")
    merge([tmp_path / "a"] * 2, [1, 1], tmp_path / "out")
    before = (tmp_path / "out" / hf.WEIGHTS).read_bytes()
    with pytest.raises(CheckpointError, match=r"b: final_norm holds NaN or infinite numbers, .*; leave this model out"):
        merge([tmp_path / "a", tmp_path / "b"], [1, 1], tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / hf.WEIGHTS).read_bytes() == before
    large = {name: torch.full_like(tensor, 3.4e38) for name, tensor in weights.items()}
    with pytest.warns(SptWarning, match="hold NaN or infinite numbers"):  # 3.4e38 is more than bfloat16 has
        hf.save(GPTConfig(**SHAPE), large, tmp_path / "large", dtype=torch.bfloat16)


def test_the_card_of_an_average_says_how_every_model_was_trained(tmp_path: Path) -> None:
    def trained(base: str) -> Origin:
        phase = PhaseFacts("tune", 64, {"chem": "1"}, 1e-3, "adamw", 0.0, "0", {"chem": 2.0}, {})
        return Origin(byte_tokenizer().digest, history=History(base, {"init": f"of {base}"}, {}, [phase]))

    for seed, name in enumerate("abc"):
        write(tmp_path / name, seed, trained(f"base-{name}") if name != "c" else None)
    merge([tmp_path / "a", tmp_path / "b"], [1, 3], tmp_path / "ab")
    merge([tmp_path / "c", tmp_path / "ab"], [1, 1], tmp_path / "all")
    card = (tmp_path / "all" / "README.md").read_text()
    headings = [line for line in card.splitlines() if line.startswith("## ")][1:]
    assert headings == [
        *("## Average", "## Training of `c`", "## Average of `ab`", "## Training of `a`", "## Training of `b`"),
    ]
    assert all(f"Base: `base-{name}` (`of base-{name}`)." in card for name in "ab")
    assert f"| `b` | 3/4 | `{stored.digest_of(tmp_path / 'b')}` |" in card
    assert "## Training of `c`\n\nNot recorded." in card
    assert origin_of(tmp_path / "all").merged[1].merged[0].history == trained("base-a").history
    with pytest.raises(RecipeError, match=r"^weights: 'a \(1\)' is a whole number \(1\), .* but 'a \(2\)' is a share"):
        merge([Path("a"), Path("a")], [1, 0.5], tmp_path / "out")


def test_a_card_shows_names_as_they_are() -> None:
    origin = Origin(merged=[Part("a`|b", "d", "1/2")], history=History("<i>", {}, {}, []))
    card = model_card("*m* <b>", origin, GPTConfig(**SHAPE), torch.float32)
    assert "\n# \\*m\\* \\<b\\>\n" in card
    assert "| `` a`\\|b `` | 1/2 | `d` |" in card
    assert "Base: `<i>` (`unknown`)" in card


def test_a_tied_head_is_averaged_as_the_embedding(tmp_path: Path) -> None:
    base, tuned = write(tmp_path / "base", 1), write(tmp_path / "tuned", 2, tied=False)
    for order in (("tuned", "base"), ("base", "tuned")):
        merge([tmp_path / name for name in order], [1, 1], tmp_path / "-".join(order))
        config, found = hf.load(tmp_path / "-".join(order))
        assert not config.tied
        torch.testing.assert_close(found["head"], (base["embedding"] + tuned["head"]) / 2)
        torch.testing.assert_close(found["embedding"], (base["embedding"] + tuned["embedding"]) / 2)


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        ([0.9], r"^weights: '0.9' is invalid: give a weight for each of the 2 models"),
        ([0.9, 0.2], "^weights: the shares of a, b sum to 11/10 .* 1/10 is too much"),
        (["0.1", "0.2"], "^weights: .* 7/10 is missing"),
        ([1, 0], r"^weights\[b\]: 0 is invalid: write a weight above 0"),
        (["1.0", "0%"], r"^weights\[b\]: '0%' is invalid: write a weight above 0"),
        ([1, "0.5"], r"^weights: 'a' is a whole number \(1\), .* but 'b' is a share \('0.5'\)"),
        (["nan", "1.0"], r"^weights\[a\]: 'nan' is invalid"),
        ([-1, 2], r"^weights\[a\]: -1 is invalid"),
        ([float("inf"), 0.5], r"^weights\[a\]: inf is invalid"),
    ],
)
def test_invalid_weights_of_an_average_are_refused(tmp_path: Path, weights: list[Any], problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        merge([Path("a"), Path("b")], weights, tmp_path / "out")
    with pytest.raises(RecipeError, match=r"^models: 1 is invalid: give at least two"):
        merge([tmp_path / "a"], [1], tmp_path / "out")


def test_models_that_cannot_be_averaged_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a", 1)
    for field, value in (("ffn", 48), ("rope_theta", 500.0), ("layers", 2), ("context", 64)):
        write(tmp_path / field, 1, **{field: value})
        with pytest.raises(
            CheckpointError, match=rf"{field}: {field} is {value}, but {SHAPE.get(field, 10000.0)} in \S+a;"
        ):
            merge([tmp_path / "a", tmp_path / field], [1, 1], tmp_path / "out")
    write(tmp_path / "foreign", 1, Origin("0123456789abcdef"))
    with pytest.raises(CheckpointError, match=r"foreign: has another tokenizer \(0123456789ab\) than \S+a "):
        merge([tmp_path / "a", tmp_path / "foreign"], [1, 1], tmp_path / "out")
    assert not (tmp_path / "out").exists()
