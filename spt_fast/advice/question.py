"""The input of `advise`: the size of a model by its name or number, and a check of all values."""

from __future__ import annotations

import math
from dataclasses import dataclass

from spt_fast.advice.result import Asked
from spt_fast.errors import RecipeError, invalid, nearest
from spt_fast.fields import optional, parse_count, rounded_share
from spt_fast.model.flops import matmul_parameters, parameters
from spt_fast.model.gpt import GPTConfig
from spt_fast.model.presets import PRESETS

NO_GENERAL = "max_general_rise: these runs have no general losses; set `heldout` of the general source"
NO_GENERAL_BEFORE = (
    "max_general_rise: these runs have no general losses before the finetune, from which a rise is counted; fill in "
    "`general_before` in their table"
)
RISE_UNKNOWN = "max_general_rise is not used: how far the general loss rises on your text is known from runs only"


@dataclass(frozen=True)
class Size:
    preset: str | None
    params: int | None
    multiplied: int | None
    """Parameters that multiply every token."""


def size_of(model: str | int | None) -> Size:
    """The size of a preset, or of a number of parameters such as "1.5B"; all fields are None without a model.

    Raises RecipeError for anything else.
    """
    if model is None:
        return Size(None, None, None)
    if isinstance(model, str) and model in PRESETS:
        config = GPTConfig(**PRESETS[model])
        return Size(model, parameters(config), matmul_parameters(config))
    try:
        params = parse_count(model, "model")
    except RecipeError:
        presets = nearest(str(model), PRESETS)
        message = invalid("model", model, f"give a preset ({presets}) or a number of parameters")
        raise RecipeError(message, argument=True) from None
    return Size(None, params, params)


def nearest_preset(params: float) -> str:
    return min(PRESETS, key=lambda name: abs(math.log(parameters(GPTConfig(**PRESETS[name])) / params)))


def ask(
    *,
    domain_tokens: object,
    budget: object,
    model: str | int | None,
    params: int | None,
    max_general_rise: object = None,
    inference_tokens: object = None,
) -> Asked:
    """The question with its counts and shares parsed as in a recipe. RecipeError for values that have no answer."""
    try:
        asked = Asked(
            domain_tokens=parse_count(domain_tokens, "domain_tokens"),
            budget=parse_count(budget, "budget"),
            model=model,
            params=params,
            inference_tokens=optional(parse_count)(inference_tokens, "inference_tokens"),
            max_general_rise=optional(rounded_share)(max_general_rise, "max_general_rise"),
        )
    except RecipeError as error:
        error.argument = True
        raise
    if asked.max_general_rise == 0:
        expected = "give a fraction above 0 and up to 1; 0.03 is 3%"
        raise RecipeError(invalid("max_general_rise", max_general_rise, expected), argument=True)
    if asked.inference_tokens is not None and asked.params is None:
        raise RecipeError(
            "model: missing, but the cost of serving depends on it; give a preset such as 1b, or its size",
            argument=True,
        )
    return asked
