"""The frequencies of the rotary position embedding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spt_fast.model.config import GPTConfig


def frequencies(config: GPTConfig, device: torch.device) -> Tensor:
    """Radians per position [Q/2], 1 / theta^(2i/Q) in float32; with `rope_scaling` those of its docstring."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1 / config.rope_theta**exponents
    if scaling := config.rope_scaling:
        turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = kept * frequencies + (1 - kept) * frequencies / scaling.factor
    return frequencies
