"""AdamW: python -m benchmarks.kernels.bench_adamw [--help]

Bytes that must be moved (kernels/adamw.py): 28 per parameter in float32, 30 in bf16 with a float32 master copy and a
float32 gradient. Ours is called as by the trainer, with the step's number, the clipping factor and the skip flag as
device scalars, which the others don't support.

One large matrix per width, and all parameters of a small GPT, where calls and launches count: all take lists of
tensors. The check is on the change of the weights in two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.harness import Case, Contender, Function, Run, main
from spt_fast.kernels import adamw_step_all
from spt_fast.model.gpt import GPT, GPTConfig

SHARE = 2
LR, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.95), 1e-8, 0.1
SETTINGS: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}

Shapes = Sequence[tuple[int, ...]]


def cases(run: Run) -> list[Callable[[], Case]]:
    widths = run.sizes(gpu=(1024, 2048, 4096, 8192), cpu=(1024,), dry=(64,))
    numbers = run.sizes(gpu=2**26, cpu=2**23, dry=2**10)
    preset = run.sizes(gpu="124m", cpu="10m", dry="1m")
    layouts = [(f"{numbers // width} x {width}", [(numbers // width, width)]) for width in widths]
    layouts.append(all_of(preset))
    return [partial(case, run, *layout) for layout in layouts for case in (in_float32, in_bf16)]


def all_of(preset: str) -> tuple[str, Shapes]:
    with torch.device("meta"):
        shapes = [tuple(p.shape) for p in GPT(GPTConfig.preset(preset)).parameters()]
    return f"the {len(shapes)} tensors of {preset}", shapes


def in_float32(run: Run, name: str, shapes: Shapes) -> Case:
    return _compared(run, "adamw_step, float32", name, shapes, torch.float32, weight_bytes=28)


def in_bf16(run: Run, name: str, shapes: Shapes) -> Case:
    return _compared(run, "adamw_step, bf16 with master", name, shapes, torch.bfloat16, weight_bytes=30)


def _compared(run: Run, op: str, name: str, shapes: Shapes, dtype: torch.dtype, weight_bytes: int) -> Case:
    count = len(shapes)
    contenders = [
        Contender("eager", lambda: TorchAdamW(count), "torch"),
        Contender("torch's own, fused", lambda: TorchAdamW(count, fused=True), "torch"),
        *(Contender(c.name, partial(_counting, c, count), c.kind) for c in run.ours(ours)),
        Contender("flashoptim", partial(FlashOptim, count)),
    ]
    if count == 1:
        compiled = run.torch_contenders(partial(textbook, 1, Counter()))[1]
        contenders.insert(1, compiled)
    return _case(op, name, _inputs(run, shapes, dtype, master=dtype != torch.float32), count, contenders, weight_bytes)


def _inputs(run: Run, shapes: Shapes, dtype: torch.dtype, *, master: bool) -> list[Tensor]:
    """Parameters, gradients, both moments (zero, as at the start) and perhaps masters, one group after another."""
    weights = [run.randn(*shape, dtype=torch.float32, scale=0.02, grad=False) for shape in shapes]
    grads = [run.randn(*shape, dtype=torch.float32, scale=1e-3, grad=False) for shape in shapes]
    moments = [torch.zeros_like(x) for _ in range(2) for x in weights]
    return [*(x.to(dtype) for x in weights), *grads, *moments, *(weights if master else [])]


def _groups(inputs: Sequence[Tensor], count: int) -> list[list[Tensor]]:
    """[parameters, gradients, first moments, second moments, masters or else the parameters again]."""
    groups = [list(inputs[i : i + count]) for i in range(0, len(inputs), count)]
    return groups if len(groups) == 5 else [*groups, groups[0]]


def _case(
    op: str,
    name: str,
    inputs: list[Tensor],
    count: int,
    contenders: list[Contender],
    weight_bytes: int,
) -> Case:
    start = _groups(inputs, count)[-1]

    def updates(weights: list[Tensor]) -> list[Tensor]:
        return [torch.cat([(w.double() - s.double()).flatten() for w, s in zip(weights, start, strict=True)])]

    def exact(upstream: Sequence[Tensor]) -> list[Tensor]:
        weights, grads, m, v = ([x.double() for x in group] for group in _groups([*start, *inputs[count:]], count)[:4])
        step = Counter()
        for _ in range(2):
            textbook(count, step, *weights, *grads, *m, *v)
        return updates(weights)

    work = {"step": float(weight_bytes * sum(x.numel() for x in start))}
    return Case(op, name, inputs, contenders, work, exact=exact, spot=updates, calls=2)


class Counter:
    """The number of a step as a tensor, so that compiled code is compiled once."""

    def __init__(self) -> None:
        self.count = torch.zeros((), dtype=torch.float64)

    def next(self, like: Tensor) -> Tensor:
        self.count = self.count.to(like.device) + 1
        return self.count.to(like.dtype)


def _counting(contender: Contender, count: int) -> Function:
    return partial(contender.load(), count, Counter())


def ours(count: int, step: Counter, *inputs: Tensor, backend: str) -> tuple[Tensor, ...]:
    params, grads, m, v, weights = _groups(inputs, count)
    t = step.next(m[0])
    scalars: dict[str, Any] = {"step": t, "grad_scale": torch.ones_like(t), "skip": torch.zeros_like(t) > 0}
    masters = None if weights[0] is params[0] else weights
    adamw_step_all(params, grads, m, v, masters=masters, backend=backend, **scalars, **SETTINGS)
    return tuple(weights)


@torch.no_grad()
def textbook(count: int, step: Counter, *inputs: Tensor) -> tuple[Tensor, ...]:
    """PyTorch ops in float32 (or float64), rounded to the parameter at the end."""
    params, grads, first, second, weights = _groups(inputs, count)
    t = step.next(first[0])
    for p, g, m, v, w in zip(params, grads, first, second, weights, strict=True):
        m.lerp_(g, 1 - BETAS[0])
        v.lerp_(g.square(), 1 - BETAS[1])
        update = m / (1 - BETAS[0] ** t) / ((v / (1 - BETAS[1] ** t)).sqrt() + EPS)
        new = w.to(m.dtype)
        new = new - LR * (update + WEIGHT_DECAY * new)
        w.copy_(new)
        if w is not p:
            p.copy_(new)
    return tuple(weights)


class Optimizer:
    """An optimizer over the tensors of a case, created again for other tensors."""

    def __init__(self, count: int, **options: Any) -> None:
        self.count, self.options = count, options
        self.bound: Tensor | None = None

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if self.bound is not inputs[0]:
            self.bound = inputs[0]
            self.bind(*_groups(inputs, self.count))
        return self.step()

    def bind(
        self, params: list[Tensor], grads: list[Tensor], m: list[Tensor], v: list[Tensor], w: list[Tensor]
    ) -> None:
        raise NotImplementedError

    def step(self) -> tuple[Tensor, ...]:
        raise NotImplementedError


class TorchAdamW(Optimizer):
    """torch.optim.AdamW on the masters, which are then rounded into the parameters."""

    def bind(
        self, params: list[Tensor], grads: list[Tensor], m: list[Tensor], v: list[Tensor], w: list[Tensor]
    ) -> None:
        self.params, self.weights = params, w
        self.adamw = torch.optim.AdamW(w, **SETTINGS, **self.options)
        for w_, g, m_, v_ in zip(w, grads, m, v, strict=True):
            w_.grad = g
            step = torch.zeros((), device=g.device if self.options.get("fused") else "cpu")
            self.adamw.state[w_] = {"step": step, "exp_avg": m_, "exp_avg_sq": v_}

    @torch.no_grad()
    def step(self) -> tuple[Tensor, ...]:
        self.adamw.step()
        if self.params[0] is not self.weights[0]:
            torch._foreach_copy_(self.params, self.weights)
        return tuple(self.weights)


class FlashOptim(Optimizer):
    """FlashAdamW, its moments not quantised and its masters of 32 bits (bf16 parameters keep 16 more bits beside them,
    start from their rounding, and have bf16 moments: fewer bytes than ours)."""

    def __init__(self, count: int) -> None:
        import flashoptim

        super().__init__(count)
        self.library = flashoptim

    def bind(
        self, params: list[Tensor], grads: list[Tensor], m: list[Tensor], v: list[Tensor], w: list[Tensor]
    ) -> None:
        self.params = params
        narrow = params[0].dtype != torch.float32
        for p, g in zip(params, grads, strict=True):
            p.grad = g.to(p.dtype)
        bits = 32 if narrow else None
        self.adamw = self.library.FlashAdamW(params, quantize=False, master_weight_bits=bits, **SETTINGS)

    def step(self) -> tuple[Tensor, ...]:
        self.adamw.step()
        return tuple(self.params)


if __name__ == "__main__":
    main(cases, __doc__)
