"""What a run was trained on is known by its content: paths may change; text, tokenizer and weights may not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spt_fast.config import recipe_from
from spt_fast.data import shards
from spt_fast.data.shards import TokenDataset
from spt_fast.data.tokenizer import EOS, PATTERN, Tokenizer
from spt_fast.errors import DataError, RecipeError
from spt_fast.train.plan import make_plan
from spt_fast.train.run import run
from spt_fast.train.state import KnownText
from tests import tiny
from tests.train.test_loop import StopAfter


def byte_tokenizer(shift: int = 0) -> Tokenizer:
    """A token a byte; those of another shift mean other text by the same ids."""
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
    """Replace a file, whose size and time stay."""
    times = path.stat()
    path.write_bytes(change(path.read_bytes()))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_run_goes_on_with_the_same_data_at_another_path_and_refuses_other_data_at_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = tmp_path / "start"
    run(recipe_from(raw_recipe(tmp_path) | {"run": str(start)}), progress=False)
    raw = raw_recipe(tmp_path, "whole") | {"init": str(start / "weights" / "pretrain"), "model": {}}
    run(recipe_from(raw), progress=False)
    raw["run"] = str(tmp_path / "moved")
    stop(raw, monkeypatch)

    for name, why in (("chem.bin", "damaged"), ("general.heldout.bin", "damaged"), ("chem.idx", "damaged")):
        before = (tmp_path / name).read_bytes()
        in_bytes(tmp_path / name, lambda data: data[:64] + data[66:64:-1] + data[66:])
        with pytest.raises(DataError, match=why):
            run(recipe_from(raw), resume=True, progress=False)
        in_bytes(tmp_path / name, lambda _, data=before: data)
    byte_tokenizer(1).save(tmp_path / "bytes.tiktoken")
    with pytest.raises(RecipeError, match=r"tokenizer: .* is another than .*moved/tokenizer"):
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
    assert run(recipe_from(raw), resume=True, progress=False)["data"].keys() >= {"init", "tokenizer"}
    assert tiny.metrics(tmp_path / "moved") == tiny.metrics(tmp_path / "whole")


def test_a_glance_hashes_some_blocks_and_says_where_it_may_not_have_seen_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BLOCK_BYTES", 200)
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
    np.save(tmp_path / "ids.npy", np.arange(3_000_000, dtype=np.uint16))
    foreign = TokenDataset.open(tmp_path / "ids.npy")
    assert not foreign.verify()
