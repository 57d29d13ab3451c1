"""Linear layer and cross-entropy in one, so that the logits never exist whole.

    z = softcap(x wᵀ)     l = logsumexp(z) - z_target + z_loss logsumexp(z)²
    dl/dz_v = p_v (1 + 2 z_loss logsumexp(z)) - [v = target],   p = softmax(z)
    softcap(s) = c tanh(s / c), whose derivative is 1 - (z / c)²

The z-loss (PaLM, arXiv 2204.02311, page 6) is part of every token's loss, so a mean is over both. Tokens whose target
is ignore_index have loss 0 and no gradient; "mean" divides by the number of the others, and where there are none it is
0 with zero gradients, not NaN, so that a micro-batch of padding harms nothing.

Legend: N tokens, D width, V vocabulary. At N = 16,384 and V = 151,936 float32 logits are 10 GB, and as many again for
their gradient. Here a few rows at a time are made, turned into their gradient in place, and multiplied at once into

    dx = dz w        dw = sum over chunks of dzᵀ x   (float32: sums of many chunks in bf16 make training diverge)

For "mean" and "sum" this happens in the forward pass, since the upstream gradient is one number that can be multiplied
in later: three GEMMs altogether (6NDV multiply-adds and additions), none repeated. For "none" every row has its own
upstream gradient, which must be known first: the logits are made again in the backward pass (8NDV). Where nobody asks
for a gradient, only the losses are made. Matrix products are in x's dtype, everything else in float32 (float64 for
float64 inputs). Gradients of "mean" and "sum" are kept unscaled until the backward pass, so that float16 doesn't lose
them at 1/N.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spt_fast.kernels.backend import Op, accumulation_dtype

# Bytes of logits at a time. On a CPU they should stay in its cache; on a GPU a chunk must be tall enough for its GEMMs,
# and for the pass over dw that ends it, to pay.
CHUNK_BYTES = {"cpu": 8 << 20}
CHUNK_BYTES_ELSEWHERE = 1 << 30
CHUNK_MIN_ROWS = 128


def linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy in nats of the logits x_ND @ weight_VDᵀ against targets_N.

    x_ND and weight_VD of one floating dtype; targets_N integers in [0, V) or ignore_index. Returns losses in float32
    (float64 for float64 inputs): a scalar for "mean" (over the tokens not ignored; 0 if there are none) and "sum", [N]
    for "none". The gradient of weight_VD is handed on in that dtype too; autograd casts it unless `weight.grad_dtype`
    takes it.
    ValueError: shapes, dtypes, reduction or softcap that don't fit, or a backend that isn't available.
    RuntimeError (on a CPU): a target outside the vocabulary.
    """
    if (
        x_ND.dim() != 2
        or weight_VD.dim() != 2
        or x_ND.shape[1] != weight_VD.shape[1]
        or targets_N.shape != x_ND.shape[:1]
    ):
        raise ValueError(
            "linear_cross_entropy: x, weight and targets must be [N, D], [V, D] and [N]; "
            f"given {tuple(x_ND.shape)}, {tuple(weight_VD.shape)}, {tuple(targets_N.shape)}"
        )
    if x_ND.dtype != weight_VD.dtype:
        raise ValueError(f"linear_cross_entropy: x is {x_ND.dtype}, weight is {weight_VD.dtype}; they must agree")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"linear_cross_entropy: reduction must be 'mean', 'sum' or 'none', not {reduction!r}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"linear_cross_entropy: softcap must be positive or None, not {softcap}")
    _LINEAR_CROSS_ENTROPY.pick(backend, x_ND)
    return _reference(x_ND, weight_VD, targets_N, ignore_index, z_loss, softcap, reduction)


def _reference(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    ignore_index: int,
    z_loss: float,
    softcap: float | None,
    reduction: str,
) -> Tensor:
    # A Function sees requires_grad, but not whether gradients are enabled.
    wanted = torch.is_grad_enabled()
    needs = (wanted and x_ND.requires_grad, wanted and weight_VD.requires_grad)
    return _LinearCrossEntropy.apply(x_ND, weight_VD, targets_N, ignore_index, z_loss, softcap, reduction, needs)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        ignore_index: int,
        z_loss: float,
        softcap: float | None,
        reduction: str,
        needs: tuple[bool, bool],
    ) -> Tensor:
        kept_N = targets_N != ignore_index
        targets_N = targets_N.masked_fill(~kept_N, 0).long()
        ctx.z_loss, ctx.softcap, ctx.reduction, ctx.needs = z_loss, softcap, reduction, needs

        now = needs if reduction != "none" else (False, False)
        dloss_N = kept_N.to(accumulation_dtype(x_ND))
        loss_N, dx_ND, dw_VD = _sweep(x_ND, weight_VD, targets_N, dloss_N, z_loss, softcap, now)
        loss_N.masked_fill_(~kept_N, 0)
        if reduction == "none":
            ctx.save_for_backward(x_ND, weight_VD, targets_N, kept_N)
            return loss_N
        scale = dloss_N.sum().clamp_(min=1).reciprocal_() if reduction == "mean" else loss_N.new_ones(())
        ctx.save_for_backward(dx_ND, dw_VD, scale)
        return loss_N.sum() * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.reduction == "none":
            x_ND, weight_VD, targets_N, kept_N = ctx.saved_tensors
            dloss_N = dloss.masked_fill(~kept_N, 0)
            _, dx_ND, dw_VD = _sweep(x_ND, weight_VD, targets_N, dloss_N, ctx.z_loss, ctx.softcap, ctx.needs)
        else:
            dx_ND, dw_VD, scale = ctx.saved_tensors
            scale = scale * dloss
            dx_ND = None if dx_ND is None else (dx_ND.to(scale.dtype) * scale).to(dx_ND.dtype)
            dw_VD = None if dw_VD is None else dw_VD * scale
        return dx_ND, dw_VD, None, None, None, None, None, None


def _sweep(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    dloss_N: Tensor,
    z_loss: float,
    softcap: float | None,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(losses [N], gradients of sum(dloss_N * losses) by x_ND and by weight_VD where needed), chunk by chunk.

    All chunks use the same three buffers: memory that is new costs a CPU more than the arithmetic on it.
    """
    N, V, dtype = len(x_ND), len(weight_VD), accumulation_dtype(x_ND)
    rows = min(max(1, N), _chunk_rows(x_ND, V))
    product_CV = x_ND.new_empty(rows, V)
    z_CV = product_CV if x_ND.dtype == dtype else x_ND.new_empty(rows, V, dtype=dtype)
    p_CV = torch.empty_like(z_CV)

    loss_N = x_ND.new_empty(N, dtype=dtype)
    dx_ND = torch.empty_like(x_ND) if needs[0] else None
    dw_VD = torch.zeros_like(weight_VD, dtype=dtype) if needs[1] else None
    for start in range(0, N, rows):
        chunk = slice(start, start + rows)
        x_CD, targets_C1, dloss_C = x_ND[chunk], targets_N[chunk].unsqueeze(1), dloss_N[chunk]
        product_CV, z_CV, p_CV = (buffer[: len(x_CD)] for buffer in (product_CV, z_CV, p_CV))

        z_CV.copy_(torch.mm(x_CD, weight_VD.T, out=product_CV))
        if softcap is not None:
            z_CV.div_(softcap).tanh_().mul_(softcap)
        torch.softmax(z_CV, dim=1, out=p_CV)
        # The largest logit's probability is at least 1 / V, so that its logarithm is exact to rounding.
        lse_C = z_CV.amax(1).sub_(p_CV.amax(1).log_())
        loss_N[chunk] = lse_C - z_CV.gather(1, targets_C1).squeeze(1) + z_loss * lse_C.square()
        if not any(needs):
            continue

        dz_CV = p_CV.mul_((dloss_C * (1 + 2 * z_loss * lse_C)).unsqueeze(1))
        dz_CV.scatter_add_(1, targets_C1, -dloss_C.unsqueeze(1))
        if softcap is not None:
            dz_CV.mul_(z_CV.div_(softcap).square_().neg_().add_(1))
        if x_ND.dtype != dtype:
            dz_CV = product_CV.copy_(dz_CV)
        if dx_ND is not None:
            torch.mm(dz_CV, weight_VD, out=dx_ND[chunk])
        if dw_VD is not None:
            dw_VD.add_(dz_CV.T @ x_CD)
    return loss_N, dx_ND, dw_VD


def _chunk_rows(x_ND: Tensor, vocab_size: int) -> int:
    """Rows whose logits, in the accumulation dtype, take about CHUNK_BYTES."""
    row_bytes = vocab_size * accumulation_dtype(x_ND).itemsize
    return max(CHUNK_MIN_ROWS, CHUNK_BYTES.get(x_ND.device.type, CHUNK_BYTES_ELSEWHERE) // row_bytes)


_LINEAR_CROSS_ENTROPY = Op(
    "linear_cross_entropy", {"cuda": {"reference": "PyTorch ops"}, "cpu": {"reference": "PyTorch ops"}}
)
