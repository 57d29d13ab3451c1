"""The faster interpreter of Triton that the tests use (tests/interpreter.py) computes what Triton's own does."""

from __future__ import annotations

import pytest
import torch

from spt_fast.kernels.launch import INTERPRETED

if not INTERPRETED:
    pytest.skip("Triton's kernels are compiled here", allow_module_level=True)

import triton.language as tl
from triton.language import core
from triton.runtime import interpreter

from spt_fast.kernels import add_rms_norm, flash_attention
from tests.interpreter import FASTER, TRITONS_OWN
from tests.kernels.compare import random_tensors, run


def test_kernels_give_the_same_bits_as_in_tritons_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, weight, heads = (random_tensors([shape], torch.float32)[0] for shape in ((5, 48), (48,), (2, 20, 2, 16)))

    def results() -> list[torch.Tensor]:
        norm = run(lambda x, w: add_rms_norm(x, x, w, backend="triton"), [rows, weight], [rows, rows])
        return norm + run(lambda x: flash_attention(x, x, x, backend="triton", window=7), [heads], [heads])

    assert all(getattr(*place) is faster for place, faster in FASTER.items())
    found = results()
    for (owner, name), own in TRITONS_OWN.items():
        monkeypatch.setattr(owner, name, own)
    for ours, expected in zip(found, results(), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("sizes", [[4], [2, 8], [1, 1, 16]])
@pytest.mark.parametrize("element", [tl.float32, tl.bfloat16, tl.int64, tl.pointer_type(tl.float16)])
def test_types_and_shapes_are_those_of_triton(element: tl.dtype, sizes: list[int]) -> None:
    """The first time, and when they are remembered; from numbers and from constants."""
    for shape in (sizes, sizes, [core.constexpr(size) for size in sizes], core.tuple(sizes)):
        expected, found = made_by(TRITONS_OWN, element, shape), made_by(FASTER, element, shape)
        assert found == expected


def made_by(functions: dict, element: tl.dtype, shape: object) -> list[str]:
    """What a block's type and a tensor of it say of themselves, and a number's."""
    block, tensor, number = (object.__new__(kind) for kind in (core.block_type, core.tensor, core.tensor))
    functions[core.block_type, "__init__"](block, element, shape)
    functions[core.tensor, "__init__"](tensor, None, block)
    functions[core.tensor, "__init__"](number, None, element)
    said = [
        f"{name}: {value!r} {type(value)}" for made in (block, tensor, number) for name, value in vars(made).items()
    ]
    return [*sorted(said), repr(functions[interpreter, "_get_np_dtype"](block))]
