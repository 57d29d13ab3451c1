"""The tables of the rotary position embedding, as transformers 5 computes them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spt_fast.model.config import GPTConfig, LinearScaling, RopeScaling, YarnScaling


def tables(config: GPTConfig, positions: int, device: torch.device, *, scaled: bool) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, Q] of position times frequency, halves repeated, computed in float32; YaRN multiplies
    both by its attention factor."""
    at = torch.arange(positions, dtype=torch.float32, device=device)
    turned = torch.outer(at, frequencies(config, device, scaled=scaled)).repeat(1, 2)
    factor = _attention_factor(config.rope_scaling) if scaled and isinstance(config.rope_scaling, YarnScaling) else 1.0
    return turned.cos() * factor, turned.sin() * factor


def frequencies(config: GPTConfig, device: torch.device, *, scaled: bool = True) -> Tensor:
    """Radians per position [Q/2], 1 / theta^(2i/Q) in float32; `scaled`: by `rope_scaling`."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1 / config.rope_theta**exponents
    scaling = config.rope_scaling if scaled else None
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor
    if isinstance(scaling, RopeScaling):
        turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return kept * frequencies + (1 - kept) * frequencies / scaling.factor
    if isinstance(scaling, YarnScaling):
        first, last = (_pair_that_turns(config, scaling, times) for times in (scaling.beta_fast, scaling.beta_slow))
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, config.head_dim - 1)
        last += 0.001 * (first == last)
        pairs = torch.arange(config.head_dim // 2, dtype=torch.float32, device=device)
        divided = ((pairs - first) / (last - first)).clamp(0, 1)
        return divided * frequencies / scaling.factor + (1 - divided) * frequencies
    return frequencies


def _pair_that_turns(config: GPTConfig, scaling: YarnScaling, times: float) -> float:
    """The index of the pair, not whole, that turns this many times within the length of pretraining."""
    length = scaling.original_max_position_embeddings / (times * 2 * math.pi)
    return config.head_dim * math.log(length) / (2 * math.log(config.rope_theta))


def _attention_factor(scaling: YarnScaling) -> float:
    def mscale(m: float) -> float:
        return 0.1 * m * math.log(scaling.factor) + 1

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)
