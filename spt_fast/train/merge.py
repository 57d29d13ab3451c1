"""The average of several models' weights, such as a finetuned model and its base, which restores part of what was
forgotten (WiSE-FT, arXiv 2109.01903)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spt_fast.data.mixture import exact_weights
from spt_fast.errors import CheckpointError, RecipeError, invalid
from spt_fast.model.config import GPTConfig
from spt_fast.model.parameters import table
from spt_fast.model.stored import Stored, finite
from spt_fast.train.origin import Origin, Part, named, with_history
from spt_fast.train.release import outside_runs, write_release
from spt_fast.train.weights import chosen, digest_of, read_config, stored_weights
from spt_fast.train.weights_tokenizer import tokenizer_of

Weight = int | float | str | Fraction


def merge(
    models: Sequence[Path],
    weights: Sequence[Weight],
    folder: Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> list[Fraction]:
    """Write the average of the models' weights as a Hugging Face folder, and return each one's share of it.

    models: runs, their weights/<phase>, checkpoints or Hugging Face folders, of one shape and one tokenizer; if some
    have a separate head, the others' embedding serves as theirs. weights: one each, above 0; all whole numbers, which
    are relative, or shares that sum to exactly 1. The average is made in float32, a tensor at a time, and stored in
    `dtype`, by default that of the first model, whose tokenizer and other files are copied.
    RecipeError for the weights, CheckpointError for models that don't fit together, and for NaN or infinite numbers in
    one, which would be those of the average.
    """
    shares = _shares(weights, models)
    with outside_runs(folder):
        parts = [chosen(model) for model in models]
        config = _shape_of(parts)
        origin = _origin_of(parts, shares)
        read = [_untied(*stored_weights(part), config) for part in parts]
        likes = {
            name: torch.empty(parameter.shape, dtype=torch.float32, device="meta")
            for name, parameter in table(config).items()
        }

        def part(i: int, name: str) -> Tensor:
            tensor = read[i][name].float()
            if not finite(tensor):
                says = "holds NaN or infinite numbers, as every average with it would; leave this model out"
                raise CheckpointError(f"{models[i]}: {name} {says}, or take an earlier checkpoint")
            return tensor

        def average(name: str) -> Tensor:
            mean, so_far = part(0, name), shares[0]
            for i, share in enumerate(shares[1:], 1):
                so_far += share
                mean.lerp_(part(i, name), float(share / so_far))  # leaves equal values unchanged
            return mean

        merged = Stored(likes, average)
        write_release(parts[0], config, merged, folder, tokenizer, origin, dtype=dtype, overwrite=overwrite)
    return shares


def _shares(weights: Sequence[Weight], models: Sequence[Path]) -> list[Fraction]:
    if len(models) < 2:
        raise RecipeError(invalid("models", len(models), "give at least two"), argument=True)
    if len(weights) != len(models):
        expected = f"give a weight for each of the {len(models)} models"
        raise RecipeError(invalid("weights", " ".join(map(str, weights)), expected), argument=True)
    names = [f"{model} ({i})" if models.count(model) > 1 else str(model) for i, model in enumerate(models, 1)]
    numbers = [int(w) if isinstance(w, str) and w.isdecimal() else w for w in weights]
    given = dict(zip(names, numbers, strict=True))
    try:
        shares = exact_weights(given)
    except RecipeError as error:
        says = str(error).removeprefix("mixture")
        of = next((name for name in names if says.startswith(f".{name}: ")), None)
        raise RecipeError("weights" + (f"[{of}]{says[len(of) + 1 :]}" if of else says), argument=True) from None
    for name, share in shares.items():
        if not share:
            expected = "write a weight above 0, or leave this model out"
            raise RecipeError(invalid(f"weights[{name}]", given[name], expected), argument=True)
    return [shares[name] for name in names]


def _shape_of(parts: Sequence[Path]) -> GPTConfig:
    """The shape of the average; CheckpointError if the parts differ."""
    configs = [read_config(part) for part in parts]
    first = configs[0]
    for part, config in zip(parts, configs, strict=True):
        for field in fields(GPTConfig):
            mine, theirs = getattr(first, field.name), getattr(config, field.name)
            if mine != theirs and field.name != "tied":
                raise CheckpointError(
                    f"{part}: {field.name} is {theirs}, but {mine} in {parts[0]}; averaged models need the same shape"
                )
    return replace(first, tied=all(config.tied for config in configs))


def _origin_of(parts: Sequence[Path], shares: Sequence[Fraction]) -> Origin:
    """The origin of the average; CheckpointError if the parts have several tokenizers."""
    origins = [with_history(part) for part in parts]
    known: dict[str, Path] = {}
    for origin, part in zip(origins, parts, strict=True):
        beside = None if origin.tokenizer else tokenizer_of(part)
        if digest := origin.tokenizer or (beside and beside.digest):
            known[digest] = part
    if len(known) > 1:
        (mine, one), (theirs, other), *_ = known.items()
        raise CheckpointError(
            f"{other}: has another tokenizer ({theirs[:12]}) than {one} ({mine[:12]}); its ids mean other text"
        )
    merged = [
        Part(named(part), digest_of(part), str(share), origin.history, origin.merged)
        for part, share, origin in zip(parts, shares, origins, strict=True)
    ]

    def first(field: str) -> Any:
        return next((value for origin in origins if (value := getattr(origin, field)) is not None), None)

    ends = {name: first(name) for name in ("context", "eos_id", "bos_id")}
    return Origin(next(iter(known), None), first("documents"), first("dtype"), merged, **ends)


def _untied(config: GPTConfig, tensors: Mapping[str, Tensor], wanted: GPTConfig) -> Mapping[str, Tensor]:
    """The tensors of a model, with the embedding for its head if only `wanted` has a separate one."""
    if config.tied == wanted.tied:
        return tensors
    likes = {name: torch.empty(row.shape, device="meta") for name, row in table(wanted).items()}
    return Stored(likes, lambda name: tensors["embedding" if name == "head" else name])
