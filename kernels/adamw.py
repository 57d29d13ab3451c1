"""AdamW of one tensor or many, in place, in one pass. Everything that must not cause a synchronisation is a device
scalar.

    g ← grad · grad_scale
    m ← β1 m + (1 - β1) g        m^ = m / (1 - β1^step)
    v ← β2 v + (1 - β2) g²       v^ = v / (1 - β2^step)
    θ ← θ - lr ( m^ / (√v^ + eps) + weight_decay θ + anchor_decay (θ - θ0) )

Adam with decoupled decay (Loshchilov & Hutter, arXiv 1711.05101), toward zero and toward an anchor θ0, usually the
starting weights of a finetuning phase (our reading of the Anchored AdamW of arXiv 2502.06042). `step` counts from 1.

If θ is kept twice, `master` in float32 is updated and `param` is its rounding. The arithmetic is float32 (float64 if θ
is), whatever the dtypes of param, grad and moments.

A bf16 parameter without a master loses every update smaller than half a unit in its last place, 1/256 to 1/512 of it.

Clipping and skipping don't wait for the device: grad_scale (such as min(1, clip / norm)) and skip may be 0-d tensors
that it has just computed. A skipped step changes nothing, moments included, whatever grad and grad_scale hold (NaN
too). The step counter belongs to the caller, who must not count a skipped step: step += ~skip.

Bytes moved for a float32 parameter with float32 gradient, in an ideal kernel: 28 (read grad, read and write θ, m, v);
for a bf16 parameter with master 30. The kernels move these; the reference makes a dozen passes, over blocks that stay
in a CPU's cache. A call of a custom op costs more than the update of a small tensor (60 µs on a CPU), so one call takes
all tensors with the same settings. On a CPU threads share all their elements; on a GPU each has its launch, so the
trainer puts them in one flat tensor (train/optim.py): first those with weight decay, then the others. Kernels work in
place, so they must never be autotuned: the first call would make many steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from operator import index
from typing import Any

import torch
from torch import Tensor

from spt_fast import native
from spt_fast.errors import invalid
from spt_fast.kernels.backend import Candidate, Op, accumulation_dtype, custom_op, tried_on_gpus
from spt_fast.kernels.launch import Config, Variant, jit, launched, tl

# Elements that the reference updates together: on a CPU tensors and temporaries should fit its cache, on a GPU it only
# bounds the temporaries.
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

    All tensors have param's shape, any strides (kernels copy non-contiguous ones) and any floating dtypes. step, lr,
    grad_scale and skip may be 0-d tensors on param's device. step is the number of this update, from 1.
    ValueError: shapes that differ, a step below 1, a number that is negative or not finite, or a beta of 1 or more (a
    tensor's value isn't read), an anchor_decay without anchor, or a backend that cannot run for these tensors.
    """
    adamw_step_all(
        [param],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        step=step,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        anchors=None if anchor is None else [anchor],
        anchor_decay=anchor_decay,
        grad_scale=grad_scale,
        skip=skip,
        masters=None if master is None else [master],
        backend=backend,
    )


@torch.no_grad()
def adamw_step_all(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    anchors: Sequence[Tensor] | None = None,
    anchor_decay: float = 0.0,
    grad_scale: float | Tensor = 1.0,
    skip: bool | Tensor | None = None,
    masters: Sequence[Tensor] | None = None,
    decayed: Sequence[int] | None = None,
    backend: str = "auto",
) -> None:
    """`adamw_step` for every param, with the same numbers for all, in one call.

    The lists have equal lengths, with a tensor for each param; all tensors are on one device, and no two updated ones
    share memory. decayed: how many numbers of each param, from the first, get weight_decay; by default all. A param of
    which only a part decays is contiguous, as its other tensors are. All use one backend, which can run for all of
    them. ValueError: as adamw_step, lists of other lengths, `decayed` below 0 or above a param's numbers, or params of
    float64 among others.
    """
    lists = {"grad": grads, "exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs, "anchor": anchors, "master": masters}
    for name, tensors in lists.items():
        if tensors is None:
            continue
        if len(tensors) != len(params):
            raise ValueError(f"adamw_step: {len(tensors)} {name}s for {len(params)} params; give one for each")
        for number, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            if tensor.shape != param.shape:
                raise ValueError(
                    f"adamw_step: {name} {number} is {tuple(tensor.shape)}, its param is {tuple(param.shape)}; "
                    "they must agree"
                )
    sizes = [param.numel() for param in params]
    if decayed is not None and (
        len(decayed) != len(params) or not all(0 <= index(n) <= size for n, size in zip(decayed, sizes, strict=True))
    ):
        expected = f"give a number for each param, from 0 to its size; their sizes are {sizes}"
        raise ValueError(invalid("adamw_step_all(decayed)", decayed, expected))
    if not isinstance(step, Tensor) and step < 1:
        raise ValueError(invalid("adamw_step(step)", step, "the number of this update, from 1"))
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(invalid("adamw_step(betas)", betas, "give two numbers, at least 0 and below 1"))
    numbers = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
    numbers |= {"anchor_decay": anchor_decay, "grad_scale": grad_scale}
    for name, value in numbers.items():
        if not isinstance(value, Tensor) and not 0 <= value < math.inf:
            raise ValueError(invalid(f"adamw_step({name})", value, "it must be finite and at least 0"))
    if anchors is None and anchor_decay != 0:
        raise ValueError(invalid("adamw_step(anchor_decay)", anchor_decay, "it needs an anchor; give `anchor`"))
    if not params:
        return
    if anchor_decay == 0:
        anchors = None
    given = [params, exp_avgs, exp_avg_sqs, masters or [], grads, anchors or []]
    one_of_each = {(x.device, x.dtype): x for tensors in given for x in tensors}
    picked = {_ADAMW_STEP.pick(backend, tensor) for tensor in one_of_each.values()}
    wide = {accumulation_dtype(param) for param in masters or params}
    if len(wide) > 1:
        raise ValueError(
            "adamw_step: params of float64 among others are computed in float64; update them in a separate call"
        )
    dtype, device = wide.pop(), params[0].device

    def scalar(value: float | Tensor, dtype: torch.dtype) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(device=device, dtype=dtype)
        return torch.full((), value, dtype=dtype, device=device)

    _step(
        *given,
        [
            scalar(step, dtype),
            scalar(lr, dtype),
            scalar(grad_scale, dtype),
            None if skip is None else scalar(skip, torch.bool),
        ],
        [*betas, eps, weight_decay, anchor_decay],
        sizes if decayed is None else decayed,
        picked.pop() if len(picked) == 1 else "reference",
    )


# ------------------------------------------------------------------------------------------------ custom op


@custom_op("adamw_step", lambda *_: None, mutates=("params", "exp_avgs", "exp_avg_sqs", "masters"))
def _step(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    grads: Sequence[Tensor],
    anchors: Sequence[Tensor],
    scalars: Sequence[Tensor | None],
    numbers: Sequence[float],
    decayed: Sequence[int],
    backend: str,
) -> None:
    """masters and anchors: one for each param, or none. scalars: the 0-d tensors step, lr and grad_scale in the dtype
    of the arithmetic, and skip (bool or None); numbers: beta1, beta2, eps, weight_decay, anchor_decay. They are in
    lists because torch's Python side of a custom op takes time by the square of the number of arguments.
    """
    given = [params, exp_avgs, exp_avg_sqs, masters, grads, anchors]
    taken = given if backend == "reference" else [[tensor.contiguous() for tensor in tensors] for tensors in given]
    if backend == "triton":
        for each, count in zip(_each(taken), decayed, strict=True):
            _triton(count, scalars, numbers, *each)
    else:
        for lists, decay in _by_decay(taken, decayed, numbers[3]):
            (_cpu if backend == "cpu" else _reference_all)(lists, scalars, [*numbers[:3], decay, numbers[4]])
    for tensors, updates in zip(given[:4], taken, strict=False):
        for tensor, updated in zip(tensors, updates, strict=True):
            if updated is not tensor:
                tensor.copy_(updated)


def _each(lists: Sequence[Sequence[Tensor]]) -> Iterator[tuple[Any, ...]]:
    """The tensors of one param after the other, None for absent ones."""
    absent = [None] * len(lists[0])
    return zip(*(tensors or absent for tensors in lists), strict=True)


def _by_decay(
    lists: Sequence[Sequence[Tensor]], decayed: Sequence[int], weight_decay: float
) -> Iterator[tuple[list[list[Tensor]], float]]:
    """The tensors, or parts of them, with weight decay, and the others, each with their weight decay."""
    sizes = [param.numel() for param in lists[0]]
    for decays in (True, False):
        picked: list[list[Tensor]] = [[] for _ in lists]
        for number, (count, size) in enumerate(zip(decayed, sizes, strict=True)):
            first, end = (0, count) if decays else (count, size)
            for tensors, part in zip(lists, picked, strict=True):
                if tensors and first < end:
                    whole = tensors[number]
                    part.append(whole if end - first == size else whole.view(-1)[first:end])
        if picked[0]:
            yield picked, weight_decay if decays else 0.0


# ------------------------------------------------------------------------------------------------ reference


def _reference_all(lists: Sequence[Sequence[Tensor]], scalars: Sequence[Any], numbers: Sequence[float]) -> None:
    for tensors in _each(lists):
        _reference(scalars, numbers, *tensors)


def _reference(
    scalars: Sequence[Any],
    numbers: Sequence[float],
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    master: Tensor | None,
    grad: Tensor,
    anchor: Tensor | None,
) -> None:
    step, lr, grad_scale, skip = scalars
    beta1, beta2, eps, weight_decay, anchor_decay = numbers
    theta, dtype = param if master is None else master, step.dtype
    new1, new2 = (torch.full_like(step, 1 - beta) for beta in (beta1, beta2))
    # 1 - beta^step by expm1, whose float32 result stays exact to rounding where beta^step is close to 1.
    bias1, bias2 = (-torch.expm1(step * _log(beta)) for beta in (beta1, beta2))
    if skip is not None:
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
        update.mul_(lr)
        if skip is not None:
            update.masked_fill_(skip, 0)
        w.sub_(update)
        for stored, computed in ((m_, m), (v_, v), (theta_, w), (param_, w)):
            if stored is not computed:
                stored.copy_(computed if skip is None else torch.where(skip, stored, computed.to(stored.dtype)))


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf


def _blocks(*tensors: Tensor | None) -> Iterator[list]:
    """The tensors in aligned flat views of BLOCK elements; whole if one of them is not contiguous."""
    given = [tensor for tensor in tensors if tensor is not None]
    if not all(tensor.is_contiguous() for tensor in given):
        yield list(tensors)
        return
    size = BLOCK.get(given[0].device.type, BLOCK_ELSEWHERE)
    for first in range(0, given[0].numel(), size):
        yield [x if x is None else x.view(-1)[first : first + size] for x in tensors]


# ------------------------------------------------------------------------------------------------ csrc/adamw.cpp


def _cpu(lists: Sequence[Sequence[Tensor]], scalars: Sequence[Any], numbers: Sequence[float]) -> None:
    step, lr, grad_scale, skip = (None if scalar is None else scalar.item() for scalar in scalars)
    if not skip:
        native.ops().cpu_adamw_step(*lists, step, lr, grad_scale, *numbers)


# ------------------------------------------------------------------------------------------------ Triton

SIZES = ((1024, 4), (512, 4), (1024, 8), (2048, 8), (512, 2))
"""Elements and warps of a program, the default first: 8 elements per thread are one access of 16 bytes to a bf16
tensor, two to one in float32."""


def candidates(aligned: bool = True) -> list[Config]:
    """The launches to measure, the default first. If numbers are loaded one by one (not `aligned`), a thread needs
    twice as many registers, and the assembler, which aims at a high occupancy, would spill."""
    return [Config((("BLOCK_SIZE", size),), warps, maxnreg=None if aligned else 168) for size, warps in SIZES]


@jit
def _bias(beta_log, step):
    """1 - beta^step, by the series of e^x - 1 if the difference would lose digits."""
    x = beta_log * step
    series = x * 0 + 1
    for k in tl.static_range(0, 8):
        series = 1 + series * x / (9 - k)
    return tl.where(x > -0.5, -x * series, 1 - tl.exp(x))


@partial(jit, do_not_specialize=("decayed",))
def _kernel(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, master_ptr, anchor_ptr,
    step_ptr, lr_ptr, grad_scale_ptr, skip_ptr,
    N, decayed, new1, new2, log_beta1, log_beta2, eps, weight_decay, anchor_decay,
    HAS_MASTER: tl.constexpr, HAS_ANCHOR: tl.constexpr, HAS_SKIP: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    updated = tl.where(tl.load(skip_ptr) == 0, N, 0) if HAS_SKIP else N
    mask = at < updated
    step = tl.load(step_ptr)
    lr = tl.load(lr_ptr)
    grad = tl.load(grad_ptr + at, mask, 0.0).to(tl.float32) * tl.load(grad_scale_ptr)
    m = tl.load(exp_avg_ptr + at, mask, 0.0).to(tl.float32)
    v = tl.load(exp_avg_sq_ptr + at, mask, 0.0).to(tl.float32)
    theta_ptr = master_ptr if HAS_MASTER else param_ptr
    theta = tl.load(theta_ptr + at, mask, 0.0).to(tl.float32)

    m += (grad - m) * new1
    v += (grad * grad - v) * new2
    rate, correction2 = lr / _bias(log_beta1, step), 1 / _bias(log_beta2, step)
    decay = tl.where(at < decayed, weight_decay, 0.0)
    change = tl.div_rn(rate * m, tl.sqrt_rn(v * correction2) + eps) + lr * decay * theta
    if HAS_ANCHOR:
        change += lr * anchor_decay * (theta - tl.load(anchor_ptr + at, mask, 0.0).to(tl.float32))
    theta -= change

    tl.store(exp_avg_ptr + at, m.to(exp_avg_ptr.dtype.element_ty), mask)
    tl.store(exp_avg_sq_ptr + at, v.to(exp_avg_sq_ptr.dtype.element_ty), mask)
    if HAS_MASTER:
        tl.store(master_ptr + at, theta.to(master_ptr.dtype.element_ty), mask)
    tl.store(param_ptr + at, theta.to(param_ptr.dtype.element_ty), mask)


def _launches(param: Tensor, *_: Tensor) -> list[Candidate]:
    return tried_on_gpus(param, "adamw_step", (param.itemsize,), candidates()[1:])


def _triton(
    decayed: int,
    scalars: Sequence[Any],
    numbers: Sequence[float],
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    master: Tensor | None,
    grad: Tensor,
    anchor: Tensor | None,
) -> None:
    step, lr, grad_scale, skip = scalars
    beta1, beta2, eps, weight_decay, anchor_decay = numbers
    N = param.numel()
    config = candidates(N % 16 == 0)[0]
    config = launched("adamw_step", (param.itemsize,), config) if N % 16 == 0 else config
    if N:
        _kernel[(-(-N // config["BLOCK_SIZE"]),)](
            param, grad, exp_avg, exp_avg_sq, master, anchor, step, lr, grad_scale, skip,
            N, decayed, 1 - beta1, 1 - beta2, _log(beta1), _log(beta2), eps, weight_decay, anchor_decay,
            HAS_MASTER=master is not None, HAS_ANCHOR=anchor is not None, HAS_SKIP=skip is not None,
            **config.options,
        )  # fmt: skip


def variants() -> list[Variant]:
    """The trainer's calls (float32, or bf16 with master), with and without anchor and skip, in float16 too; and bf16
    alone, with moments in float32 or in bf16. The trainer's calls also for sizes that are not multiples of 16."""
    found = []
    cases: list[tuple[str, str, str | None]] = [("*fp32", "*fp32", None), ("*bf16", "*fp32", "*fp32")]
    cases += [("*fp16", "*fp32", "*fp32"), ("*bf16", "*bf16", None), ("*bf16", "*fp32", None)]
    for (param, state, master), N in [(case, 16) for case in cases] + [(case, 1) for case in cases[:2]]:
        for anchor, skip in ((False, True), (True, True), (False, False), (True, False)):
            arguments = {
                "param_ptr": param,
                **dict.fromkeys(("grad_ptr", "exp_avg_ptr", "exp_avg_sq_ptr"), state),
                "master_ptr": master,
                "anchor_ptr": (master or param) if anchor else None,
                "skip_ptr": "*i1" if skip else None,
            }
            arguments |= dict.fromkeys(("step_ptr", "lr_ptr", "grad_scale_ptr"), "*fp32")
            arguments |= {"N": "i32" if N % 16 else "i32:16", "decayed": "i32"}
            numbers = ("new1", "new2", "log_beta1", "log_beta2", "eps", "weight_decay", "anchor_decay")
            arguments |= dict.fromkeys(numbers, "fp32")
            flags = {"HAS_MASTER": bool(master), "HAS_ANCHOR": anchor, "HAS_SKIP": skip}
            default = skip and N == 16 and param != "*fp16" and state == "*fp32"
            for config in candidates(N == 16)[: None if default else 1]:
                usual = default and config.constants == candidates()[0].constants and config.num_warps == SIZES[0][1]
                constants = {**flags, **dict(config.constants)}
                found.append(
                    Variant(_kernel, arguments, constants, config.num_warps, maxnreg=config.maxnreg, default=usual)
                )
    return found


_ADAMW_STEP = Op(
    "adamw_step",
    {
        "cuda": {
            "triton": "1.2 times PyTorch's fused AdamW on one large tensor, 1.4 times with a master (H200)",
            "reference": "PyTorch ops",
        },
        "cpu": {
            "cpu": "limited by memory bandwidth, like torch's fused AdamW, 12 times PyTorch's ops; with a master 1.2 "
            "times that AdamW and the rounding (AMD EPYC, 1 core)",
            "reference": "PyTorch ops",
        },
    },
    variants,
    _launches,
)
