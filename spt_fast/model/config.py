"""The shape of a GPT: each field with its parser, which a recipe's `model:` section uses too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from spt_fast.errors import RecipeError, among, invalid
from spt_fast.fields import boolean, build, integer, number, one_of, optional, setting
from spt_fast.model.families import FAMILIES, PLAIN, family_of
from spt_fast.model.presets import PRESETS
from spt_fast.synonyms import unknown_key

_size = integer(1, 2**31 - 1)
_positive: Callable[[object, str], float] = number(0.0, open_low=True)


def _parse(settings: Any, where: str) -> None:
    """Check every field of a frozen dataclass by its parser, and give it the type that it is declared with."""
    for item in fields(settings):
        value = getattr(settings, item.name)
        parsed = item.metadata["parse"](value, f"{where}.{item.name}")
        if isinstance(value, str) and parsed != value:  # parsers read numbers from text, as YAML needs it
            raise RecipeError(invalid(f"{where}.{item.name}", value, "give a value that is not text"))
        object.__setattr__(settings, item.name, parsed)


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """RoPE for texts longer than in pretraining; the kinds have the names of transformers."""

    rope_type: str
    factor: float

    def __post_init__(self) -> None:
        _parse(self, "model.rope_scaling")

    def __str__(self) -> str:
        """For the names of a study's runs."""
        return "-".join(f"{value}" for value in vars(self).values() if value is not None)

    @staticmethod
    def parse(value: object, where: str) -> Scaling:
        if isinstance(value, Scaling):
            return value
        kind = value.get("rope_type", "llama3") if isinstance(value, Mapping) else "llama3"
        return build(SCALINGS[one_of(*SCALINGS)(kind, f"{where}.rope_type")], value, where)


@dataclass(frozen=True, kw_only=True)
class RopeScaling(Scaling):
    """Llama 3.1's scaling.

    A frequency is divided by `factor` if its wavelength is above original_max_position_embeddings / low_freq_factor
    tokens, kept if it is below original_max_position_embeddings / high_freq_factor, and interpolated in between.
    """

    rope_type: str = setting(one_of("llama3"), "llama3")
    factor: float = setting(number(1.0))
    low_freq_factor: float = setting(_positive)
    high_freq_factor: float = setting(_positive)
    original_max_position_embeddings: int = setting(_size)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.high_freq_factor <= self.low_freq_factor:
            above = f"write a number above low_freq_factor ({self.low_freq_factor})"
            raise RecipeError(invalid("model.rope_scaling.high_freq_factor", self.high_freq_factor, above))


@dataclass(frozen=True, kw_only=True)
class LinearScaling(Scaling):
    """Every frequency divided by `factor` (Chen et al., arXiv 2306.15595)."""

    rope_type: str = setting(one_of("linear"), "linear")
    factor: float = setting(number(1.0))


@dataclass(frozen=True, kw_only=True)
class YarnScaling(Scaling):
    """YaRN (Peng et al., arXiv 2309.00071).

    Pairs of a head that turn more than beta_fast times in original_max_position_embeddings tokens keep their frequency;
    those that turn less than beta_slow times have it divided by `factor`; between them is a ramp, whose ends are whole
    numbers with `truncate`. Queries and keys are multiplied by attention_factor; None means 0.1 ln(factor) + 1, or
    (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1) if both are given.
    """

    rope_type: str = setting(one_of("yarn"), "yarn")
    factor: float = setting(number(1.0))
    original_max_position_embeddings: int = setting(_size)
    beta_fast: float = setting(_positive, 32.0)
    beta_slow: float = setting(_positive, 1.0)
    attention_factor: float | None = setting(optional(_positive), None)
    mscale: float | None = setting(optional(_positive), None)
    mscale_all_dim: float | None = setting(optional(_positive), None)
    truncate: bool = setting(boolean, True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta_fast <= self.beta_slow:
            above = f"write a number above beta_slow ({self.beta_slow})"
            raise RecipeError(invalid("model.rope_scaling.beta_fast", self.beta_fast, above))


SCALINGS: dict[str, type[Scaling]] = {"llama3": RopeScaling, "linear": LinearScaling, "yarn": YarnScaling}


def _layer_numbers(value: object, where: str) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)):
        raise RecipeError(invalid(where, value, "write a list of layers, counted from 0"))
    return tuple(sorted({integer(0, 9_999)(layer, f"{where}.{i}") for i, layer in enumerate(value)}))


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. RecipeError (a ValueError) names the invalid field."""

    layers: int = setting(integer(1, 10_000))
    """Transformer blocks."""
    width: int = setting(_size)
    """Width of the residual stream."""
    heads: int = setting(_size)
    """Query heads."""
    kv_heads: int = setting(_size)
    """Key/value heads; a divisor of heads. Fewer than heads is grouped-query attention."""
    ffn: int = setting(_size)
    """Inner width of the SwiGLU."""
    context: int = setting(integer(1, 2**24))
    """The longest sequence, in tokens. Training windows have this length unless `batch.context` says otherwise."""
    vocab_size: int = setting(_size)
    """Rows of the embedding. By default a recipe uses the tokenizer's vocabulary, rounded up to a multiple of 64."""
    head_dim: int = setting(optional(_size), None)
    """Width of one head, an even number. None: width / heads, which then is the field's value."""
    qk_norm: bool = setting(boolean, False)
    """RMSNorm of queries and keys, before RoPE (Qwen3, OLMo 2)."""
    tied: bool = setting(boolean, True)
    """The output head shares the embedding's weights."""
    rope_theta: float = setting(number(0.0, 1e30, open_low=True), 10_000.0)
    """Base of RoPE's wavelengths."""
    norm_eps: float = setting(number(0.0, 1.0, open_low=True), 1e-6)
    """Added to the mean square in every RMSNorm."""
    qkv_bias: bool = setting(boolean, False)
    """A bias on queries, keys and values (Qwen2)."""
    rope_scaling: Scaling | None = setting(optional(Scaling.parse), None)
    """RoPE stretched to longer texts, as transformers names it: rope_type llama3, linear or yarn, with their fields."""
    qk_norm_over: str = setting(one_of("head", "width"), "head")
    """What `qk_norm` normalises: every head alone (Qwen3), or all heads together (OLMo 2)."""
    norms: str = setting(one_of("before", "after"), "before")
    """Position of a block's norms: before its layers (Llama), or after them, before the addition to the stream
    (OLMo 2)."""
    o_bias: bool = setting(boolean, False)
    """A bias on attention's output projection."""
    mlp_bias: bool = setting(boolean, False)
    """Biases in the feed-forward layer."""
    window: int | None = setting(optional(_size), None)
    """Number of keys that a query sees, its own included; None: all up to its own."""
    full_layers: tuple[int, ...] = setting(_layer_numbers, ())
    """Layers that ignore `window`, counted from 0."""
    scaled_windows: bool = setting(boolean, True)
    """Apply `rope_scaling` in layers with a window too; false in OLMo 3."""
    no_rope_layers: tuple[int, ...] = setting(_layer_numbers, ())
    """Layers without RoPE, counted from 0 (SmolLM3)."""
    family: str | None = setting(optional(one_of(*FAMILIES)), None)
    """The transformers model type under which weights are written, if several families have this shape."""

    def __post_init__(self) -> None:
        _parse(self, "model")
        if self.heads % self.kv_heads:
            raise RecipeError(invalid("model.kv_heads", self.kv_heads, f"write a divisor of heads ({self.heads})"))
        if self.head_dim is None:
            if self.width % self.heads:
                raise RecipeError(
                    invalid(
                        "model.heads", self.heads, f"write a divisor of width ({self.width}), or give head_dim as well"
                    )
                )
            object.__setattr__(self, "head_dim", self.width // self.heads)
        if self.head_dim % 2:
            raise RecipeError(invalid("model.head_dim", self.head_dim, "write an even whole number"))
        for name in ("full_layers", "no_rope_layers"):
            if (last := max(getattr(self, name), default=0)) >= self.layers:
                raise RecipeError(invalid(f"model.{name}", last, f"write layers from 0 to {self.layers - 1}"))
        for name, needed in (("full_layers", self.window), ("scaled_windows", self.window and self.rope_scaling)):
            if getattr(self, name) != PLAIN[name] and not needed:
                needs = "window" if name == "full_layers" else "window and rope_scaling"
                raise RecipeError(invalid(f"model.{name}", getattr(self, name), f"give {needs} as well"))
        if isinstance(self.rope_scaling, YarnScaling) and self.rope_theta <= 1:
            raise RecipeError(invalid("model.rope_theta", self.rope_theta, "YaRN needs a number above 1"))
        family_of(self)  # a run's weights are Hugging Face folders

    def window_of(self, layer: int) -> int | None:
        return None if layer in self.full_layers else self.window

    def rope_of(self, layer: int) -> str:
        """The rotary embedding of a layer: "none", "plain", or "scaled" as `rope_scaling` says."""
        if layer in self.no_rope_layers:
            return "none"
        unscaled = self.rope_scaling is None or (self.window_of(layer) and not self.scaled_windows)
        return "plain" if unscaled else "scaled"

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> GPTConfig:
        """The shape of a preset, with its own vocabulary unless vocab_size is given.

        Overrides replace single fields; if they change width or heads, head_dim is width / heads again unless given.
        RecipeError for an unknown name or field.
        """
        if name not in PRESETS:
            raise RecipeError(invalid("model.preset", name, among(name, PRESETS)))
        known = {field.name for field in fields(cls)}
        for field in overrides:
            if field not in known:
                raise RecipeError(f"model.{field}: {unknown_key(field, known)}")
        return cls(**{**PRESETS[name], **overrides})
