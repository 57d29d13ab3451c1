"""AdamW of one tensor, in place, with everything that must not cost a synchronisation as device scalars.

    g ← grad · grad_scale
    m ← β1 m + (1 - β1) g        m^ = m / (1 - β1^step)
    v ← β2 v + (1 - β2) g²       v^ = v / (1 - β2^step)
    θ ← θ - lr ( m^ / (√v^ + eps) + weight_decay θ + anchor_decay (θ - θ0) )

Adam with decoupled decay (Loshchilov & Hutter, arXiv 1711.05101), toward zero and toward an anchor θ0, usually the
starting weights of a finetuning phase (our reading of the Anchored AdamW of arXiv 2502.06042). `step` counts from 1.

Where θ is kept twice, `master` in float32 is what is updated and `param` is its rounding. The arithmetic is float32
(float64 where θ is), whatever the dtypes of param, grad and moments.

Clipping and skipping need no word from the device: grad_scale (say min(1, clip / norm)) and skip may be 0-d tensors
that it has just computed. A skipped step changes nothing, not the moments either, whatever grad and grad_scale hold
(NaN too). The step counter belongs to the caller, who must not count a skipped step: step += ~skip.

Bytes moved for a float32 parameter with float32 gradient, in an ideal kernel: 28 (read grad, read and write θ, m, v);
for a bf16 parameter with master 30. The reference makes a dozen passes, over blocks that stay in a CPU's cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import repeat

import torch
from torch import Tensor

from spt_fast.kernels.backend import Op, accumulation_dtype

# Elements updated together: on a CPU so many that tensors and temporaries fit its cache, on a GPU only to bound the
# temporaries.
BLOCK = {"cpu": 1 << 19}
BLOCK_ELSEWHERE = 1 << 26


@torch.no_grad()
def adamw_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    anchor: Tensor | None = None,
    anchor_decay: float = 0.0,
    grad_scale: float | Tensor = 1.0,
    skip: bool | Tensor | None = None,
    master: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """One AdamW update of param, exp_avg, exp_avg_sq and master, in place.

    All tensors have param's shape, any strides and any floating dtypes. step, lr, grad_scale and skip may be 0-d
    tensors on param's device. step is the number of this update, from 1.
    ValueError: shapes that differ, an anchor_decay without anchor, or a backend that isn't available.
    """
    tensors = {"grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "anchor": anchor, "master": master}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != param.shape:
            raise ValueError(
                f"adamw_step: {name} is {tuple(tensor.shape)}, param is {tuple(param.shape)}; they must agree"
            )
    if anchor is None and anchor_decay != 0:
        raise ValueError(f"adamw_step: anchor_decay={anchor_decay} needs an anchor")
    _ADAMW_STEP.pick(backend, param)
    _reference(
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        step,
        lr,
        betas,
        eps,
        weight_decay,
        anchor,
        anchor_decay,
        grad_scale,
        skip,
        master,
    )


def _reference(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    anchor: Tensor | None,
    anchor_decay: float,
    grad_scale: float | Tensor,
    skip: bool | Tensor | None,
    master: Tensor | None,
) -> None:
    theta = param if master is None else master
    dtype, device = accumulation_dtype(theta), param.device

    def scalar(value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(device=device, dtype=dtype)
        return torch.full((), value, dtype=dtype, device=device)

    new1, new2 = scalar(1 - betas[0]), scalar(1 - betas[1])
    # 1 - beta^step by expm1, whose float32 result stays exact to rounding where beta^step is close to 1.
    bias1, bias2 = (-torch.expm1(scalar(step) * (math.log(beta) if beta else -math.inf)) for beta in betas)
    lr, grad_scale = scalar(lr), scalar(grad_scale)
    if skip is not None:
        skip = (
            torch.full((), skip, device=device) if isinstance(skip, bool) else skip.to(device=device, dtype=torch.bool)
        )
        new1, new2 = new1.masked_fill(skip, 0), new2.masked_fill(skip, 0)

    for param_, grad_, m_, v_, theta_, anchor_ in _blocks(param, grad, exp_avg, exp_avg_sq, theta, anchor):
        g = grad_.to(dtype) * grad_scale
        if skip is not None:
            g.masked_fill_(skip, 0)
        m = m_.to(dtype).lerp_(g, new1)
        v = v_.to(dtype).lerp_(g.square_(), new2)
        update = torch.div(v, bias2, out=g).sqrt_().add_(eps)
        torch.div(m, update, out=update).div_(bias1)
        w = theta_.to(dtype)
        if weight_decay:
            update.add_(w, alpha=weight_decay)
        if anchor_decay:
            update.add_(w - anchor_, alpha=anchor_decay)
        if skip is not None:
            update.masked_fill_(skip, 0)
        w.sub_(update.mul_(lr))
        for stored, computed in ((m_, m), (v_, v), (theta_, w), (param_, w)):
            if stored is not computed:
                stored.copy_(computed)


def _blocks(*tensors: Tensor | None) -> Iterator[tuple]:
    """The tensors in aligned flat views of BLOCK elements; whole where one of them is not contiguous."""
    given = [tensor for tensor in tensors if tensor is not None]
    if not all(tensor.is_contiguous() for tensor in given):
        return iter([tensors])
    size = BLOCK.get(given[0].device.type, BLOCK_ELSEWHERE)
    count = max(1, -(-given[0].numel() // size))
    return zip(*(repeat(None, count) if x is None else x.view(-1).split(size) for x in tensors), strict=True)


_ADAMW_STEP = Op("adamw_step", {"cuda": {"reference": "PyTorch ops"}, "cpu": {"reference": "PyTorch ops"}})
