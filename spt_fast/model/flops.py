"""What a GPT costs: parameters, FLOPs per trained token, share of the hardware's peak, memory.

Legend: L layers, H query heads, K key/value heads, Q head dimension, D width, F feed-forward width, V vocabulary, T
sequence length.
"""

from __future__ import annotations

import re

import torch

from spt_fast.model.gpt import GPTConfig

MFU_CONVENTION = "6N+12LHQT"

# Dense bf16 peaks in FLOP/s (without sparsity) from the makers' datasheets; the first pattern found in the device's
# name counts. H100 SXM calls itself "NVIDIA H100 80GB HBM3".
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
    norms = config.layers * 2 * config.width + config.width
    if config.qk_norm:
        norms += config.layers * 2 * _head_dim(config)
    embeddings = (1 if config.tied else 2) * config.vocab_size * config.width
    return _block_matrices(config) + norms + embeddings


def matmul_parameters(config: GPTConfig) -> int:
    """N: what multiplies every token: the head, tied or not, but not the embedding lookup and not the norms."""
    return _block_matrices(config) + config.vocab_size * config.width


def train_flops_per_token(config: GPTConfig, context: int | None = None) -> int:
    """6N + 12·L·H·Q·T: a forward and a backward pass, with no discount for the causal mask.

    (PaLM, arXiv 2204.02311, appendix B.)
    context T: tokens in a sequence, the model's context if None.
    """
    T = config.context if context is None else context
    return 6 * matmul_parameters(config) + 12 * config.layers * config.heads * _head_dim(config) * T


def peak_flops(device: torch.device | str) -> float | None:
    """Dense bf16 FLOP/s of a CUDA device by its datasheet; None for an unknown one, a MIG slice and a CPU."""
    device = torch.device(device)
    return peak_flops_by_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_flops_by_name(name: str) -> float | None:
    """As `peak_flops`, of the device that calls itself `name`."""
    if "MIG" in name:
        return None
    for model, peak in PEAK_BF16_FLOPS.items():
        if re.search(rf"\b{model}\b(?! (Ti|D|Laptop))", name):
            return peak
    return None


def mfu_label(device: torch.device | str) -> str:
    """What an MFU on this device means: the FLOPs' convention and the peak in TFLOP/s, "n/a" where that isn't known."""
    peak = peak_flops(device)
    return f"{MFU_CONVENTION}, bf16 dense {peak / 1e12:.4g}" if peak else f"{MFU_CONVENTION}, n/a"


def memory_bytes(
    config: GPTConfig, micro: int, *, dtype: torch.dtype, context: int | None = None, checkpointing: str = "none"
) -> dict[str, int]:
    """What a training step with `micro` sequences at a time needs on one device that holds everything, estimated.

    `parameters`: of `dtype`, and where that is not float32 a float32 master copy (counted under `optimizer`).
    `gradients`: float32. `optimizer`: two float32 moments.
    `activations`: what the backward pass keeps, per token and layer 4 D for the two norms and their results, (2H + 2K)
    Q for rotated queries, keys, values and the attention's result, 4 F for gate, up, silu(gate) and their product
    (with QK-norm (H + K) Q more), all of `dtype`; and once 3 D a token and the float32 gradient of the head. Left out:
    workspaces, the chunk of logits, the allocator's own. With `checkpointing` "full" a layer keeps its two inputs,
    2 D; "selective" besides them the results of its four products of matrices and of attention. `total` is the sum.
    """
    D, H, K, Q = config.width, config.heads, config.kv_heads, _head_dim(config)
    tokens = micro * (config.context if context is None else context)
    per_layer = 4 * D + (2 * H + 2 * K) * Q + 4 * config.ffn + ((H + K) * Q if config.qk_norm else 0)
    if checkpointing == "selective":
        per_layer = 4 * D + (2 * H + 2 * K) * Q + 2 * config.ffn
    elif checkpointing == "full":
        per_layer = 2 * D
    count = parameters(config)
    parts = {
        "parameters": count * dtype.itemsize,
        "gradients": 4 * count,
        "optimizer": (8 if dtype == torch.float32 else 12) * count,
        "activations": tokens * (config.layers * per_layer + 3 * D) * dtype.itemsize + 4 * config.vocab_size * D,
    }
    return {**parts, "total": sum(parts.values())}


def _head_dim(config: GPTConfig) -> int:
    assert config.head_dim is not None
    return config.head_dim


def _block_matrices(config: GPTConfig) -> int:
    attention = (2 * config.heads + 2 * config.kv_heads) * _head_dim(config) * config.width
    return config.layers * (attention + 3 * config.width * config.ffn)
