"""Arguments of a wrong type are refused by name, with what was given and what would do."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from functools import partial
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch

from spt_fast import kernels
from spt_fast.kernels import arguments
from tests.kernels.compare import DEVICE

X, W, HEADS = (torch.ones(shape, device=DEVICE) for shape in ((4, 8), (8, 8), (1, 4, 2, 8)))
TARGETS = torch.zeros(4, dtype=torch.int64, device=DEVICE)
THREE = (HEADS, HEADS, HEADS)
WHOLE_NUMBERS: dict[str, tuple[tuple, dict[str, Any], dict[str, Any]]] = {
    "flash_attention": (THREE, {}, {"window": 4}),
    "qkv_attention": ((HEADS.repeat(1, 1, 2, 1),), {}, {"kv_heads": 1, "window": 4}),
    "self_attention": ((X[None], W), {}, {"kv_heads": 1, "head_dim": 2, "window": 4}),
    "linear_cross_entropy": ((X, W, TARGETS), {}, {"ignore_index": -100}),
    "adamw_step": ((X,) * 4, {"lr": 1.0}, {"step": 1}),
    "adamw_step_all": (([X],) * 4, {"lr": 1.0, "decayed": [3]}, {"step": 1}),
}
"""By op, the usual arguments, and whole numbers among them."""


@pytest.mark.parametrize(
    ("op", "given", "named", "says"),
    [
        ("rms_norm", (X, W[0]), {"eps": "1e-6"}, "(eps): '1e-6' is invalid: it must be a number"),
        ("rms_norm", (X, W[0]), {"eps": None}, "(eps): None is invalid: it must be a number"),
        ("rms_norm", ([1.0], W[0]), {}, "(x): [1.0] is invalid: it must be a tensor"),
        (
            "qk_norm_rope",
            (HEADS, HEADS, W[0], W[0], W[:4], W[:4], "x"),
            {},
            "(eps): 'x' is invalid: it must be a number",
        ),
        (
            "flash_attention",
            THREE,
            {"cu_seqlens": [0, 4]},
            "(cu_seqlens): [0, 4] is invalid: it must be a tensor or None",
        ),
        ("flash_attention", THREE, {"window": "4"}, "(window): '4' is invalid: it must be a whole number or None"),
        ("flash_attention", THREE, {"scale": "x"}, "(scale): 'x' is invalid: it must be a number or None"),
        ("qkv_attention", (HEADS, "1"), {}, "(kv_heads): '1' is invalid: it must be a whole number"),
        ("self_attention", (X[None], W, 2, 2), {"eps": None}, "(eps): None is invalid: it must be a number"),
        ("linear_cross_entropy", (X, W, TARGETS), {"z_loss": "x"}, "(z_loss): 'x' is invalid: it must be a number"),
        (
            "linear_cross_entropy",
            (X, W, TARGETS),
            {"softcap": "x"},
            "(softcap): 'x' is invalid: it must be a number or N",
        ),
        (
            "linear_cross_entropy",
            (X, W, TARGETS),
            {"scale": "x"},
            "(scale): 'x' is invalid: it must be a number or None",
        ),
        ("linear_cross_entropy", (X, W, [0] * 4), {}, "(targets_N): [0, 0, 0, 0] is invalid: it must be a tensor"),
        ("adamw_step", (X, X, X, "x"), {"step": 1, "lr": 1.0}, "(exp_avg_sq): 'x' is invalid: it must be a tensor"),
        ("adamw_step", (X,) * 4, {"step": 1, "lr": 1.0, "betas": 0.9}, "(betas): 0.9 is invalid: it must be 2 numbers"),
        (
            "adamw_step_all",
            ([X], [X], [X], [1]),
            {"step": 1, "lr": 1.0},
            "(exp_avg_sqs): [1] is invalid: it must be a list of tensors",
        ),
        ("accumulate_in_place", (3,), {}, "(parameters): 3 is invalid: it must be a list of tensors"),
    ],
)
def test_an_argument_of_a_wrong_type_is_named(op: str, given: tuple, named: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(op + says)}") as raised:
        getattr(kernels, op)(*given, **named)
    assert raised.value.__cause__, "what the call raised"


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("op", WHOLE_NUMBERS)
def test_whole_numbers_are_whole(op: str, backend: str) -> None:
    given, others, whole = WHOLE_NUMBERS[op]
    call = partial(getattr(kernels, op), *map(copy.deepcopy, given), **others, backend=backend)
    call(**whole)
    call(**{name: np.int64(number) for name, number in whole.items()})
    for name, number in whole.items():
        for wrong in (number + 0.5, float(number)):
            says = f"{op}({name}): {wrong} is invalid: it must be a whole number"
            with pytest.raises(ValueError, match=f"^{re.escape(says)}"):
                call(**{**whole, name: wrong})
    names = [name for _, name, _ in arguments._whole_numbers(call.func.__wrapped__)]
    assert names == list(whole)


def test_a_call_with_arguments_in_wrong_places_has_pythons_own_error() -> None:
    """A bias in third place, as `linear` has it, is no whole number either."""
    with pytest.raises(TypeError, match=r"self_attention\(\) got multiple values for argument 'kv_heads'"):
        kernels.self_attention(X[None], W, None, kv_heads=2, head_dim=2)


def test_a_whole_number_by_its_place_and_a_step_in_any_tensor() -> None:
    with pytest.raises(ValueError, match=r"^qkv_attention\(kv_heads\): 1.0 is invalid: it must be a whole number"):
        kernels.qkv_attention(HEADS.repeat(1, 1, 2, 1), 1.0)
    step = torch.nn.Parameter(torch.ones((), device=DEVICE))
    kernels.adamw_step(*(x.clone() for x in (X,) * 4), step=step, lr=1.0)
    for op in set(kernels.backend.OPS) - set(WHOLE_NUMBERS):
        assert not arguments._whole_numbers(getattr(kernels, op).__wrapped__)


@pytest.mark.parametrize("decayed", [[2.5], [-1], [33], [3, 3], []])
def test_how_many_numbers_decay(decayed: list) -> None:
    given = [[x.clone()] for x in (X,) * 4]
    with pytest.raises(ValueError, match=rf"^adamw_step_all\(decayed\): {re.escape(str(decayed))} is invalid: "):
        kernels.adamw_step_all(*given, step=1, lr=1.0, decayed=decayed)
    assert torch.equal(given[0][0], X)


PROJECTIONS = {
    "linear": ((X, W), ("weight", "bias"), "x"),
    "swiglu_linear": ((X, W[:, :4]), ("weight", "bias"), "gate_up"),
    "swiglu_mlp": ((X, W, W[:, :4]), ("gate_up_weight", "down_weight", "gate_up_bias", "down_bias"), "x"),
    "self_attention": ((X[None], W, 1, 2), ("weight", None, None, "bias"), "x_BTE"),
}
"""By op, the usual arguments; the names of those after x; and of x."""


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("op", PROJECTIONS)
def test_weights_and_biases_of_other_shapes_are_named(op: str, grad: bool) -> None:
    """Also those that PyTorch would broadcast."""
    given, names, first = PROJECTIONS[op]

    def refused(place: int, name: str, wrong: torch.Tensor, expected: str = "it must be ") -> None:
        changed = [*given, *[None] * (len(names) + 1 - len(given))]
        changed[place] = wrong
        says = f"{op}({name}): {tuple(wrong.shape)} is invalid: {expected}"
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=f"^{re.escape(says)}"):
            getattr(kernels, op)(*changed)

    for place, name in enumerate(names, 1):
        if name is None:
            continue
        weight = given[place] if "weight" in name else given[names.index(name.replace("bias", "weight")) + 1]
        O, I = weight.shape  # noqa: E741
        for wrong in ((O, I + 1), (I,), (1, O, I)) if "weight" in name else ((O + 2,), (1,), (), (4, O)):
            expected = f"it must be [O, {I}]" if "weight" in name else f"it must be [{O}]"
            refused(place, name, X.new_ones(wrong), expected)
    refused(0, first, X[0, 0], "it" if op != "swiglu_linear" else "its last dimension must be")
    if op == "swiglu_mlp":
        refused(1, "gate_up_weight", W[:7], "it must have an even number of rows: gate's, then up's")
    if op == "self_attention":
        refused(0, "x_BTE", X, "it must be [B, T, E]")


@pytest.mark.parametrize(
    ("call", "error"),
    [(lambda: kernels.linear(X, W.double()), RuntimeError), (lambda: kernels.rms_norm(X), TypeError)],
)
def test_other_errors_stay_as_they_are(call: Callable[[], object], error: type[Exception]) -> None:
    with pytest.raises(error) as raised:
        call()
    assert not isinstance(raised.value, ValueError)


def test_every_op_goes_to_another_process_and_what_it_takes_can_be_said() -> None:
    for name in (*kernels.backend.OPS, "adamw_step_all", "accumulate_in_place"):
        op = getattr(kernels, name)
        assert op.__wrapped__, "it explains wrong types"
        assert pickle.loads(pickle.dumps(op)) is op
        for argument, hint in get_type_hints(op).items():
            assert argument == "return" or arguments._words(hint)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: kernels.flash_attention(*[HEADS[..., :0]] * 3), r"q is \(1, 4, 2, 0\), .* with D above 0"),
        (
            lambda: kernels.qkv_attention(HEADS.repeat(1, 1, 2, 1)[..., :0], 1),
            r"q is \(1, 4, 2, 0\), .* with D above 0",
        ),
        (
            lambda: kernels.qkv_attention(HEADS.repeat(1, 1, 2, 1), 1, eps=-1.0),
            r"eps\): -1.0 is invalid: it must be at",
        ),
        (lambda: kernels.self_attention(X[None], W, 1, 0), r"head_dim\): 0 is invalid: it must divide the weight's 8"),
        (lambda: kernels.self_attention(X[None], W, 1, 3), r"head_dim\): 3 is invalid: it must divide the weight's 8"),
        (lambda: kernels.linear_cross_entropy(X, W[:0], TARGETS), r"weight is \(0, 8\), .* V above 0"),
        (lambda: kernels.embedding(TARGETS, W[0]), r"embedding\(weight_VD\): \(8,\) is invalid: it must be \[V, D\]"),
        (
            lambda: kernels.embedding(TARGETS.bool(), W),
            r"embedding\(tokens\): torch.bool is invalid: they must be int64",
        ),
    ],
)
def test_sizes_that_cannot_be_are_refused(call: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()
