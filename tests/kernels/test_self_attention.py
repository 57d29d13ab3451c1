from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spt_fast.kernels import accumulate_in_place, self_attention
from spt_fast.kernels.backend import OPS, Candidate, install
from spt_fast.kernels.persistent import config
from tests.kernels.compare import (
    DEVICE,
    assert_as_exact_as_torch,
    by_more_than_chance,
    random_tensors,
    usable,
)
from tests.kernels.contract import Calls, Contract, Sample, Shape
from tests.kernels.launches import BF16, FP16, compiled_launches
from tests.kernels.test_attention import angles, cut, plain_projection

SELF_ATTENTION = importlib.import_module("spt_fast.kernels.self_attention")  # the function has the same name
PROJECTED = SELF_ATTENTION._projected
E, H, K, D = 8, 2, 1, 8
C = (H + 2 * K) * D
TILES = config(16, 32, 16, 4, 1)
halves = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])


@contextmanager
def fused(head_dim: int = D, heads: int = H + 2 * K, width: int = E) -> Iterator[None]:
    """Within it such a projection runs in the fused kernel."""
    shapes = [(heads * head_dim, width, head_dim, dtype.itemsize) for dtype in (torch.float32, torch.float16)]
    install({"self_attention": Candidate("auto", tuple(("qkv_projection", shape, TILES) for shape in shapes))})
    try:
        yield
    finally:
        install({})


def inputs(rows: Shape, dtype: torch.dtype) -> list[Tensor]:
    x, weight, bias = random_tensors([(*rows[:2], E), (C, E), (C,)], dtype)
    return [x, 0.1 * weight, bias, *angles(rows[1], D, dtype)]


def attend(x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, *, backend: str = "auto") -> Tensor:
    return self_attention(x, weight, K, D, bias, cos, sin, window=3, backend=backend)


def plain(x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return plain_projection(F.linear(x, weight, bias).unflatten(-1, (-1, D)), K, (), (cos, sin), window=3)


class TestContract(Contract):
    """But on the CPU kernel, whose heads are wider: test_attention_cpu.py."""

    samples = (
        Sample(
            "self_attention",
            attend,
            plain,
            inputs,
            rows=(2, 5),
            empty=((0, 4), (2, 0)),
            gradients=3,
            loose=("sdpa", "reference", "flash_attn", "triton"),  # of which products are PyTorch's
            strided=True,
        ),
    )
    usable = staticmethod(lambda backend, dtype: backend != "cpu")

    @pytest.fixture(autouse=True)
    def in_the_fused_kernel(self, request: pytest.FixtureRequest) -> Iterator[None]:
        """But for torch.compile, which gets the separate ops."""
        with nullcontext() if "compiles" in request.node.name else fused():
            yield


CASES: tuple[tuple[int, int, int, bool, dict], ...] = (
    (4, 2, 8, True, {}),
    (4, 2, 8, False, {"window": 5}),
    (3, 1, 16, True, {"cuts": [0, 3, 21, 21, 30]}),  # 4 heads to rotate and a part of the next tile
    (2, 1, 32, False, {}),  # a head fills a tile
)


@halves
@pytest.mark.parametrize(("H", "K", "D", "biased", "options"), CASES)
@pytest.mark.parametrize(("by_row", "backend"), [(False, "triton"), (True, "triton"), (True, "sdpa")])
@by_more_than_chance
def test_as_exact_as_torch(
    dtype: torch.dtype, H: int, K: int, D: int, biased: bool, options: dict, by_row: bool, backend: str
) -> None:
    """Of 42 rows the last tile has only 10. Tables are of all rows, or each row's. Rounded twice, as without a kernel
    that rotates; and a score's rounding is multiplied by its size."""
    usable("triton")
    B, T, E, heads = 2, 21, 24, H + 2 * K
    cuts, more = options.get("cuts"), {"window": options.get("window")}
    x, weight, bias, do = random_tensors([(B, T, E), (heads * D, E), (heads * D,), (B, T, H, D)], dtype)
    tables = angles(B * T if by_row else T, D, dtype)
    tables = [table.view(B, T, D) if by_row else table for table in tables]
    given = (x, 0.3 * weight, *([bias] if biased else []))

    def ours(x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        return self_attention(
            x, weight, K, D, *(bias or [None]), *tables, cu_seqlens=cut(cuts), **more, backend=backend
        )

    def composition(x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        qkv = F.linear(x, weight, *bias).unflatten(-1, (-1, D))
        wide = [table.to(qkv.dtype) if qkv.dtype == torch.float64 else table for table in tables]
        return plain_projection(qkv, K, (), tuple(wide), cu_seqlens=cuts, **more)

    with fused(D, heads, E):
        with pytest.MonkeyPatch.context() as patch:
            made: list[Tensor] = []
            patch.setattr(SELF_ATTENTION, "_projected", lambda *given: made.append(PROJECTED(*given)) or made[-1])
            assert_as_exact_as_torch(ours, composition, given, (do,), 4)
        assert made


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_added_in_place(frozen: bool, backend: str) -> None:
    """Also through a checkpoint; a weight without a gradient gets none."""
    usable("triton")
    given = inputs((2, 5), torch.float32)
    (do,) = random_tensors([(2, 5, H, D)], torch.float32)
    leaves = [x.requires_grad_(number < 3 and not (frozen and number == 1)) for number, x in enumerate(given)]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    expected = torch.autograd.grad(plain(*leaves), wanted, do)
    accumulate_in_place(leaves[1:3])
    with fused():
        for _ in range(2):
            checkpoint(lambda *x: attend(*x, backend=backend), *leaves, use_reentrant=False).backward(do)
    for e, leaf in zip(expected, wanted, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * e, rtol=1e-4, atol=1e-4)
    assert not frozen or leaves[1].grad is None


def test_other_cases_are_the_separate_ops() -> None:
    usable("triton")
    x, weight, bias, cos, sin = inputs((2, 5), torch.float32)
    norm = torch.ones(D, device=DEVICE, requires_grad=True)
    leaves = [x.requires_grad_() for x in (x, weight, bias)]

    def is_fused(*given: Tensor, **options: Tensor | str) -> bool:
        found = self_attention(*given[:2], K, D, *given[2:], **{"backend": "triton"} | options)
        return "Fused" in type(found.grad_fn).__name__

    assert not is_fused(*leaves, cos, sin)
    with fused():
        assert is_fused(*leaves, cos, sin)
        assert not is_fused(*leaves)  # without positions
        assert not is_fused(*leaves, cos, sin, q_weight=norm, k_weight=norm)
        assert not is_fused(*leaves, cos, sin, backend="reference")
        assert not is_fused(x, weight.T.contiguous().T, bias, cos, sin)
        with torch.autocast(DEVICE, torch.bfloat16):
            assert not is_fused(*leaves, cos, sin)


def test_with_norms_and_where_ops_are_looked_at_the_choice_is_that_of_qkv_attention() -> None:
    """The tuner asks for it there."""
    usable("triton")
    x, weight, bias, cos, sin = inputs((2, 5), torch.float32)
    x.requires_grad_()
    norm = torch.ones(D, device=DEVICE)

    def attention(**norms: Tensor) -> str:
        return type(self_attention(x, weight, K, D, bias, cos, sin, **norms).grad_fn).__name__

    def chosen() -> list[bool]:
        names = [attention(), attention(q_weight=norm, k_weight=norm)]
        with Calls():
            names.append(attention())
        return ["Attention" in name for name in names]

    try:
        install({"qkv_attention": Candidate("triton"), "self_attention": Candidate("reference")})
        assert chosen() == [False, True, True]
        install({"qkv_attention": Candidate("reference"), "self_attention": Candidate("triton")})
        assert chosen() == [True, False, False]
    finally:
        install({})


def test_inputs_that_are_not_aligned_are_copied_and_tables_are_of_any_dtype() -> None:
    usable("triton")
    x, weight, bias, cos, sin = inputs((2, 5), torch.float32)
    tables = [table.bfloat16() for table in (cos, sin)]
    expected = plain(x, weight, bias, *(table.float() for table in tables))
    flat = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
    assert flat.data_ptr() % 16
    with fused():
        found = attend(flat.requires_grad_(), weight, bias, *tables, backend="triton")
        assert "Fused" in type(found.grad_fn).__name__
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("in_kernel", [False, True])
def test_bad_arguments_are_refused(in_kernel: bool) -> None:
    x, weight, bias, cos, sin = inputs((2, 5), torch.float32)

    def refused(match: str, error: type[Exception], *given: Tensor | int | None, **options: object) -> None:
        with pytest.raises(error, match=match):
            self_attention(*given, **options)  # type: ignore[arg-type]

    install({})
    with fused() if in_kernel else torch.no_grad():
        refused(r"qkv_attention\(kv_heads\)", ValueError, x, weight, 3, D, bias, cos, sin)
        refused(r"qkv_attention\(cos\)", ValueError, x, weight, K, D, bias, cos[1:], sin[1:])
        refused(r"qkv_attention\(window\)", ValueError, x, weight, K, D, bias, cos, sin, window=0)
        refused("sin is missing", ValueError, x, weight, K, D, bias, cos)
        refused(r"self_attention\(weight\)", ValueError, x[..., 1:], weight, K, D, bias, cos, sin)
        refused(r"self_attention\(bias\)", ValueError, x, weight, K, D, bias[1:], cos, sin)
        refused(r"self_attention\(head_dim\): 7 is invalid", ValueError, x, weight, K, 7, bias, cos, sin)
        problem = r"self_attention\(backend\): 'tirton' is invalid: unknown; the op has auto, "
        refused(problem, ValueError, x, weight, K, D, bias, cos, sin, backend="tirton")


def test_candidates_hold_whole_heads() -> None:
    assert OPS["self_attention"].candidates(*inputs((1, 2), torch.float32))[0] == Candidate("auto")
    assert SELF_ATTENTION.candidates(80) == []
    for head_dim in (64, 128):
        assert all(each["COLUMNS"] % head_dim == 0 for each in SELF_ATTENTION.candidates(head_dim))


def test_every_launch_is_compiled_ahead_of_time() -> None:
    with compiled_launches(SELF_ATTENTION):
        launches: Sequence = [(BF16, False), (BF16, True), (FP16, False)]
        for head_dim in (64, 128):
            tables = torch.empty(2, 3, head_dim), torch.empty(2, 3, head_dim)
            for dtype, biased in launches:
                x, weight, bias = (
                    torch.empty(s, dtype=dtype) for s in ((2, 3, 64), (6 * head_dim, 64), (6 * head_dim,))
                )
                for chosen in SELF_ATTENTION.candidates(head_dim)[: 1 if dtype == FP16 else None]:
                    install(
                        {
                            "self_attention": Candidate(
                                "triton", (("qkv_projection", (*weight.shape, head_dim, 2), chosen),)
                            )
                        }
                    )
                    SELF_ATTENTION._projected(x, weight, bias if biased else None, *tables, 2, head_dim)
    install({})
