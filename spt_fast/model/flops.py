"""The cost of a GPT: parameters, FLOPs per trained token, share of the hardware's peak.

Legend: L layers, H query heads, K key/value heads, Q head dimension, D width, F feed-forward width, V vocabulary, T
sequence length.
"""

from __future__ import annotations

import re

import torch

from spt_fast.model.config import GPTConfig
from spt_fast.model.parameters import of_block, table

MFU_CONVENTION = "6N+12LHQT"

# Dense bf16 peaks in FLOP/s (without sparsity) from the manufacturers' datasheets; the first pattern found in the
# device's name counts. The name of an H100 SXM is "NVIDIA H100 80GB HBM3".
PEAK_BF16_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 990e12,
    "H200 NVL": 836e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
}


def parameters(config: GPTConfig) -> int:
    """All parameters of the model; a tied head counts once."""
    return sum(row.size for row in table(config).values())


def matmul_parameters(config: GPTConfig) -> int:
    """N: parameters that multiply every token: with the head, tied or not, without the embedding lookup and the
    norms."""
    return block_matrices(config) + config.vocab_size * config.width


def train_flops_per_token(config: GPTConfig, context: int | None = None) -> int:
    """6N + 12·L·H·Q·T: a forward and a backward pass over sequences of `context` tokens, by default the model's
    context, with no discount for the causal mask (PaLM, arXiv 2204.02311, appendix B); in layers with a window, T is at
    most that."""
    T = context or config.context
    keys = sum(min(T, config.window_of(layer) or T) for layer in range(config.layers))
    return 6 * matmul_parameters(config) + 12 * config.heads * config.head_dim * keys


def peak_flops(device: torch.device | str) -> float | None:
    """Dense bf16 FLOP/s of a CUDA device by its datasheet; None for an unknown one, a MIG slice or a CPU."""
    device = torch.device(device)
    return peak_flops_by_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_flops_by_name(name: str) -> float | None:
    """`peak_flops` of the device with this name."""
    if "MIG" in name:
        return None
    for model, peak in PEAK_BF16_FLOPS.items():
        if re.search(rf"\b{model}\b(?! (Ti|D|Laptop))", name):
            return peak
    return None


def mfu_label(device: torch.device | str) -> str:
    """What an MFU on this device refers to: the convention of FLOPs and the peak in TFLOP/s, "n/a" if unknown."""
    peak = peak_flops(device)
    return f"{MFU_CONVENTION}, bf16 dense {peak / 1e12:.4g}" if peak else f"{MFU_CONVENTION}, n/a"


def block_matrices(config: GPTConfig) -> int:
    """Parameters of the matrices of all blocks."""
    return config.layers * sum(row.size for row in of_block(config) if row.kind.multiplies)
