"""Weights in and out of a Hugging Face folder: model.safetensors, config.json, tokenizer files.

This is the project's own form of weights too, so that every phase's result loads in transformers as it is.
Which family of transformers a GPT belongs to is in `FAMILIES`, which tensors hold a parameter is in parameters.py.
Whatever else the families' configurations allow (other scalings of RoPE, biases, sliding windows …) is refused by
name. Only safetensors are read: a pickle can run code.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spt_fast.errors import CheckpointError, invalid, shown
from spt_fast.files import sync
from spt_fast.model.config import GPTConfig, RopeScaling
from spt_fast.model.parameters import table

if TYPE_CHECKING:
    from spt_fast.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Family:
    """A kind of model in transformers."""

    architecture: str
    fields: Mapping[str, bool]
    """What all of its models have in common, by field of a GPTConfig."""
    head_dim: int | None = None
    """Where config.json doesn't say; None: width / heads."""


FAMILIES = {
    "llama": Family("LlamaForCausalLM", {"qk_norm": False, "qkv_bias": False}),
    "qwen2": Family("Qwen2ForCausalLM", {"qkv_bias": True}),
    "qwen3": Family("Qwen3ForCausalLM", {"qk_norm": True}, head_dim=128),
}
"""By model_type."""

FIELDS = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn": "intermediate_size",
    "context": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "tied": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps",
}
"""Fields of config.json by those of a GPTConfig that they equal."""

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


def load(folder: str | Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Shape and weights of the model in `folder`: the GPT's parameters by name, on the CPU, in the dtype that they are
    stored in (float32 where they differ).

    CheckpointError: no such folder, no safetensors in it, a damaged or missing file or tensor, or a configuration that
    a GPT can't represent.
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors = _read_tensors(folder)
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
                raise CheckpointError(f"{folder}: tensor {source} is missing")
            part, shape = tensors.pop(source).to(dtype), [rows, *parameter.shape[1:]]
            if list(part.shape) != shape:
                raise CheckpointError(f"{folder}: tensor {source} is {list(part.shape)}; by {CONFIG} it is {shape}")
            parts.append(part)
        weights[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    # Old files hold the rotary frequencies, which the configuration gives; some hold a tied head as well.
    left = [name for name in tensors if not name.endswith("rotary_emb.inv_freq") and name != "lm_head.weight"]
    if left:
        raise CheckpointError(f"{folder}: a GPT has no place for tensor {left[0]} ({len(left)} such tensors)")
    return config, weights


def save(
    config: GPTConfig,
    weights: Mapping[str, Tensor],
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes model.safetensors, config.json and a tokenizer's files, for AutoModelForCausalLM and AutoTokenizer.

    weights: the GPT's parameters by name. dtype float32, bfloat16 or float16; None keeps the weights' own. Everything
    is written and flushed beside the folder and then moved into it, config.json last; other files in the folder are
    left alone.
    """
    folder = Path(folder)
    dtype = dtype or weights["embedding"].dtype
    if dtype not in DTYPES:
        raise CheckpointError(invalid("dtype", dtype, "float32, bfloat16 or float16"))
    if _family(config) == "llama" and config.width % config.heads:
        warnings.warn(
            f"{folder}: transformers loads no Llama whose {config.heads} heads don't divide its width "
            f"{config.width}; GPT.from_hf does",
            stacklevel=3,
        )
    tensors = {}
    for name, parameter in table(config).items():
        parts = weights[name].detach().split([*parameter.sources.values()])
        for source, part in zip(parameter.sources, parts, strict=True):
            tensors[source] = part.to(device="cpu", dtype=dtype, copy=True)

    temporary = folder.absolute().with_name(f".{folder.absolute().name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_hf(temporary)
        described = _to_hf(config, dtype, None if tokenizer is None else tokenizer.eos_id)
        (temporary / CONFIG).write_text(json.dumps(described, indent=2) + "\n")
        for file in temporary.iterdir():
            sync(file)
        folder.mkdir(exist_ok=True)
        for file in sorted(temporary.iterdir(), key=lambda file: file.name == CONFIG):
            file.replace(folder / file.name)
        sync(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: the weights could not be written ({error}); make room or choose another place"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_config(folder: str | Path) -> GPTConfig:
    """The shape that the folder's config.json describes; CheckpointError names what a GPT can't represent."""
    file = Path(folder) / CONFIG
    try:
        hf = {field: value for field, value in json.loads(file.read_text()).items() if value is not None}
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file; a Hugging Face model folder has one") from None
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON: {error}") from None

    model_type = hf.get("model_type")
    if model_type not in FAMILIES:
        raise CheckpointError(f"{file}: model_type {model_type!r} cannot be represented; known: {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    refused: dict[str, Callable[[Any], bool]] = {
        "architectures": lambda names: bool(names) and names != [family.architecture],
        "attention_bias": bool,
        "mlp_bias": bool,
        "hidden_act": lambda name: name not in (None, "silu", "swish"),
        "use_sliding_window": bool,
        "layer_types": lambda types: any(type_ != "full_attention" for type_ in types or []),
        "partial_rotary_factor": lambda share: share not in (None, 1, 1.0),
        "quantization_config": bool,
    }
    found = {field: hf.get(field) for field, wrong in refused.items() if wrong(hf.get(field))}
    rope_field = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"  # as transformers 5 prefers them
    rope = {field: value for field, value in hf.get(rope_field, {}).items() if value is not None}
    try:
        scaling = _rope_scaling(hf, rope)
    except (KeyError, ValueError):
        found[rope_field] = rope
    if found:
        field, value = next(iter(found.items()))
        raise CheckpointError(f"{file}: {field} {shown(value)} cannot be represented by a GPT")

    unsaid = {
        "num_key_value_heads": hf.get("num_attention_heads"),
        "head_dim": family.head_dim,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
    }
    try:
        shape: dict[str, Any] = {ours: (unsaid | hf)[theirs] for ours, theirs in FIELDS.items()}
        theta = rope.get("rope_theta", hf.get("rope_theta", 10_000.0))
        return GPTConfig(**shape, **family.fields, rope_theta=theta, rope_scaling=scaling)
    except KeyError as error:
        raise CheckpointError(f"{file}: {error.args[0]} is missing") from None
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None


def _rope_scaling(hf: Mapping[str, Any], rope: Mapping[str, Any]) -> RopeScaling | None:
    """What `rope` says in a config.json; KeyError or ValueError where a GPT can't represent it."""
    if rope.get("partial_rotary_factor", 1) != 1 or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    factors = {field: rope[field] for field in ("factor", "low_freq_factor", "high_freq_factor")}
    window = "original_max_position_embeddings"
    whole = hf.get(window, rope.get(window, hf.get("max_position_embeddings")))
    return RopeScaling(rope_type=kind, **factors, original_max_position_embeddings=whole)


def _family(config: GPTConfig) -> str:
    """The model_type that has all that the shape has."""
    return next(
        name
        for name, family in FAMILIES.items()
        if all(getattr(config, field) == value for field, value in family.fields.items())
    )


def _to_hf(config: GPTConfig, dtype: torch.dtype, eos_id: int | None) -> dict[str, Any]:
    """config.json, with what transformers 4 and 5 call differently under both names."""
    model_type = _family(config)
    scaling = asdict(config.rope_scaling) if config.rope_scaling else None
    return {
        "architectures": [FAMILIES[model_type].architecture],
        "model_type": model_type,
        **{theirs: getattr(config, ours) for ours, theirs in FIELDS.items()},
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": config.rope_theta},
        "rope_scaling": scaling,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "dtype": DTYPES[dtype],
        "torch_dtype": DTYPES[dtype],
    }


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as stored:
                tensors |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: cannot be read as safetensors: {error}") from None
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / INDEX).exists():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{folder / INDEX}: cannot be read as an index of shards: {error!r}") from None
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise CheckpointError(f"{folder / INDEX}: shard {outside[0]!r} is not a file of this folder")
        return [folder / name for name in names]
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder}: {pickles[0]} is a pickle, which can run code and is never read; convert it to safetensors, for "
            "example by transformers' AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise CheckpointError(f"{folder}: no {WEIGHTS} or {INDEX} in this folder")
