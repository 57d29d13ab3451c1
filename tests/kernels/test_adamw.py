from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from spt_fast import kernels
from spt_fast.kernels import adamw, adamw_step, adamw_step_all
from spt_fast.kernels.launch import INTERPRETED
from tests.kernels.compare import DEVICE, ROUNDING, random_tensors, usable
from tests.kernels.contract import Contract, Sample, Shape, last_two_swapped, with_gaps
from tests.kernels.launches import BF16, FP16, FP32, compiled_launches

# What Triton's interpreter computes of masked elements.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")

LR, BETAS, EPS = 1e-2, (0.9, 0.95), 1e-8
HYPER = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": 0.1}
BACKENDS = ("reference", "cpu", "triton")
Update = Callable[..., None]


@pytest.fixture(autouse=True)
def small_blocks_on_the_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(adamw, "BLOCK", {DEVICE: 100})
    with torch.device(DEVICE):
        yield


@pytest.fixture(params=BACKENDS)
def update(request: pytest.FixtureRequest) -> Update:
    """adamw_step by each backend."""
    return partial(adamw_step, backend=usable(request.param))


@pytest.fixture
def half(request: pytest.FixtureRequest) -> torch.dtype:
    """bf16, but float16 in Triton's interpreter, which cuts bf16 off instead of rounding it."""
    return torch.float16 if INTERPRETED and "triton" in request.node.name else torch.bfloat16


def formula(
    theta: Tensor, m: Tensor, v: Tensor, grad: Tensor, step: int, decay: float, anchor: Tensor | None, pull: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The update as the docstring states it."""
    m = BETAS[0] * m + (1 - BETAS[0]) * grad
    v = BETAS[1] * v + (1 - BETAS[1]) * grad**2
    update = (m / (1 - BETAS[0] ** step)) / ((v / (1 - BETAS[1] ** step)).sqrt() + EPS) + decay * theta
    if anchor is not None:
        update = update + pull * (theta - anchor)
    return theta - LR * update, m, v


def state(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    (theta,) = random_tensors([shape], dtype)
    return theta, torch.zeros_like(theta), torch.zeros_like(theta)


def step_with_everything(
    param: Tensor, grad: Tensor, m: Tensor, v: Tensor, master: Tensor, anchor: Tensor, step: Tensor, *, backend: str
) -> tuple[Tensor, ...]:
    options = {**HYPER, "anchor": anchor, "anchor_decay": 0.1, "master": master, "backend": backend}
    adamw_step(param, grad, m, v, step=step, **options, skip=step < 0)
    adamw_step(param, grad, m, v, step=step + 1, **options, grad_scale=step)
    return param, m, v, master


def steps_of_one_and_of_two(
    param: Tensor, grad: Tensor, m: Tensor, v: Tensor, other: Tensor, *, backend: str
) -> tuple[Tensor, ...]:
    adamw_step(param, grad, m, v, step=3, **HYPER, backend=backend)
    numbers = {**HYPER, "anchors": [grad, grad], "anchor_decay": 0.1, "backend": backend}
    adamw_step_all([param, other], [grad, grad], [m, m + 1], [v, v + 1], step=3, **numbers, skip=False)
    return param, m, v, other


def draw(kinds: str) -> Callable[[Shape, torch.dtype], list[Tensor]]:
    """p: of the dtype of param, f: float32, v: not negative, t: the number of the step."""

    def inputs(rows: Shape, dtype: torch.dtype) -> list[Tensor]:
        tensors = random_tensors([() if kind == "t" else rows for kind in kinds], torch.float32)
        made = {"p": lambda x: x.to(dtype), "f": lambda x: x, "v": torch.abs, "t": lambda x: torch.full_like(x, 3)}
        return [made[kind](x) for kind, x in zip(kinds, tensors, strict=True)]

    return inputs


def unchanged(*tensors: Tensor) -> tuple[Tensor, ...]:
    param, _, m, v, *others = tensors
    return param, m, v, *others[:1]


FEW = {"rows": (20, 30), "empty": ((0, 3), (0,)), "many": (50_001,), "gradients": 0}


class TestContract(Contract):
    samples = (
        Sample("adamw_step", step_with_everything, unchanged, draw("pffvfft"), **FEW),
        Sample("adamw_step", steps_of_one_and_of_two, unchanged, draw("pffvp"), **FEW),
    )


MIXES = ("f f f f - -", "f h f f - f", "h f f f f -", "h f f f f f", "h h f h f h", "h h h f - h", "f h h h f -")
"""param, grad, exp_avg, exp_avg_sq, master and anchor: float32, half precision, or none."""


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("shape", [(37, 11), (2048,), (2500,)])
def test_as_exact_as_torch_in_every_mix_of_dtypes(
    update: Update, half: torch.dtype, mix: str, shape: tuple[int, ...]
) -> None:
    """The composition is the formula in float32, each result then rounded to its tensor's dtype."""
    dtypes = [{"f": torch.float32, "h": half, "-": None}[kind] for kind in mix.split()]
    param, grad, m, v, master, anchor = (
        None if dtype is None else x.to(dtype)
        for dtype, x in zip(dtypes, random_tensors([shape] * 6, torch.float32), strict=True)
    )
    v.abs_()
    pull = 0.0 if anchor is None else 0.2
    before = (param if master is None else master, m, v, grad)
    exact = formula(*(x.double() for x in before), 7, 0.1, anchor, pull)
    plain = formula(*(x.float() for x in before), 7, 0.1, anchor, pull)
    update(param, grad / 4, m, v, step=7, **HYPER, anchor=anchor, anchor_decay=pull, grad_scale=4.0, master=master)
    results = [(param, 0), (m, 1), (v, 2)] + ([] if master is None else [(master, 0)])
    for found, number in results:
        error = (found.double() - exact[number]).abs()
        allowed = (plain[number].to(found.dtype).double() - exact[number]).abs()
        rounding = ROUNDING[found.dtype] * exact[number].abs().max()
        assert error.max() <= 2 * allowed.max() + rounding
        assert error.mean() <= 2 * allowed.mean() + max(0.1, error.numel() ** -0.5) * rounding


@pytest.mark.parametrize("as_tensors", [False, True])
@pytest.mark.parametrize("shape", [(37, 11), (7,), (), (0, 3)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_torch_adamw(update: Update, as_tensors: bool, shape: tuple[int, ...], decay: float) -> None:
    theta, m, v = state(shape)
    theirs = torch.nn.Parameter(theta.clone())
    optimizer = torch.optim.AdamW([theirs], lr=LR, betas=BETAS, eps=EPS, weight_decay=decay)
    for step, grad in enumerate(random_tensors([shape] * 20, torch.float32), start=1):
        theirs.grad = grad.clone()
        optimizer.step()
        numbers = {"step": step, "lr": LR, "grad_scale": 1.0, "skip": False}
        if as_tensors:
            numbers = {name: torch.tensor(value) for name, value in numbers.items()}
        update(theta, grad, m, v, betas=BETAS, eps=EPS, weight_decay=decay, **numbers)
    torch.testing.assert_close(theta, theirs.detach(), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(m, optimizer.state[theirs]["exp_avg"])
    torch.testing.assert_close(v, optimizer.state[theirs]["exp_avg_sq"])


def test_equals_the_formula_in_float64_with_anchor_and_scale() -> None:
    theta, m, v = state((13, 9), torch.float64)
    anchor, *grads = random_tensors([(13, 9)] * 6, torch.float64)
    expected = (theta.clone(), m.clone(), v.clone())
    for step, grad in enumerate(grads, start=1):
        expected = formula(*expected, 0.3 * grad, step, 0.1, anchor, 0.2)
        adamw_step(theta, grad, m, v, step=step, **HYPER, anchor=anchor, anchor_decay=0.2, grad_scale=0.3)
    for found, e in zip((theta, m, v), expected, strict=True):
        torch.testing.assert_close(found, e, rtol=1e-12, atol=1e-14)


def test_dtypes_that_kernels_don_t_take_go_to_the_reference() -> None:
    theta, m, v = state((8,))
    alone = [x.clone() for x in (theta, m, v)]
    (grad,) = random_tensors([(8,)], torch.float32)
    adamw_step(theta, grad.double(), m, v, step=1, lr=LR)
    adamw_step(alone[0], grad, *alone[1:], step=1, lr=LR)
    torch.testing.assert_close(theta, alone[0])
    with pytest.raises(ValueError, match="float64"):
        adamw_step(theta, grad.double(), m, v, step=1, lr=LR, backend="triton" if DEVICE == "cuda" else "cpu")


def test_anchor_holds_a_parameter_without_gradient(update: Update) -> None:
    """Decay toward zero and toward the anchor balance at anchor · pull / (decay + pull)."""
    theta, m, v, grad, anchor = (torch.zeros(4) for _ in range(5))
    anchor += 1
    for step in range(1, 101):
        update(theta, grad, m, v, step=step, lr=0.5, weight_decay=0.1, anchor=anchor, anchor_decay=0.3)
    torch.testing.assert_close(theta, torch.full((4,), 0.75))


def test_master_takes_the_update_and_param_is_its_rounding(update: Update, half: torch.dtype) -> None:
    master, m, v = state((50, 7))
    alone = [x.clone() for x in (master, m, v)]
    param = torch.nn.Parameter(master.to(half))
    for step, grad in enumerate(random_tensors([(50, 7)] * 5, half), start=1):
        update(param, grad, m, v, step=step, lr=1e-4, weight_decay=0.1, master=master)
        update(alone[0], grad.float(), *alone[1:], step=step, lr=1e-4, weight_decay=0.1)
    assert torch.equal(master, alone[0])
    assert torch.equal(m, alone[1])
    assert torch.equal(param, master.to(half))


def test_small_updates_are_not_lost_in_half_precision(update: Update, half: torch.dtype) -> None:
    """1 - 1e-4 rounds to 1 in bf16 and float16: without a master nothing ever moves, with one it adds up."""
    master, grad, m, v = torch.ones(3), torch.ones(3), torch.zeros(3), torch.zeros(3)
    param = master.to(half)
    for step in range(1, 101):
        update(param, grad, m, v, step=step, lr=1e-4, master=master)
    torch.testing.assert_close(master, torch.full((3,), 0.99), rtol=1e-4, atol=0)
    assert (param < 1).all()


# ------------------------------------------------------------------------------------------------ skipped steps


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_skipped_step_changes_nothing(update: Update, poison: float, first: bool, as_tensor: bool) -> None:
    """Not even as the first step, whose number is then not counted: step=0, where the bias corrections divide by
    zero; nor a param that isn't its master's rounding."""
    master, m, v = state((40, 5))
    param, (anchor, grad) = master.bfloat16(), random_tensors([(40, 5)] * 2, torch.float32)
    if not first:
        update(param, grad, m, v, step=1, lr=LR, master=master)
    param.neg_()
    before = [x.clone() for x in (param, master, m, v)]
    update(
        param, torch.full((40, 5), poison), m, v, step=torch.tensor(0.0 if first else 2.0), lr=LR, eps=0.0,
        weight_decay=0.1, anchor=anchor, anchor_decay=0.1, grad_scale=torch.tensor(poison),
        skip=torch.tensor(True) if as_tensor else True, master=master,
    )  # fmt: skip
    for x, b in zip((param, master, m, v), before, strict=True):
        assert torch.equal(x, b)


@pytest.mark.parametrize("skipped", list(itertools.product([False, True], repeat=3)))
def test_skipped_steps_change_nothing_in_later_training(update: Update, skipped: tuple[bool, ...]) -> None:
    theta, *grads = random_tensors([(8,)] * 4, torch.float32)
    runs = []
    for flags in (True, False):
        state = [theta.clone(), torch.zeros(8), torch.zeros(8)]
        step = torch.zeros((), dtype=torch.int64)
        for grad, skip in zip(grads, torch.tensor(skipped), strict=True):
            if flags or not skip:
                update(state[0], grad, *state[1:], step=step + 1, lr=LR, weight_decay=0.1, skip=skip if flags else None)
                step += ~skip
        runs.append(state)
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------ manners of a kernel


def test_grad_and_anchor_are_left_alone(update: Update) -> None:
    theta, m, v = state((5, 5))
    grad, anchor = random_tensors([(5, 5)] * 2, torch.float32)
    before = grad.clone(), anchor.clone()
    update(theta, grad, m, v, step=1, **HYPER, grad_scale=0.5, anchor=anchor, anchor_decay=0.1)
    assert torch.equal(grad, before[0])
    assert torch.equal(anchor, before[1])


# ------------------------------------------------------------------------------------------------ many tensors

SHAPES = [(300, 70), (), (0, 3), (257,), (64, 256), (0,), (40, 700), (5, 5), (0,)]
"""Empty, single and ragged ones between those that several threads share."""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["float32", "master and anchor", "bf16", "strided", "skipped"])
def test_many_tensors_at_once_are_as_each_alone(backend: str, half: torch.dtype, kind: str) -> None:
    """Bit for bit, whatever the number of threads."""
    usable(backend)
    shapes = [(n, m) for n, m in [(30, 7), (0, 3), (40, 11)]] if kind == "strided" else SHAPES
    weights, grads, m, v, anchors = (random_tensors(shapes, torch.float32) for _ in range(5))
    params, masters, options, alone = weights, None, {}, [{} for _ in shapes]
    if kind == "master and anchor":
        params, masters = [w.to(half) for w in weights], weights
        options = {"anchor_decay": 0.3}
        alone = [{"master": w.clone(), "anchor": a} for w, a in zip(weights, anchors, strict=True)]
    elif kind == "bf16":
        params = [w.bfloat16() for w in weights]
    elif kind == "strided":
        params, grads = [last_two_swapped(w) for w in params], [with_gaps(g) for g in grads]
    elif kind == "skipped":
        options = {"skip": torch.tensor(True)}
    v = [x.abs() for x in v]
    numbers = {**HYPER, "step": torch.tensor(3.0), "grad_scale": torch.tensor(0.5), **options, "backend": backend}
    expected = [[x.clone() for x in state] for state in zip(params, m, v, strict=True)]
    for (p, m_, v_), g, own in zip(expected, grads, alone, strict=True):
        adamw_step(p, g, m_, v_, **numbers, **own)

    threads = torch.get_num_threads()
    for count in (1, 3) if backend == "cpu" else (1,):
        torch.set_num_threads(count)
        found = [[x.clone() for x in xs] for xs in (params, m, v)]
        own_masters = None if masters is None else [x.clone() for x in masters]
        adamw_step_all(
            found[0], grads, found[1], found[2], **numbers, masters=own_masters,
            anchors=anchors if kind == "master and anchor" else None,
        )  # fmt: skip
        for one, many in zip(expected, zip(*found, strict=True), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))
        for one, many in zip(alone, own_masters or [], strict=False):
            assert torch.equal(one["master"], many)
    torch.set_num_threads(threads)
    changed = [not torch.equal(a, b[0]) for a, b in zip(params, expected, strict=True) if a.numel() > 1]
    assert not any(changed) if kind == "skipped" else all(changed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_decay_stops_where_it_is_told_to(backend: str) -> None:
    """To the bit what two updates of the parts are, one with and one without decay; of all of a param, or of none."""
    usable(backend)
    numbers = {"step": 3, **HYPER, "backend": backend}
    lengths, decayed = (3000, 70, 70), (1344, 70, 0)
    together, apart = ([[*state((N,)), torch.full((N,), 0.1)] for N in lengths] for _ in "ab")
    for one, other in zip(together, apart, strict=True):
        for x, y in zip(one, other, strict=True):
            y.copy_(x)
    params, ms, vs, grads = zip(*together, strict=True)
    adamw_step_all(params, grads, ms, vs, decayed=decayed, **numbers)
    for tensors, count in zip(apart, decayed, strict=True):
        for part, decay in ((slice(0, count), 0.1), (slice(count, None), 0.0)):
            param, m, v, grad = (x[part] for x in tensors)
            adamw_step(param, grad, m, v, **(numbers | {"weight_decay": decay}))
    for one, other in zip(together, apart, strict=True):
        assert all(map(torch.equal, one, other))


def test_no_tensors_are_no_update() -> None:
    adamw_step_all([], [], [], [], step=1, lr=LR)


def test_lists_that_don_t_fit_are_refused() -> None:
    theta, m, v = state((5,))
    two = {"step": 1, "lr": LR}
    with pytest.raises(ValueError, match="1 grads for 2 params"):
        adamw_step_all([theta, m], [m], [m, m], [v, v], **two)
    with pytest.raises(ValueError, match="master 1 is"):
        adamw_step_all([theta, m], [m, m], [m, m], [v, v], masters=[theta, v[:3]], **two)
    with pytest.raises(ValueError, match="float64"):
        adamw_step_all([theta, theta.double()], [m, m], [m, m], [v, v], **two)


def test_the_first_steps_bias_correction_is_exact(update: Update) -> None:
    """With betas near 1 the float32 powers lose digits in 1 - beta^step; the first update must be lr · sign(grad)."""
    theta, m, v, grad = torch.zeros(3), torch.zeros(3), torch.zeros(3), torch.tensor([1.0, -2.0, 0.5])
    update(theta, grad, m, v, step=torch.tensor(1), lr=1.0, betas=(0.9999, 0.99999), eps=0.0)
    torch.testing.assert_close(theta, torch.tensor([-1.0, 1.0, -1.0]), rtol=5e-6, atol=0)


@pytest.mark.parametrize("step", [1, 5, 13, 14, 1000, 100_000])
def test_bias_correction_at_any_step(update: Update, step: int) -> None:
    theta, m, v = torch.zeros(3), torch.ones(3), torch.ones(3)
    update(theta, torch.ones(3), m, v, step=step, lr=1.0, betas=(0.9, 0.999), eps=0.0)
    expected = -((1 - 0.999**step) ** 0.5) / (1 - 0.9**step)
    torch.testing.assert_close(theta, torch.full((3,), expected), rtol=1e-6, atol=0)


def test_no_kernel_is_autotuned() -> None:
    """Tuning runs a kernel many times: in place, that is many steps."""
    for module in pkgutil.iter_modules(kernels.__path__, "spt_fast.kernels."):
        for name, member in vars(importlib.import_module(module.name)).items():
            assert type(member).__name__ not in ("Autotuner", "Heuristics"), f"{module.name}.{name}"


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU has nothing to wait for")
def test_the_host_never_waits_for_the_device() -> None:
    theta, m, v = state((8,))
    grad, scale, skip = torch.ones(8), torch.ones(()), torch.tensor(False)
    adamw_step(theta, grad, m, v, step=1, lr=LR, grad_scale=scale, skip=skip)
    torch.cuda.set_sync_debug_mode("error")
    try:
        adamw_step(theta, grad, m, v, step=2, lr=LR, grad_scale=scale, skip=skip)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_bad_arguments_are_refused() -> None:
    theta, m, v = state((5,))
    with pytest.raises(ValueError, match="exp_avg_sq"):
        adamw_step(theta, m, m, v[:3], step=1, lr=LR)
    with pytest.raises(ValueError, match="anchor"):
        adamw_step(theta, m, m, v, step=1, lr=LR, anchor_decay=0.1)
    with pytest.raises(ValueError, match=r"adamw_step\(step\): 0 is invalid: the number of this update, from 1"):
        adamw_step(theta, m, m, v, step=0, lr=LR)  # its bias corrections would divide by 0
    before = theta.clone()
    for name, given in [
        ("betas", (1.0, 0.95)),  # its bias correction is 0 at every step
        ("betas", (0.9, -0.1)),
        ("betas", (0.9, 0.95, 0.99)),
        ("eps", -1e-8),
        ("weight_decay", float("nan")),
        ("anchor_decay", -0.1),
        ("lr", float("inf")),
        ("grad_scale", float("nan")),
    ]:
        with pytest.raises(ValueError, match=rf"adamw_step\({name}\): .* is invalid"):
            adamw_step(theta, m, m, v, step=1, **{"lr": LR, "anchor": before, name: given})
    assert torch.equal(theta, before)


def test_every_launch_is_compiled_ahead_of_time() -> None:
    with compiled_launches(adamw):
        for N, dtype, state, has_master in (
            (64, FP32, FP32, False),
            (99, FP32, FP32, False),
            (64, BF16, FP32, True),
            (99, BF16, FP32, True),
            (64, FP16, FP32, True),
            (64, BF16, BF16, False),
            (64, BF16, FP32, False),
        ):
            param, moment = torch.empty(N, dtype=dtype), torch.empty(N, dtype=state)
            master = torch.empty(N) if has_master else None
            for anchor in (None, master if has_master else param):
                for skip in (None, False):
                    adamw.adamw_step(
                        param, moment, moment.clone(), moment.clone(), step=1, lr=0.1, master=master, skip=skip,
                        anchor=anchor, anchor_decay=0.1 if anchor is not None else 0.0, backend="triton",
                    )  # fmt: skip
