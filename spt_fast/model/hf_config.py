"""config.json of a Hugging Face folder, and the shape of a GPT: read into each other, or refused by name.

Every field is one of: a field of a GPTConfig (`FIELDS`), part of the rotary embedding, one that a GPT has at a single
value (`ONLY`), or one that changes nothing that is computed (`WITHOUT_EFFECT`). Any other is refused where its name
speaks of what a model computes, and named in a warning where not: none is left out in silence.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spt_fast.errors import CheckpointError, SptWarning, cut, invalid, shown, shown_key
from spt_fast.model.config import GPTConfig, RopeScaling
from spt_fast.model.stored import mistaken

CONFIG = "config.json"
MAX_CHARACTERS = 50_000_000
"""Of config.json, or of the index of shards."""
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


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

ROPE_TABLES = ("rope_parameters", "rope_scaling")
"""Where transformers 5 and 4 write the rotary embedding."""
ROPE = (*ROPE_TABLES, "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
WINDOW = "original_max_position_embeddings"
FACTORS = ("factor", "low_freq_factor", "high_freq_factor")

ONLY: dict[str, Callable[[Any], bool]] = {
    "hidden_act": lambda name: name in ("silu", "swish"),
    "layer_types": lambda types: isinstance(types, list) and all(type_ == "full_attention" for type_ in types),
    "sliding_window": lambda window: window is None,
}
"""Whether a value is a GPT's."""

_WITHOUT_EFFECT = (
    "model_type architectures torch_dtype dtype transformers_version initializer_range use_cache pretraining_tp "
    "bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id attention_dropout hidden_dropout "
    "max_window_layers is_llama_config return_dict output_attentions output_hidden_states chunk_size_feed_forward "
    "id2label label2id problem_type tokenizer_class vocab_file task_specific_params attn_implementation "
    "use_flash_attention use_flash_attention_2 max_sequence_length top_k top_p temperature repetition_penalty "
    "length_penalty max_length min_length num_beams num_beam_groups num_return_sequences typical_p "
    "diversity_penalty encoder_no_repeat_ngram_size no_repeat_ngram_size transformers.js_config"
)
WITHOUT_EFFECT = frozenset(_WITHOUT_EFFECT.split())
"""In training by spt_fast, evaluation and generation. So have names that begin with an underscore."""

_OF_THE_FUNCTION = re.compile(
    "(?!.*(dropout|pdrop)).*(act|alibi|attention|attn|auto_map|bias|cap|clip|conv|decoder|embed|expert|gate|head|"
    "latent|layer|lora|mlp|moe|mul|mup|norm|parallel|position|quant|qk|residual|rope|rotary|scal|ssm|temper|window)"
)
_ONE_IS_NEUTRAL = re.compile("(?!.*(attention|attn)).*(factor|multiplier|pct|scal|temper)")


def read_config(folder: str | Path) -> GPTConfig:
    """The shape that the folder's config.json describes; CheckpointError names what a GPT can't represent."""
    file = Path(folder) / CONFIG
    hf = {field: value for field, value in read_json(file).items() if value is not None}
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"{file}: model_type {shown(model_type)} cannot be represented; known: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[model_type]
    _check_fields(hf, family, file)
    unsaid = {
        "num_key_value_heads": hf.get("num_attention_heads"),
        "head_dim": family.head_dim,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
    }
    try:
        shape: dict[str, Any] = {ours: (unsaid | hf)[theirs] for ours, theirs in FIELDS.items()}
    except KeyError as error:
        raise CheckpointError(f"{file}: {error.args[0]} is missing; copy the file again") from None
    theta, scaling = _rope(hf, file)
    try:
        return GPTConfig(**shape, **family.fields, rope_theta=theta, rope_scaling=scaling)
    except ValueError as error:
        ours, _, wrong = str(error).removeprefix("model.").partition(":")
        raise CheckpointError(f"{file}: {FIELDS.get(ours, ours)}:{wrong}") from None


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file of a model folder; CheckpointError where there is none."""
    try:
        with file.open(encoding="utf-8-sig") as opened:
            text = opened.read(MAX_CHARACTERS + 1)
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"more than {MAX_CHARACTERS:,} characters")
        content = json.loads(text, object_pairs_hook=_each_once)
    except FileNotFoundError:
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


def download(folder: Path) -> str | None:
    """How to get a model's folder, where the path is a name on Hugging Face or a place in its cache."""
    if folder.is_dir():
        inside = sorted(folder.glob("snapshots/*/"))
        return f"give the folder {inside[-1]}" if inside else None
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(folder)) and not folder.parent.exists():
        return (
            f"nothing is downloaded here: run `hf download {folder} --local-dir {folder.name}` where there is a "
            "network, and give that folder"
        )
    return None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, times in Counter(key for key, _ in pairs).items():
        if times > 1:
            raise ValueError(f"{shown(key)} is given twice")
    return dict(pairs)


def _refused(file: Path, field: str, value: object) -> CheckpointError:
    return CheckpointError(f"{file}: {shown_key(field)} {shown(value)} cannot be represented by a GPT")


def _check_fields(hf: Mapping[str, Any], family: Family, file: Path) -> None:
    """Refuse what a GPT doesn't compute, and warn of what nothing is known about."""
    if hf.get("architectures") not in (None, [], [family.architecture]):
        raise _refused(file, "architectures", hf["architectures"])
    for field in SPECIAL_IDS:
        ids = hf.get(field, 0)
        if not all(type(id_) is int for id_ in (ids if isinstance(ids, list) and ids else [ids])):
            raise CheckpointError(f"{file}: {invalid(field, ids, 'a token id, or a list of some')}")
    only = ONLY
    if hf.get("use_sliding_window") is False:  # Qwen's files hold the size of a window that isn't used
        only = {**ONLY, "sliding_window": lambda _: True}
    unknown = []
    for field, value in hf.items():
        if field in only:
            if not only[field](value):
                raise _refused(file, field, value)
        elif field in FIELDS.values() or field in ROPE or field in WITHOUT_EFFECT or field.startswith("_") or not value:
            continue
        elif _OF_THE_FUNCTION.match(field.lower()):
            if isinstance(value, bool) or value != 1 or not _ONE_IS_NEUTRAL.match(field.lower()):
                raise _refused(file, field, value)
        else:
            unknown.append(field)
    if unknown:
        warnings.warn(f"{file}: a GPT has no place for {shown(', '.join(unknown))}; left out", SptWarning, stacklevel=5)


def _rope(hf: Mapping[str, Any], file: Path) -> tuple[Any, RopeScaling | None]:
    """Base and scaling of the rotary embedding, which may stand in several places that have to agree."""
    thetas, scalings = [hf["rope_theta"]] if "rope_theta" in hf else [], []
    if hf.get("partial_rotary_factor", 1) != 1:
        raise _refused(file, "partial_rotary_factor", hf["partial_rotary_factor"])
    for name in ROPE_TABLES:
        if (rope := hf.get(name, {})) == {}:
            continue
        try:
            theta, scaling = _rope_table(hf, rope)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise _refused(file, name, rope) from None
        thetas += [] if theta is None else [theta]
        scalings.append(scaling)
    if any(theta != thetas[0] for theta in thetas) or any(scaling != scalings[0] for scaling in scalings):
        said = {field: hf[field] for field in ROPE if field in hf}
        raise CheckpointError(f"{file}: {', '.join(said)} contradict each other ({shown(said)}); keep the right one")
    return thetas[0] if thetas else 10_000.0, scalings[0] if scalings else None


def _rope_table(hf: Mapping[str, Any], rope: Mapping[str, Any]) -> tuple[Any, RopeScaling | None]:
    """What one place says; another exception where a GPT can't represent it."""
    rope = {field: value for field, value in rope.items() if value is not None}
    kinds = {rope[name] for name in ("rope_type", "type") if name in rope} or {"default"}
    scaled = kinds == {"llama3"}
    left = rope.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor", *(FACTORS if scaled else ())}
    if left - {WINDOW} or rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError
    if not scaled:
        if kinds != {"default"}:
            raise ValueError
        return rope.get("rope_theta"), None
    windows = [place[WINDOW] for place in (hf, rope) if WINDOW in place] or [hf.get("max_position_embeddings")]
    if windows[0] != windows[-1]:
        raise ValueError
    factors = {field: rope[field] for field in FACTORS}
    return rope.get("rope_theta"), RopeScaling(**factors, original_max_position_embeddings=windows[0])


def family_of(config: GPTConfig) -> str:
    """The model_type that has all that the shape has."""
    return next(
        name
        for name, family in FAMILIES.items()
        if all(getattr(config, field) == value for field, value in family.fields.items())
    )


def to_hf(config: GPTConfig, dtype: str, eos_id: int | None) -> dict[str, Any]:
    """config.json, with what transformers 4 and 5 call differently under both names."""
    model_type = family_of(config)
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
        "dtype": dtype,
        "torch_dtype": dtype,
    }
