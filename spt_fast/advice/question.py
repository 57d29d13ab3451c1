"""What is asked of `advise`: the size of a model by its name or number, and questions that have no answer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from spt_fast.advice.result import Asked
from spt_fast.errors import RecipeError, invalid, nearest
from spt_fast.fields import parse_count
from spt_fast.model.flops import matmul_parameters, parameters
from spt_fast.model.gpt import GPTConfig
from spt_fast.model.presets import PRESETS


@dataclass(frozen=True)
class Size:
    preset: str | None
    params: int | None
    multiplied: int | None
    """Parameters that multiply every token."""


def size_of(model: str | int | None) -> Size:
    """Of a preset, or of a number of parameters; all None without a model."""
    if model is None:
        return Size(None, None, None)
    if model in PRESETS:
        config = GPTConfig(**PRESETS[str(model)])
        return Size(str(model), parameters(config), matmul_parameters(config))
    try:
        params = parse_count(model, "model")
    except RecipeError:
        presets = nearest(str(model), PRESETS)
        message = invalid("model", model, f"give a preset ({presets}) or a number of parameters")
        raise RecipeError(message, argument=True) from None
    return Size(None, params, params)


def nearest_preset(params: float) -> str:
    return min(PRESETS, key=lambda name: abs(math.log(parameters(GPTConfig(**PRESETS[name])) / params)))


def check(asked: Asked) -> None:
    """RecipeError for a question without an answer."""
    for name in ("domain_tokens", "budget", "inference_tokens"):
        count = getattr(asked, name)
        if count is not None and not count >= 1:
            raise RecipeError(invalid(name, count, "give a positive number of tokens"), argument=True)
    rise = asked.max_general_rise
    if rise is not None and not 0 < rise <= 1:
        expected = "give a fraction above 0 and up to 1; 0.03 is 3%"
        raise RecipeError(invalid("max_general_rise", rise, expected), argument=True)
    if asked.inference_tokens is not None and asked.params is None:
        raise RecipeError(
            "model: missing, and what serving costs depends on it; give a preset such as 1b, or its size", argument=True
        )
