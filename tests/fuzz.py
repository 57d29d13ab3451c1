"""Damaged input: recipes, `--set` values, token datasets and checkpoints, broken in every way that comes to mind.

    python -m tests.fuzz [TARGET …] [--cases N] [--seed N] [--only TARGET:CASE] [--json FILE]

recipe      YAML: cut short, bits flipped, fields deleted, swapped or given twice, values of the wrong type or size,
            deep nesting, text that is no UTF-8. One that is accepted must read back as itself, and plan or be refused
set         `--set KEY=VALUE`, keys and values of every kind
study       the YAML of a study, as that of recipes; every refusal names the file
dataset     our format, Megatron, llm.c, .npy and headerless ids with an index: headers, indices and ids damaged, hashes
            made to fit again or not
shards      token files of a corpus in many: some damaged, doubled, of another kind or name; what opens is all of them
text        documents in every format and compression, damaged before or after they are compressed; bombs
tokenizer   files of ranks; what is accepted must encode every text so that it decodes to itself
checkpoint  manifest, state and tensors damaged, names that lead out of the folder, the manifest's own hash made to fit
weights     the header of model.safetensors
config      config.json of model folders, and the index of their shards; what is accepted must read back as itself, and
            no field may be left out in silence
names       names of runs, phases and sources with brackets, dollars, HTML, control signs: on the terminal, in pictures,
            on the page; those that are accepted must be seen there as they are
flags       the flags of `generate` and others, and a launcher's variables: exit code 0, or 2 and a short message

Every case must end in a refusal (an SptError) or in something sound, within a time limit and a limit on memory. A crash
of the process, another exception, and damage that is taken for the real thing are failures. Sound is: of our datasets
what `verify` finds whole and equal to the original, or (its hashes made to fit) whole by its own hashes; of others, ids
and document ends inside their file, with another digest than the original's unless they equal it, so that a resumed run
refuses them; of a checkpoint, the same state and the same tensors, with every file's hash checked.

A case depends on seed, target and number only; `--only` repeats one. Cases run in forked processes, so that one that
dies or hangs costs the campaign nothing.
"""

from __future__ import annotations

import argparse
import bz2
import copy
import gzip
import hashlib
import io
import json
import lzma
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch comes in: a pool of threads would not survive the fork
os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # the others reserve more addresses than a case may

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from markupsafe import escape
from safetensors.torch import load, save

from spt_fast import cli
from spt_fast.config import load_recipe
from spt_fast.data import formats
from spt_fast.data.inspection import verify_all
from spt_fast.data.shards import TokenDataset
from spt_fast.data.text import iter_documents
from spt_fast.data.tokenizer import EOS, Tokenizer, train_tokenizer
from spt_fast.errors import SptError, shown_key
from spt_fast.model import hf, hf_config
from spt_fast.model.config import RopeScaling
from spt_fast.model.families import FAMILIES
from spt_fast.model.gpt import GPT, GPTConfig
from spt_fast.printing import print_table, set_up, terminal
from spt_fast.report.panels import panel
from spt_fast.study.load import load_study
from spt_fast.study.tree import expand
from spt_fast.train import checkpoint
from spt_fast.train.metrics import RunLog
from spt_fast.train.plan import make_plan
from spt_fast.train.snapshot import Snapshot
from spt_fast.train.trackers import Followed
from spt_fast.train.world import ALONE, join_world
from tests import tiny
from tests.study import tiny_study

CASE_SECONDS = 20
"""More than any case takes on a machine under any load."""
CASE_BYTES = 1 << 30
"""Of address space, beyond what the process has when the case begins."""

HARD: list[Any] = [
    *(None, True, False, 0, 1, -1, 255, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30, 10**400),
    *(0.0, -0.0, 0.5, 1e-320, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", " ", "x", "0", "-1", "1e3", "1e999999999", "1e-999999999", "9" * 5000, "1/0", "1/3", "100%", "1e99%", "NaN"),
    *(
        "../../../etc/passwd",
        "/etc/passwd",
        ".",
        "..",
        "a\0b",
        "\ud800",
        "é" * 300,
        "x" * 10_000,
        "1e999",
        "1e1_000_000_000",
        "uint16",
        "float32",
    ),
    *([], {}, [[]], [1, 2], {"a": 1}, {1: 2}, [None], ["1e-3", "2"], {"lr": []}, {"general": "1/2", "chem": "1/2"}),
]


HARD_YAML = [
    *(
        "010",
        "1:30",
        "yes",
        "1_000",
        "2026-11-28",
        "1.10",
        "!!int 010",
        "!!binary YQ==",
        "!!timestamp 2026-11-28",
        "=",
        "? ",
    ),
    *(
        "!!set {a}",
        "!!bool yes",
        "&a {<<: *a}",
        "[&a [1], *a, *b]",
        "{null: 1}",
        "{1.10: 2}",
        "{&k a: 1, *k : 2}",
        "\ufeff1",
    ),
    *("[", "{", "]", "{a: 1, a: 2}", "&a [*a]", "!!python/object:os.system x", "2024-13-45", "? x", "<<: 1", "\x00"),
    *("{<<: [1]}", "[" * 3000, "0x" + "f" * 5000, "2e99999999", "1" * 5000, "1" * 5000 + "%", "1e1_000_000_000%"),
]
KEYS = [
    "phases",
    "0",
    "-1",
    "99",
    "9" * 5000,
    "²",
    "",
    "x",
    "pretrain",
    "optimizer",
    "lr",
    "model",
    "stop",
    "on",
    "name",
]
"""Parts of `--set` keys."""
PLAUSIBLE = ["1e-3", "0.5", "1", "7", "8", "10%", "3 steps", "true", "null", "2K", "cosine", "local", "fp32", "a/b"]


class TooLong(BaseException):
    """A case that went on for more than CASE_SECONDS."""


# ------------------------------------------------------------------------------------------------ damage


def hard_value(rng: random.Random) -> Any:
    if rng.random() < 0.02:
        value: Any = 1
        for _ in range(rng.choice([20, 90])):
            value = [value] if rng.random() < 0.5 else {"a": value}
        return value
    return rng.choice(HARD)


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to three bits or stretches changed."""
    content = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at, length = rng.randrange(len(content) + 1), rng.choice([1, 2, 4, 8, 50])
        kind = rng.choice(["cut", "flip", "flip", "number", "insert", "delete", "double", "move", "no text", "nest"])
        if kind == "cut":
            del content[at:]
        elif kind == "flip" and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif kind == "number":
            at -= at % 8
            content[at : at + 8] = struct.pack("<q", rng.choice([0, 1, -1, 2**31, 2**62, -(2**63), 2**63 - 1]))
        elif kind == "insert":
            content[at:at] = rng.randbytes(length)
        elif kind == "delete":
            del content[at : at + length]
        elif kind == "double":
            content[at:at] = content[at : at + 50]
        elif kind == "move":
            moved = content[at : at + length]
            del content[at : at + length]
            content[0:0] = moved
        elif kind == "no text":
            content[at:at] = b"\xff\xfe\x80"
        elif kind == "nest":
            content[at:at] = rng.choice([b"[", b"{", b'{"a":', b"(", b"- "]) * rng.choice([3, 100, 3000])
    return bytes(content)


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of nested dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from places(value)


def damaged_tree(tree: Any, rng: random.Random) -> Any:
    """One or two fields replaced, deleted, renamed, doubled in value, or swapped with another."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 2])):
        all_places = list(places(tree))
        if not all_places:
            return tree
        (node, key), (other, other_key) = rng.choice(all_places), rng.choice(all_places)
        kind = rng.choice(["replace", "replace", "replace", "delete", "rename", "swap", "scale"])
        if kind == "replace":
            node[key] = hard_value(rng)
        elif kind == "delete":
            del node[key]
        elif kind == "rename" and isinstance(node, dict):
            renamed = rng.choice(["x", "../x", key + "x" if isinstance(key, str) else "y", "", "format", "state.json"])
            node[renamed] = node.pop(key)
        elif kind == "swap":
            node[key], other[other_key] = copy.deepcopy(other[other_key]), copy.deepcopy(node[key])
        elif kind == "scale" and isinstance(node[key], int):
            node[key] *= rng.choice([-1, 0, 2, 10**9])
    return tree


def dotted(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every place of nested dicts and lists, as `--set` writes it, with what is there."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield f"{prefix}{key}", value
        yield from dotted(value, f"{prefix}{key}.")


def twice(text: str, rng: random.Random) -> str:
    """The text with one of its lines given twice."""
    lines = text.splitlines()
    i = rng.randrange(len(lines))
    return "\n".join([*lines[: i + 1], lines[i].rstrip(",") + ",", *lines[i + 1 :]])


def as_json(tree: Any) -> bytes:
    return json.dumps(tree, indent=1).encode("utf-8", "surrogatepass")


# ------------------------------------------------------------------------------------------------ targets


class Recipes:
    """`recipe`, `set` and `study`."""

    def __init__(self, folder: Path) -> None:
        tiny.write_corpora(folder)
        self.folder, self.path = folder, folder / "case.yaml"
        self.raw = tiny.raw_recipe(folder)
        self.raw["phases"][0]["batch"]["micro"] = 2
        self.raw |= {"seed": 1, "precision": "auto", "engine": {"name": "local", "stage": 1, "offload": "none"}}
        self.raw_study = tiny_study.raw_study(folder)
        self.text, self.places = yaml.safe_dump(self.raw), list(dotted(self.raw))

    def recipe(self, rng: random.Random) -> str:
        kind = rng.random()
        if kind < 0.4:
            self.path.write_bytes(damaged_bytes(self.text.encode(), rng))
        elif kind < 0.5:
            self.path.write_text(twice(self.text, rng).replace(",\n", "\n"))
        else:
            text = yaml.safe_dump(damaged_tree(self.raw, rng), allow_unicode=True)
            self.path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return self.sound([])

    def set(self, rng: random.Random) -> str:
        self.path.write_text(self.text)
        overrides = []
        for _ in range(rng.randint(1, 3)):
            key, before = rng.choice(self.places)
            value = rng.choice([*PLAUSIBLE, *[json.dumps(before)] * 10])
            if rng.random() < 0.2:
                key = ".".join(rng.choice(KEYS) for _ in range(rng.randint(1, 4)))
            if rng.random() < 0.4:
                value = rng.choice([rng.choice(HARD_YAML), yaml.safe_dump(hard_value(rng), default_flow_style=True)])
            overrides.append(rng.choice([*[f"{key}={value}"] * 9, key, f"={value}", f"{key}=={value}"]))
        return self.sound(overrides)

    def study(self, rng: random.Random) -> str:
        if rng.random() < 0.3:
            self.path.write_bytes(damaged_bytes(yaml.safe_dump(self.raw_study).encode(), rng))
        else:
            text = yaml.safe_dump(damaged_tree(self.raw_study, rng), allow_unicode=True)
            self.path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            runs = expand(load_study(str(self.path)))
        except SptError as error:
            if not str(error).startswith(f"{self.path}: "):
                raise AssertionError(f"names no file: {error}") from error
            raise
        assert all(run.recipe.changes(run.recipe) == [] for run in runs)
        return "accepted and expanded"

    def sound(self, overrides: list[str]) -> str:
        recipe = load_recipe(self.path, overrides)
        self.path.write_text(recipe.as_yaml(), encoding="utf-8")
        assert load_recipe(self.path) == recipe, "the resolved recipe does not read back as itself"
        assert recipe.changes(recipe) == []
        make_plan(recipe)
        return "accepted, reads back and plans"


class Datasets:
    """`dataset`: one of each format."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "data"
        whole = tiny.write_dataset(self.folder / "ours" / "d", 1, 600)
        ids, ends = np.fromfile(f"{whole}.bin", np.uint16), np.fromfile(f"{whole}.idx", np.int64)
        for name in ("megatron", "llm.c", "npy", "headerless"):
            (self.folder / name).mkdir()
        lengths = np.diff(ends, prepend=0).astype(np.int32)
        header = formats.MEGATRON_HEADER.pack(formats.MEGATRON_MAGIC, 1, 8, len(ends), len(ends) + 1)
        starts = np.arange(len(ends) + 1, dtype=np.int64)
        index = header + lengths.tobytes() + ((ends - lengths) * 2).tobytes() + starts.tobytes()
        (self.folder / "megatron" / "d.idx").write_bytes(index)
        ids.tofile(self.folder / "megatron" / "d.bin")
        header = struct.pack("<iii", 20240520, 1, len(ids)).ljust(formats.LLMC_HEADER_BYTES, b"\0")
        (self.folder / "llm.c" / "d.bin").write_bytes(header + ids.tobytes())
        np.save(self.folder / "npy" / "d.npy", ids)
        ids.tofile(self.folder / "headerless" / "d.bin")
        ends.tofile(self.folder / "headerless" / "d.bin.index")
        self.originals = {name: self.open(self.folder / name) for name in os.listdir(self.folder)}
        self.files = {
            name: {path.name: path.read_bytes() for path in sorted((self.folder / name).iterdir())}
            for name in self.originals
        }

    def open(self, folder: Path) -> TokenDataset:
        return TokenDataset.open(folder / "d", "uint16" if folder.name == "headerless" else None)

    def dataset(self, rng: random.Random) -> str:
        name = rng.choice(sorted(self.originals))
        here = self.folder.parent / "case" / name
        shutil.rmtree(here, ignore_errors=True)
        here.mkdir(parents=True)
        files = dict(self.files[name])
        target = rng.choice([file for file in files for _ in range(1 if file == "d.bin" and len(files) > 1 else 3)])
        forged = name == "ours" and rng.random() < 0.4
        if forged:
            files["d.json"] = self.forged(json.loads(files["d.json"]), rng)
        elif target == "d.json" and rng.random() < 0.5:
            damaged = damaged_tree(json.loads(files[target]), rng)
            files[target] = rng.choice([as_json(damaged), twice(files[target].decode(), rng).encode()])
        elif name == "npy" and rng.random() < 0.5:
            files[target] = self.npy(files[target], rng)
        elif rng.random() < 0.1:
            del files[target]
        else:
            head = rng.choice([64, 1100, len(files[target])])
            files[target] = damaged_bytes(files[target][:head], rng) + files[target][head:]
        for file, content in files.items():
            (here / file).write_bytes(content)
        return self.sound(name, self.open(here), forged)

    def forged(self, metadata: Any, rng: random.Random) -> bytes:
        """Damaged metadata whose own hash fits."""
        del metadata["sha256"]
        damaged = damaged_tree(metadata, rng)
        text = json.dumps(damaged, sort_keys=True)
        return as_json(damaged | {"sha256": hashlib.sha256(text.encode()).hexdigest()})

    def npy(self, content: bytes, rng: random.Random) -> bytes:
        """A header of its own: well framed, oddly filled."""
        shape = rng.choice(["(600,)", "(-1,)", "()", "(3, 200)", "(True,)", "600", "(1e3,)", "(" * 300, "(10**9,)"])
        dtype = rng.choice(["'<u2'", "'>u2'", "'<f4'", "'O'", "'|b1'", "[('a','<u2')]", "'<M8[ns]'", "3", "''"])
        header = f"{{'descr': {dtype}, 'fortran_order': {rng.choice(['False', 'True', '0'])}, 'shape': {shape}, }}"
        header = damaged_bytes(header.encode(), rng).decode("latin1") if rng.random() < 0.5 else header
        data = content[128:]
        encoded = header.encode("latin1")[:60_000]
        return (
            formats.NPY_MAGIC + bytes([rng.choice([1, 1, 2, 3]), 0]) + struct.pack("<H", len(encoded)) + encoded + data
        )

    def sound(self, name: str, found: TokenDataset, forged: bool) -> str:
        original = self.originals[name]
        int(np.asarray(found.tokens, dtype=np.uint64).sum())  # every id is really there
        verify_all(found)
        ends = found.document_ends
        if ends is not None and len(ends):
            assert ends[0] >= 0, "a document ends before the text begins"
            assert np.all(ends[1:] >= ends[:-1]), "document ends fall"
            assert ends[-1] == found.num_tokens, "the last document does not end with the text"
        equal = np.array_equal(found.tokens, original.tokens) and np.array_equal(ends, original.document_ends)
        if found.metadata is not None and original.metadata is not None and not forged:
            assert equal, "ids or documents changed, and verify found nothing"
            assert found.metadata == original.metadata, "metadata changed, and nothing was found"
            return "accepted, equal"
        if found.metadata is not None:
            for file in ("d.bin", "d.idx"):
                assert (found.path.parent / file).read_bytes() == self.files[name][file]
            assert equal, "forged metadata read other ids or documents out of the same files"
            return "accepted, the same ids under metadata that was forged"
        assert equal or found.digest != original.digest, "another content has the same digest"
        return "accepted, equal" if equal else "accepted as another content with another digest"


class Checkpoints:
    """`checkpoint`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "checkpoints"
        generator = torch.Generator().manual_seed(0)
        snapshot = Snapshot({str(i): torch.randn(3, 2 + i, generator=generator) for i in range(4)})
        writer = checkpoint.Writer(self.folder, ALONE, checkpoint.Retention(1))
        state = {"model": {"layers": 1}, "train": {"phase": 0, "counts": {"a": 3}, "seconds": 1.5}, "data": {"a": "b"}}
        writer.save("step-0000000001-p00-a000", state, {"current": snapshot, "best": snapshot})
        writer.finish()
        self.path = self.folder / "step-0000000001-p00-a000"
        self.files = {path.name: path.read_bytes() for path in self.path.iterdir()}
        self.state, self.tensors = checkpoint.read(self.path), self.bytes_of(self.path)

    def bytes_of(self, path: Path) -> dict[str, dict[str, bytes]]:
        return {
            kind: {name: tensor.numpy().tobytes() for name, tensor in snapshot.tensors().items()}
            for kind, snapshot in checkpoint.load(path).items()
        }

    def checkpoint(self, rng: random.Random) -> str:
        here = self.folder.parent / "case" / "checkpoints" / self.path.name
        shutil.rmtree(here.parent, ignore_errors=True)
        shutil.copytree(self.path, here)
        shutil.copytree(self.path, here.parent / "other")
        file, kind = rng.choice(sorted(self.files)), rng.random()
        manifest = json.loads(self.files["manifest.json"])
        if kind < 0.35:
            (here / file).write_bytes(damaged_bytes(self.files[file], rng))
        elif kind < 0.4:
            (here / file).unlink()
            if rng.random() < 0.5:
                (here / file).mkdir()
        elif kind < 0.45:
            (here / rng.choice(["current-00001.safetensors", "kept-00000.safetensors"])).write_bytes(self.files[file])
        elif kind < 0.55:
            (here / "manifest.json").write_bytes(as_json(damaged_tree(manifest, rng)))
        elif kind < 0.6:
            (here / "manifest.json").write_text(twice(self.files["manifest.json"].decode(), rng))
        else:
            del manifest["sha256"]
            manifest = self.led_astray(manifest, rng) if kind < 0.8 else damaged_tree(manifest, rng)
            text = json.dumps(manifest, sort_keys=True)
            manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
            (here / "manifest.json").write_bytes(as_json(manifest))
        return self.sound(here)

    def led_astray(self, manifest: Any, rng: random.Random) -> Any:
        """A manifest that speaks of other files than those of its folder, all of them there and whole."""
        files, name = manifest["files"], rng.choice(sorted(manifest["files"]))
        ways = [f"../other/{name}", f"../{self.path.name}/{name}", f"./{name}", str(self.path / name), f"x/../{name}"]
        if rng.random() < 0.3:
            del files[name]
        else:
            files[rng.choice(ways)] = files[name] if rng.random() < 0.3 else files.pop(name)
        return manifest

    def sound(self, here: Path) -> str:
        state = checkpoint.read(here)
        assert state == self.state, "another state"
        assert self.bytes_of(here) == self.tensors, "other tensors"
        listed = set(json.loads((here / "manifest.json").read_text())["files"])
        assert listed == {path.name for path in here.iterdir()} - {"manifest.json"}, f"hashed were {sorted(listed)}"
        return "accepted, equal"


def stretched(rng: random.Random, scaling: RopeScaling) -> GPTConfig:
    """A tiny model of one of the families."""
    shape: dict[str, Any] = {"layers": 1, "width": 16, "heads": 2, "kv_heads": 1, "ffn": 16, "context": 8}
    family = rng.choice(
        [
            {},
            {"qkv_bias": True},
            {"qk_norm": True},
            {"norms": "after", "qk_norm": True, "qk_norm_over": "width"},
            {"norms": "after", "qk_norm": True, "qk_norm_over": "width", "window": 4},
            {"window": 4, "family": "mistral"},
            {"window": 4, "full_layers": [0], "no_rope_layers": [0]},
            {"qkv_bias": True, "mlp_bias": True},
        ]
    )
    more = {"tied": rng.random() < 0.5, "rope_scaling": rng.choice([None, scaling])}
    return GPTConfig(**shape, vocab_size=32, **family, **more)


FOREIGN = [
    *("attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "partial_rotary_factor", "rope_scaling"),
    *("final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar", "embedding_multiplier"),
    *("residual_multiplier", "attention_multiplier", "logits_scaling", "logit_scale", "rope_interleaved", "alibi"),
    *("layer_types", "num_local_experts", "quantization_config", "norm_eps", "layer_norm_eps", "hidden_activation"),
    *("rotary_pct", "rope_local_base_freq", "no_rope_layers", "use_qk_norm", "auto_map", "unsloth_fixed", "_x", "é"),
    *("head_dim", "rope_theta", "original_max_position_embeddings", "architectures", "torch_dtype", "bos_token_id"),
]
"""Fields that other models' config.json have, or that stand elsewhere there."""


class Configs:
    """`config`: for each kind of model its folder, in one file and in shards."""

    def __init__(self, folder: Path) -> None:
        self.case, rng = folder / "case" / "config", random.Random(0)
        scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=4)
        self.models: list[tuple[dict[str, bytes], GPTConfig]] = []
        for kind in range(12):
            config = stretched(rng, scaling)
            model = GPT(config, seed=kind)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(20 if parameter.dim() == 2 else 1)
            model.save_hf(self.case)
            files = {path.name: path.read_bytes() for path in self.case.iterdir()}
            shutil.rmtree(self.case)
            if kind % 2:
                tensors = load(files.pop(hf.WEIGHTS))
                halves = {f"{i}.safetensors": dict(list(tensors.items())[i::2]) for i in range(2)}
                files |= {name: save(half) for name, half in halves.items()}
                weight_map = {name: file for file, half in halves.items() for name in half}
                files[hf.INDEX] = as_json({"metadata": {"total_size": 1}, "weight_map": weight_map})
            self.models.append((files, config))

    def config(self, rng: random.Random) -> str:
        files, before = rng.choice(self.models)
        files = dict(files)
        target = hf.INDEX if hf.INDEX in files and rng.random() < 0.3 else hf.CONFIG
        tree, kind = json.loads(files[target]), rng.random()
        if kind < 0.1:
            files[target] = damaged_bytes(files[target], rng)
        elif kind < 0.15:
            files[target] = as_json(hard_value(rng))
        elif kind < 0.2:
            files[target] = twice(files[target].decode(), rng).replace(",\n}", "\n}").encode()
        elif kind < 0.5 and target == hf.CONFIG:
            for _ in range(rng.randint(1, 3)):
                tree[rng.choice(FOREIGN)] = rng.choice([hard_value(rng), True, 0.5, 2, "gelu"])
            for name in rng.sample(["rope_theta", "rope_parameters", "rope_scaling"], rng.randint(0, 2)):
                tree.pop(name, None)
            files[target] = as_json(tree)
        else:
            files[target] = as_json(damaged_tree(tree, rng))
        shutil.rmtree(self.case, ignore_errors=True)
        self.case.mkdir(parents=True)
        for name, content in files.items():
            (self.case / name).write_bytes(content)
        return self.sound(before)

    def sound(self, before: GPTConfig) -> str:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model = GPT.from_hf(self.case)
            assert hf.read_config(self.case) == model.config
        given = json.loads((self.case / hf.CONFIG).read_text())
        named = " ".join(str(warning.message) for warning in said)
        family = FAMILIES[given["model_type"]]
        of_family = {*family.written.values(), *family.unsaid, "sliding_window", "layer_types", "no_rope_layers"}
        known = {*hf_config.FIELDS.values(), *hf_config.ROPE, *hf_config.WITHOUT_EFFECT, *of_family}
        for field in given.keys() - known:
            silent = not given[field] or field.startswith("_") or field in hf_config.ONLY or given[field] == 1
            assert silent or shown_key(field) in named or "…" in named, f"{field} was left out in silence"
        model.save_hf(self.case / "again")
        assert GPT.from_hf(self.case / "again").config == model.config
        model.generate([1], 1, temperature=0)
        return "accepted, equal" if model.config == before else "accepted as another shape"


PIECES = [
    *("[", "]", "[/]", "[red]", "[/v2]", "[link=x]", "$", "$x_{", "\\", "\\frac", "{", "}", "{0}", "%", "%s", "50%"),
    *(
        "<b>",
        "</script>",
        "<!--",
        "-->",
        "&amp;",
        "&",
        '"',
        "'",
        "/",
        "//",
        ":smile:",
        ":",
        "a",
        "chem",
        "é",
        "化",
        "🙂",
    ),
    *("\u202e", "\u200b", " ", "#", "~", "-", ".", "..", "=", ",", "*", "@", "!", "|", "`", "\xa0", "#ffffff"),
    *("\0", "\n", "\r", "\t", "\x1b[31m", "\x9b", "\ud800", "x" * 300, "no", "null", "1.10", "010", "true"),
]


class Names:
    """`names`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "names.yaml"
        self.raw = tiny.raw_recipe(folder)

    def name(self, rng: random.Random) -> str:
        return "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 4)))

    def names(self, rng: random.Random) -> str:
        raw, (one, two) = copy.deepcopy(self.raw), (self.name(rng), self.name(rng) + "2")
        called = {"general": one, "chem": two}
        raw["sources"] = {called[name]: source for name, source in raw["sources"].items()}
        for phase in raw["phases"]:
            phase["mixture"] = {called[name]: share for name, share in phase["mixture"].items()}
        raw["phases"][1]["stop"]["on"] = two
        if rng.random() < 0.3:
            raw["run"] = f"runs/{self.name(rng)}"
        if rng.random() < 0.1:
            raw["phases"][0]["name"] = self.name(rng)
        self.path.write_bytes(yaml.safe_dump(raw, allow_unicode=True).encode("utf-8", "surrogatepass"))
        recipe = load_recipe(self.path)
        assert {*recipe.sources} == {one, two}
        make_plan(recipe)
        for encoding in ("utf-8", "ascii"):
            written = io.BytesIO()
            sys.stdout = io.TextIOWrapper(written, encoding)
            set_up()
            print_table(terminal(), recipe.run, ["source", "x"], [[one, 1.0], [two, None]])
            sys.stdout.flush()
            seen = written.getvalue().decode(encoding)
            sys.stdout = sys.__stdout__
        folded = "".join(seen.split()).replace("|", "")
        assert "".join(recipe.run.encode("ascii", "backslashreplace").decode().split()).replace("|", "") in folded
        if rng.random() < 0.1:
            board = RunLog(Followed(self.folder, recipe, {}, None), [], keep_bytes=0, progress=False, mfu_label="")
            losses = {one: 1.0, two: 2.0}
            halves = {"heldout": losses, "select": losses, "train": losses}
            where = {"phase": recipe.phases[0].name, "arm": 0, "step": 1}
            board.evaluation({**halves, "standard_errors": halves, **where}, 1)
            board.close()
            drawn = panel(one, two, lambda axes: axes.set_ylabel(f"loss on {one}"))
            assert drawn.svg.count("<svg") == 1
            assert "<script" not in drawn.svg.replace(str(escape("<script")), "")
        return "accepted and shown"


class Flags:
    """`flags`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        text = folder / "words.txt"
        text.write_text("some words and more words " * 50)
        encoding = train_tokenizer([str(text)], 260, folder / "words.tiktoken")
        shape = GPTConfig(layers=1, width=16, heads=1, kv_heads=1, ffn=16, context=8, vocab_size=encoding.vocab_size)
        GPT(shape).save_hf(folder / "hf", encoding)
        tiny.write_recipe(folder, tiny.raw_recipe(folder))

    def value(self, rng: random.Random) -> str:
        plain = [
            "1",
            "0",
            "2",
            "0.5",
            "1e-9",
            "10%",
            "1K",
            "7",
            "80GB",
            "H100",
            "general",
            "0x1",
            "1_0",
            "١",
            "+1",
            "-0",
        ]
        value = rng.choice([*plain, *plain, *[str(hard) for hard in HARD[:48] if not isinstance(hard, bool)], *PIECES])
        return "1" if len(value) > 4000 else value.replace("\0", "0")

    def flags(self, rng: random.Random) -> str:
        if rng.random() < 0.1:
            return self.launched(rng)
        words: list[str] = [
            *rng.choice(
                [
                    ("generate", str(self.folder / "hf"), "--tokens", "2"),
                    ("generate", str(self.folder / "hf"), "--tokens", "2"),
                    ("plan", str(self.folder / "recipe.yaml"), "--mfu", "40%"),
                    ("eval", str(self.folder / "hf"), "--data", str(self.folder / "general")),
                    ("advise", "--domain-tokens", "30M", "--budget", "20B"),
                ]
            )
        ]
        known = {
            "generate": ["--prompt", "--prompts", "--temperature", "--top-k", "--seed", "--tokenizer"],
            "plan": ["--gpus", "--gpu", "--gpu-memory", "--mfu", "--mfu-from", "--price"],
            "eval": ["--data", "--dtype"],
            "advise": ["--model", "--domain-tokens", "--budget", "--inference-tokens", "--max-general-rise"],
        }[words[0]]
        for flag in rng.sample(known, rng.randint(1, 2)):
            words += [flag, self.value(rng)]
        if rng.random() < 0.05:
            words[rng.randrange(len(words))] = self.value(rng)
        code, said = self.ended(words)
        assert code in (0, 2), f"{words}: exit code {code}: {said[-300:]}"
        assert "Traceback" not in said
        assert code == 0 or 0 < len(said.splitlines()) <= 12, f"{words}: {len(said.splitlines())} lines"
        assert len(said) < 4000, f"{words}: {len(said)} characters"
        return "done" if code == 0 else "refused"

    def ended(self, words: list[str]) -> tuple[object, str]:
        """Exit code of a command, and what it said on stderr."""
        sys.argv, out, err = ["spt-fast", *words], io.BytesIO(), io.BytesIO()
        sys.stdout, sys.stderr = io.TextIOWrapper(out, "utf-8"), io.TextIOWrapper(err, "utf-8")
        try:
            cli.main()
        except SystemExit as exit_:
            sys.stderr.flush()
            return exit_.code or 0, err.getvalue().decode("utf-8", "replace")
        finally:
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        raise AssertionError("the command line came back")

    def launched(self, rng: random.Random) -> str:
        values = ["0", "1", "2", "8", "-1", "", "x", "1.0", "9" * 30, "1e3", " 1"]
        names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"]
        given = {name: rng.choice(values) for name in rng.sample(names, rng.randint(1, 4))}
        os.environ.update(given)
        try:
            world = join_world(process_group=False)
        finally:
            for name in given:
                del os.environ[name]
        assert (world.rank, world.size) == (0, 1)
        return "alone"


class Weights:
    """`weights`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.case = folder / "weights", folder / "case" / "weights"
        config = GPTConfig(layers=1, width=16, heads=2, kv_heads=1, ffn=16, context=8, vocab_size=32)
        GPT(config, seed=0).save_hf(self.folder)
        self.content = (self.folder / hf.WEIGHTS).read_bytes()
        self.header_bytes = 8 + struct.unpack("<Q", self.content[:8])[0]

    def weights(self, rng: random.Random) -> str:
        shutil.rmtree(self.case, ignore_errors=True)
        shutil.copytree(self.folder, self.case)
        header, data = self.content[: self.header_bytes], self.content[self.header_bytes :]
        if rng.random() < 0.5:
            header = damaged_bytes(header, rng)
        else:
            text = as_json(damaged_tree(json.loads(header[8:]), rng))
            header = struct.pack("<Q", len(text)) + text
        (self.case / hf.WEIGHTS).write_bytes(header + data[: rng.choice([len(data), len(data), 100])])
        hf.load(self.case)
        return "accepted, every tensor of the shape that the configuration gives"


class Texts:
    """`text`, `tokenizer` and `shards`."""

    documents = ("one\ntwo", "naïve 日本 😀", 'say "hi"\\\t', "x" * 300, " a b ")

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "text"
        self.folder.mkdir()
        tokenizer = Tokenizer(
            {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257}, r"\p{L}+|[\s\S]", {EOS: 258}
        )
        self.ranks = tokenizer.to_bytes()

    def text(self, rng: random.Random) -> str:
        packing = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}
        form, ending = rng.choice([".jsonl", ".ndjson", ".txt", ".parquet"]), rng.choice(list(packing))
        plain = self.plain(form, rng)
        inside, outside = rng.choice([(True, False), (False, True), (False, False)])
        if form == ".parquet" and ending == "":
            inside, outside = inside or outside, False
        if inside:
            plain = damaged_bytes(plain, rng)
        content = packing[ending](plain)
        path = self.folder / f"a{form}{ending}"
        content = damaged_bytes(content, rng) if outside else content
        path.write_bytes(content)
        try:
            found = list(iter_documents(path, skip_bad=rng.random() < 0.5))
        finally:
            path.unlink()
        assert all(isinstance(document, str) and document for document in found)
        if content and not inside and not (outside and ending == ""):  # else there is no checksum
            expected = ["".join(self.documents)] if form == ".txt" else list(self.documents)
            assert found in (expected, [*expected, *expected]), "damage was believed"  # an archive may be doubled
        return "read"

    def plain(self, form: str, rng: random.Random) -> bytes:
        if form == ".txt":
            return "".join(self.documents).encode()
        if form == ".parquet":
            sink = pa.BufferOutputStream()
            column = pa.array(self.documents)
            options = {"compression": rng.choice(["none", "snappy", "zstd"]), "use_dictionary": rng.random() < 0.5}
            pq.write_table(pa.table({"text": column}), sink, row_group_size=rng.choice([1, 3, 9]), **options)
            return sink.getvalue().to_pybytes()
        lines = b"".join(json.dumps({"text": document}).encode() + b"\n" for document in self.documents)
        return lines

    def tokenizer(self, rng: random.Random) -> str:
        content = damaged_bytes(self.ranks, rng)
        if rng.random() < 0.3:
            head, rest = self.ranks.split(b"\n", 1)
            content = b"#" + as_json(damaged_tree(json.loads(head[1:]), rng)).replace(b"\n", b"") + b"\n" + rest
        path = self.folder / "t.tiktoken"
        path.write_bytes(content)
        tokenizer = Tokenizer.load(path)
        for document in self.documents:
            assert tokenizer.decode(tokenizer.encode(document)) == document
        assert Tokenizer.from_bytes(tokenizer.to_bytes()).digest == tokenizer.digest
        return "accepted, every text decodes to itself"

    def shards(self, rng: random.Random) -> str:
        folder = self.folder / "shards"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        names = rng.sample(["a.bin", "b.bin", "c-[1].bin", "d e.bin", "train_1.bin", "val_1.bin", "x.npy", "é.bin"], 3)
        for name in names:
            magic, version, dtype = rng.choices([(20240520, 1, "<u2"), (20240801, 7, "<u4")], [15, 1])[0]
            ids, header = np.arange(rng.choice([1, 50, 50]), dtype=dtype), np.zeros(256, "<i4")
            header[:3] = magic, version, len(ids)
            content = header.tobytes() + ids.tobytes()
            (folder / name).write_bytes(damaged_bytes(content, rng) if rng.random() < 0.2 else content)
        given: Any = rng.choice([folder, folder / "*.bin", folder / "**" / "*", [folder / name for name in names]])
        data = TokenDataset.open(given)
        ids = np.asarray(data.tokens)
        assert len(ids) == data.num_tokens == sum(shard.num_tokens for shard in data.shards)
        assert ids.tolist() == [i for shard in data.shards for i in shard.tokens.tolist()]
        limit = rng.randint(1, data.num_tokens + 1)
        assert data.limit(limit).num_tokens == min(limit, data.num_tokens)
        return f"{len(data.shards)} shards are one"


# ------------------------------------------------------------------------------------------------ the campaign

SHARES = {
    **{"text": 0.2, "tokenizer": 0.1, "shards": 0.1},
    **{"recipe": 0.15, "set": 0.1, "study": 0.05, "dataset": 0.25, "checkpoint": 0.1, "weights": 0.05},
    **{"config": 0.15, "names": 0.1, "flags": 0.05},
}
"""Of the cases."""


def targets(folder: Path) -> dict[str, Callable[[random.Random], str]]:
    """By name, what damages something by a random source and returns how it was taken, or raises."""
    recipes = Recipes(folder)
    return {
        "recipe": recipes.recipe,
        "set": recipes.set,
        "study": recipes.study,
        "dataset": Datasets(folder).dataset,
        "text": (texts := Texts(folder)).text,
        "tokenizer": texts.tokenizer,
        "shards": texts.shards,
        "checkpoint": Checkpoints(folder).checkpoint,
        "weights": Weights(folder).weights,
        "config": Configs(folder).config,
        "names": Names(folder).names,
        "flags": Flags(folder).flags,
    }


def outcome(act: Callable[[random.Random], str], seed: int, target: str, case: int) -> tuple[bool, str]:
    """Whether the case ended as it should, and how."""

    def too_long(number: int, frame: FrameType | None) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, CASE_SECONDS)
    try:
        return True, act(random.Random(f"{seed} {target} {case}"))
    except SptError as error:
        short = 0 < len(str(error)) < 2000 and str(error).count("\n") < 5
        return short, "refused" if short else f"a message of {len(str(error))} characters: {str(error)[:200]}"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "spt_fast" in f.filename]
        place = ours[-1] if ours else where
        return False, f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def run_cases(act: Callable[[random.Random], str], seed: int, target: str, cases: range) -> list[tuple[int, bool, str]]:
    """(case, as it should, how) of every case, in forked processes: one that dies is followed by the next."""
    results: list[tuple[int, bool, str]] = []
    while len(results) < len(cases):
        reader, writer = os.pipe()
        at = mmap.mmap(-1, 8)
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            limit_memory()
            with open(writer, "w") as file:
                for case in cases[len(results) :]:
                    at[:8] = struct.pack("<q", case)
                    file.write(json.dumps([case, *outcome(act, seed, target, case)]) + "\n")
                    file.flush()
            os._exit(0)
        os.close(writer)
        with open(reader) as file, watched(pid, at):
            results += [tuple(json.loads(line)) for line in file]
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if len(results) < len(cases):
            died = struct.unpack("<q", at[:8])[0]
            results.append((died, False, f"the process ended with {status}"))
    return results


class watched:
    """While this lasts, a child that stays at one case for twice its time is killed: a hang inside a library."""

    def __init__(self, pid: int, at: mmap.mmap) -> None:
        self.pid, self.at, self.last, self.since = pid, at, b"", time.monotonic()

    def __enter__(self) -> None:
        signal.signal(signal.SIGALRM, self.look)
        signal.setitimer(signal.ITIMER_REAL, 1, 1)

    def look(self, number: int, frame: FrameType | None) -> None:
        if self.at[:8] != self.last:
            self.last, self.since = self.at[:8], time.monotonic()
        elif time.monotonic() - self.since > 2 * CASE_SECONDS:
            os.kill(self.pid, signal.SIGKILL)

    def __exit__(self, *error: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)


def limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + CASE_BYTES, used + CASE_BYTES))


def fuzz(folder: Path, names: list[str], *, cases: int, seed: int) -> dict[str, Any]:
    """What came out of `cases` cases over these targets."""
    began = time.monotonic()
    acts, counts, failures = targets(folder), Counter[str](), []
    for name in names:
        share = round(cases * SHARES[name] / sum(SHARES[n] for n in names))
        results = run_cases(acts[name], seed, name, range(share))
        counts.update(f"{name}: {how if fine else 'FAILED'}" for _, fine, how in results)
        failures += [f"{name}:{case}: {how}" for case, fine, how in results if not fine]
        print(f"[{time.monotonic() - began:6.1f} s] {name}: {len(results)} cases, {len(failures)} failures", flush=True)
    seconds = round(time.monotonic() - began, 1)
    total = sum(counts.values())
    return {"seed": seed, "cases": total, "counts": dict(counts), "failures": failures, "seconds": seconds}


def main(machine: dict[str, Any] | None = None) -> None:
    """machine: what stands beside the results in JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(SHARES) + "; all of them without any")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="TARGET:CASE", help="repeat one case here, and show its error whole")
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.targets) - set(SHARES))
    if unknown:
        parser.error(f"no target {unknown[0]!r}; there are {', '.join(SHARES)}")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        if arguments.only:
            name, _, case = arguments.only.partition(":")
            print(targets(Path(folder))[name](random.Random(f"{arguments.seed} {name} {case}")))
            return
        results = fuzz(Path(folder), arguments.targets or list(SHARES), cases=arguments.cases, seed=arguments.seed)
    for name, value in results["counts"].items():
        print(f"{name:<80}{value:>6}")
    for failure in results["failures"]:
        print(failure)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    print(
        f"seed {results['seed']}: {len(results['failures'])} failures of {results['cases']} in {results['seconds']} s"
    )
    sys.exit(bool(results["failures"]))


if __name__ == "__main__":
    main()
