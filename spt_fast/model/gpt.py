"""The lean GPT: pre-norm RMSNorm, RoPE, grouped-query attention, SwiGLU, optional QK-norm, tied or untied head.

Legend: B sequences, T positions, D width, H query heads, K key/value heads, Q head dimension, F feed-forward width,
V vocabulary.

A block reads the residual stream twice. Every read is a norm, and every norm but the first follows an addition to the
stream, so the stream runs through `add_rms_norm`: h is what the next layer sees, stream what it adds to.

    h = norm(stream)
    for each block:   h, stream = add_norm(attention(h), stream);   h, stream = add_norm(feed_forward(h), stream)
    loss = linear_cross_entropy(h, head)

All ops are those of spt_fast.kernels; all parameters have one dtype, that of the computation.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint

from spt_fast.errors import RecipeError, nearest
from spt_fast.kernels import (
    add_rms_norm,
    embedding,
    flash_attention,
    fp8_linear,
    linear_cross_entropy,
    qk_norm_rope,
    rms_norm,
    rope,
    swiglu_packed,
)
from spt_fast.kernels.fp8 import MULTIPLE
from spt_fast.model.presets import PRESETS

if TYPE_CHECKING:
    from spt_fast.data.tokenizer import Tokenizer

INIT_STD = 0.02
FP8_WIDTH = 2048
"""Products with a weight that is narrower either way are never taken in fp8: quantising costs more than is won."""


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. RecipeError (a ValueError) names the field that is wrong."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    """Key/value heads; a divisor of heads. Fewer than heads is grouped-query attention."""
    ffn: int
    """Width of the gated feed-forward layer."""
    context: int
    """The longest sequence, in tokens."""
    vocab_size: int
    head_dim: int | None = None
    """None: width / heads, which is what the field then holds."""
    qk_norm: bool = False
    """RMSNorm of every query and key head, before RoPE (Qwen3)."""
    tied: bool = True
    """The head is the embedding."""
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "kv_heads", "ffn", "context", "vocab_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise RecipeError(f"model.{name}: must be a whole number of at least 1, not {value!r}")
        for name in ("qk_norm", "tied"):
            if type(getattr(self, name)) is not bool:
                raise RecipeError(f"model.{name}: must be true or false, not {getattr(self, name)!r}")
        for name in ("rope_theta", "norm_eps"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise RecipeError(f"model.{name}: must be a positive number, not {value!r}")
            object.__setattr__(self, name, float(value))
        if self.heads % self.kv_heads:
            raise RecipeError(f"model.kv_heads: must divide heads ({self.heads}), not {self.kv_heads}")
        if self.head_dim is None:
            if self.width % self.heads:
                raise RecipeError(
                    f"model.heads: must divide width ({self.width}), not {self.heads}; or give head_dim as well"
                )
            object.__setattr__(self, "head_dim", self.width // self.heads)
        if type(self.head_dim) is not int or self.head_dim < 2 or self.head_dim % 2:
            raise RecipeError(f"model.head_dim: must be an even whole number, not {self.head_dim!r}")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> GPTConfig:
        """The shape that `name` stands for, at the vocabulary it is named for unless vocab_size is given.

        Overrides replace single fields; where they change width or heads, head_dim is width / heads again unless given.
        RecipeError for an unknown name or field.
        """
        if name not in PRESETS:
            raise RecipeError(f"model.preset: {name!r} is unknown; {nearest(name, PRESETS)}")
        known = {field.name for field in dataclasses.fields(cls)}
        for field in overrides:
            if field not in known:
                raise RecipeError(f"model.{field}: no such field; {nearest(field, known)}")
        return cls(**{**PRESETS[name], **overrides})


class Block(nn.Module):
    """The parameters and the two layers of one block; the additions and norms between layers are the model's."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        D, H, K, Q, F_ = config.width, config.heads, config.kv_heads, config.head_dim, config.ffn
        assert Q is not None
        self.split = [H, K, K]
        self.head_dim = Q
        self.norm_eps = config.norm_eps
        self.attention_norm = nn.Parameter(torch.empty(D))
        self.wqkv = nn.Parameter(torch.empty((H + 2 * K) * Q, D))
        self.q_norm = nn.Parameter(torch.empty(Q)) if config.qk_norm else None
        self.k_norm = nn.Parameter(torch.empty(Q)) if config.qk_norm else None
        self.wo = nn.Parameter(torch.empty(D, H * Q))
        self.ffn_norm = nn.Parameter(torch.empty(D))
        self.w_gate_up = nn.Parameter(torch.empty(2 * F_, D))
        self.w_down = nn.Parameter(torch.empty(D, F_))

    def forward(
        self,
        h_BTD: Tensor,
        stream_BTD: Tensor,
        next_norm: Tensor,
        cos: Tensor,
        sin: Tensor,
        cu_seqlens: Tensor | None,
        fp8: bool,
    ) -> tuple[Tensor, Tensor]:
        """(the next block's h, the stream after this block)."""
        attended_BTD = self.attention(h_BTD, cos, sin, cu_seqlens, fp8)
        h_BTD, stream_BTD = add_rms_norm(attended_BTD, stream_BTD, self.ffn_norm, self.norm_eps)
        return add_rms_norm(self.feed_forward(h_BTD, fp8), stream_BTD, next_norm, self.norm_eps)

    def attention(self, h_BTD: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None, fp8: bool) -> Tensor:
        qkv = linear(h_BTD, self.wqkv, fp8).unflatten(-1, (-1, self.head_dim))
        q_BTHQ, k_BTKQ, v_BTKQ = qkv.split(self.split, dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHQ, k_BTKQ = qk_norm_rope(q_BTHQ, k_BTKQ, self.q_norm, self.k_norm, cos, sin, self.norm_eps)
        else:
            q_BTHQ, k_BTKQ = rope(q_BTHQ, k_BTKQ, cos, sin)
        return linear(flash_attention(q_BTHQ, k_BTKQ, v_BTKQ, cu_seqlens=cu_seqlens).flatten(2), self.wo, fp8)

    def feed_forward(self, h_BTD: Tensor, fp8: bool) -> Tensor:
        return linear(swiglu_packed(linear(h_BTD, self.w_gate_up, fp8)), self.w_down, fp8)


def linear(x: Tensor, weight: Tensor, fp8: bool) -> Tensor:
    """x @ weight.T, where `fp8` asks for it and the weight is wide enough with operands rounded to fp8."""
    return fp8_linear(x, weight) if fp8 and gains_by_fp8(weight) else F.linear(x, weight)


def gains_by_fp8(weight: Tensor) -> bool:
    return all(size >= FP8_WIDTH and size % MULTIPLE == 0 for size in weight.shape)


class GPT(nn.Module):
    """A GPT of the given shape, its parameters drawn by `seed` alone.

    Matrices are normal with standard deviation 0.02, the two projections into the residual stream of each block with
    0.02 / sqrt(2·layers) (GPT-2); norms are 1. Numbers are drawn on the CPU by their own generator, so that they are
    the same on every device and the global generator neither matters nor moves. On the meta device nothing is drawn.
    """

    def __init__(self, config: GPTConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = "none"
        """What the backward pass makes again to save memory: nothing; within a block all but products of matrices and
        attention ("selective"); or whole blocks ("full"). Changes no result."""
        self.fp8 = False
        """Whether training takes the blocks' wide products in fp8 (kernels/fp8.py). Without gradients, in evaluation
        and generation, nothing is: those are losses and texts of the weights as they will be used."""
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = nn.Parameter(torch.empty(config.width))
        self.head = None if config.tied else nn.Parameter(torch.empty(config.vocab_size, config.width))
        self._rope_tables: dict[torch.device, tuple[Tensor, Tensor]] = {}
        if not self.embedding.is_meta:
            self._init(seed)

    @torch.no_grad()
    def _init(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1)
                continue
            into_stream = name.endswith(("wo", "w_down"))
            std = INIT_STD / math.sqrt(2 * self.config.layers) if into_stream else INIT_STD
            drawn = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            parameter.copy_(drawn.normal_(std=std, generator=generator))

    @property
    def head_weight(self) -> Tensor:
        """[V, D]: the head's own, or the embedding that it is tied to."""
        return self.embedding if self.head is None else self.head

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Logits [B, T, V] in the parameters' dtype; with targets the loss instead, in float32, its logits never whole.

        tokens_BT and targets_BT are integers [B, T]; a target of -100 is left out, and the mean is over the others.
        reduction is "mean" or "sum" (scalars), or "none" ([B·T]), in nats. cu_seqlens int32 [n+1] cuts the B·T tokens,
        read as one line, into documents: attention stays inside a document and positions start anew in each (and in
        each row).
        ValueError: more than config.context tokens.
        """
        B, T = tokens_BT.shape
        if self.config.context < T:
            raise ValueError(f"GPT: {T} tokens in a sequence, but the model's context is {self.config.context}")
        cos, sin = self._cos_sin(B, T, cu_seqlens)
        eps = self.config.norm_eps

        stream_BTD = embedding(tokens_BT, self.embedding)
        blocks = cast("list[Block]", [*self.blocks])
        h_BTD = rms_norm(stream_BTD, blocks[0].attention_norm, eps)
        next_norms = [*(block.attention_norm for block in blocks[1:]), self.final_norm]
        fp8 = self.fp8 and torch.is_grad_enabled()
        for block, next_norm in zip(blocks, next_norms, strict=True):
            arguments = (h_BTD, stream_BTD, next_norm, cos, sin, cu_seqlens, fp8)
            if self.checkpointing == "none" or not torch.is_grad_enabled():
                h_BTD, stream_BTD = block(*arguments)
            else:
                h_BTD, stream_BTD = checkpoint.checkpoint(
                    block,
                    *arguments,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    context_fn=_keep_products if self.checkpointing == "selective" else checkpoint.noop_context_fn,
                )

        if targets_BT is None:
            return F.linear(h_BTD, self.head_weight)
        return linear_cross_entropy(h_BTD.flatten(0, 1), self.head_weight, targets_BT.flatten(), reduction=reduction)

    def _cos_sin(self, B: int, T: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """The rotary tables in float32: [T, Q], or [B, T, Q] where documents restart the positions."""
        device = self.embedding.device
        if device not in self._rope_tables:
            with torch.inference_mode(False):
                self._rope_tables[device] = rope_tables(self.config, device)
        cos, sin = self._rope_tables[device]
        if cu_seqlens is None:
            return cos[:T], sin[:T]
        flat = torch.arange(B * T, device=device, dtype=torch.int32)
        starts = cu_seqlens[torch.searchsorted(cu_seqlens, flat, right=True) - 1]
        positions_BT = (flat - torch.maximum(starts, flat - flat % T)).view(B, T)
        return cos[positions_BT], sin[positions_BT]

    @property
    def fp8_share(self) -> float:
        """Of the multiplications in the blocks' products, the share that `fp8` changes."""
        weights = [parameter for parameter in self.blocks[0].parameters() if parameter.dim() == 2]
        return sum(w.numel() for w in weights if gains_by_fp8(w)) / sum(w.numel() for w in weights)

    @torch.no_grad()
    def untie(self) -> None:
        """Gives the head its own parameter, a copy of the embedding; an untied model stays as it is."""
        if self.head is None:
            self.head = nn.Parameter(self.embedding.detach().clone())
            self.config = dataclasses.replace(self.config, tied=False)

    @classmethod
    def from_hf(cls, folder: str | Path) -> GPT:
        """The Llama or Qwen3 model in a Hugging Face folder; see spt_fast.model.hf.load."""
        from spt_fast.model import hf

        return hf.load(folder)

    def save_hf(self, folder: str | Path, tokenizer: Tokenizer | None = None, dtype: torch.dtype | None = None) -> None:
        """Writes a folder that transformers loads; see spt_fast.model.hf.save."""
        from spt_fast.model import hf

        hf.save(self, folder, tokenizer, dtype)

    def generate(self, tokens: list[int], new_tokens: int, **sampling: Any) -> list[int]:
        """Samples a continuation; see spt_fast.model.generate.generate."""
        from spt_fast.model import generate

        return generate.generate(self, tokens, new_tokens, **sampling)


def _keep_products() -> tuple[Any, Any]:
    """Of a checkpointed block the products of matrices and attention are kept; what is cheap is made again."""

    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.spt_fast.fp8_linear.default)

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> checkpoint.CheckpointPolicy:
        dear = op in products or "attention" in str(op)
        return checkpoint.CheckpointPolicy.MUST_SAVE if dear else checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

    return checkpoint.create_selective_checkpoint_contexts(policy)


def rope_tables(config: GPTConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [context, Q] of position / theta^(2i/Q), halves repeated, in float32 throughout as in Hugging Face
    Llama."""
    assert config.head_dim is not None
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    positions = torch.arange(config.context, dtype=torch.float32, device=device)
    angles = torch.outer(positions, 1 / config.rope_theta**exponents).repeat(1, 2)
    return angles.cos(), angles.sin()
