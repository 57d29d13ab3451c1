"""The families of models that a GPT can be: their differences, by field of a GPTConfig.

A family is a row. The fields of PLAIN are those in which families differ. In a family's models such a field has the
value in `fixed`, any value if config.json gives it (`written`) or if it is `free`, and else the value in PLAIN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from spt_fast.errors import RecipeError, invalid

PLAIN: dict[str, Any] = {
    "qk_norm": False,
    "qk_norm_over": "head",
    "norms": "before",
    "qkv_bias": False,
    "o_bias": False,
    "mlp_bias": False,
    "window": None,
    "full_layers": (),
    "scaled_windows": True,
    "no_rope_layers": (),
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of model in transformers."""

    architecture: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    written: Mapping[str, str] = field(default_factory=dict)
    """Equal fields of config.json by field of a GPTConfig; fields with the same name are equal."""
    free: frozenset[str] = frozenset()
    windowed: Callable[[Mapping[str, Any], int], bool] | None = None
    """Whether a layer has the window, if config.json doesn't say so layer by layer; None: none has."""
    fused: bool = False
    """One tensor holds queries, keys and values, another one gate and up."""
    unsaid: Mapping[str, Any] = field(default_factory=dict)
    """Default values of fields that a config.json leaves out, if families differ in them."""

    rope_theta: float = 10_000.0
    """The same for the base of the rotary embedding."""

    def misfits(self, shape: Any) -> list[str]:
        """The fields of a GPTConfig whose values no model of this family has."""
        of_file: dict[str, Any] = {}
        for ours, theirs in self.written.items():
            of_file.setdefault(theirs, getattr(shape, ours))
        expected = {**PLAIN, **self.fixed, **{ours: of_file[theirs] for ours, theirs in self.written.items()}}
        wrong = [name for name, value in expected.items() if name not in self.free and getattr(shape, name) != value]
        return wrong + (["window"] if "scaled_windows" in self.free and shape.window is None else [])


_ATTENTION = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}
_MLP = {"mlp_bias": "mlp_bias"}
_BY_LAYER = frozenset({"window", "full_layers"})
_OLMO = {"norms": "after", "qk_norm": True, "qk_norm_over": "width"}
_QWEN = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}


def _last_layers(hf: Mapping[str, Any], layer: int) -> bool:
    return bool(layer >= hf["max_window_layers"])


def _every_layer(hf: Mapping[str, Any], layer: int) -> bool:
    return True


FAMILIES = {
    "llama": Family(architecture="LlamaForCausalLM", written=_ATTENTION | _MLP),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        fixed={"qkv_bias": True},
        free=_BY_LAYER,
        windowed=_last_layers,
        unsaid=_QWEN,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        fixed={"qk_norm": True},
        written=_ATTENTION,
        free=_BY_LAYER,
        windowed=_last_layers,
        unsaid={**_QWEN, "head_dim": 128},
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        free=frozenset({"window"}),
        windowed=_every_layer,
        unsaid={"sliding_window": 4096},
    ),
    "olmo2": Family(architecture="Olmo2ForCausalLM", fixed=_OLMO, written=_ATTENTION, unsaid={"rms_norm_eps": 1e-5}),
    "olmo3": Family(
        architecture="Olmo3ForCausalLM",
        fixed=_OLMO,
        written=_ATTENTION,
        free=_BY_LAYER | {"scaled_windows"},
        windowed=lambda hf, layer: (layer + 1) % 4 != 0,
        unsaid={"rms_norm_eps": 1e-5, "sliding_window": 4096},
        rope_theta=500_000.0,
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        written=_ATTENTION | _MLP,
        free=_BY_LAYER | {"no_rope_layers"},
        windowed=lambda hf, layer: not hf["no_rope_layers"][layer],
        unsaid={"use_sliding_window": False, "tie_word_embeddings": True},
        rope_theta=2_000_000.0,
    ),
    "seed_oss": Family(
        architecture="SeedOssForCausalLM",
        written={"qkv_bias": "attention_bias", "o_bias": "attention_out_bias", **_MLP},
        unsaid={"attention_bias": True, "head_dim": 128},
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        fixed={"rope_scaling": None},
        free=frozenset({"window"}),
        windowed=_every_layer,
        fused=True,
        unsaid={"rms_norm_eps": 1e-5},
    ),
}
"""By model_type. A shape without a family gets the first one that fits."""


def family_of(shape: Any) -> str:
    """The model_type of a GPTConfig's family; RecipeError if there is none."""
    if shape.family is not None:
        if wrong := FAMILIES[shape.family].misfits(shape):
            expected = f"the family {shape.family} has no such models; choose another value or another family"
            raise RecipeError(invalid(f"model.{wrong[0]}", getattr(shape, wrong[0]), expected))
        return str(shape.family)
    for name, family in FAMILIES.items():
        if not family.misfits(shape):
            return name
    *others, last = [name for name, plain in PLAIN.items() if getattr(shape, name) != plain]
    expected = f"no family of models combines it with {', '.join(others)}; choose one"
    if not others:
        expected = "no family of models has only this; docs/families.md lists what belongs with it"
    raise RecipeError(invalid(f"model.{last}", getattr(shape, last), expected))
