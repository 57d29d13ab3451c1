"""SwiGLU: the gated activation of Llama's feed-forward layer.

    y = silu(g) u,  silu(g) = g s,  s = sigmoid(g)                                      (Shazeer, arXiv 2002.05202)
    du = dy silu(g)        dg = dy u s (1 + g (1 - s))

Elementwise, so the time is the bytes: for bf16, 6 bytes an element forward (read g and u, write y) and 10 backward
(read g, u and dy, write dg and du), if only g and u are saved and s is made again. The reference is PyTorch's own two
ops, each in float32 inside and rounded once.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from spt_fast.kernels.backend import Op


def swiglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """silu(gate) * up, of one shape and dtype, which are the result's too.

    ValueError: shapes or dtypes that differ, or a backend that isn't available.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"swiglu: gate is {gate.dtype} {tuple(gate.shape)}, up is {up.dtype} {tuple(up.shape)}; they must agree"
        )
    _SWIGLU.pick(backend, gate)
    return _swiglu_reference(gate, up)


def _swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


_SWIGLU = Op("swiglu", {"cuda": {"reference": "PyTorch ops"}, "cpu": {"reference": "PyTorch ops"}})
