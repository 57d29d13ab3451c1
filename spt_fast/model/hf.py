"""Weights in and out of a Hugging Face folder: model.safetensors, config.json, tokenizer files.

This is the project's own form of weights too, so that every phase's result loads in transformers as it is.
What config.json means is in hf_config.py, which tensors hold a parameter in parameters.py; a tensor that has no place
in a GPT is refused by name. Only safetensors are read: a pickle can run code.
"""

from __future__ import annotations

import filecmp
import json
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spt_fast.errors import CheckpointError, SptWarning, cut, invalid, shown, shown_key
from spt_fast.files import sync, with_usual_mode
from spt_fast.model import hf_config, rotary
from spt_fast.model.config import GPTConfig
from spt_fast.model.hf_config import CONFIG
from spt_fast.model.parameters import table

if TYPE_CHECKING:
    from spt_fast.data.tokenizer import Tokenizer

CARRIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json"),
    "tokenizer.tiktoken",
)

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
HEAD, EMBEDDING, FREQUENCIES = "lm_head.weight", "model.embed_tokens.weight", "rotary_emb.inv_freq"


def load(folder: str | Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Shape and weights of the model in `folder`: the GPT's parameters by name, on the CPU, in the dtype that they are
    stored in (float32 where they differ).

    CheckpointError: no such folder, no safetensors in it, a damaged or missing file or tensor, or a configuration that
    a GPT can't represent.
    """
    folder = Path(folder)
    config = read_config(folder)
    files = _files_of_tensors(folder)
    tensors = {name: _read(file, name) for name, file in files.items()}
    stored = {tensor.dtype for tensor in tensors.values()}
    if not stored <= DTYPES.keys():
        raise CheckpointError(
            f"{folder}: tensors are stored as {stored - DTYPES.keys()}; float32, bfloat16 or float16 can be read"
        )
    dtype = stored.pop() if len(stored) == 1 else torch.float32

    weights = {}
    for name, parameter in table(config).items():
        parts = []
        for source, rows in parameter.sources.items():
            if source not in tensors:
                raise CheckpointError(f"{folder}: tensor {source} is missing; copy the folder again")
            part, shape = tensors.pop(source).to(dtype), [rows, *parameter.shape[1:]]
            if list(part.shape) != shape:
                raise CheckpointError(f"{folder}: tensor {source} is {list(part.shape)}; by {CONFIG} it is {shape}")
            parts.append(part)
        weights[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    for name in [
        name for name in tensors if name.endswith(FREQUENCIES)
    ]:  # old files hold what follows from config.json
        found, expected = tensors.pop(name).float(), rotary.frequencies(config, torch.device("cpu"))
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=0.01):
            raise CheckpointError(
                f"{folder}: tensor {name} holds other frequencies than those of {CONFIG}; mend either"
            )
    if config.tied:
        tensors.pop(HEAD, None)
    if tensors:
        name = shown_key(next(iter(tensors)))
        raise CheckpointError(f"{folder}: a GPT has no place for tensor {name} ({len(tensors)} such tensors)")
    return config, weights


def save(
    config: GPTConfig,
    weights: Mapping[str, Tensor],
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    *,
    like: Path | None = None,
    overwrite: bool | None = None,
) -> None:
    """Writes model.safetensors, config.json and a tokenizer's files, for AutoModelForCausalLM and AutoTokenizer.

    weights: the GPT's parameters by name. dtype float32, bfloat16 or float16; None keeps the weights' own. like: a
    Hugging Face folder whose tokenizer, settings of generation, special ids and metadata go along as they are.
    metadata: what is to be known of the weights, kept in model.safetensors; `read_metadata` gives it back. Everything
    is written and flushed in a folder of its own and then moved into place, config.json last; other files in the folder
    are left alone. overwrite: False raises CheckpointError rather than replace anything that differs, or be read
    together with another model's shards; True has another model's files removed.
    """
    folder = Path(folder)
    dtype = dtype or weights["embedding"].dtype
    if dtype not in DTYPES:
        raise CheckpointError(invalid("dtype", dtype, "float32, bfloat16 or float16"))
    if hf_config.family_of(config) == "llama" and config.width % config.heads:
        warnings.warn(
            f"{folder}: transformers loads no Llama whose {config.heads} heads don't divide its width "
            f"{config.width}; GPT.from_hf does",
            SptWarning,
            stacklevel=3,
        )
    tensors = {}
    for name, parameter in table(config).items():
        parts = weights[name].detach().split([*parameter.sources.values()])
        for source, part in zip(parameter.sources, parts, strict=True):
            tensors[source] = part.to(device="cpu", dtype=dtype, copy=True)

    temporary = folder / ".weights.tmp"  # inside: the folder may be a mount point
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        known = {**(read_metadata(like) if like else {}), **(metadata or {}), "format": "pt"}
        with with_usual_mode(temporary / WEIGHTS):
            save_file(tensors, temporary / WEIGHTS, metadata=known)
        _sort_metadata(temporary / WEIGHTS)
        if tokenizer is not None:
            tokenizer.save_hf(temporary)
        described = hf_config.to_hf(config, DTYPES[dtype], None if tokenizer is None else tokenizer.eos_id)
        if like is not None:
            for file in like.iterdir():
                if file.name in CARRIED:
                    shutil.copyfile(file, temporary / file.name)
            described |= {field: hf_config.read_json(like / CONFIG).get(field) for field in hf_config.SPECIAL_IDS}
        (temporary / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        for file in temporary.iterdir():
            sync(file)
        if overwrite is not None:
            _make_way(folder, {file.name for file in temporary.iterdir()}, temporary, overwrite=overwrite)
        for file in sorted(temporary.iterdir(), key=lambda file: file.name == CONFIG):
            file.replace(folder / file.name)
        sync(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: the weights could not be written ({error}); make room or choose another place"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            folder.rmdir()  # where nothing came into it


def _make_way(folder: Path, names: Collection[str], temporary: Path, *, overwrite: bool) -> None:
    """Remove what would be taken for a part of the model whose files are `temporary`; CheckpointError instead where
    that isn't wanted."""
    others = {INDEX, "pytorch_model.bin", *CARRIED} | {path.name for path in folder.glob("*.safetensors")}
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
    for name in [CONFIG, *differing] if differing else ():  # without the first, what is left is no model
        (folder / name).unlink(missing_ok=True)


def _sort_metadata(file: Path) -> None:
    """Bring the metadata of safetensors, which come in any order, into one: equal weights make equal files."""
    with file.open("r+b") as stored:
        size = int.from_bytes(stored.read(8), "little")
        header = json.loads(stored.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        stored.seek(8)
        stored.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


def read_config(folder: str | Path) -> GPTConfig:
    """The shape of the model in `folder`: that of its config.json, but with a head of its own where the weights hold
    one that differs from the embedding. CheckpointError names what a GPT can't represent."""
    folder = Path(folder)
    config = hf_config.read_config(folder)
    if (folder / ADAPTER).exists():
        raise CheckpointError(f"{folder / ADAPTER}: a GPT has no place for an adapter; merge it into the weights")
    if not config.tied or not any((folder / file).exists() for file in (WEIGHTS, INDEX)):
        return config
    files = _files_of_tensors(folder)
    if HEAD not in files or EMBEDDING not in files or _equal(*(_read(files[name], name) for name in (HEAD, EMBEDDING))):
        return config
    warnings.warn(
        f"{folder}: {HEAD} differs from {EMBEDDING}, though {CONFIG} says tie_word_embeddings: true; it is kept",
        SptWarning,
        stacklevel=3,
    )
    return replace(config, tied=False)


def read_metadata(folder: Path) -> dict[str, str]:
    """What `save` was told to keep beside the weights; empty where another program wrote them."""
    if not (folder / WEIGHTS).exists():
        return {}
    with _opened(folder / WEIGHTS) as stored:
        return stored.metadata() or {}


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a == b).all())


def _files_of_tensors(folder: Path) -> dict[str, Path]:
    """The file of the folder that holds a tensor, by the tensor's name."""
    listed = {} if (folder / WEIGHTS).exists() else _index(folder)
    found: dict[str, Path] = {}
    for file in [folder / name for name in sorted(set(listed.values()) or {WEIGHTS})]:
        with _opened(file) as stored:
            for name in stored.keys():  # noqa: SIM118
                if name in found:
                    raise CheckpointError(
                        f"{file}: tensor {shown_key(name)} is in {found[name].name} too; keep one file"
                    )
                found[name] = file
    if lost := sorted(listed.keys() - found.keys()):
        raise CheckpointError(f"{folder / INDEX}: tensor {shown_key(lost[0])} is in no shard; copy the folder again")
    return found


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as stored:
            yield stored
    except (OSError, SafetensorError, UnicodeError) as error:
        raise CheckpointError(
            f"{file}: cannot be read as safetensors ({cut(str(error), 160)}); copy it again"
        ) from None


def _read(file: Path, name: str) -> Tensor:
    with _opened(file) as stored:
        tensor: Tensor = stored.get_tensor(name)
    return tensor


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
    return listed


def _without_weights(folder: Path) -> CheckpointError:
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles:
        return CheckpointError(
            f"{folder}: {pickles[0]} is a pickle, which can run code and is never read; convert it to safetensors, for "
            "example by transformers' AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    return CheckpointError(f"{folder}: no {WEIGHTS} or {INDEX} in this folder; give a folder of weights")
