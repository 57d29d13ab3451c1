"""The shape of a GPT: each field with its parser, from which a recipe's `model:` section is made too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from spt_fast.errors import RecipeError, invalid, nearest
from spt_fast.fields import boolean, build, integer, number, one_of, optional, setting
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
class RopeScaling:
    """RoPE stretched to texts longer than those of pretraining, as Llama 3.1 has it ("llama3" in transformers).

    A frequency is divided by `factor` where its wavelength is above original_max_position_embeddings / low_freq_factor
    tokens, kept where it is below original_max_position_embeddings / high_freq_factor, and between in between.
    """

    rope_type: str = setting(one_of("llama3"), "llama3")
    factor: float = setting(number(1.0))
    low_freq_factor: float = setting(_positive)
    high_freq_factor: float = setting(_positive)
    original_max_position_embeddings: int = setting(_size)

    def __post_init__(self) -> None:
        _parse(self, "model.rope_scaling")
        if self.high_freq_factor <= self.low_freq_factor:
            above = f"write a number above low_freq_factor ({self.low_freq_factor})"
            raise RecipeError(invalid("model.rope_scaling.high_freq_factor", self.high_freq_factor, above))

    def __str__(self) -> str:
        """For the names of a study's runs."""
        return "-".join(f"{value}" for value in vars(self).values())

    @classmethod
    def parse(cls, value: object, where: str) -> RopeScaling:
        return value if isinstance(value, RopeScaling) else build(cls, value, where)


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. RecipeError (a ValueError) names the field that is wrong."""

    layers: int = setting(integer(1, 10_000))
    width: int = setting(_size)
    heads: int = setting(_size)
    kv_heads: int = setting(_size)
    """Key/value heads; a divisor of heads. Fewer than heads is grouped-query attention."""
    ffn: int = setting(_size)
    """Inner width of the SwiGLU."""
    context: int = setting(integer(1, 2**24))
    """The longest sequence, in tokens; a training window has as many."""
    vocab_size: int = setting(_size)
    """Rows of the embedding. A recipe that leaves it out gets the tokenizer's vocabulary, rounded up to a multiple of
    64."""
    head_dim: int = setting(optional(_size), None)
    """Width of one head, an even number. None: width / heads, which is what the field then holds."""
    qk_norm: bool = setting(boolean, False)
    """RMSNorm of every query and key head, before RoPE (Qwen3)."""
    tied: bool = setting(boolean, True)
    """The head is the embedding."""
    rope_theta: float = setting(number(0.0, 1e30, open_low=True), 10_000.0)
    norm_eps: float = setting(number(0.0, 1.0, open_low=True), 1e-6)
    qkv_bias: bool = setting(boolean, False)
    """A bias on queries, keys and values (Qwen2)."""
    rope_scaling: RopeScaling | None = setting(optional(RopeScaling.parse), None)

    def __post_init__(self) -> None:
        _parse(self, "model")
        if self.qkv_bias and self.qk_norm:  # a run's weights are Hugging Face folders
            raise RecipeError(invalid("model.qkv_bias", True, "no family of models has it beside qk_norm; choose one"))
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

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> GPTConfig:
        """The shape that `name` stands for, at the vocabulary it is named for unless vocab_size is given.

        Overrides replace single fields; where they change width or heads, head_dim is width / heads again unless given.
        RecipeError for an unknown name or field.
        """
        if name not in PRESETS:
            raise RecipeError(invalid("model.preset", name, nearest(name, PRESETS)))
        known = {field.name for field in fields(cls)}
        for field in overrides:
            if field not in known:
                raise RecipeError(f"model.{field}: {unknown_key(field, known)}")
        return cls(**{**PRESETS[name], **overrides})
