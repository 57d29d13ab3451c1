"""The inputs of a run are identified by content: paths may change; text, tokenizer and weights may not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spt_fast as spt
from spt_fast.config import recipe_from
from spt_fast.data.heldout import begins
from spt_fast.data.hf_tokenizer import HFTokenizer
from spt_fast.data.shards import TokenDataset
from spt_fast.data.tokenizer import EOS, PATTERN, Tokenizer
from spt_fast.errors import CheckpointError, DataError, RecipeError, SptWarning
from spt_fast.evaluation.score import scored
from spt_fast.model.gpt import GPT
from spt_fast.train.audit import audit_document, audit_run
from spt_fast.train.evaluate import EvalSet, measure
from spt_fast.train.folder import recipe_of
from spt_fast.train.lineage import parent_of
from spt_fast.train.plan import make_plan
from spt_fast.train.release import export, take_over, tokenizer_of
from spt_fast.train.run import run
from spt_fast.train.state import KnownText
from tests import tiny
from tests.train.test_loop import StopAfter


def byte_tokenizer(shift: int = 0) -> Tokenizer:
    """One token per byte; with another shift the same ids mean other text."""
    return Tokenizer({bytes([byte]): (byte + shift) % 256 for byte in range(256)}, PATTERN, {EOS: 256})


def raw_recipe(folder: Path, name: str = "run") -> dict[str, Any]:
    """A recipe with a tokenizer, whose corpora are in the folder too."""
    byte_tokenizer().save(folder / "bytes.tiktoken")
    for seed, source in enumerate(("general", "general.heldout", "chem", "chem.heldout")):
        tiny.write_dataset(folder / source, seed, 900, vocab=257, tokenizer_digest=byte_tokenizer().digest)
    raw = tiny.raw_recipe(folder, name)
    raw["phases"] = [raw["phases"][0] | {"tokens": 12 * 8 * 16}]
    return raw | {"tokenizer": str(folder / "bytes.tiktoken")}


def stop(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("spt_fast.train.run.StopRequest", StopAfter)
        StopAfter.looks = 20
        assert run(recipe_from(raw), progress=False)["status"] == "stopped"


def in_bytes(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Replace a file without changing its size and time."""
    times = path.stat()
    path.write_bytes(change(path.read_bytes()))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_run_continues_with_its_data_at_another_path_and_refuses_other_data_at_the_same_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = tmp_path / "start"
    run(recipe_from(raw_recipe(tmp_path) | {"run": str(start)}), progress=False)
    raw = raw_recipe(tmp_path, "whole") | {"init": str(start / "weights" / "pretrain"), "model": {}}
    run(recipe_from(raw | {"init": str(start)}), progress=False)
    assert parent_of(tmp_path / "whole", recipe_of(tmp_path / "whole")) == (start, "pretrain")
    carried = make_plan(recipe_from(raw | {"tokenizer": None})).tokenizer
    assert carried is not None, "that of the weights"
    assert carried.digest == byte_tokenizer().digest
    byte_tokenizer(1).save(tmp_path / "other.tiktoken")
    unknown = str(tiny.write_dataset(tmp_path / "unknown", 1, 900, vocab=257))
    other = {source: {"train": unknown, "heldout": unknown} for source in raw["sources"]}
    with pytest.raises(RecipeError, match=r"init: the weights at .* were trained with another tokenizer"):
        make_plan(recipe_from(raw | {"tokenizer": str(tmp_path / "other.tiktoken"), "sources": other}))
    raw["run"] = str(tmp_path / "moved")
    stop(raw, monkeypatch)

    for name, field in (("chem.bin", "train"), ("chem.heldout.bin", "heldout"), ("chem.idx", "train")):
        before = (tmp_path / name).read_bytes()
        in_bytes(tmp_path / name, lambda data: data[:64] + data[66:64:-1] + data[66:])
        with pytest.raises(DataError, match=rf"sources\.chem\.{field}: .* is damaged"):
            run(recipe_from(raw), resume=True, progress=False)
        in_bytes(tmp_path / name, lambda _, data=before: data)
    byte_tokenizer(1).save(tmp_path / "bytes.tiktoken")
    with pytest.raises(RecipeError, match=r"tokenizer: .* is not .*moved/tokenizer"):
        run(recipe_from(raw), resume=True, progress=False)
    byte_tokenizer(1).save(tmp_path / "moved" / "tokenizer.tiktoken")
    with pytest.raises(DataError, match="another tokenizer"):
        run(recipe_from(raw), resume=True, progress=False)
    byte_tokenizer().save(tmp_path / "moved" / "tokenizer.tiktoken")
    weights = start / "weights" / "pretrain" / "model.safetensors"
    (tmp_path / "bytes.tiktoken").unlink()
    in_bytes(weights, lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DataError, match=r"init: holds other weights than when .*step-"):
        run(recipe_from(raw), resume=True, progress=False)
    with pytest.raises(DataError, match=r"init: holds other weights than when .*summary\.json"):
        run(recipe_from(raw | {"run": str(tmp_path / "whole")}), resume=True, progress=False)
    with pytest.raises(CheckpointError, match=r"the run .*start holds other weights now"):
        parent_of(tmp_path / "whole", recipe_of(tmp_path / "whole"))

    store = tmp_path / "store"
    store.mkdir()
    for path in [*tmp_path.glob("general*"), *tmp_path.glob("chem*")]:
        path.rename(store / path.name)
    shutil.rmtree(start)
    with pytest.raises(DataError, match="no token dataset"):
        run(recipe_from(raw), resume=True, progress=False)
    raw["sources"] = {
        name: source | {field: str(store / Path(source[field]).name) for field in ("train", "heldout")}
        for name, source in raw["sources"].items()
    }
    raw["sources"]["chem"]["train"] = [raw["sources"]["chem"]["train"]]
    assert run(recipe_from(raw), resume=True, progress=False)["data"].keys() >= {"init", "tokenizer"}
    assert tiny.metrics(tmp_path / "moved") == tiny.metrics(tmp_path / "whole")
    for field in ("train", "heldout"):
        others = raw["sources"] | {"chem": raw["sources"]["chem"] | {field: raw["sources"]["general"][field]}}
        with pytest.raises(DataError, match=rf"sources\.chem\.{field}: holds other text than when .*summary\.json"):
            run(recipe_from(raw | {"sources": others}), resume=True, progress=False)
    tiny.write_dataset(store / "chem", 9, 900, vocab=257, tokenizer_digest=byte_tokenizer().digest)
    with pytest.raises(DataError, match=r"sources\.chem\.train: holds other text than when .*summary\.json"):
        run(recipe_from(raw), resume=True, progress=False)


def test_a_quick_check_hashes_some_blocks_and_says_what_it_did_not_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spt_fast.data.writer.BLOCK_BYTES", 200)
    raw = raw_recipe(tmp_path)
    plan = make_plan(recipe_from(raw))
    data = plan.texts["sources.general.train"]
    assert len(data.metadata["blocks_sha256"]) > 8  # type: ignore[index]
    assert (data.verify(), data.verify(most_blocks=4)) == (True, False)
    assert plan.check_files(plan.known_texts(), verify=False) == plan.check_files(None, verify=False) == []
    rewritten = {field: KnownText(text.tokens, 0) for field, text in plan.known_texts().items()}
    said = plan.check_files(rewritten, verify=False)
    assert len(said) == 4
    assert "sources.chem.train: only parts of" in said[2] + said[1]
    assert plan.check_files(rewritten, verify=True) == []
    in_bytes(tmp_path / "general.bin", lambda data: data[:250] + bytes([data[250] ^ 1]) + data[251:])
    assert plan.check_files(None, verify=False) == []
    with pytest.raises(DataError, match="block 1 of"):
        plan.check_files(None, verify=True)
    parts = [tiny.write_dataset(tmp_path / "parts" / str(seed), seed, 900) for seed in range(5)]
    joined = TokenDataset.open(tmp_path / "parts")
    assert (joined.verify(), joined.verify(most_blocks=200), joined.verify(most_blocks=4)) == (True, True, False)
    in_bytes(parts[-1].with_suffix(".bin"), lambda data: bytes([data[0] ^ 1]) + data[1:])
    for most in (None, 200, 4):
        with pytest.raises(DataError, match=r"4\.bin: is damaged: block 0 of"):
            joined.verify(most)
    np.save(tmp_path / "ids.npy", np.arange(3_000_000, dtype=np.uint16))
    foreign = TokenDataset.open(tmp_path / "ids.npy")
    assert (foreign.verify(), foreign.has_hashes, joined.has_hashes) == (False, False, True)
    raw["sources"]["general"]["train"] = str(tmp_path / "ids.npy")
    raw["model"]["vocab_size"] = 1 << 16
    plan = make_plan(recipe_from(raw))
    rewritten = {field: KnownText(text.tokens, 0) for field, text in plan.known_texts().items()}
    (said,) = plan.check_files(rewritten, verify=True)
    assert said.startswith("sources.general.train: only parts of ")
    assert said.endswith("npy files record no hashes")
    known = plan.known_texts()
    (tmp_path / "ids.npy").unlink()  # a checkpoint of a run that reads it must still be written
    assert plan.known_texts() == known


@pytest.fixture
def moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run with relative paths is moved, and used from a directory where other data is at these paths."""
    for name, shift in (("home", 0), ("elsewhere", 1)):
        raw = raw_recipe(tmp_path / name)
        byte_tokenizer(shift).save(tmp_path / name / "bytes.tiktoken")
    for source in ("general", "chem"):
        raw["sources"][source] |= {"train": source, "heldout": f"{source}.heldout"}
        tiny.write_dataset(tmp_path / "elsewhere" / source, 9, 900, vocab=257)
    raw["phases"][0] |= {"documents": True, "tokens": 8 * 8 * 16}
    raw["precision"] = "fp32"
    monkeypatch.chdir(tmp_path / "home")
    run(recipe_from(raw | {"run": "run", "tokenizer": "bytes.tiktoken"}), progress=False)
    monkeypatch.chdir(tmp_path / "elsewhere")
    return (tmp_path / "home" / "run").rename(tmp_path / "moved")


def greedy(weights: Path, tokenizer: str | None = None) -> str:
    return spt.generate(weights, "ab", 3, temperature=0, tokenizer=tokenizer)[0].text


def test_a_moved_run_is_read_by_its_own_records(moved: Path, tmp_path: Path) -> None:
    text, out = greedy(moved), tmp_path / "out"
    assert text.startswith("ab")
    export(moved, out)
    card = (out / "README.md").read_text()
    losses = json.loads((moved / "summary.json").read_text())["phases"]["pretrain"]
    assert (
        f"| pretrain | chem | {losses['heldout']['chem']:.4f} ± {losses['standard_errors']['heldout']['chem']:.4f} |"
        in card
    )
    assert "| pretrain | 1,024 | chem 1/4, general 3/4 | 0.003 | adamw | — |" in card
    assert f"| general.train | `general` | `{TokenDataset.open(tmp_path / 'home' / 'general').digest}` |" in card
    assert "Base: none, from scratch." in card
    assert "\n# license: yours to choose" in card
    assert str(tmp_path) not in card
    export(out, tmp_path / "twice", dtype="bf16")
    twice = (tmp_path / "twice" / "README.md").read_text()
    assert twice == card.replace("# out\n", "# twice\n").replace("stored in float32", "stored in bfloat16")
    for again in ("1", "2", "3", "4", "5"):
        export(moved, tmp_path / again)
        assert (tmp_path / again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    checkpoint = next((moved / "checkpoints").glob("step-*"))
    assert greedy(out) == greedy(moved / "weights" / "pretrain") == greedy(moved, "../home/bytes.tiktoken") == text
    assert greedy(checkpoint).startswith("ab")
    for weights in (moved, out, checkpoint):
        with pytest.raises(CheckpointError, match=r"tokenizer: bytes.tiktoken .* is not the one that the weights"):
            greedy(weights, "bytes.tiktoken")
        with pytest.raises(CheckpointError, match="is not the one that the weights"):
            export(weights, tmp_path / "other", "bytes.tiktoken")
    for part in ("", "weights", "weights/pretrain", "checkpoints", f"checkpoints/{checkpoint.name}/hf"):
        with pytest.raises(CheckpointError, match=r"out: .* belongs to the run"):
            export(moved, moved / part)
        with pytest.raises(CheckpointError, match=r"out: .* belongs to the run"):
            take_over(out, moved / part)
    export(moved, moved / "hf")
    shutil.copy("bytes.tiktoken", out / "tokenizer.tiktoken")
    with pytest.raises(CheckpointError, match="is not the one that the weights"):
        greedy(out)

    audited, document = audit_run(moved), audit_document(moved, "chem", 2)
    assert audited["general"].windows == 48
    assert document.token_visits > 0
    shutil.rmtree(tmp_path / "home")
    with pytest.raises(DataError, match=r"sources\.general\.train: holds other text than when .*moved was"):
        audit_run(moved)
    for path in Path().iterdir():
        path.unlink()
    assert audit_run(moved) == audited
    with pytest.raises(DataError, match="which holds the document ends, is missing"):
        audit_document(moved, "chem", 2)
    (moved / "summary.json").unlink()
    assert audit_run(moved)["general"].windows == 6 * 7, "up to the newest checkpoint"


def test_eval_scores_as_the_run_did(moved: Path, tmp_path: Path) -> None:
    heldout = tmp_path / "home" / "chem.heldout"
    found = scored(moved, heldout)
    data = TokenDataset.open(heldout)
    model = GPT.from_hf(moved / "weights" / "pretrain")
    marks = begins(data, np.array([[0, data.num_tokens]]))
    loss = partial(model, reduction="none")
    assert found.loss == pytest.approx(measure(loss, EvalSet.of_tokens(data.tokens, 16, marks), 8).loss, rel=1e-6)
    assert found.loss != pytest.approx(measure(loss, EvalSet.of_tokens(data.tokens, 16), 8).loss, rel=1e-6)
    summary = json.loads((moved / "summary.json").read_text())
    assert (found.inside_documents, found.documents, found.same_tokenizer) == (
        True,
        data.num_documents,
        True,
    )
    assert found.dtype == summary["precision"]
    assert found.reported == summary["phases"]["pretrain"]["heldout"]["chem"]
    assert found.rescored == pytest.approx(found.reported, rel=1e-4)
    assert found.rescored != pytest.approx(found.loss, rel=3e-4), "half of the text is other text"
    export(moved, tmp_path / "out")
    assert scored(tmp_path / "out", heldout) == replace(found, reported=None, rescored=None)
    before = heldout.with_suffix(".heldout.bin").read_bytes()
    in_bytes(heldout.with_suffix(".heldout.bin"), lambda data: data[2:] + data[:2])
    with pytest.raises(DataError, match="damaged"):
        scored(moved, heldout)
    heldout.with_suffix(".heldout.bin").write_bytes(before)
    checkpoint = next((moved / "checkpoints").glob("step-*"))
    assert scored(checkpoint, heldout).inside_documents
    tiny.write_dataset(tmp_path / "foreign", 3, 300, vocab=257, tokenizer_digest=byte_tokenizer(1).digest)
    for weights in (moved, tmp_path / "out", checkpoint):
        with pytest.raises(DataError, match="foreign: was made with another tokenizer"):
            scored(weights, tmp_path / "foreign")
    tiny.write_dataset(tmp_path / "foreign", 3, 300, vocab=257)
    assert scored(moved, tmp_path / "foreign").same_tokenizer is None


def test_a_run_of_an_earlier_version_is_read_by_its_records(
    moved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, audited = greedy(moved), audit_run(moved)
    weights = moved / "weights" / "pretrain"
    old = GPT.from_hf(weights)
    shutil.rmtree(weights)
    old.save_hf(weights)
    (moved / "tokenizer.tiktoken").unlink()
    summary = json.loads((moved / "summary.json").read_text())
    del summary["directory"], summary["context"], summary["data"]["tokenizer"]
    (moved / "summary.json").write_text(json.dumps(summary))
    assert scored(moved, tmp_path / "home" / "chem.heldout").inside_documents
    with pytest.raises(CheckpointError, match=r"tokenizer: bytes.tiktoken .* is not the one that the weights"):
        greedy(moved)
    monkeypatch.chdir(tmp_path / "home")
    assert greedy(moved) == text
    assert audit_run(moved) == audited
    Path("bytes.tiktoken").rename("kept")
    with pytest.raises(CheckpointError, match=r"has no copy, and bytes\.tiktoken is missing; name the one it was"):
        greedy(moved)
    Path("kept").rename("bytes.tiktoken")
    (moved / "summary.json").unlink()
    with pytest.warns(SptWarning, match="earlier version and doesn't record its tokenizer: bytes.tiktoken is assumed"):
        assert greedy(moved) == text
    with pytest.warns(SptWarning):
        export(moved, tmp_path / "out")
    (tmp_path / "out" / "tokenizer.tiktoken").unlink()
    project = tmp_path / "project"
    (project / "weights").mkdir(parents=True)
    shutil.copy(moved / "recipe.yaml", project / "recipe.yaml")
    shutil.copytree(tmp_path / "out", project / "weights" / "pretrain")
    beside = tokenizer_of(project / "weights" / "pretrain")
    assert isinstance(beside, HFTokenizer), "a recipe makes no run"
