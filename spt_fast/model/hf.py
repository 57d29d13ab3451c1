"""Weights in Hugging Face folders, read and written: model.safetensors, config.json, tokenizer files.

This is also the project's own weight format, so that every phase's result loads in transformers directly. hf_config.py
interprets config.json, and parameters.py lists the tensors of each parameter; a tensor without a place in a GPT is
refused by name. Only safetensors are read: a pickle can run code.
"""

from __future__ import annotations

import filecmp
import json
import shutil
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spt_fast.data.hf_tokenizer import HF_FILE, HF_FILES, TEMPLATES
from spt_fast.errors import CheckpointError, SptWarning, counted, invalid, shown, shown_key
from spt_fast.files import sync
from spt_fast.model import hf_config, rotary
from spt_fast.model.config import GPTConfig
from spt_fast.model.hf_config import CONFIG
from spt_fast.model.parameters import table
from spt_fast.model.stored import Stored, contents, fill, opened, pieces, unread, write

if TYPE_CHECKING:
    from spt_fast.data.base_tokenizer import BaseTokenizer

GENERATION = "generation_config.json"
CARRIED = (*HF_FILES, GENERATION, "tokenizer.tiktoken")
"""Files beside the weights that are copied with them, byte for byte."""
BASE_CONFIG = "base_config.json"
"""In a run's folder, the config.json of the base that it began with."""

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
HEAD, EMBEDDING, FREQUENCIES = "lm_head.weight", "model.embed_tokens.weight", "rotary_emb.inv_freq"


def load(folder: str | Path, dtype: torch.dtype | None = None) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Shape and weights of the model in `folder`: the GPT's parameters by name, on the CPU, in `dtype`, by default the
    stored one (float32 if tensors differ).

    CheckpointError: no such folder, no safetensors in it, a damaged or missing file or tensor, or a configuration that
    a GPT can't represent.
    """
    config, weights = stored_weights(folder, dtype)
    return config, dict(weights)


def stored_weights(folder: str | Path, dtype: torch.dtype | None = None) -> tuple[GPTConfig, Stored]:
    """`load`, but each parameter is read when it is used. Names and shapes are checked now."""
    folder = Path(folder)
    config = read_config(folder)
    places = _places(folder)
    dtypes = {like.dtype for name, (_, like) in places.items() if not name.endswith(FREQUENCIES)}
    if not dtypes <= DTYPES.keys():
        others = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes - DTYPES.keys()))
        raise CheckpointError(f"{folder}: tensors are stored as {others}; float32, bfloat16 or float16 can be read")
    dtype = dtype or (dtypes.pop() if len(dtypes) == 1 else torch.float32)

    parameters, left = table(config), dict(places)
    for parameter in parameters.values():
        for source, rows in parameter.sources.items():
            if source not in left:
                raise CheckpointError(f"{folder}: tensor {source} is missing; copy the folder again")
            found, shape = [*left.pop(source)[1].shape], [rows, *parameter.shape[1:]]
            if found != shape:
                raise CheckpointError(f"{folder}: tensor {source} is {found}; by {CONFIG} it should be {shape}")
    for name in [name for name in left if name.endswith(FREQUENCIES)]:  # old files store what config.json implies
        file, like = left.pop(name)
        held, expected = torch.empty(like.shape), rotary.frequencies(config, torch.device("cpu"))
        fill(held, file, name)
        if held.shape != expected.shape or not torch.allclose(held, expected, rtol=0.01):
            raise CheckpointError(
                f"{folder}: tensor {name} holds other frequencies than those of {CONFIG}; correct either"
            )
    if config.tied:
        left.pop(HEAD, None)
    if left:
        name = shown_key(next(iter(left)))
        raise CheckpointError(f"{folder}: a GPT has no place for tensor {name} ({len(left)} such tensors)")

    def read(name: str) -> Tensor:
        parameter = parameters[name]
        whole = torch.empty(parameter.shape, dtype=dtype)
        for source, part in zip(parameter.sources, whole.split([*parameter.sources.values()]), strict=True):
            fill(part, places[source][0], source)
        return whole

    likes = {name: torch.empty(parameter.shape, dtype=dtype, device="meta") for name, parameter in parameters.items()}
    return config, Stored(likes, read)


def save(
    config: GPTConfig,
    weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    folder: str | Path,
    tokenizer: BaseTokenizer | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    *,
    like: Path | None = None,
    named: bool = False,
    overwrite: bool | None = None,
) -> None:
    """Writes model.safetensors, config.json and a tokenizer's files, for AutoModelForCausalLM and AutoTokenizer.

    weights: the GPT's parameters by name, or pairs of both, which are written in the given order. dtype float32,
    bfloat16 or float16; None keeps the weights' own. like: a Hugging Face folder, or a run that began with one, whose
    tokenizer, generation settings, special ids and metadata are copied. named: the user asked for `tokenizer`, so its
    files replace the tokenizer's of `like`; a tokenizer.json alone replaces only that one. metadata: information on the
    weights, kept in model.safetensors; `read_metadata` returns it. Everything is written and flushed in a temporary
    folder and then moved into place, config.json last; other files in the folder are left alone. overwrite: False
    raises CheckpointError instead of replacing files that differ, or of adding to another model's shards; True removes
    another model's files. SptWarning for NaN and infinite numbers.
    """
    folder = Path(folder)
    if dtype is None:
        assert isinstance(weights, Mapping)
        dtype = unread(weights)["embedding"].dtype
    if dtype not in DTYPES:
        raise CheckpointError(invalid("dtype", dtype, "float32, bfloat16 or float16"))
    if hf_config.family_of(config) == "llama" and config.width % config.heads:
        warnings.warn(
            f"{folder}: transformers can't load a Llama whose {config.heads} heads don't divide its width "
            f"{config.width}; GPT.from_hf does",
            SptWarning,
            stacklevel=3,
        )
    temporary = folder / ".weights.tmp"  # inside: the folder may be a mount point
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        known = {**(read_metadata(like) if like else {}), **(metadata or {}), "format": "pt"}
        unusable = _write(config, weights, temporary / WEIGHTS, dtype, known)
        if tokenizer is not None:
            tokenizer.save_hf(temporary)
        described = hf_config.to_hf(config, DTYPES[dtype], None if tokenizer is None else tokenizer.eos_id)
        if tokenizer is not None and tokenizer.bos_id is not None:
            described["bos_token_id"] = tokenizer.bos_id
        if like is not None:
            own = {*_carried(temporary)} if named else set()
            carry(like, temporary, {GENERATION} if own - {HF_FILE} else {*_carried(like)} - own)
            theirs = hf_config.read_json(like / (BASE_CONFIG if (like / BASE_CONFIG).exists() else CONFIG))
            ids = {field: theirs.get(field) for field in hf_config.SPECIAL_IDS}
            described |= ids if any(id_ is not None for id_ in ids.values()) else {}
        (temporary / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        names = [str(file.relative_to(temporary)) for file in temporary.rglob("*") if file.is_file()]
        for name in names:
            sync(temporary / name)
        if overwrite is not None:
            _make_way(folder, names, temporary, overwrite=overwrite)
        for name in sorted(names, key=lambda name: name == CONFIG):
            (folder / name).parent.mkdir(exist_ok=True)
            (temporary / name).replace(folder / name)
        sync(folder)
        if unusable:
            warnings.warn(
                f"{folder}: {counted(len(unusable), 'tensor', 'hold')} NaN or infinite numbers, {unusable[0]} first; "
                "take an earlier checkpoint, or copy the files again",
                SptWarning,
                stacklevel=3,
            )
    except OSError as error:
        raise CheckpointError(
            f"{folder}: the weights could not be written ({error}); make room or choose another place"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            folder.rmdir()  # if it is empty


def carry(source: Path, folder: Path, only: Collection[str] | None = None) -> None:
    """Copy the files that belong to the weights in a folder to another; `only`: those of them, None for all."""
    for name in _carried(source):
        if only is not None and name not in only:
            continue
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def stop_ids(folder: Path) -> list[int]:
    """The ids at which transformers ends a text of the model in a folder, or of the base of a run there; empty if none
    is stated. CheckpointError for a file that can't be read, and for anything but ids in it."""
    for name in (GENERATION, BASE_CONFIG, CONFIG):
        if (folder / name).exists() and (ids := hf_config.read_json(folder / name).get("eos_token_id")) is not None:
            found = ids if isinstance(ids, list) else [ids]
            if not all(type(id_) is int for id_ in found):
                raise CheckpointError(f"{folder / name}: {invalid('eos_token_id', ids, hf_config.AN_ID)}")
            return found
    return []


def _carried(folder: Path) -> list[str]:
    templates = [str(file.relative_to(folder)) for file in folder.glob(TEMPLATES)]
    return [name for name in (*CARRIED, *templates) if (folder / name).is_file()]


def _make_way(folder: Path, names: Collection[str], temporary: Path, *, overwrite: bool) -> None:
    """Remove files that would be read as a part of the model whose files are `temporary`; CheckpointError instead
    unless `overwrite`."""
    others = {INDEX, "pytorch_model.bin", *_carried(folder)} | {path.name for path in folder.glob("*.safetensors")}
    differing = []
    for name in sorted({*names, *others}):
        file = folder / name
        equal = name in names and file.is_file() and filecmp.cmp(file, temporary / name, shallow=False)
        if not equal and file.exists():
            differing.append(name)
    if differing and not overwrite:
        raise CheckpointError(
            f"out: {folder} holds {differing[0]} of another model; choose another folder, or add `overwrite=True`",
            argument=True,
        )
    for name in [CONFIG, *differing] if differing else ():  # without the config, the rest is no model
        (folder / name).unlink(missing_ok=True)


def _write(
    config: GPTConfig,
    weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    file: Path,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> list[str]:
    parameters = table(config)

    def parts() -> Iterator[tuple[str, Tensor]]:
        for name, whole in weights.items() if isinstance(weights, Mapping) else weights:
            sources = parameters[name].sources
            yield from zip(sources, whole.split([*sources.values()]), strict=True)

    shapes = {
        source: (rows, *parameter.shape[1:])
        for parameter in parameters.values()
        for source, rows in parameter.sources.items()
    }
    return write(file, shapes, parts(), dtype, metadata)


def read_config(folder: str | Path) -> GPTConfig:
    """The shape of the model in `folder`: that of its config.json, but with a separate head if the weights hold one
    that differs from the embedding. CheckpointError names what a GPT can't represent."""
    folder = Path(folder)
    if (folder / ADAPTER).exists():
        raise CheckpointError(
            f"{folder / ADAPTER}: a GPT has no place for an adapter; merge it into its base first, as PEFT's "
            "merge_and_unload does"
        )
    config = hf_config.read_config(folder)
    if not config.tied or not any((folder / file).exists() for file in (WEIGHTS, INDEX)):
        return config
    places = _places(folder)
    if HEAD not in places or EMBEDDING not in places or _equal(places, HEAD, EMBEDDING):
        return config
    warnings.warn(
        f"{folder}: {HEAD} differs from {EMBEDDING}, although {CONFIG} says tie_word_embeddings: true; it is kept",
        SptWarning,
        stacklevel=3,
    )
    return replace(config, tied=False)


def read_metadata(folder: Path) -> dict[str, str]:
    """The metadata that `save` kept beside the weights; empty if another program wrote them."""
    if not (folder / WEIGHTS).exists():
        return {}
    with opened(folder / WEIGHTS) as stored:
        return stored.metadata() or {}


def _equal(places: Mapping[str, tuple[Path, Tensor]], a: str, b: str) -> bool:
    """Whether two tensors are equal; stops reading at the first difference."""
    (file_a, like_a), (file_b, like_b) = places[a], places[b]
    both = zip(pieces(file_a, a), pieces(file_b, b), strict=True)
    return like_a.shape == like_b.shape and all(bool((x == y).all()) for x, y in both)


def _places(folder: Path) -> dict[str, tuple[Path, Tensor]]:
    """The file of each tensor in the folder, and its shape and dtype."""
    listed = {} if (folder / WEIGHTS).exists() else _index(folder)
    found: dict[str, tuple[Path, Tensor]] = {}
    for file in [folder / name for name in sorted(set(listed.values()) or {WEIGHTS})]:
        for name, like in contents(file).items():
            if name in found:
                other = found[name][0].name
                raise CheckpointError(f"{file}: tensor {shown_key(name)} is in {other} too; keep one file")
            found[name] = file, like
    if lost := sorted(listed.keys() - found.keys()):
        raise CheckpointError(f"{folder / INDEX}: tensor {shown_key(lost[0])} is in no shard; copy the folder again")
    return found


def _index(folder: Path) -> dict[str, str]:
    """The file of each tensor, by model.safetensors.index.json."""
    if not (folder / INDEX).exists():
        raise _without_weights(folder)
    listed = hf_config.read_json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{folder / INDEX}: weight_map names no shards ({shown(listed)}); copy it again")
    for name in listed.values():
        if not isinstance(name, str) or Path(name).name != name or len(name) > 255:
            raise CheckpointError(f"{folder / INDEX}: shard {shown(name)} is not a file of this folder")
    shards = set(listed.values())
    if absent := sorted(name for name in shards if not (folder / name).exists()):
        raise CheckpointError(
            f"{folder / absent[0]}: cannot be read because it is missing; {INDEX} lists {len(shards)} shards, and "
            f"{len(absent)} of them are missing: download the rest of the folder"
        )
    return listed


def _without_weights(folder: Path) -> CheckpointError:
    def found(*patterns: str) -> str | None:
        return min((file.name for pattern in patterns for file in folder.glob(pattern)), default=None)

    if (folder / WEIGHTS).is_symlink():  # as in Hugging Face's cache after an interrupted download
        return CheckpointError(f"{folder / WEIGHTS}: is a link to a missing file; download it again")
    if shard := found("*.safetensors"):
        return CheckpointError(f"{folder}: has {shard} without {INDEX}, which lists its shards; copy that as well")
    if pickle := found("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl"):
        return CheckpointError(
            f"{folder}: {pickle} is a pickle, which can run code and is never read; convert it to safetensors, for "
            "example by transformers' AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    if other := found("*.gguf", "*.h5", "*.msgpack", "*.onnx"):
        return CheckpointError(f"{folder}: {other} holds weights in another format; download the model's safetensors")
    return CheckpointError(f"{folder}: no {WEIGHTS} or {INDEX} in this folder; give a folder of weights")
