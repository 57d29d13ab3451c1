"""The feed-forward layer: two projections and SwiGLU between them, which can be a part of the matmuls.

    g, u = x w_gᵀ + b_g, x w_uᵀ + b_u        y = silu(g) u        z = y w_dᵀ + b_d
    dy = dz w_d        dg, du from dy, g, u (activation.py)        dx = [dg du] w_gu

Legend: N rows (all leading dimensions together), D width of the layer, F of its middle, E of its result; w_gu [2F, D]
holds w_g and then w_u.

With separate kernels (`linear` and `swiglu_linear`), SwiGLU reads g and u and writes y; in the backward pass it reads
dy, g and u and writes dg, du and y: for bf16, 18NF bytes, which a GPU moves while its tensor cores are idle. But a
matmul that ends has a tile of g and u, or of dy, in registers. Here one kernel makes g, u and y, another one dg, du and
y from dz. Only g and u are read again, and the copies of one tile overlap with the arithmetic of others: at D >= 1024
they cost nothing, by the model in benchmarks/roofline.py. persistent.py says when these kernels are used; forward and
backward are chosen separately.

y is computed from g and u as they are stored, so that both passes compute the same; dy is not rounded. The backward
kernel works on half a tile at a time, for which registers suffice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spt_fast.errors import invalid
from spt_fast.kernels.activation import (
    SWIGLU_BACKENDS,
    activate,
    project_activated,
    swiglu_launches,
    swiglu_linear_backward,
)
from spt_fast.kernels.backend import Candidate, Op, is_looked_at, tried_on_gpus
from spt_fast.kernels.gradients import accumulates_in_place
from spt_fast.kernels.launch import Config, Variant, jit, launched, tl
from spt_fast.kernels.linear import check, project, weight_gradients
from spt_fast.kernels.matmul import rows_times, shaped
from spt_fast.kernels.persistent import SEPARATE, config, describable, described, fits, launch, place, variant


def swiglu_mlp(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """swiglu_packed(x @ gate_up_weight.T + gate_up_bias) @ down_weight.T + down_bias.

    x [..., D], gate_up_weight [2F, D] (gate's rows, then up's), down_weight [E, F], biases [2F] and [E], all of one
    dtype; the result is [..., E]. The intermediate result y is not kept for the backward pass.
    ValueError: shapes that don't fit, or a backend that isn't available. RuntimeError: dtypes that differ.
    """
    given = (x, gate_up_weight, down_weight, gate_up_bias, down_bias)
    check("swiglu_mlp", "x", x, x.shape, gate_up_weight, gate_up_bias, "gate_up_")
    rows = gate_up_weight.shape[0]
    if rows % 2:
        expected = "it must have an even number of rows: gate's, then up's"
        raise ValueError(invalid("swiglu_mlp(gate_up_weight)", tuple(gate_up_weight.shape), expected))
    check("swiglu_mlp", "gate_up_weight", gate_up_weight, (rows // 2,), down_weight, down_bias, "down_")
    if not is_looked_at(given):  # which is to see every op
        backend = _SWIGLU_MLP.pick(backend, x)
        if backend == "triton" and fits(*given):
            launches = [_launched(kernel, _shape_class(x, gate_up_weight)) for kernel in ("forward", "backward")]
            if launches != [SEPARATE, SEPARATE]:
                return Fused.apply(*given, *launches)
    return project_activated(project(x, gate_up_weight, gate_up_bias), down_weight, down_bias, backend)


class Fused(torch.autograd.Function):
    """With at least one fused kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_up_weight: Tensor,
        down_weight: Tensor,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
        launch: Config,
        backward_launch: Config,
    ) -> Tensor:
        x_ND = describable(x.reshape(x.shape[:-1].numel(), x.shape[-1]))
        if launch == SEPARATE:
            gate_up = rows_times(x_ND, gate_up_weight.T, gate_up_bias)
            y_NF = activate(gate_up, "triton")
        else:
            gate_up, y_NF = _forward(x_ND, gate_up_weight, gate_up_bias, launch)
        ctx.save_for_backward(x_ND, gate_up, gate_up_weight, down_weight)
        ctx.launch = backward_launch
        # The parameters themselves: a checkpoint's copies of saved tensors are not.
        parameters = (gate_up_weight, gate_up_bias, down_weight, down_bias)
        ctx.in_place = [parameter if accumulates_in_place(parameter) else None for parameter in parameters]
        return shaped(rows_times(y_NF, down_weight.T, down_bias), (*x.shape[:-1], len(down_weight)))

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("swiglu_mlp has no second derivative (create_graph=True)")
        x_ND, gate_up, gate_up_weight, down_weight = ctx.saved_tensors
        dz_NE = describable(dz.reshape(len(x_ND), len(down_weight)))
        if ctx.launch == SEPARATE:
            dgate_up, y_NF = swiglu_linear_backward(dz_NE, gate_up, down_weight, "triton")
        else:
            dgate_up, y_NF = _backward(dz_NE, gate_up, down_weight, ctx.launch)
        of_gate_up, of_gate_up_bias, of_down, of_down_bias = ctx.in_place
        wanted = ctx.needs_input_grad
        dw_down, db_down = weight_gradients(dz_NE, y_NF, of_down, of_down_bias, (wanted[2], wanted[4]))
        dw_gate_up, db_gate_up = weight_gradients(dgate_up, x_ND, of_gate_up, of_gate_up_bias, (wanted[1], wanted[3]))
        dx = rows_times(dgate_up, gate_up_weight).view(*dz.shape[:-1], x_ND.shape[1]) if wanted[0] else None
        return dx, dw_gate_up, dw_down, db_gate_up, db_down, None, None


# ------------------------------------------------------------------------------------------------ launches

FORWARD = ((128, 128, 64, 8, 3), (128, 128, 32, 8, 4), (128, 64, 32, 4, 4), (64, 128, 32, 4, 4))
BACKWARD = ((128, 64, 64, 4, 4), (64, 128, 64, 4, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4))
"""To be measured: rows and columns of y's tiles, depth, warps, stages."""


def candidates(kernel: str, F: int) -> list[Config]:
    """The fused launches of a kernel, "forward" or "backward"."""
    every = [config(*sizes) for sizes in (FORWARD if kernel == "forward" else BACKWARD)]
    return [each for each in every if F % each["COLUMNS"] == 0]


def _shape_class(x: Tensor, gate_up_weight: Tensor) -> tuple[int, int, int]:
    return x.shape[-1], len(gate_up_weight) // 2, x.itemsize


def _launched(kernel: str, shape: tuple[int, int, int]) -> Config:
    return launched(f"swiglu_mlp_{kernel}", shape, SEPARATE)


def _launches(x: Tensor, gate_up_weight: Tensor, *others: Tensor) -> list[Candidate]:
    shape = _, F, _ = _shape_class(x, gate_up_weight)
    found = swiglu_launches(x, F)
    if x.is_cuda and fits(x, gate_up_weight, *others):
        for kernel in ("forward", "backward"):
            found += tried_on_gpus(x, f"swiglu_mlp_{kernel}", shape, candidates(kernel, F))
    return found


# ------------------------------------------------------------------------------------------------ kernels


@jit
def _forward_kernel(
    x, weight, bias_ptr, gate_up, y, N, D, F,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """weight [2, F, D]. One product makes g and u side by side: of two, each would wait for the last on Hopper."""
    down, across = tl.cdiv(N, ROWS), F // COLUMNS
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=True):
        i, j = place(tile, down, across, GROUP)
        n, f = i * ROWS, j * COLUMNS
        both = tl.zeros((ROWS, 2 * COLUMNS), tl.float32)
        for d in range(0, D, DEPTH):
            weights = tl.reshape(weight.load([0, f, d]), (2 * COLUMNS, DEPTH))
            both = tl.dot(x.load([n, d]), weights.T, both, input_precision="ieee")
        g, u = tl.split(tl.permute(tl.reshape(both, (ROWS, 2, COLUMNS)), (0, 2, 1)))
        if bias_ptr is not None:
            columns = f + tl.arange(0, COLUMNS)
            g += tl.load(bias_ptr + columns).to(tl.float32)[None, :]
            u += tl.load(bias_ptr + F + columns).to(tl.float32)[None, :]
        g, u = g.to(gate_up.dtype), u.to(gate_up.dtype)
        gate_up.store([n, f], g)
        gate_up.store([n, F + f], u)
        g, u = g.to(tl.float32), u.to(tl.float32)
        y.store([n, f], (g * (1 / (1 + tl.exp(-g))) * u).to(y.dtype))


@jit
def _backward_kernel(
    dz, weight, gate_up, dgate_up, y, N, E, F,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    down, across = tl.cdiv(N, ROWS), F // COLUMNS
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=True):
        i, j = place(tile, down, across, GROUP)
        n, f = i * ROWS, j * COLUMNS
        dy = tl.zeros((ROWS, COLUMNS), tl.float32)
        for e in range(0, E, DEPTH):
            dy = tl.dot(dz.load([n, e]), weight.load([e, f]), dy, input_precision="ieee")
        halves = tl.split(tl.permute(tl.reshape(dy, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
        for half in tl.static_range(2):
            at = f + half * (COLUMNS // 2)
            g, u = gate_up.load([n, at]).to(tl.float32), gate_up.load([n, F + at]).to(tl.float32)
            s = 1 / (1 + tl.exp(-g))
            dgate_up.store([n, at], (halves[half] * s * u * (1 + g * (1 - s))).to(dgate_up.dtype))
            dgate_up.store([n, F + at], (halves[half] * s * g).to(dgate_up.dtype))
            y.store([n, at], (g * s * u).to(y.dtype))


def _forward(x_ND: Tensor, weight: Tensor, bias: Tensor | None, chosen: Config) -> tuple[Tensor, Tensor]:
    """(gate_up [N, 2F], y [N, F])."""
    (N, D), F = x_ND.shape, len(weight) // 2
    rows, columns, depth = chosen["ROWS"], chosen["COLUMNS"], chosen["DEPTH"]
    gate_up, y_NF = x_ND.new_empty(N, 2 * F), x_ND.new_empty(N, F)
    launch(
        _forward_kernel, N, F, chosen, x_ND.device,
        described(x_ND, rows, depth), described(weight.view(2, F, D), 2, columns, depth), bias,
        described(gate_up, rows, columns), described(y_NF, rows, columns), N, D, F,
    )  # fmt: skip
    return gate_up, y_NF


def _backward(dz_NE: Tensor, gate_up: Tensor, weight: Tensor, chosen: Config) -> tuple[Tensor, Tensor]:
    """(dgate_up [N, 2F], y [N, F])."""
    E, F = weight.shape
    rows, columns, depth = chosen["ROWS"], chosen["COLUMNS"], chosen["DEPTH"]
    dgate_up, y_NF = torch.empty_like(gate_up), dz_NE.new_empty(len(dz_NE), F)
    launch(
        _backward_kernel, len(dz_NE), F, chosen, dz_NE.device,
        described(dz_NE, rows, depth), described(weight, depth, columns),
        *(described(x, rows, columns // 2) for x in (gate_up, dgate_up, y_NF)), len(dz_NE), E, F,
    )  # fmt: skip
    return dgate_up, y_NF


def variants() -> list[Variant]:
    """The fused launches, with and without a bias; none is a default."""
    found = []
    for dtype, bias in (("bf16", None), ("bf16", "*bf16"), ("fp16", None)):
        others = {"bias_ptr": bias, "N": "i32", "D": "i32:16", "F": "i32:16"}
        for each in candidates("forward", 1 << 12)[: 1 if dtype == "fp16" else None]:
            rows, columns, depth = each["ROWS"], each["COLUMNS"], each["DEPTH"]
            whole = (rows, columns)
            blocks = {"x": (rows, depth), "weight": (2, columns, depth), "gate_up": whole, "y": whole}
            found.append(variant(_forward_kernel, dtype, blocks, others, each))
    for dtype in ("bf16", "fp16"):
        for each in candidates("backward", 1 << 12)[: 1 if dtype == "fp16" else None]:
            rows, columns, depth = each["ROWS"], each["COLUMNS"], each["DEPTH"]
            half = (rows, columns // 2)
            blocks = {"dz": (rows, depth), "weight": (depth, columns), "gate_up": half, "dgate_up": half, "y": half}
            found.append(variant(_backward_kernel, dtype, blocks, {"N": "i32", "E": "i32:16", "F": "i32:16"}, each))
    return found


_SWIGLU_MLP = Op("swiglu_mlp", SWIGLU_BACKENDS, variants, _launches)
