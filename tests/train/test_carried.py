"""The files beside a base's weights are copied byte for byte to the run, its weights and its exports."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

import spt_fast as spt
from spt_fast.config import recipe_from
from spt_fast.data.hf_tokenizer import HFTokenizer
from spt_fast.data.prepare import prepare
from spt_fast.data.tokenizer import EOS, PATTERN, Tokenizer
from spt_fast.errors import CheckpointError, DataError, RecipeError, SptWarning
from spt_fast.evaluation.likelihood import TextModel
from spt_fast.evaluation.score import scored
from spt_fast.model import hf
from spt_fast.model.gpt import GPT, GPTConfig
from spt_fast.train.doubts import doubts
from spt_fast.train.evaluate import evaluation_texts
from spt_fast.train.merge import merge
from spt_fast.train.origin import Origin, origin_of
from spt_fast.train.plan import make_plan
from spt_fast.train.release import export, take_over, tokenizer_of
from spt_fast.train.run import run
from spt_fast.train.weights import read_config
from tests import hf_tokenizers, tiny
from tests.data.test_prepare import documents, write_jsonl
from tests.train.test_identity import byte_tokenizer, stop
from tests.train.test_loop import StopAfter

IDS = {"bos_token_id": 257, "eos_token_id": [256, 300], "pad_token_id": 3}
TEMPLATE = "additional_chat_templates/rag.jinja"
CARRIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", TEMPLATE)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model with more rows than its tokenizer has ids."""
    folder = hf_tokenizers.write(tmp_path / "base")
    config = GPTConfig(layers=1, width=16, heads=2, kv_heads=1, ffn=32, context=tiny.CONTEXT, vocab_size=448)
    GPT(config).save_hf(folder)
    (folder / TEMPLATE).parent.mkdir()
    (folder / TEMPLATE).write_text("{{ documents }}")
    described = json.loads((folder / "config.json").read_text()) | IDS
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "generation_config.json").write_text('{"eos_token_id": [256, 300],\n "temperature": 0.6}')
    return folder


@pytest.fixture
def raw(tmp_path: Path, base: Path) -> dict[str, Any]:
    """Two phases from the base on text of its tokenizer, which the recipe doesn't name."""
    texts = write_jsonl(tmp_path / "text.jsonl", documents(60))
    prepare(texts, tmp_path / "text", base, eos="<tool>", heldout=Fraction(1, 5), workers=1, progress=False)
    phase = tiny.raw_recipe(tmp_path)["phases"][0] | {"tokens": 10 * 8 * 16, "mixture": {"text": 1}}
    return tiny.raw_recipe(tmp_path) | {
        "init": str(base),
        "model": {},
        "sources": {"text": {"train": str(tmp_path / "text"), "heldout": str(tmp_path / "text.heldout")}},
        "phases": [phase, phase | {"name": "second"}],
    }


def carries(folder: Path, base: Path) -> bool:
    return all(
        (folder / name).read_bytes() == (base / name).read_bytes() for name in (*CARRIED, "generation_config.json")
    )


def test_a_token_that_begins_documents_is_kept_and_reported(tmp_path: Path, base: Path, raw: dict[str, Any]) -> None:
    own = Tokenizer.load(base, bos="<tool>")
    assert isinstance(own, HFTokenizer)
    origin, trained, out = Origin(own.digest, eos_id=own.eos_id, bos_id=own.bos_id), tmp_path / "tool", tmp_path / "out"
    hf.save(*hf.load(base), trained, own, metadata=origin.as_metadata(), like=base)
    with pytest.warns(SptWarning, match=r"documents began with '<tool>' in training, but the tokenizer does not add"):
        export(trained, out)
    assert "- Documents began with: `<tool>`; the tokenizer does not add it" in (out / "README.md").read_text()
    assert carries(out, base)
    assert own.bos_id != own.usual_bos_id
    begun = [TextModel.load(*given).bos for given in ((out,), (base,))]
    assert [*begun, TextModel.load(base, bos="<tool>").bos] == [own.bos_id, own.usual_bos_id, own.bos_id]
    with pytest.warns(SptWarning) as said:
        scored(out, tmp_path / "text", progress=False)
    tool = own.bos_id  # which ends the documents there
    assert [str(one.message).split("; ")[0] for one in said] == [
        f"{tmp_path / 'text'}: has eos_id {tool}, but the weights' training text has {own.eos_id}",
        f"{tmp_path / 'text'}: has bos_id None, but the weights' training text has {tool}",
    ]
    continued = doubts(make_plan(recipe_from(raw | {"init": str(trained)})))
    assert [doubt.split("; ")[0] for doubt in continued if "has eos_id" in doubt or "has bos_id" in doubt] == [
        f"sources.text.train: has {name} {this}, but the text that the weights at {trained} were trained on has {other}"
        for name, this, other in (("eos_id", tool, own.eos_id), ("bos_id", None, tool))
    ]
    ranks = byte_tokenizer(0)
    ranks.set_ends(None, EOS)
    ranks.save_hf(tmp_path / "ranks")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "ranks" / "tokenizer.json"))
    assert theirs.encode("ab").ids == ranks.prompt("ab") == [256, 97, 98]
    assert json.loads((tmp_path / "ranks" / "tokenizer_config.json").read_text())["bos_token"] == EOS
    assert Tokenizer.load(tmp_path / "ranks").digest == ranks.digest
    GPT(read_config(base)).save_hf(tmp_path / "ranks", ranks)
    shutil.copy(base / "tokenizer.json", tmp_path / "ranks")
    for use in (Tokenizer.load, tokenizer_of, partial(take_over, folder=tmp_path / "taken")):
        with pytest.raises(DataError, match=r"tokenizer: .*ranks holds two that give different ids, tokenizer\.tikt"):
            use(tmp_path / "ranks")


@pytest.mark.parametrize(("field", "value"), [("eos_id", "x"), ("eos_id", -1), ("context", "y"), ("tokenizer", 5)])
def test_metadata_of_another_type_is_named(tmp_path: Path, base: Path, field: str, value: object) -> None:
    hf.save(*hf.load(base), tmp_path / "out", metadata={"spt_fast": json.dumps({field: value})}, like=base)
    with pytest.raises(CheckpointError, match=rf"out: its metadata is damaged \({field} is {value!r}\); copy it again"):
        spt.generate(tmp_path / "out", "fox", 1)


def special_ids(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    return {field: config[field] for field in IDS}


def test_the_files_of_a_base_are_copied_to_the_run_its_weights_and_its_exports(
    tmp_path: Path, base: Path, raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    take_over(base, tmp_path / "imported")
    assert carries(tmp_path / "imported", base)
    assert special_ids(tmp_path / "imported") == IDS
    expected = tmp_path / "as_it_was"
    shutil.copytree(base, expected)
    Tokenizer.load(base).keep(tmp_path / "kept")
    assert (tmp_path / "kept" / TEMPLATE).read_text() == "{{ documents }}"
    stop(raw, monkeypatch)
    shutil.rmtree(base)
    assert run(recipe_from(raw), resume=True, progress=False)["status"] == "done"
    folder = tmp_path / "run"
    assert carries(folder, expected)
    checkpoint = next((folder / "checkpoints").glob("step-*"))
    for weights in (folder / "weights" / "pretrain", folder / "weights" / "second", folder, checkpoint):
        out = tmp_path / "out" / weights.name
        export(weights, out)
        assert carries(out, expected)
        assert special_ids(out) == IDS
    ended = (
        r"documents ended with '<tool>' \(402\) in training, .* end a text with \[256, 300\]; add it to eos_token_id"
    )
    with pytest.warns(SptWarning, match=ended):
        export(folder, tmp_path / "ended")
    assert "- Documents ended with: `<tool>`; the base's settings do not" in (tmp_path / "ended/README.md").read_text()
    own = Tokenizer.load(expected, eos="<tool>")
    origin = origin_of(folder)
    assert (origin.tokenizer, origin.eos_id, origin.bos_id) == (own.digest, own.eos_id, None)
    assert origin_of(checkpoint).eos_id == own.eos_id
    exported = tokenizer_of(tmp_path / "out" / "second")
    assert exported is not None
    assert exported.eos_id == own.eos_id, "that of the data"
    prompt = f"<tool>{hf_tokenizers.BOS}the fox"
    text = spt.generate(folder, prompt, 4, temperature=0)[0].text
    assert text.startswith(prompt), "its tokens are read out of a prompt, and shown"
    assert spt.generate(tmp_path / "out" / "second", prompt, 4, temperature=0)[0].text == text
    assert scored(tmp_path / "out" / "second", tmp_path / "text.heldout").same_tokenizer
    again = raw | {"run": str(tmp_path / "again"), "init": str(folder / "weights" / "second")}
    plan = make_plan(recipe_from(again))
    assert plan.tokenizer is not None
    assert plan.tokenizer.digest == own.digest
    from_checkpoint = recipe_from(again | {"init": str(checkpoint), "phases": raw["phases"][:1]})
    run(from_checkpoint, progress=False)
    assert carries(tmp_path / "again" / "weights" / "pretrain", expected)
    assert special_ids(tmp_path / "again" / "weights" / "pretrain") == IDS


def test_a_tokenizer_that_export_is_told_replaces_the_files_of_the_base(tmp_path: Path, base: Path) -> None:
    mine, out = tmp_path / "mine", tmp_path / "out"
    mine.mkdir()
    content = json.loads((base / "tokenizer_config.json").read_text())
    (mine / "tokenizer_config.json").write_text(json.dumps(content | {"chat_template": "{{ mine }}"}))
    (mine / "tokenizer.json").write_text(json.dumps(json.loads((base / "tokenizer.json").read_text()), indent=1))
    export(base, out, mine)
    assert (out / "tokenizer.json").read_bytes() == (mine / "tokenizer.json").read_bytes()
    assert (out / "tokenizer_config.json").read_bytes() == (mine / "tokenizer_config.json").read_bytes()
    assert (out / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    assert not (out / "chat_template.jinja").exists(), "transformers would take it instead of the other one"
    assert not (out / TEMPLATE).exists()
    (mine / "tokenizer_config.json").unlink()
    export(base, out, mine, overwrite=True)
    assert (out / "tokenizer.json").read_bytes() == (mine / "tokenizer.json").read_bytes()
    shutil.copy(base / "tokenizer.json", out)
    assert carries(out, base), "beside a tokenizer.json alone"


def test_a_run_continues_with_its_own_copies_when_the_base_has_changed(
    tmp_path: Path, base: Path, raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, own = read_config(base), Tokenizer.load(base).digest
    stop(raw, monkeypatch)
    config = json.loads((base / "config.json").read_text())
    other = {"rope_theta": 5e5, "rope_parameters": None, "rms_norm_eps": 1e-3, "max_position_embeddings": 64}
    (base / "config.json").write_text(json.dumps(config | other))
    content = json.loads((base / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (base / "tokenizer.json").write_text(json.dumps(content))
    assert run(recipe_from(raw), resume=True, progress=False)["status"] == "done"
    assert read_config(tmp_path / "run" / "weights" / "second") == shape
    assert Tokenizer.load(tmp_path / "run").digest == own


def test_settings_of_the_base_may_be_written_in_the_recipe_or_left_out(
    tmp_path: Path, base: Path, raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = raw["phases"]
    out = [first | {"batch": first["batch"] | {"context": tiny.CONTEXT}}, second]
    written = raw | {"tokenizer": str(base), "model": {"width": 16, "context": tiny.CONTEXT}, "phases": out}
    stop(raw, monkeypatch)
    shorter = [first | {"batch": first["batch"] | {"context": 8}}, second]
    for changes, says in (
        ({"phases": shorter}, rf"phases\.0\.batch\.context: {tiny.CONTEXT} → 8 "),
        ({"model": {"width": 32}}, r"model\.width: 16 → 32 "),
        ({"tokenizer": str(hf_tokenizers.write(tmp_path / "nfc", "nfc"))}, r"^tokenizer: .*nfc is not "),
    ):
        with pytest.raises(RecipeError, match=says):
            run(recipe_from(written | changes), resume=True, progress=False)
    assert run(recipe_from(written), resume=True, progress=False)["status"] == "done"
    shutil.rmtree(base)
    assert run(recipe_from(raw), resume=True, progress=False)["status"] == "done"
    with pytest.raises(RecipeError, match=r"^tokenizer: .*nfc is not "):
        run(recipe_from(raw | {"tokenizer": str(tmp_path / "nfc")}), resume=True, progress=False)


def test_a_base_with_a_separate_head_stays_untied(
    tmp_path: Path, base: Path, raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    GPT(replace(read_config(base), tied=False)).save_hf(base)
    first, second = raw["phases"]
    frozen = first | {"freeze": "embeddings", "tokens": 8 * 16}
    raw["phases"] = [frozen, second | {"untie": True}]
    with monkeypatch.context() as patch:
        patch.setattr("spt_fast.train.run.StopRequest", StopAfter)
        StopAfter.looks = 50
        assert run(recipe_from(raw), progress=False)["status"] == "stopped"
    assert (tmp_path / "run" / "weights" / "pretrain").exists()
    assert run(recipe_from(raw), resume=True, progress=False)["status"] == "done"


def test_a_base_knows_its_tokenizer(tmp_path: Path, base: Path, raw: dict[str, Any]) -> None:
    assert scored(base, tmp_path / "text.heldout").same_tokenizer
    ranks = Tokenizer({bytes([byte]): byte for byte in range(256)}, PATTERN, {EOS: 256})
    for kind, tokenizer in (("ranks", ranks), ("nfc", hf_tokenizers.write(tmp_path / "nfc", "nfc"))):
        prepare(tmp_path / "text.jsonl", tmp_path / kind, tokenizer, workers=1, progress=False)
        wrong = raw | {"sources": {"text": raw["sources"]["text"] | {"train": str(tmp_path / kind)}}}
        says = r"init: .*base were trained with another tokenizer .* than sources\.text\.train .*`tokenizer=.*base"
        with pytest.raises(RecipeError, match=says):
            make_plan(recipe_from(wrong))
        with pytest.raises(DataError, match="was made with another tokenizer"):
            scored(base, tmp_path / kind)
    with pytest.raises(RecipeError, match=r"init: .* than the recipe's tokenizer .*nfc .*leave `tokenizer` out"):
        make_plan(recipe_from(raw | {"tokenizer": str(tmp_path / "nfc")}))
    assert make_plan(recipe_from(raw | {"tokenizer": str(base / "tokenizer.json")})).tokenizer is not None
    prepare(tmp_path / "text.jsonl", tmp_path / "other", base, workers=1, progress=False)
    wrong = raw | {"sources": {"text": raw["sources"]["text"] | {"train": str(tmp_path / "other")}}}
    with pytest.raises(DataError, match=r"sources\.text\.heldout: .* has eos_id .*sources\.text\.train has"):
        make_plan(recipe_from(wrong))

    (tmp_path / "data").mkdir()
    with pytest.raises(CheckpointError, match=r"data/config\.json: no such file; a Hugging Face model folder has one"):
        spt.generate(tmp_path / "data", "fox", 1)
    (base / "tokenizer.json").rename(tmp_path / "kept")
    foreign = make_plan(recipe_from(raw))
    assert foreign.tokenizer is None, "nothing is known"
    says = f"init: {base} neither records nor holds a tokenizer, so whether its weights were trained with that of the"
    assert [doubt.startswith(says) for doubt in doubts(foreign) if "a tokenizer" in doubt] == [True]
    (tmp_path / "kept").rename(base / "tokenizer.json")
    assert not [doubt for doubt in doubts(make_plan(recipe_from(raw))) if "a tokenizer" in doubt]
    (base / "tokenizer.json").rename(tmp_path / "kept")
    (base / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(
        DataError, match=r"tokenizer: .*base/tokenizer.model belongs to a slow tokenizer, .*save_pretrained"
    ):
        spt.generate(base, "fox", 1)
    with pytest.raises(CheckpointError, match=r"gone/base: is not a folder; .*`hf download gone/base"):
        make_plan(recipe_from(raw | {"init": "gone/base"}))


@pytest.mark.parametrize("content", ["[", "[]", '{"eos_token_id": "<end>"}'])
def test_settings_of_a_base_that_end_no_text_are_refused_before_training(
    tmp_path: Path, base: Path, raw: dict[str, Any], content: str
) -> None:
    (base / "generation_config.json").write_text(content)
    says = r"base/generation_config\.json: (cannot be read|holds \[\] instead of|eos_token_id: '<end>' is)"
    with pytest.raises(CheckpointError, match=f"^init: .*{says}"):
        make_plan(recipe_from(raw))
    with pytest.raises(CheckpointError, match=says):
        take_over(base, tmp_path / "taken")


def test_a_base_whose_tokenizer_has_more_ids_than_rows_is_used_with_text_that_lacks_them(
    tmp_path: Path, base: Path, raw: dict[str, Any]
) -> None:
    larger = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json"))
    larger.add_tokens([f"<{i}>" for i in range(47)])
    larger.save(str(base / "tokenizer.json"))
    says = r"has ids beyond the 448 rows of the weights, 448 \('<45>'\), 449 \('<46>'\); text that holds one is refused"
    prepare(tmp_path / "text.jsonl", tmp_path / "text", base, heldout=Fraction(1, 5), workers=1, progress=False)
    raw["phases"] = [raw["phases"][0] | {"tokens": 2 * 8 * 16}]
    (doubt,) = [doubt for doubt in doubts(make_plan(recipe_from(raw))) if "beyond" in doubt]
    assert re.match(rf"init: its tokenizer {says}", doubt)
    assert run(recipe_from(raw), progress=False)["status"] == "done"
    for use in (
        partial(take_over, folder=tmp_path / "taken"),
        partial(export, folder=tmp_path / "out"),
        lambda weights: merge([weights, base], [1, 1], tmp_path / "merged"),
    ):
        with pytest.warns(SptWarning, match=rf"tokenizer: \S+tokenizer.json {says}"):
            use(tmp_path / "run" / "weights" / "pretrain")
    for weights in (base, tmp_path / "run", tmp_path / "merged", tmp_path / "taken"):
        with pytest.warns(SptWarning, match=says):
            assert spt.generate(weights, "fox <44>", 2, temperature=0)[0].text.startswith("fox <44>")
        with pytest.raises(DataError, match=r"text holds '<45>', id 448, but the weights have rows for 448 ids: leave"):
            spt.generate(weights, "fox <45>", 2)
    model = TextModel.load(base)
    for ask in (
        lambda text: model.likelihoods([model.pair("fox", text)]),
        lambda text: model.continuations([text], [], 2),
    ):
        ask("<44>")
        with pytest.raises(DataError, match=r"text holds '<46>', id 449, but the weights have rows for 448 ids"):
            ask("<46>")
    write_jsonl(tmp_path / "more.jsonl", ["fox <45>", *documents(60)])
    prepare(tmp_path / "more.jsonl", tmp_path / "text", base, workers=1, progress=False)
    with pytest.raises(DataError, match=r"text: holds token id 448, the model's .* without tokens that they lack"):
        scored(base, tmp_path / "text")
    with pytest.raises(DataError, match=r"sources\.text\.train: .* holds token id 448, outside the vocabulary of 448"):
        make_plan(recipe_from(raw | {"sources": {"text": {"train": str(tmp_path / "text")}}}))
    other = hf_tokenizers.write(tmp_path / "nfc", "nfc")
    for use in (spt.generate, export):
        with pytest.raises(CheckpointError, match=r"nfc .* is not the one that the weights at .* were trained with"):
            use(tmp_path / "run", *([tmp_path / "again"] if use is export else ["fox", 1]), tokenizer=other)


def test_an_unreadable_tokenizer_of_a_base_is_copied_with_a_warning(tmp_path: Path, base: Path) -> None:
    (base / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1")
    says = r"base/tokenizer\.json: is damaged, .* run `git lfs pull`; until then no text can be prepared or generated"
    for use in (
        partial(take_over, folder=tmp_path / "taken"),
        partial(export, folder=tmp_path / "out"),
        lambda weights: merge([weights, weights], [1, 1], tmp_path / "merged"),
    ):
        with pytest.warns(SptWarning, match=says):
            use(base)
    assert all(carries(tmp_path / name, base) for name in ("taken", "out", "merged"))
    with pytest.raises(DataError, match=r"base/tokenizer\.json: is damaged"):
        spt.generate(base, "fox", 1)


def test_a_fresh_model_on_a_hugging_face_tokenizer(tmp_path: Path, base: Path, raw: dict[str, Any]) -> None:
    fresh = {"init": None, "tokenizer": str(base), "model": tiny.raw_recipe(tmp_path)["model"]}
    run(recipe_from(raw | fresh | {"phases": raw["phases"][:1]}), progress=False)
    shutil.rmtree(base)
    weights = tmp_path / "run" / "weights" / "pretrain"
    export(tmp_path / "run", tmp_path / "out")
    for folder in (tmp_path / "run", weights, tmp_path / "out"):
        assert all((folder / name).exists() for name in CARRIED)
        assert not (folder / "generation_config.json").exists()
    tool = Tokenizer.load(weights).named_tokens()["<tool>"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == tool
    assert spt.generate(tmp_path / "run", "fox", 2, temperature=0)[0].text.startswith("fox")


def test_an_id_outside_a_base_is_refused_with_its_tokenizer_as_the_remedy(
    tmp_path: Path, base: Path, raw: dict[str, Any]
) -> None:
    np.arange(4000, dtype=np.uint16).tofile(tmp_path / "foreign.bin")
    foreign = raw | {"sources": {"text": {"train": str(tmp_path / "foreign.bin"), "dtype": "uint16"}}}
    plan = make_plan(recipe_from(foreign))
    with pytest.raises(
        DataError, match=r"sources\.text\.train: .*the tokenizer of the weights at .*base, without .*, or correct"
    ):
        evaluation_texts(plan, plan.recipe.phases[0])
