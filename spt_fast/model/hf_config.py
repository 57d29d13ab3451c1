"""config.json of a Hugging Face folder and the shape of a GPT, converted into each other, or refused by name.

Every field is one of: a field of a GPTConfig (`FIELDS`, and a family's own), part of the rotary embedding or of the
window, one that a GPT has at a single value (`ONLY`), or one without effect on the computation (`WITHOUT_EFFECT`).
Any other field is refused if its name suggests that it affects the computation, and named in a warning otherwise: none
is ignored silently.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from spt_fast.errors import CheckpointError, SptWarning, cut, invalid, shown, shown_key
from spt_fast.fields import integer
from spt_fast.files import check_regular, download
from spt_fast.model.config import SCALINGS, GPTConfig, Scaling, YarnScaling
from spt_fast.model.families import FAMILIES, Family, family_of
from spt_fast.model.stored import mistaken

CONFIG = "config.json"
MAX_CHARACTERS = 50_000_000
"""Of config.json, or of the index of shards."""
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
AN_ID = "a token id, or a list of some"
"""What each of them may be."""


UNLIKE = {
    "gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text": "its norms multiply by 1 + weight, and "
    "it multiplies its embedding by the square root of the width",
    "gpt2 opt gpt_bigcode openai-gpt": "its positions are learnt and its norms are LayerNorms",
    "gpt_neox gpt_neo gptj phi falcon stablelm starcoder2 codegen": "its norms are LayerNorms",
    "bloom mpt": "its positions are ALiBi and its norms are LayerNorms",
    "olmo cohere cohere2": "its norms are LayerNorms without bias",
    "granite": "it multiplies its embedding, residuals and logits",
    "mixtral llama4 llama4_text gpt_oss dbrx deepseek_v2 deepseek_v3": "it has experts",
    "mamba mamba2 falcon_mamba rwkv": "it has no attention",
}
"""Why well-known models, by model_type, cannot be represented by a GPT."""

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
"""Fields of config.json by the equal fields of a GPTConfig."""

ROPE_TABLES = ("rope_parameters", "rope_scaling")
"""Where transformers 5 and 4 write the rotary embedding."""
ROPE = (*ROPE_TABLES, "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
LENGTH = "original_max_position_embeddings"
LAYER_TYPES = {"sliding_attention": True, "full_attention": False}
"""Whether a layer of that type has the window."""

ONLY: dict[str, Callable[[Any], bool]] = {
    "hidden_act": lambda name: name in ("silu", "swish"),
    "layer_types": lambda types: isinstance(types, list) and all(type_ == "full_attention" for type_ in types),
    "sliding_window": lambda window: window is None,
    "is_causal": lambda causal: causal is True,
}
"""Whether a GPT can have a value."""

_WITHOUT_EFFECT = (
    "model_type architectures torch_dtype dtype transformers_version initializer_range use_cache pretraining_tp "
    "bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id attention_dropout hidden_dropout "
    "resid_pdrop embd_pdrop residual_dropout "
    "max_window_layers is_llama_config return_dict output_attentions output_hidden_states chunk_size_feed_forward "
    "id2label label2id problem_type tokenizer_class vocab_file task_specific_params attn_implementation "
    "use_flash_attention use_flash_attention_2 max_sequence_length top_k top_p temperature repetition_penalty "
    "length_penalty max_length min_length num_beams num_beam_groups num_return_sequences typical_p "
    "diversity_penalty encoder_no_repeat_ngram_size no_repeat_ngram_size transformers.js_config"
)
WITHOUT_EFFECT = frozenset(_WITHOUT_EFFECT.split())
"""In training by spt_fast, evaluation and generation. Names that begin with an underscore have none either."""

_OF_THE_FUNCTION = re.compile(
    "(?!.*(dropout|pdrop)).*(act|alibi|attention|attn|auto_map|bias|cap|clip|conv|decoder|embed|expert|gate|head|"
    "latent|layer|lora|mlp|moe|mul|mup|norm|parallel|position|quant|qk|residual|rope|rotary|scal|ssm|temper|window)"
)
_ONE_IS_NEUTRAL = re.compile("(?!.*(attention|attn)).*(factor|multiplier|pct|scal|temper)")


def read_config(folder: str | Path) -> GPTConfig:
    """The shape that the folder's config.json describes; CheckpointError names what a GPT can't represent."""
    file = Path(folder) / CONFIG
    given = read_json(file)
    if given.get("auto_map"):
        raise CheckpointError(
            f"{file}: auto_map {shown(given['auto_map'])} cannot be represented by a GPT: code that comes with a model "
            "is never run; remove auto_map if the model needs no code of its own"
        )
    model_type = given.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        why = next((f", since {why}" for names, why in UNLIKE.items() if model_type in names.split()), "")
        known = ", ".join(FAMILIES)
        raise CheckpointError(f"{file}: model_type {shown(model_type)} cannot be represented{why}; known: {known}")
    family = FAMILIES[model_type]
    hf = {field: value for field, value in {**family.unsaid, **given}.items() if value is not None}
    _check_fields(hf, family, file)
    unsaid = {
        "num_key_value_heads": hf.get("num_attention_heads"),
        "head_dim": None,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        **dict.fromkeys(family.written.values(), False),
    }
    names = {**FIELDS, **family.written}
    try:
        shape: dict[str, Any] = {ours: (unsaid | hf)[theirs] for ours, theirs in names.items()}
    except KeyError as error:
        raise CheckpointError(f"{file}: {error.args[0]} is missing; copy the file again") from None
    theta, scaling, scaled_windows = _rope(hf, file, family)
    rope = {"rope_theta": theta, "rope_scaling": scaling}
    try:
        layers = range(integer(1, 10_000)(shape["layers"], "layers"))
        of_layers = _of_layers(hf, family, layers, file)
        everything = {**family.fixed, **shape, **rope, "scaled_windows": scaled_windows, **of_layers}
        config = GPTConfig(**everything, family=model_type)
    except CheckpointError:
        raise
    except ValueError as error:
        ours, _, wrong = str(error).removeprefix("model.").partition(":")
        raise CheckpointError(f"{file}: {({'window': 'sliding_window'} | names).get(ours, ours)}:{wrong}") from None
    unnamed = replace(config, family=None)
    return unnamed if family_of(unnamed) == model_type else config


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file of a model folder; CheckpointError if there is none."""
    try:
        check_regular(file)
        with file.open(encoding="utf-8-sig") as opened:
            text = opened.read(MAX_CHARACTERS + 1)
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"more than {MAX_CHARACTERS:,} characters")
        content = json.loads(text, object_pairs_hook=_each_once)
    except NotADirectoryError:
        raise CheckpointError(f"{file.parent}: is not a folder; give a Hugging Face model folder") from None
    except FileNotFoundError:
        if not file.parent.exists():
            remedy = download(file.parent) or "give a Hugging Face model folder"
            raise CheckpointError(f"{file.parent}: does not exist; {remedy}") from None
        remedy = download(file.parent) or "a Hugging Face model folder has one"
        raise CheckpointError(f"{file}: no such file; {remedy}") from None
    except (OSError, ValueError, RecursionError) as error:
        why = mistaken(file) or f"cannot be read as JSON ({cut(str(error), 160)}); copy it again"
        raise CheckpointError(f"{file}: {why}") from None
    if isinstance(content, dict) and content.keys() == {"error"}:
        raise CheckpointError(f"{file}: {mistaken(file)}")
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds {shown(content)} instead of fields by name; copy it again")
    return content


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, times in Counter(key for key, _ in pairs).items():
        if times > 1:
            raise ValueError(f"{shown(key)} is given twice")
    return dict(pairs)


def _refused(file: Path, field: str, value: object) -> CheckpointError:
    return CheckpointError(f"{file}: {shown_key(field)} {shown(value)} cannot be represented by a GPT")


def _check_fields(hf: Mapping[str, Any], family: Family, file: Path) -> None:
    """Refuse what a GPT doesn't compute, and warn of unknown fields."""
    if hf.get("architectures") not in (None, [], [family.architecture]):
        raise _refused(file, "architectures", hf["architectures"])
    for field in SPECIAL_IDS:
        ids = hf.get(field, 0)
        if not all(type(id_) is int for id_ in (ids if isinstance(ids, list) and ids else [ids])):
            raise CheckpointError(f"{file}: {invalid(field, ids, AN_ID)}")
    read = {*FIELDS.values(), *family.written.values(), *family.unsaid, *ROPE, *WITHOUT_EFFECT}
    read |= {"sliding_window", "layer_types"} if family.windowed else set()
    read |= {"no_rope_layers", "no_rope_layer_interval"} if "no_rope_layers" in family.free else set()
    if hf.get("use_sliding_window") is False:  # Qwen's files hold the size of an unused window
        read |= {"sliding_window"}
    unknown = []
    for field, value in hf.items():
        if field in read or field.startswith("_"):
            continue
        if field in ONLY:
            if not ONLY[field](value):
                raise _refused(file, field, value)
        elif not value:
            continue
        elif _OF_THE_FUNCTION.match(field.lower()):
            if isinstance(value, bool) or value != 1 or not _ONE_IS_NEUTRAL.match(field.lower()):
                raise _refused(file, field, value)
        else:
            unknown.append(field)
    if unknown:
        warnings.warn(f"{file}: a GPT has no place for {shown(', '.join(unknown))}; ignored", SptWarning, stacklevel=5)


def _of_layers(hf: Mapping[str, Any], family: Family, layers: range, file: Path) -> dict[str, Any]:
    """The window, and the layers without it and without RoPE; ValueError for wrong values."""
    found: dict[str, Any] = {}
    if "no_rope_layers" in family.free:
        interval = integer(1)(hf.get("no_rope_layer_interval", 4), "no_rope_layer_interval")
        rotated = hf.get("no_rope_layers", [(layer + 1) % interval for layer in layers])
        if not isinstance(rotated, list) or len(rotated) < len(layers) or {type(one) for one in rotated} != {int}:
            raise ValueError(invalid("no_rope_layers", rotated, f"a 1 or a 0 for each of {len(layers)} layers"))
        hf = {**hf, "no_rope_layers": rotated}
        found["no_rope_layers"] = [layer for layer in layers if not rotated[layer]]
    if family.windowed is None:
        return found
    if "max_window_layers" in family.unsaid:
        integer(0)(hf.get("max_window_layers"), "max_window_layers")
    window, types = hf.get("sliding_window"), hf.get("layer_types")
    if "use_sliding_window" in family.unsaid and not hf.get("use_sliding_window"):
        window = None
    if types is not None:
        known = isinstance(types, list) and all(isinstance(name, str) and name in LAYER_TYPES for name in types)
        if not known or len(types) != len(layers):
            raise _refused(file, "layer_types", types)
    if "full_layers" in family.free and window is not None and types is not None:
        windowed = [LAYER_TYPES[name] for name in types]
    else:
        windowed = [window is not None and family.windowed(hf, layer) for layer in layers]
        if types is not None and windowed != [LAYER_TYPES[name] for name in types]:
            raise _refused(file, "layer_types", types)
    return {**found, "window": window, "full_layers": [i for i in layers if window is not None and not windowed[i]]}


def _rope(hf: Mapping[str, Any], file: Path, family: Family) -> tuple[Any, Scaling | None, bool]:
    """Base and scaling of the rotary embedding, which may be in several places that have to agree; and whether layers
    with a window are scaled too."""
    by_layer_type = "scaled_windows" in family.free
    thetas, scalings, scaled_windows = [hf["rope_theta"]] if "rope_theta" in hf else [], [], not by_layer_type
    of_windows = family.rope_theta if by_layer_type else None
    if hf.get("partial_rotary_factor", 1) != 1:
        raise _refused(file, "partial_rotary_factor", hf["partial_rotary_factor"])
    for name in ROPE_TABLES:
        if (rope := hf.get(name, {})) == {}:
            continue
        try:
            if by_layer_type and name == "rope_parameters":
                of_types = {layer_type: _rope_table(hf, table) for layer_type, table in rope.items()}
                theta, scaling = of_types["full_attention"]
                scaled_windows = of_types["sliding_attention"] == (theta, scaling)
                of_windows = of_windows if theta is None else theta
                if (not scaled_windows and of_types["sliding_attention"] != (theta, None)) or len(of_types) > 2:
                    raise ValueError
            else:
                theta, scaling = _rope_table(hf, rope)
            if by_layer_type and isinstance(scaling, YarnScaling) and not scaling.truncate:
                raise ValueError  # transformers looks for it where it isn't
        except (AttributeError, KeyError, TypeError, ValueError):
            raise _refused(file, name, rope) from None
        thetas += [] if theta is None else [theta]
        scalings.append(scaling)
    if any(theta != thetas[0] for theta in thetas) or any(scaling != scalings[0] for scaling in scalings):
        said = {field: hf[field] for field in ROPE if field in hf}
        raise CheckpointError(f"{file}: {', '.join(said)} contradict each other ({shown(said)}); keep the right one")
    theta, scaling = thetas[0] if thetas else family.rope_theta, scalings[0] if scalings else None
    if of_windows not in (None, theta):  # transformers 5 reads `rope_theta` for the other layers only
        expected = f"transformers 4 has it in every layer, 5 has {of_windows:,.0f} in layers with a window"
        remedy = "write it in rope_parameters, for both types of layers"
        raise CheckpointError(f"{file}: {invalid('rope_theta', theta, f'{expected}; {remedy}')}")
    return theta, scaling, scaled_windows or scaling is None


def _rope_table(hf: Mapping[str, Any], rope: Mapping[str, Any]) -> tuple[Any, Scaling | None]:
    """The value in one place; an exception if a GPT can't represent it."""
    rope = {field: value for field, value in rope.items() if value is not None}
    kinds = {rope[name] for name in ("rope_type", "type") if name in rope} or {"default"}
    (kind,) = kinds
    own = [] if kind == "default" else [field.name for field in fields(SCALINGS[kind]) if field.name != "rope_type"]
    left = rope.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor", *own}
    if left - {LENGTH} or rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError
    if kind == "default":
        return rope.get("rope_theta"), None
    factors = {field: rope[field] for field in own if field in rope}
    if LENGTH in own:
        lengths = [place[LENGTH] for place in (hf, rope) if LENGTH in place] or [hf.get("max_position_embeddings")]
        if lengths[0] != lengths[-1]:
            raise ValueError
        factors[LENGTH] = lengths[0]
    return rope.get("rope_theta"), SCALINGS[kind](**factors)


def to_hf(config: GPTConfig, dtype: str, eos_id: int | None) -> dict[str, Any]:
    """config.json; what transformers 4 and 5 name differently is there under both names."""
    model_type = family_of(config)
    family = FAMILIES[model_type]
    scaling = None
    if config.rope_scaling:
        scaling = {name: value for name, value in asdict(config.rope_scaling).items() if value is not None}
    plain = {"rope_type": "default", "rope_theta": config.rope_theta}
    rope = {**(scaling or plain), "rope_theta": config.rope_theta}
    if "scaled_windows" in family.free:
        rope = {"full_attention": rope, "sliding_attention": rope if config.scaled_windows else plain}
    return {
        "architectures": [family.architecture],
        "model_type": model_type,
        **{theirs: getattr(config, ours) for ours, theirs in {**FIELDS, **family.written}.items()},
        **_said_of_layers(config, family),
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
        "rope_scaling": scaling,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "pad_token_id": None,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _said_of_layers(config: GPTConfig, family: Family) -> dict[str, Any]:
    """The values that differ from layer to layer."""
    said: dict[str, Any] = {}
    if "no_rope_layers" in family.free:
        said["no_rope_layers"] = [int(layer not in config.no_rope_layers) for layer in range(config.layers)]
    if config.window or "sliding_window" in family.unsaid:
        said["sliding_window"] = config.window
    if "full_layers" in family.free:
        types = {windowed: type_ for type_, windowed in LAYER_TYPES.items()}
        said["layer_types"] = [types[config.window_of(layer) is not None] for layer in range(config.layers)]
        if "use_sliding_window" in family.unsaid:
            said["use_sliding_window"] = config.window is not None
        if "max_window_layers" in family.unsaid and config.window:  # for programs that don't read layer_types
            said["max_window_layers"] = len(config.full_layers)
    return said
