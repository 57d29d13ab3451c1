"""The lean GPT: RMSNorm, RoPE, grouped-query attention, SwiGLU, optional QK-norm, tied or untied head.

Legend: B sequences, T positions, D width, H query heads, K key/value heads, Q head dimension, F feed-forward width,
V vocabulary.

A block reads the residual stream twice. Every read is a norm, and every norm but the first follows an addition to the
stream, so the stream runs through `add_rms_norm`: h is the input of the next layer, stream is what it adds to.

    h = norm(stream)
    for each block:   h, stream = add_norm(attention(h), stream);   h, stream = add_norm(feed_forward(h), stream)
    loss = linear_cross_entropy(h, head)

If norms come after the layers (OLMo 2), layers read the stream itself, and only the head reads a norm of it:

    for each block:   stream = stream + norm(attention(stream));   stream = stream + norm(feed_forward(stream))
    h = norm(stream)

All ops are those of spt_fast.kernels; all parameters have one dtype, that of the computation. Under torch.autocast all
are cast to its dtype first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import checkpoint

from spt_fast.errors import invalid
from spt_fast.files import place
from spt_fast.kernels import (
    add_rms_norm,
    embedding,
    flash_attention,
    fp8_linear,
    linear,
    linear_cross_entropy,
    qk_norm_rope,
    qkv_attention,
    rms_norm,
    rope,
    self_attention,
    swiglu_linear,
    swiglu_mlp,
    swiglu_packed,
)
from spt_fast.kernels.backend import autocasts
from spt_fast.kernels.documents import spans
from spt_fast.kernels.fp8 import MULTIPLE
from spt_fast.model import generate, hf, rotary
from spt_fast.model.cache import Cache
from spt_fast.model.config import GPTConfig
from spt_fast.model.parameters import Parameter, around_blocks, of_block, table

if TYPE_CHECKING:
    from spt_fast.data.base_tokenizer import BaseTokenizer

FP8_WIDTH = 2048
"""Smallest width, either way, of a weight whose matmul uses fp8: below it, quantising costs more than it gains."""


class Block(nn.Module):
    """The parameters and the two layers of one block; the additions and norms between layers belong to the model."""

    attention_norm: nn.Parameter
    wqkv: nn.Parameter
    bqkv: nn.Parameter | None
    q_norm: nn.Parameter | None
    k_norm: nn.Parameter | None
    wo: nn.Parameter
    bo: nn.Parameter | None
    ffn_norm: nn.Parameter
    w_gate_up: nn.Parameter
    b_gate_up: nn.Parameter | None
    w_down: nn.Parameter
    b_down: nn.Parameter | None

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.split = [config.heads, config.kv_heads, config.kv_heads]
        self.head_dim = config.head_dim
        self.norm_eps = config.norm_eps
        self.norms_after = config.norms == "after"
        self.norm_over_width = config.qk_norm_over == "width"
        self.rope = config.rope_of(layer)
        self.window = config.window_of(layer)
        _register(self, of_block(config))

    def forward(
        self,
        h_BTD: Tensor,
        stream_BTD: Tensor,
        next_norm: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        cu_seqlens: Tensor | None,
        fp8: bool,
        attend: Callable[..., Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(the next block's h, the stream after this block); `attend`: a cache's method instead of attention to h."""
        attended_BTD = self.attention(h_BTD, cos, sin, cu_seqlens, fp8, attend)
        if self.norms_after:
            stream_BTD = stream_BTD + rms_norm(attended_BTD, self.attention_norm, self.norm_eps, largest=fp8)
            fed_BTD = self.feed_forward(stream_BTD, fp8)
            stream_BTD = stream_BTD + rms_norm(fed_BTD, self.ffn_norm, self.norm_eps, largest=fp8)
            return stream_BTD, stream_BTD
        h_BTD, stream_BTD = add_rms_norm(attended_BTD, stream_BTD, self.ffn_norm, self.norm_eps, largest=fp8)
        return add_rms_norm(self.feed_forward(h_BTD, fp8), stream_BTD, next_norm, self.norm_eps, largest=fp8)

    def attention(
        self,
        h_BTD: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        cu_seqlens: Tensor | None,
        fp8: bool,
        attend: Callable[..., Tensor] | None,
    ) -> Tensor:
        K, Q = self.split[1], self.head_dim
        q_norm, k_norm = (None, None) if cos is None else (self.q_norm, self.k_norm)
        norms: dict[str, Any] = {"q_weight": q_norm, "k_weight": k_norm, "eps": self.norm_eps}
        seen: dict[str, Any] = {"cu_seqlens": cu_seqlens, "window": self.window}
        if attend is None and not self.norm_over_width and not (fp8 and gains_by_fp8(self.wqkv.shape)):
            o_BTHQ = self_attention(h_BTD, self.wqkv, K, Q, self.bqkv, cos, sin, **norms, **seen)
            return product(o_BTHQ.flatten(2), self.wo, fp8, self.bo)
        qkv = product(h_BTD, self.wqkv, fp8, self.bqkv).unflatten(-1, (-1, Q))
        if attend is None and not self.norm_over_width:
            o_BTHQ = qkv_attention(qkv, K, cos, sin, **norms, **seen)
        else:
            q_BTHQ, k_BTKQ, v_BTKQ = qkv.split(self.split, dim=2)
            q_BTHQ, k_BTKQ = self.positioned(q_BTHQ, k_BTKQ, cos, sin)
            attend = attend or partial(flash_attention, cu_seqlens=cu_seqlens)
            o_BTHQ = attend(q_BTHQ, k_BTKQ, v_BTKQ, window=self.window)
        return product(o_BTHQ.flatten(2), self.wo, fp8, self.bo)

    def positioned(
        self, q_BTHQ: Tensor, k_BTKQ: Tensor, cos: Tensor | None, sin: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys for attention: normalised, and rotated to their positions."""
        if cos is None or sin is None:
            return q_BTHQ, k_BTKQ
        if self.q_norm is None or self.k_norm is None:
            return rope(q_BTHQ, k_BTKQ, cos, sin)
        if not self.norm_over_width:
            return qk_norm_rope(q_BTHQ, k_BTKQ, self.q_norm, self.k_norm, cos, sin, self.norm_eps)
        q_BTHQ = rms_norm(q_BTHQ.flatten(2), self.q_norm, self.norm_eps).view(q_BTHQ.shape)
        k_BTKQ = rms_norm(k_BTKQ.flatten(2), self.k_norm, self.norm_eps).view(k_BTKQ.shape)
        return rope(q_BTHQ, k_BTKQ, cos, sin)

    def feed_forward(self, h_BTD: Tensor, fp8: bool) -> Tensor:
        if not (fp8 and gains_by_fp8(self.w_gate_up.shape)):
            return swiglu_mlp(h_BTD, self.w_gate_up, self.w_down, self.b_gate_up, self.b_down)
        gate_up = product(h_BTD, self.w_gate_up, fp8, self.b_gate_up)
        if not gains_by_fp8(self.w_down.shape):
            return swiglu_linear(gate_up, self.w_down, self.b_down)
        return product(swiglu_packed(gate_up, largest=True), self.w_down, fp8, self.b_down)


def product(x: Tensor, weight: Tensor, fp8: bool, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias; with `fp8` and a wide enough weight, the operands are rounded to fp8."""
    if not (fp8 and gains_by_fp8(weight.shape)):
        return linear(x, weight, bias)
    return fp8_linear(x, weight) if bias is None else fp8_linear(x, weight) + bias


def _holding_its_parameters(block: Block) -> Callable[..., tuple[Tensor, Tensor]]:
    """The block bound to its current parameters, even if it is recomputed after they have been replaced."""
    parameters: dict[str, Tensor] = dict(block.named_parameters())
    return lambda *arguments: functional_call(block, parameters, arguments)


def gains_by_fp8(shape: Sequence[int]) -> bool:
    return all(size >= FP8_WIDTH and size % MULTIPLE == 0 for size in shape)


def _register(module: nn.Module, rows: Iterable[Parameter]) -> None:
    """Give the module its parameters, not yet initialised; an absent one is None."""
    for row in rows:
        module.register_parameter(row.name, nn.Parameter(torch.empty(row.shape)) if row.present else None)


CHECKPOINTING = ("none", "selective", "full")


class GPT(nn.Module):
    """A GPT of the given shape; its initial parameters depend on `seed` only.

    Matrices are normal with standard deviation 0.02, the two projections into the residual stream of each block with
    0.02 / sqrt(2·layers) (GPT-2); norms are 1, biases 0. Numbers are drawn on the CPU by a separate generator, so that
    they are the same on every device and the global generator is neither used nor changed. On the meta device nothing
    is drawn.
    """

    embedding: nn.Parameter
    final_norm: nn.Parameter
    head: nn.Parameter | None

    def __init__(self, config: GPTConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = "none"
        """What the backward pass recomputes to save memory: nothing; within a block all but matmuls and attention
        ("selective"); or whole blocks ("full"). It does not change results."""
        self.fp8 = False
        """Whether training computes the blocks' wide matmuls in fp8 (kernels/fp8.py). Evaluation and generation never
        do: they measure the weights as they will be used."""
        _register(self, around_blocks(config))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self._rope_tables: dict[tuple[torch.device, str, int], tuple[Tensor, Tensor]] = {}
        if not self.embedding.is_meta:
            self._init(seed)

    @torch.no_grad()
    def _init(self, seed: int) -> None:
        parameters = dict(self.named_parameters())
        for name, values in drawn(self.config, seed):
            parameters[name].copy_(values)

    @property
    def head_weight(self) -> Tensor:
        """[V, D]: the head's own weight, or the embedding that it is tied to."""
        return self.embedding if self.head is None else self.head

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        reduction: str = "mean",
        scale: float | None = None,
    ) -> Tensor:
        """Logits [B, T, V] in the parameters' dtype; with targets the loss instead, in float32, without all logits.
        Under torch.autocast the parameters are cast to its dtype, and gradients have the parameters' own.

        tokens_BT and targets_BT are integers [B, T]; a target of -100 is left out, and the mean is over the others.
        reduction is "mean" or "sum" (scalars), or "none" ([B·T]), in nats. cu_seqlens int32 [n+1] cuts the B·T tokens,
        flattened, into documents: attention stays inside a document and positions restart in each (and in each row).
        scale: as in linear_cross_entropy, for a loss that is only used for its `backward()`.
        ValueError: an argument that is no tensor, tokens of another shape, more than config.context of them in a row,
        or a `checkpointing` that is none of CHECKPOINTING.
        """
        for name, given in (("tokens", tokens_BT), ("targets", targets_BT), ("cu_seqlens", cu_seqlens)):
            if not isinstance(given, Tensor) and (given is not None or name == "tokens"):
                raise ValueError(invalid(name, given, "give a tensor of integers"))
        if tokens_BT.dim() != 2:
            raise ValueError(f"tokens: {tuple(tokens_BT.shape)} is invalid: they must be [B, T]")
        if self.checkpointing not in CHECKPOINTING:
            raise ValueError(invalid("checkpointing", self.checkpointing, f"write one of {', '.join(CHECKPOINTING)}"))
        if autocasts(tokens_BT) and isinstance(self.embedding, nn.Parameter):
            return self._under_autocast(tokens_BT, targets_BT, cu_seqlens, reduction, scale)
        T = tokens_BT.shape[1]
        if self.config.context < T:
            raise ValueError(
                f"tokens: {T} tokens in a sequence, but the model's context is {self.config.context}; cut it"
            )
        h_BTD = self._hidden(tokens_BT, cu_seqlens)
        if targets_BT is None:
            return F.linear(h_BTD, self.head_weight)
        return linear_cross_entropy(
            h_BTD.flatten(0, 1), self.head_weight, targets_BT.flatten(), reduction=reduction, scale=scale
        )

    def _under_autocast(self, tokens_BT: Tensor, *arguments: Any) -> Tensor:
        """`forward` of these parameters in autocast's dtype; gradients arrive in the parameters' own."""
        device = tokens_BT.device.type
        cast_to = torch.get_autocast_dtype(device)
        parameters = {name: parameter.to(cast_to) for name, parameter in self.named_parameters()}
        with torch.autocast(device, enabled=False):
            output: Tensor = functional_call(self, parameters, (tokens_BT, *arguments))
            return output

    @torch.no_grad()
    def next_logits(self, tokens_NT: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits [N, V] of the token after each row of tokens, or after the cached text and then the row, which is
        added to the cache."""
        with torch.autocast(tokens_NT.device.type, enabled=False):
            h_NTD = self._hidden(tokens_NT, None, cache)
            if cache is not None:
                cache.end += tokens_NT.shape[1]
            return F.linear(h_NTD[:, -1], self.head_weight)

    def _hidden(self, tokens_BT: Tensor, cu_seqlens: Tensor | None, cache: Cache | None = None) -> Tensor:
        """The head's input [B, T, D]."""
        B, T = tokens_BT.shape
        eps = self.config.norm_eps
        blocks = cast("list[Block]", [*self.blocks])
        tables = {kind: self._cos_sin(B, T, cu_seqlens, kind, cache) for kind in {block.rope for block in blocks}}

        stream_BTD = embedding(tokens_BT, self.embedding)
        after = self.config.norms == "after"
        next_norms = [*(block.attention_norm for block in blocks[1:]), self.final_norm]
        fp8 = self.fp8 and torch.is_grad_enabled()
        lowered = not isinstance(self.embedding, nn.Parameter)  # by _under_autocast
        kept: dict[str, Any] = {"context_fn": _keep_matmuls} if self.checkpointing == "selective" else {}
        h_BTD = stream_BTD if after else rms_norm(stream_BTD, blocks[0].attention_norm, eps, largest=fp8)
        for i, (block, next_norm) in enumerate(zip(blocks, next_norms, strict=True)):
            arguments = (h_BTD, stream_BTD, next_norm, *tables[block.rope], cu_seqlens, fp8)
            if cache is not None:
                h_BTD, stream_BTD = block(*arguments, partial(cache.attend, i))
            elif self.checkpointing == "none" or not torch.is_grad_enabled():
                h_BTD, stream_BTD = block(*arguments)
            else:
                h_BTD, stream_BTD = checkpoint.checkpoint(
                    _holding_its_parameters(block) if lowered else block,
                    *arguments,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    **kept,
                )
        return rms_norm(stream_BTD, self.final_norm, eps) if after else h_BTD

    def _cos_sin(
        self, B: int, T: int, cu_seqlens: Tensor | None, kind: str, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The rotary tables in float32: [T, Q], or [B, T, Q] if positions differ between rows.

        kind: as in GPTConfig.rope_of. Tables are kept, since a recorded CUDA graph reads them at their addresses; they
        have a power of two of rows, so that all of them together are at most twice the longest.
        """
        if kind == "none":
            return None, None
        device, positions = self.embedding.device, T if cache is None else cache.end + T
        key = (device, kind, 1 << (positions - 1).bit_length())
        if key not in self._rope_tables:
            with torch.inference_mode(False):
                self._rope_tables[key] = rotary.tables(self.config, key[2], device, scaled=kind == "scaled")
        cos, sin = self._rope_tables[key]
        if cache is not None:
            positions_BT = cache.positions(T).to(device)
            return cos[positions_BT], sin[positions_BT]
        if cu_seqlens is None:
            return cos[:T], sin[:T]
        positions_BT = torch.arange(T, device=device, dtype=torch.int32) - spans(cu_seqlens, B, T)[0]
        return cos[positions_BT], sin[positions_BT]

    @property
    def fp8_share(self) -> float:
        """The share of the FLOPs of the blocks' matmuls that `fp8` changes."""
        weights = [row for row in of_block(self.config) if row.kind.multiplies]
        return sum(row.size for row in weights if gains_by_fp8(row.shape)) / sum(row.size for row in weights)

    @torch.no_grad()
    def untie(self) -> None:
        """Gives the head its own parameter, a copy of the embedding; an untied model is unchanged."""
        if self.head is None:
            self.head = nn.Parameter(self.embedding.detach().clone())
            self.config = dataclasses.replace(self.config, tied=False)

    @classmethod
    def from_hf(cls, folder: str | Path, dtype: torch.dtype | None = None) -> GPT:
        """The model in a Hugging Face folder, on the CPU, in `dtype`, by default the stored one; see
        spt_fast.model.hf."""
        return cls.with_weights(*hf.load(place(folder, "folder"), dtype))

    @classmethod
    def without_weights(cls, config: GPTConfig) -> GPT:
        """A model on the meta device, which has only shapes."""
        with torch.device("meta"):
            return cls(config)

    @classmethod
    def with_weights(cls, config: GPTConfig, weights: Mapping[str, Tensor]) -> GPT:
        """A model whose parameters are these tensors, by name."""
        model = cls.without_weights(config)
        model.load_state_dict(weights, assign=True)
        return model

    def save_hf(
        self, folder: str | Path, tokenizer: BaseTokenizer | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Writes a folder that transformers loads; see spt_fast.model.hf.save."""
        hf.save(self.config, dict(self.named_parameters()), place(folder, "folder"), tokenizer, dtype)

    def generate(self, tokens: Sequence[int] | Tensor, new_tokens: int, **sampling: Any) -> list[int]:
        """The tokens, a list of ids or an integer tensor [T], and up to `new_tokens` sampled after them; `sampling` as
        in spt_fast.model.generate.generate."""
        return self.generate_batch([tokens], new_tokens, **sampling)[0]

    def generate_batch(
        self, prompts: Sequence[Sequence[int] | Tensor] | Tensor, new_tokens: int, **sampling: Any
    ) -> list[list[int]]:
        """`generate` for each prompt, with all of them in one batch."""
        return generate.generate(self, prompts, new_tokens, **sampling)


def drawn(config: GPTConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The initial values of every parameter of a GPT, fp32 on the CPU, in order."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in table(config).items():
        values = torch.full(parameter.shape, parameter.kind.mean, dtype=torch.float32, device="cpu")
        if parameter.kind.std:
            values.normal_(parameter.kind.mean, parameter.kind.std, generator=generator)
        yield name, values


def _keep_matmuls() -> tuple[Any, Any]:
    """A checkpointed block keeps the results of matmuls and attention; cheap operations are recomputed."""

    ours = torch.ops.spt_fast
    matmuls = (
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        ours.fp8_linear.default,
        ours.swiglu_linear.default,
    )

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> checkpoint.CheckpointPolicy:
        dear = op in matmuls or "attention" in str(op) or "cpu_product" in str(op)
        return checkpoint.CheckpointPolicy.MUST_SAVE if dear else checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

    return checkpoint.create_selective_checkpoint_contexts(policy)
