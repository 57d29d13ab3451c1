"""Llama and Qwen3 weights in and out of a Hugging Face folder: model.safetensors, config.json, tokenizer files.

The same folder is this project's own form of weights, so that every phase's result loads in transformers as it lies. A
GPT with QK-norm is a Qwen3, one without is a Llama. Both keep an own head_dim, grouped queries, a tied or own head and
rope theta; whatever else their configurations allow (scaled RoPE, biases, sliding windows …) is refused by name. The
attention and feed-forward matrices that a GPT holds fused are the rows of several Hugging Face tensors one below the
other. Only safetensors are read: a pickle can run code.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spt_fast.errors import CheckpointError
from spt_fast.files import sync
from spt_fast.model.gpt import GPT, GPTConfig

if TYPE_CHECKING:
    from spt_fast.data.tokenizer import Tokenizer

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


def load(folder: str | Path) -> GPT:
    """The model in `folder`, on the CPU, in the dtype that it is stored in (the widest, where they differ).

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

    with torch.device("meta"):
        model = GPT(config)
    state = {}
    for name, parameter in model.named_parameters():
        parts = []
        for source, rows in _sources(config, name):
            if source not in tensors:
                raise CheckpointError(f"{folder}: tensor {source} is missing")
            part = tensors.pop(source).to(dtype)
            if part.shape != (rows, *parameter.shape[1:]):
                raise CheckpointError(
                    f"{folder}: tensor {source} is {list(part.shape)}; by {CONFIG} it is {[rows, *parameter.shape[1:]]}"
                )
            parts.append(part)
        state[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    # Old files hold the rotary frequencies, which the configuration gives; some hold a tied head as well.
    left = [name for name in tensors if not name.endswith("rotary_emb.inv_freq") and name != "lm_head.weight"]
    if left:
        raise CheckpointError(f"{folder}: a GPT has no place for tensor {left[0]} ({len(left)} such tensors)")
    model.load_state_dict(state, assign=True)
    return model


def save(model: GPT, folder: str | Path, tokenizer: Tokenizer | None = None, dtype: torch.dtype | None = None) -> None:
    """Writes model.safetensors, config.json and a tokenizer's files, for AutoModelForCausalLM and AutoTokenizer.

    dtype float32, bfloat16 or float16; None keeps the parameters' own. Everything is written and flushed beside the
    folder and then moved into it, config.json last; other files in the folder are left alone.
    """
    folder = Path(folder)
    dtype = dtype or model.embedding.dtype
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype: weights can be saved as float32, bfloat16 or float16, not {dtype}")
    if not model.config.qk_norm and model.config.width % model.config.heads:
        warnings.warn(
            f"{folder}: transformers loads no Llama whose {model.config.heads} heads don't divide its width "
            f"{model.config.width}; GPT.from_hf does",
            stacklevel=2,
        )
    tensors = {}
    for name, parameter in model.named_parameters():
        sources = _sources(model.config, name)
        for (source, _), part in zip(sources, parameter.detach().split([rows for _, rows in sources]), strict=True):
            tensors[source] = part.to(device="cpu", dtype=dtype, copy=True)

    temporary = folder.absolute().with_name(f".{folder.absolute().name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_hf(temporary)
        config = _to_hf(model.config, dtype, None if tokenizer is None else tokenizer.eos_id)
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
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
        hf = json.loads(file.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file; a Hugging Face model folder has one") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON: {error}") from None

    model_type = hf.get("model_type")
    if model_type not in ARCHITECTURES:
        raise CheckpointError(
            f"{file}: model_type {model_type!r} cannot be represented; {' and '.join(ARCHITECTURES)} can"
        )
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    refused: dict[str, Callable[[Any], bool]] = {
        "architectures": lambda names: bool(names) and names != [ARCHITECTURES[model_type]],
        "attention_bias": bool,
        "mlp_bias": bool,
        "hidden_act": lambda name: name not in (None, "silu", "swish"),
        "use_sliding_window": bool,
        "layer_types": lambda types: any(type_ != "full_attention" for type_ in types or []),
        "partial_rotary_factor": lambda share: share not in (None, 1, 1.0),
        "quantization_config": bool,
    }
    found = {field: hf.get(field) for field, wrong in refused.items() if wrong(hf.get(field))}
    if rope.get("rope_type", rope.get("type", "default")) != "default" or rope.get("partial_rotary_factor", 1) != 1:
        found["rope_parameters" if hf.get("rope_parameters") else "rope_scaling"] = rope
    if found:
        field, value = next(iter(found.items()))
        raise CheckpointError(f"{file}: {field} {json.dumps(value)} cannot be represented by a GPT")

    try:
        return GPTConfig(
            layers=hf["num_hidden_layers"],
            width=hf["hidden_size"],
            heads=hf["num_attention_heads"],
            kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
            ffn=hf["intermediate_size"],
            context=hf["max_position_embeddings"],
            vocab_size=hf["vocab_size"],
            head_dim=hf.get("head_dim") or (128 if model_type == "qwen3" else None),
            qk_norm=model_type == "qwen3",
            tied=hf.get("tie_word_embeddings", False),
            rope_theta=rope.get("rope_theta") or hf.get("rope_theta") or 10_000.0,
            norm_eps=hf.get("rms_norm_eps", 1e-6),
        )
    except KeyError as error:
        raise CheckpointError(f"{file}: {error.args[0]} is missing") from None
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None


def _to_hf(config: GPTConfig, dtype: torch.dtype, eos_id: int | None) -> dict[str, Any]:
    """config.json, with what transformers 4 and 5 call differently under both names."""
    model_type = "qwen3" if config.qk_norm else "llama"
    return {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "dtype": DTYPES[dtype],
        "torch_dtype": DTYPES[dtype],
    }


def _sources(config: GPTConfig, name: str) -> list[tuple[str, int]]:
    """The Hugging Face tensors, with their numbers of rows, that stand one below the other in the parameter `name`."""
    D, F, Q = config.width, config.ffn, config.head_dim
    assert Q is not None
    q_rows, kv_rows = config.heads * Q, config.kv_heads * Q
    top = {
        "embedding": ("model.embed_tokens", config.vocab_size),
        "final_norm": ("model.norm", D),
        "head": ("lm_head", config.vocab_size),
    }
    if name in top:
        source, rows = top[name]
        return [(f"{source}.weight", rows)]
    _, layer, field = name.split(".")
    attention, mlp = "self_attn.{}_proj", "mlp.{}_proj"
    block = {
        "attention_norm": [("input_layernorm", D)],
        "wqkv": [(attention.format("q"), q_rows), (attention.format("k"), kv_rows), (attention.format("v"), kv_rows)],
        "q_norm": [("self_attn.q_norm", Q)],
        "k_norm": [("self_attn.k_norm", Q)],
        "wo": [(attention.format("o"), D)],
        "ffn_norm": [("post_attention_layernorm", D)],
        "w_gate_up": [(mlp.format("gate"), F), (mlp.format("up"), F)],
        "w_down": [(mlp.format("down"), D)],
    }
    return [(f"model.layers.{layer}.{source}.weight", rows) for source, rows in block[field]]


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
