"""The table of a GPT's parameters, from which everything else about them follows.

This includes construction and initial values (gpt.py), counts, FLOPs and memory (flops.py, memory.py), the tensors of a
Hugging Face folder (hf.py), and weight decay. A parameter that is fused in a GPT consists of the rows of several
Hugging Face tensors, one below the other.

Legend: D width, F feed-forward width, Q head dimension, V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from spt_fast.model.config import GPTConfig
from spt_fast.model.families import FAMILIES, family_of


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Kind of a parameter: its initial values (normal, or constant if std is 0) and its use."""

    mean: float = 0.0
    std: float = 0.0
    decayed: bool = False
    """Weight decay applies."""
    multiplies: bool = False
    """It multiplies every token: a matmul of 2 FLOPs per parameter and token in the forward pass."""
    hidden: bool = False
    """A matrix of a block, between hidden activations."""


MATRIX = Kind(std=0.02, decayed=True, multiplies=True, hidden=True)
HEAD = replace(MATRIX, hidden=False)
LOOKUP = Kind(std=0.02, decayed=True)
NORM = Kind(mean=1.0)
BIAS = Kind()


@dataclass(frozen=True)
class Parameter:
    """One parameter of the model or of a block."""

    name: str
    kind: Kind
    sources: Mapping[str, int]
    """Rows by Hugging Face tensor, from top to bottom."""
    columns: int | None = None
    """None for a vector."""
    parts: tuple[int, ...] = ()
    """Rows of each matrix, if there are several in it."""
    present: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        rows = sum(self.sources.values())
        return (rows,) if self.columns is None else (rows, self.columns)

    @property
    def stacked(self) -> tuple[int, ...]:
        """The rows of its matrices, one below the other."""
        return self.parts or self.shape[:1]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def of_block(config: GPTConfig) -> tuple[Parameter, ...]:
    """The parameters that a block can have, in order; sources are relative to the layer."""
    D, F, Q = config.width, config.ffn, config.head_dim
    q, kv = config.heads * Q, config.kv_heads * Q
    # The two projections into the residual stream start smaller, as in GPT-2.
    into_stream = replace(MATRIX, std=MATRIX.std / math.sqrt(2 * config.layers))
    qkv = {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv}
    gate_up = {"mlp.gate_proj": F, "mlp.up_proj": F}
    if FAMILIES[family_of(config)].fused:
        qkv, gate_up = {"self_attn.qkv_proj": q + 2 * kv}, {"mlp.gate_up_proj": 2 * F}
    norms = {
        "before": ("input_layernorm", "post_attention_layernorm"),
        "after": ("post_attention_layernorm", "post_feedforward_layernorm"),
    }[config.norms]
    normed_q, normed_k = (q, kv) if config.qk_norm_over == "width" else (Q, Q)
    return (
        Parameter("attention_norm", NORM, {f"{norms[0]}.weight": D}),
        Parameter("wqkv", MATRIX, {f"{part}.weight": rows for part, rows in qkv.items()}, D, (q, kv, kv)),
        Parameter("bqkv", BIAS, {f"{part}.bias": rows for part, rows in qkv.items()}, present=config.qkv_bias),
        Parameter("q_norm", NORM, {"self_attn.q_norm.weight": normed_q}, present=config.qk_norm),
        Parameter("k_norm", NORM, {"self_attn.k_norm.weight": normed_k}, present=config.qk_norm),
        Parameter("wo", into_stream, {"self_attn.o_proj.weight": D}, q),
        Parameter("bo", BIAS, {"self_attn.o_proj.bias": D}, present=config.o_bias),
        Parameter("ffn_norm", NORM, {f"{norms[1]}.weight": D}),
        Parameter("w_gate_up", MATRIX, {f"{part}.weight": rows for part, rows in gate_up.items()}, D, (F, F)),
        Parameter("b_gate_up", BIAS, {f"{part}.bias": rows for part, rows in gate_up.items()}, present=config.mlp_bias),
        Parameter("w_down", into_stream, {"mlp.down_proj.weight": D}, F),
        Parameter("b_down", BIAS, {"mlp.down_proj.bias": D}, present=config.mlp_bias),
    )


def around_blocks(config: GPTConfig) -> tuple[Parameter, ...]:
    """The parameters that the model can have beside its blocks."""
    D, V = config.width, config.vocab_size
    return (
        Parameter("embedding", LOOKUP, {"model.embed_tokens.weight": V}, D),
        Parameter("final_norm", NORM, {"model.norm.weight": D}),
        Parameter("head", HEAD, {"lm_head.weight": V}, D, present=not config.tied),
    )


def hidden_matrices(config: GPTConfig) -> Counter[tuple[int, int]]:
    """How many matrices of each shape all blocks have, q, k and v, and gate and up, counted by themselves."""
    shapes: Counter[tuple[int, int]] = Counter()
    for row in of_block(config):
        if row.kind.hidden and row.columns is not None:
            for rows in row.stacked:
                shapes[rows, row.columns] += config.layers
    return shapes


def table(config: GPTConfig) -> dict[str, Parameter]:
    """Every parameter of the model by its full name, in the model's order."""
    rows = {row.name: row for row in around_blocks(config) if row.present}
    for layer in range(config.layers):
        for row in of_block(config):
            if row.present:
                sources = {f"model.layers.{layer}.{source}": count for source, count in row.sources.items()}
                rows[f"blocks.{layer}.{row.name}"] = replace(row, sources=sources)
    return rows
