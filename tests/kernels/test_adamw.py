from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from spt_fast.kernels import adamw, adamw_step

LR, BETAS, EPS = 1e-2, (0.9, 0.95), 1e-8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "BLOCK", {"cpu": 100})


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
    return torch.randn(shape).to(dtype), torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize("as_tensors", [False, True])
@pytest.mark.parametrize("shape", [(37, 11), (7,), (), (0, 3)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_torch_adamw(as_tensors: bool, shape: tuple[int, ...], decay: float) -> None:
    torch.manual_seed(0)
    theta, m, v = state(shape)
    theirs = torch.nn.Parameter(theta.clone())
    optimizer = torch.optim.AdamW([theirs], lr=LR, betas=BETAS, eps=EPS, weight_decay=decay)
    for step in range(1, 30):
        grad = torch.randn(shape)
        theirs.grad = grad.clone()
        optimizer.step()
        numbers = {"step": step, "lr": LR, "grad_scale": 1.0, "skip": False}
        if as_tensors:
            numbers = {name: torch.tensor(value) for name, value in numbers.items()}
        adamw_step(theta, grad, m, v, betas=BETAS, eps=EPS, weight_decay=decay, **numbers)
    torch.testing.assert_close(theta, theirs.detach(), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(m, optimizer.state[theirs]["exp_avg"])
    torch.testing.assert_close(v, optimizer.state[theirs]["exp_avg_sq"])


def test_equals_the_formula_in_float64_with_anchor_and_scale() -> None:
    torch.manual_seed(1)
    theta, m, v = state((13, 9), torch.float64)
    anchor = torch.randn(13, 9, dtype=torch.float64)
    expected = (theta.clone(), m.clone(), v.clone())
    for step in range(1, 6):
        grad = torch.randn(13, 9, dtype=torch.float64)
        expected = formula(*expected, 0.3 * grad, step, 0.1, anchor, 0.2)
        adamw_step(
            theta,
            grad,
            m,
            v,
            step=step,
            lr=LR,
            eps=EPS,
            weight_decay=0.1,
            anchor=anchor,
            anchor_decay=0.2,
            grad_scale=0.3,
        )
    for found, e in zip((theta, m, v), expected, strict=True):
        torch.testing.assert_close(found, e, rtol=1e-12, atol=1e-14)


def test_anchor_holds_a_parameter_without_gradient() -> None:
    """Decay toward zero and toward the anchor balance at anchor · pull / (decay + pull)."""
    theta, m, v = torch.zeros(4), torch.zeros(4), torch.zeros(4)
    for step in range(1, 2001):
        adamw_step(
            theta, torch.zeros(4), m, v, step=step, lr=0.05, weight_decay=0.1, anchor=torch.ones(4), anchor_decay=0.3
        )
    torch.testing.assert_close(theta, torch.full((4,), 0.75))


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_master_takes_the_update_and_param_is_its_rounding(grad_dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    master, m, v = state((50, 7))
    alone, m_, v_ = master.clone(), m.clone(), v.clone()
    param = master.bfloat16()
    for step in range(1, 10):
        grad = torch.randn(50, 7).to(grad_dtype)
        adamw_step(param, grad, m, v, step=step, lr=1e-4, weight_decay=0.1, master=master)
        adamw_step(alone, grad.float(), m_, v_, step=step, lr=1e-4, weight_decay=0.1)
    assert torch.equal(master, alone)
    assert torch.equal(m, m_)
    assert torch.equal(param, master.bfloat16())


def test_small_updates_are_not_lost_in_bf16() -> None:
    """1 - 1e-4 rounds to 1 in bf16: without a master nothing ever moves, with one it adds up."""
    param, master, m, v = torch.ones(3).bfloat16(), torch.ones(3), torch.zeros(3), torch.zeros(3)
    for step in range(1, 101):
        adamw_step(param, torch.ones(3), m, v, step=step, lr=1e-4, master=master)
    torch.testing.assert_close(master, torch.full((3,), 0.99), rtol=1e-4, atol=0)
    assert (param < 1).all()


def test_bf16_without_master_is_the_rounded_float32_update() -> None:
    torch.manual_seed(3)
    theta, m, v = state((30,), torch.bfloat16)
    grad = torch.randn(30).bfloat16()
    expected = formula(theta.float(), m.float(), v.float(), grad.float(), 1, 0.1, None, 0.0)
    adamw_step(theta, grad, m, v, step=1, lr=LR, eps=EPS, weight_decay=0.1)
    for found, e in zip((theta, m, v), expected, strict=True):
        torch.testing.assert_close(found, e.bfloat16(), rtol=2**-8, atol=0)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("skip", [True, torch.tensor(True)])
def test_a_skipped_step_changes_nothing(poison: float, first: bool, skip: bool | Tensor) -> None:
    """Not even as the first step, whose number is then not counted: step=0, where the bias corrections divide by
    zero."""
    torch.manual_seed(4)
    master, m, v = state((40, 5))
    param, anchor = master.bfloat16(), torch.randn(40, 5)
    if not first:
        adamw_step(param, torch.randn(40, 5), m, v, step=1, lr=LR, master=master)
    before = [x.clone() for x in (param, master, m, v)]
    adamw_step(
        param,
        torch.full((40, 5), poison),
        m,
        v,
        step=torch.tensor(0.0 if first else 2.0),
        lr=LR,
        eps=0.0,
        weight_decay=0.1,
        anchor=anchor,
        anchor_decay=0.1,
        grad_scale=torch.tensor(poison),
        skip=skip,
        master=master,
    )
    for x, b in zip((param, master, m, v), before, strict=True):
        assert torch.equal(x, b)


@pytest.mark.parametrize("skipped", list(itertools.product([False, True], repeat=3)))
def test_training_on_after_skips_is_as_if_they_never_were(skipped: tuple[bool, ...]) -> None:
    torch.manual_seed(5)
    grads = [torch.randn(8) for _ in skipped]
    runs = []
    for flags in (True, False):
        torch.manual_seed(6)
        theta, m, v = state((8,))
        step = torch.zeros((), dtype=torch.int64)
        for grad, skip in zip(grads, skipped, strict=True):
            if not flags and skip:
                continue
            skip_ = torch.tensor(skip)
            adamw_step(theta, grad, m, v, step=step + 1, lr=LR, weight_decay=0.1, skip=skip_ if flags else None)
            step += ~skip_
        runs.append((theta, m, v))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_grad_and_anchor_are_left_alone() -> None:
    theta, m, v = state((5, 5))
    grad, anchor = torch.randn(5, 5), torch.randn(5, 5)
    before = grad.clone(), anchor.clone()
    adamw_step(theta, grad, m, v, step=1, lr=LR, grad_scale=0.5, anchor=anchor, anchor_decay=0.1, weight_decay=0.1)
    assert torch.equal(grad, before[0])
    assert torch.equal(anchor, before[1])


def test_strides_don_t_matter() -> None:
    torch.manual_seed(7)
    theta, m, v = state((20, 30))
    grad = torch.randn(20, 30)
    moved = [x.mT.contiguous().mT for x in (theta, m, v)]
    for step in (1, 2):
        adamw_step(theta, grad, m, v, step=step, lr=LR)
        adamw_step(moved[0], grad, moved[1], moved[2], step=step, lr=LR)
    for x, y in zip((theta, m, v), moved, strict=True):
        assert torch.equal(x, y)


def test_the_first_steps_bias_correction_is_exact() -> None:
    """With betas near 1 the float32 powers lose digits in 1 - beta^step; the first update must be lr · sign(grad)."""
    theta, m, v = torch.zeros(3), torch.zeros(3), torch.zeros(3)
    adamw_step(
        theta, torch.tensor([1.0, -2.0, 0.5]), m, v, step=torch.tensor(1), lr=1.0, betas=(0.9999, 0.99999), eps=0.0
    )
    torch.testing.assert_close(theta, torch.tensor([-1.0, 1.0, -1.0]), rtol=5e-6, atol=0)


def test_bad_arguments_are_refused() -> None:
    theta, m, v = state((5,))
    with pytest.raises(ValueError, match="exp_avg_sq"):
        adamw_step(theta, m, m, v[:3], step=1, lr=LR)
    with pytest.raises(ValueError, match="anchor"):
        adamw_step(theta, m, m, v, step=1, lr=LR, anchor_decay=0.1)
