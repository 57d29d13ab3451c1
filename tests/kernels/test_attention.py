from __future__ import annotations

import contextlib
import importlib
import inspect
import itertools
import sys
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from spt_fast.kernels import (
    attention,
    attention_cpu,
    attention_triton,
    flash_attention,
    flash_attn,
    launch,
    qkv_attention,
)
from spt_fast.kernels.attention_packed import copy_heads
from tests.kernels.compare import (
    DEVICE,
    assert_as_exact_as_torch,
    backends_and_dtypes,
    by_more_than_chance,
    random_tensors,
    run,
    usable,
)
from tests.kernels.contract import Contract, Sample, Shape
from tests.kernels.launches import BF16, FP16, FP32, compiled_launches
from tests.kernels.test_rotary import plain_qk_norm_rope, plain_rope

BACKENDS_AND_DTYPES = backends_and_dtypes("reference", "sdpa", "triton", "flash_attn")


def plain_attention(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    *,
    causal: bool = True,
    cu_seqlens: list[int] | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """By the definition, pair by pair of positions."""
    B, T, H, D = q_BTHD.shape
    groups = H // k_BTHD.shape[2]
    k_BTHD, v_BTHD = k_BTHD.repeat_interleave(groups, 2), v_BTHD.repeat_interleave(groups, 2)
    document = [0] * (B * T)
    if cu_seqlens is not None:
        document = [next((d for d in range(len(cu_seqlens) - 1) if n < cu_seqlens[d + 1]), -1) for n in range(B * T)]
    visible = torch.zeros(B, T, T, dtype=torch.bool)  # on the CPU, number by number
    for b in range(B):
        for i in range(T):
            for j in range(T):
                same = document[b * T + i] == document[b * T + j] != -1
                near = (j <= i or not causal) and (window is None or i - j < window)
                visible[b, i, j] = same and near
    scores = torch.einsum("bihd,bjhd->bhij", q_BTHD, k_BTHD) * (D**-0.5 if scale is None else scale)
    weights = scores.masked_fill(~visible[:, None].to(scores.device), -torch.inf).softmax(-1).nan_to_num(0)
    return torch.einsum("bhij,bjhd->bihd", weights, v_BTHD)


def draw(B: int, T: int, H: int, K: int, D: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and an upstream gradient."""
    return random_tensors([(B, T, heads, D) for heads in (H, K, K, H)], dtype)


def cut(cuts: list[int] | None) -> Tensor | None:
    return None if cuts is None else torch.tensor(cuts, dtype=torch.int32, device=DEVICE)


def in_documents(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, **options: Any) -> Tensor:
    return flash_attention(q, k, v, cu_seqlens=cu_seqlens, window=3, **options)


def angles(T: int, D: int, dtype: torch.dtype) -> list[Tensor]:
    turns = 6.3 * torch.rand(T, D // 2, dtype=torch.promote_types(dtype, torch.float32)).repeat(1, 2)
    return [turns.cos().to(DEVICE), turns.sin().to(DEVICE)]


def projection_rotated(qkv: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, **options: Any) -> Tensor:
    return qkv_attention(qkv, 1, cos, sin, cu_seqlens=cu_seqlens, window=3, **options)


def projection_normalised(qkv: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Tensor:
    return qkv_attention(qkv, 1, cos, sin, q_weight=wq, k_weight=wk, **options)


def plain_projection(
    qkv: Tensor, K: int, weights: tuple[Tensor, ...], tables: tuple[Tensor, ...], **options: Any
) -> Tensor:
    q, k, v = qkv.split([qkv.shape[2] - 2 * K, K, K], 2)
    if weights:
        q, k = plain_qk_norm_rope(q, k, *weights, *tables)
    elif tables:
        q, k = plain_rope(q, k, *tables)
    return plain_attention(q, k, v, **options)


def samples(D: int, **more: Any) -> tuple[Sample, ...]:
    """Plain attention, and documents with a window; without positions there are no documents, or only empty ones. Also
    of projections, rotated and normalised."""

    def inputs(rows: Shape, dtype: torch.dtype) -> list[Tensor]:
        return draw(*rows[:2], 2, 1, D, dtype)[:3]

    def with_cuts(rows: Shape, dtype: torch.dtype) -> list[Tensor]:
        cuts = [0, 3, 3, 8] if rows[0] * rows[1] else [0] * (len(rows) - 1)
        return [*inputs(rows, dtype), torch.tensor(cuts, dtype=torch.int32, device=DEVICE)]

    def plain(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        return plain_attention(q, k, v, cu_seqlens=cu_seqlens.tolist(), window=3)

    few: dict[str, Any] = {"rows": (2, 5), "empty": ((0, 4), (2, 0), (0, 4, 0), (2, 0, 0)), "gradients": 3, **more}
    few["loose"] = ("sdpa", "reference", "flash_attn")

    def qkv(rows: Shape, dtype: torch.dtype) -> list[Tensor]:
        return random_tensors([(*rows[:2], 4, D)], dtype)

    def rotated(rows: Shape, dtype: torch.dtype) -> list[Tensor]:
        return [*qkv(rows, dtype), *angles(rows[1], D, dtype), with_cuts(rows, dtype)[-1]]

    def plain_rotated(qkv: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor) -> Tensor:
        return plain_projection(qkv, 1, (), (cos, sin), cu_seqlens=cu_seqlens.tolist(), window=3)

    def normalised(rows: Shape, dtype: torch.dtype) -> list[Tensor]:
        return [*qkv(rows, dtype), *random_tensors([(D,), (D,)], dtype), *angles(rows[1], D, dtype)]

    def plain_normalised(qkv: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return plain_projection(qkv, 1, (wq, wk), (cos, sin))

    return (
        Sample("flash_attention", flash_attention, plain_attention, inputs, **few),
        Sample("flash_attention", in_documents, plain, with_cuts, **few),
        Sample("qkv_attention", projection_rotated, plain_rotated, rotated, **few | {"gradients": 1}),
        Sample("qkv_attention", projection_normalised, plain_normalised, normalised, **few | {"gradients": 3}),
    )


class TestContract(Contract):
    """But on the CPU kernel: test_attention_cpu.py."""

    samples = samples(8)
    usable = staticmethod(lambda backend, dtype: backend != "cpu")


# The backward pass makes the weights again as exp(score - logsumexp), which multiplies the rounding of a score by its
# size: up to about 4 here.
ROUNDINGS = dict.fromkeys(("triton", "flash_attn"), 4)
# PyTorch's kernel for CPUs takes e^x to 20 bits (exp_u20), which is eight roundings of float32, besides.
ROUNDINGS |= dict.fromkeys(("sdpa", "reference"), 12)


CUTS = {
    "one document": [0, 24],
    "rows": [0, 12, 24],
    "across rows": [0, 5, 17, 24],
    "empty ones": [0, 0, 7, 7, 7, 13, 24, 24],
    "padding": [0, 4, 15],
    "a row of padding": [0, 3, 9],
    "no documents": [0],
    "only empty ones": [0, 0, 0],
}


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
@pytest.mark.parametrize(
    ("B", "T", "H", "K", "D"),
    [(2, 37, 3, 1, 64), (4, 3, 2, 2, 8), (1, 20, 4, 4, 16), (1, 70, 2, 1, 128), (1, 64, 2, 1, 40)],
)
@by_more_than_chance
def test_as_exact_as_torch(backend: str, dtype: torch.dtype, B: int, T: int, H: int, K: int, D: int) -> None:
    *inputs, upstream = draw(B, T, H, K, D, dtype)
    assert_as_exact_as_torch(
        lambda q, k, v: flash_attention(q, k, v, backend=backend),
        plain_attention,
        inputs,
        (upstream,),
        ROUNDINGS[backend],
    )


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_a_single_position(backend: str, dtype: torch.dtype) -> None:
    """The result is v; the gradients of q and k are differences of two equal sums, in two orders, of 8 products."""
    *inputs, upstream = draw(3, 1, 2, 2, 8, dtype)
    o, dq, dk, dv = run(lambda q, k, v: flash_attention(q, k, v, backend=backend), inputs, (upstream,))
    assert torch.equal(o, inputs[2])
    assert torch.equal(dv, upstream)
    assert max(dq.abs().max(), dk.abs().max()) <= 8 * 2**-23 * 4**3  # of numbers that are mostly below 4


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
@pytest.mark.parametrize("window", [None, 3])
@by_more_than_chance
def test_documents_as_exact_as_torch(backend: str, dtype: torch.dtype, cuts: list[int], window: int | None) -> None:
    *inputs, upstream = draw(2, 12, 2, 1, 8, dtype)
    assert_as_exact_as_torch(
        lambda q, k, v: flash_attention(q, k, v, cu_seqlens=cut(cuts), window=window, backend=backend),
        lambda q, k, v: plain_attention(q, k, v, cu_seqlens=cuts, window=window),
        inputs,
        (upstream,),
        ROUNDINGS[backend],
    )


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
@pytest.mark.parametrize(
    ("causal", "cuts", "window"),
    [
        (True, None, 5),
        (True, None, 40),
        (False, None, None),
        (True, [0, 1, 1, 46, 50, 72, 91], None),
        (False, [0, 1, 1, 46, 50, 72, 91], None),
        (True, [0, 33, 33, 80], 30),
        (True, [0, 50, 100], None),
    ],
)
@by_more_than_chance
def test_documents_and_windows_over_many_blocks(
    backend: str, dtype: torch.dtype, causal: bool, cuts: list[int] | None, window: int | None
) -> None:
    """Blocks that nobody sees, that some see and that all see, in two rows, the second of which may end in padding."""
    *inputs, upstream = draw(2, 50, 1, 1, 16, dtype)
    options = {"causal": causal, "window": window}
    assert_as_exact_as_torch(
        lambda q, k, v: flash_attention(q, k, v, cu_seqlens=cut(cuts), backend=backend, **options),
        lambda q, k, v: plain_attention(q, k, v, cu_seqlens=cuts, **options),
        inputs,
        (upstream,),
        ROUNDINGS[backend],
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cuts", [None, CUTS["empty ones"], CUTS["padding"]])
@pytest.mark.parametrize("window", [None, 1, 4, 12, 100])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_every_combination_in_float64(
    causal: bool, cuts: list[int] | None, window: int | None, scale: float | None
) -> None:
    if window is not None and not causal:
        pytest.skip("a window needs causal=True")
    *inputs, upstream = draw(2, 12, 4, 2, 8)
    options = {"causal": causal, "window": window, "scale": scale}
    found = run(lambda q, k, v: flash_attention(q, k, v, cu_seqlens=cut(cuts), **options), inputs, (upstream,))
    expected = run(lambda q, k, v: plain_attention(q, k, v, cu_seqlens=cuts, **options), inputs, (upstream,))
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
@by_more_than_chance
def test_scale(backend: str, dtype: torch.dtype) -> None:
    scale = 0.2
    *inputs, upstream = draw(1, 20, 2, 2, 16, dtype)
    assert_as_exact_as_torch(
        lambda q, k, v: flash_attention(q, k, v, scale=scale, backend=backend),
        lambda q, k, v: plain_attention(q, k, v, scale=scale),
        inputs,
        (upstream,),
        ROUNDINGS[backend],
    )


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_large_scores_overflow_nothing(backend: str, dtype: torch.dtype) -> None:
    q, k, v, upstream = draw(1, 40, 1, 1, 16, dtype)
    for result in run(lambda q, k, v: flash_attention(q, k, v, backend=backend), (30 * q, 30 * k, v), (upstream,)):
        assert result.isfinite().all()


def test_each_document_gives_what_it_gives_alone() -> None:
    q, k, v, _ = draw(1, 24, 4, 2, 8)
    cuts = CUTS["empty ones"]
    together = flash_attention(q, k, v, cu_seqlens=cut(cuts))
    for start, end in itertools.pairwise(cuts):
        alone = flash_attention(q[:, start:end], k[:, start:end], v[:, start:end])
        torch.testing.assert_close(together[:, start:end], alone)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
@pytest.mark.parametrize(("T", "cuts"), [(12, [0, 4, 15]), (50, [0, 20, 65]), (50, [0, 30])])
def test_padding_harms_nothing_whatever_it_holds(backend: str, dtype: torch.dtype, T: int, cuts: list[int]) -> None:
    """Past the last document: zeros and zero gradients, NaN in the padding included, and upstream gradients ignored."""
    q, k, v, upstream = draw(2, T, 2, 1, 8, dtype)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention(q, k, v, cu_seqlens=cut(cuts), backend=backend)

    clean = run(function, (q, k, v), (upstream,))
    for x in (q, k, v, upstream):
        x.view(2 * T, -1)[cuts[-1] :] = float("nan")
    found = run(function, (q, k, v), (upstream,))
    for f, c in zip(found, clean, strict=True):
        assert torch.equal(f, c)
        assert not f.view(2 * T, -1)[cuts[-1] :].any()


@pytest.mark.parametrize("dtype", [dtype for backend, dtype in BACKENDS_AND_DTYPES if backend == "triton"])
@pytest.mark.parametrize("D", [64, 128])
@by_more_than_chance
def test_the_blocks_of_a_gpu(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, D: int) -> None:
    """With the sizes that are launched on an H100, which in the interpreter are smaller."""
    monkeypatch.setattr(attention_triton, "INTERPRETED", False)
    monkeypatch.setattr(attention_triton, "_shape_class", lambda q: (q.shape[-1], 2, 90))
    *inputs, upstream = draw(1, 150, 2, 1, D, dtype)
    cuts = [0, 100, 140]
    assert_as_exact_as_torch(
        lambda q, k, v: flash_attention(q, k, v, cu_seqlens=cut(cuts), backend="triton"),
        lambda q, k, v: plain_attention(q, k, v, cu_seqlens=cuts),
        inputs,
        (upstream,),
        ROUNDINGS["triton"],
    )


def test_triton_offsets_are_64_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strides as of a tensor with more than 2^31 numbers: rows, heads and positions of a small one, far apart."""
    usable("triton")
    stride = 2**31 + 16
    for size in ((2, 1, 1), (1, 1, 2), (1, 33, 1)):
        B, T, H = size
        step = stride if T == 1 else -(-stride // 32 // 16) * 16
        try:
            far = torch.empty(step * (B * T * H - 1) + 16, dtype=torch.float16, device=DEVICE)  # touched in few places
        except RuntimeError:
            pytest.skip("no address space for a tensor of 2^31 numbers")
        strides = [step if n > 1 else 16 for n in (B, T, H)]
        x = far.as_strided((B, T, H, 16), (*strides, 1)).copy_(random_tensors([(B, T, H, 16)], torch.float16)[0])
        upstream = x.clone()
        function = lambda q, k, v: flash_attention(q, k, v, backend="triton")  # noqa: E731
        found, expected = run(function, (x, x, x), (x,)), run(function, [x.clone()] * 3, (upstream,))
        for f, e in zip(found, expected, strict=True):
            assert torch.equal(f, e)


def test_what_auto_prefers_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def preferred(D: int = 64, *, masked: bool = False) -> str:
        q = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(1, 8, 2, D))
        return attention.pick("auto", q, True, masked=masked)

    there: set[str] = set()
    monkeypatch.setattr(flash_attn, "obstacle", lambda backend: None if backend in there else "cannot be imported")
    assert preferred() == "sdpa"
    assert preferred(masked=True) == "triton"
    assert preferred(D=512) == "sdpa"
    assert preferred(D=512, masked=True) == "reference"
    there |= {"flash_attn", "flash_attn_2"}  # slower than cuDNN's kernels, but it knows documents
    assert preferred() == "sdpa"
    assert preferred(masked=True) == "flash_attn_2"
    there |= {"flash_attn_4"}
    assert preferred() == preferred(masked=True) == "flash_attn_4"
    assert preferred(D=20) == "sdpa"
    with deterministic():
        assert preferred() == preferred(masked=True) == "triton"


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_heads_too_wide_for_the_kernels_are_refused_and_auto_takes_another_backend() -> None:
    for D, dtype in ((160, torch.float32), (264, torch.float16)):
        q, k, v, _ = draw(1, 3, 1, 1, D, dtype)
        with pytest.raises(ValueError, match=rf"'triton' is invalid: it supports head dimensions up to .* not {D}"):
            flash_attention(q, k, v, backend=usable("triton", dtype))
        assert flash_attention(q, k, v).shape == q.shape


def test_flash_attn_counts_only_where_it_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = SimpleNamespace(__spec__=None)  # found, but without its functions
    whole = SimpleNamespace(__spec__=None, flash_attn_func=len, flash_attn_varlen_func=max)
    names = {version: module for version, (module, _) in flash_attn.VERSIONS.items()}

    def obstacles(capability: int, **modules: object) -> dict[str, str | None]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (capability, 0))
        flash_attn._functions.cache_clear()
        for version, name in names.items():
            monkeypatch.setitem(sys.modules, name, modules.get(version))
        return {backend: flash_attn.obstacle(backend) for backend in flash_attn.BACKENDS}

    try:
        found = obstacles(9, flash_attn_2=broken)
        assert None not in found.values()
        assert "flash_attn_func" in str(found["flash_attn"])
        found = obstacles(9, flash_attn_2=whole, flash_attn_3=broken)
        assert [backend for backend, problem in found.items() if problem is None] == ["flash_attn", "flash_attn_2"]
        assert "compute capability 10.x" in str(obstacles(10, flash_attn_3=whole)["flash_attn_3"])
        early = SimpleNamespace(__spec__=None, varlen_attn=lambda q, is_causal: q)
        assert "takes neither scale nor window_size" in str(obstacles(9, flash_attn_torch=early)["flash_attn_torch"])
    finally:
        flash_attn._functions.cache_clear()


@pytest.mark.parametrize("package", ["flash-attn", "PyTorch", "PyTorch without grouped queries"])
@pytest.mark.parametrize(("cuts", "window"), [(None, None), (None, 4), ([0, 5, 5, 17], 3), ([0, 30, 37], None)])
def test_flash_attn_is_called_right(
    monkeypatch: pytest.MonkeyPatch, cuts: list[int] | None, window: int | None, package: str
) -> None:
    """With stand-ins for the functions, which do by the definition what these are documented to."""

    asked = []

    def rows(q, k, v, softmax_scale, causal, window_size=(-1, -1), deterministic=False):
        asked.append(deterministic)
        window = None if window_size == (-1, -1) else window_size[0] + 1
        return plain_attention(q, k, v, causal=causal, window=window, scale=softmax_scale)

    def documents(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
        ends = cu_seqlens_q.tolist()
        assert cu_seqlens_q.dtype == torch.int32
        assert ends == cu_seqlens_k.tolist()
        assert ends[-1] == len(q)
        assert max(end - start for start, end in itertools.pairwise(ends)) <= max_seqlen_q == max_seqlen_k
        parts = [rows(*(x[None, a:b] for x in (q, k, v)), **options) for a, b in itertools.pairwise(ends)]
        return torch.cat(parts, 1)[0], None

    def early(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        left, right = window_size
        assert right == 0, "causal"
        window_size = (-1, -1) if left == -1 else (left, 0)
        ends = (cu_seq_q, cu_seq_k, max_q, max_k)
        return documents(query, key, value, *ends, softmax_scale=scale, causal=True, window_size=window_size)[0]

    def late(query, key, value, *ends, scale=None, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa == (query.shape[1] != key.shape[1])
        return early(query, key, value, *ends, scale=scale, window_size=window_size)

    functions = {
        "flash-attn": (rows, documents),
        "PyTorch": flash_attn._of_pytorch(late),
        "PyTorch without grouped queries": flash_attn._of_pytorch(early),
    }
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(flash_attn, "_functions", lambda module: functions[package])
    *inputs, upstream = draw(2, 20, 4, 2, 8)
    function = lambda *qkv: attention._flash_attn("flash_attn", *qkv, True, cut(cuts), window, 0.3)  # noqa: E731
    expected = run(
        lambda q, k, v: plain_attention(q, k, v, cu_seqlens=cuts, window=window, scale=0.3), inputs, (upstream,)
    )
    for f, e in zip(run(function, inputs, (upstream,)), expected, strict=True):
        torch.testing.assert_close(f, e)
    assert not any(asked)
    with deterministic():
        torch.testing.assert_close(function(*inputs), expected[0])
    assert asked[-1] == (package == "flash-attn"), "PyTorch's asks the global setting itself"


def test_the_function_inside_pytorch_has_the_arguments_that_it_is_called_with() -> None:
    parameters = inspect.signature(importlib.import_module("torch.nn.attention.varlen").varlen_attn).parameters
    assert [*parameters][:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size"} <= parameters.keys()


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes("reference", "triton", "cpu"))
@pytest.mark.parametrize("kind", ["rotated", "normalised", "as it is"])
@by_more_than_chance
def test_a_projection_as_exact_as_torch(backend: str, dtype: torch.dtype, kind: str) -> None:
    """With tables for each row, grouped queries, and documents that end in padding."""
    B, T, H, K, D = 2, 70 if backend == "cpu" else 20, 4, 2, 48
    if backend == "cpu" and dtype not in attention_cpu.SUPPORTED:
        pytest.skip("this CPU lacks the instructions")
    qkv, upstream, *weights = random_tensors([(B, T, H + 2 * K, D), (B, T, H, D), (D,), (D,)], dtype)
    tables = () if kind == "as it is" else tuple(torch.stack([x, x.flip(0)]) for x in angles(T, D, torch.float32))
    weights = weights if kind == "normalised" else []
    named = dict(zip(("cos", "sin"), tables, strict=False))
    cuts, window = [0, T // 2, T + 9, 2 * T - 4], T // 2 + 3

    def ours(qkv: Tensor, *weights: Tensor) -> Tensor:
        both = dict(zip(("q_weight", "k_weight"), weights, strict=False))
        return qkv_attention(qkv, K, cu_seqlens=cut(cuts), window=window, backend=backend, **named, **both)

    assert_as_exact_as_torch(
        ours,
        lambda qkv, *weights: plain_projection(qkv, K, weights, tables, cu_seqlens=cuts, window=window),
        (qkv, *weights),
        (upstream,),
        ROUNDINGS.get(backend, 4),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("B", "T", "K", "D"), [(2, 5, 3, 8), (2, 5, 1, 2), (1, 1, 2, 64), (3, 0, 2, 8), (2, 3, 2, 3)])
def test_value_gradients_are_copied_into_their_place_whatever_their_width(
    B: int, T: int, K: int, D: int, dtype: torch.dtype
) -> None:
    for first, after in ((0, 8), (1, 8), (2 * D, 8), (0, 3)):  # numbers beside them: aligned to 16 bytes or not
        packed = torch.zeros(B, T, first + K * D + after, dtype=dtype, device=DEVICE)
        (x,) = random_tensors([(B, T, K, D)], dtype)
        for given in (x, x.transpose(1, 2).contiguous().transpose(1, 2), x[:1, :1, :1, :1].expand_as(x)):
            packed.zero_()
            copy_heads(packed[..., first : first + K * D].unflatten(2, (K, D)), given)
            expected = torch.zeros_like(packed)
            expected[..., first : first + K * D] = given.reshape(B, T, K * D)
            assert torch.equal(packed, expected)


def test_a_projection_that_cannot_be_is_refused() -> None:
    qkv, cos = torch.zeros(1, 4, 6, 8), torch.zeros(4, 8)
    for kv_heads in (0, 3):
        with pytest.raises(ValueError, match=r"qkv_attention\(kv_heads\)"):
            qkv_attention(qkv, kv_heads)
    with pytest.raises(ValueError, match="qkv_attention: sin is missing"):
        qkv_attention(qkv, 2, cos)
    with pytest.raises(ValueError, match="qkv_attention: cos is missing"):
        qkv_attention(qkv, 2, q_weight=cos[0], k_weight=cos[0])
    with pytest.raises(ValueError, match=r"qkv_attention\(sin\)"):
        qkv_attention(qkv, 2, cos, cos[1:])
    with pytest.raises(ValueError, match="qkv_attention: only one of"):
        qkv_attention(qkv, 2, cos, cos, q_weight=cos[0])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_under_autocast_the_result_has_its_dtype_whatever_the_backend(backend: str) -> None:
    q, k, v = random_tensors([(2, 9, 2, 16), (2, 9, 1, 16), (2, 9, 1, 16)], torch.float32)
    lowered = [x.bfloat16() for x in (q, k, v)]
    upstream = [torch.ones(q.shape, dtype=torch.bfloat16, device=DEVICE)]
    attend = partial(flash_attention, window=4, backend=backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = run(attend, [q, k, v], upstream)
        packed = qkv_attention(torch.cat([q, k, v], 2), 1, window=4, backend=backend)
        of_two_dtypes = run(attend, [q, *lowered[1:]], upstream)
    expected = run(attend, lowered, upstream)
    assert [found.dtype for found in ours] == [torch.bfloat16] + [torch.float32] * 3
    for found in (ours, of_two_dtypes):
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(found, expected, strict=True))
    assert torch.equal(packed, expected[0])


def test_bad_arguments_are_refused() -> None:
    q, k, v, _ = draw(2, 4, 4, 2, 8)
    without_heads = (q, k[:, :, :0], v[:, :, :0])
    for shapes in ((q, k[:, :3], v[:, :3]), (q, k, v[..., :4]), (q[:, :, :3], k, v), (q[0], k[0], v[0]), without_heads):
        with pytest.raises(ValueError, match="k and v"):
            flash_attention(*shapes)
    for window, causal in ((0, True), (2, False)):
        with pytest.raises(ValueError, match="window"):
            flash_attention(q, k, v, window=window, causal=causal)
    for cuts in ([1, 8], [0, 5, 4], [0, 9], []):
        with pytest.raises(ValueError, match="cu_seqlens"):
            flash_attention(q, k, v, cu_seqlens=torch.tensor(cuts, dtype=torch.int32))
    for scale in (0.0, -1.0):
        with pytest.raises(ValueError, match="scale"):
            flash_attention(q, k, v, scale=scale)
    with pytest.raises(ValueError, match="dtype"):
        flash_attention(q, k.float(), v.float())
    with pytest.raises(ValueError, match="int32"):
        flash_attention(q, k, v, cu_seqlens=torch.tensor([0, 8]))


def test_on_hopper_tiles_are_64_and_copies_that_no_fence_follows_are_not_asynchronous(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_triton, "INTERPRETED", False)
    for fenced in (True, False):
        monkeypatch.setattr(attention_triton, "FENCED", fenced)
        for kernel, width in itertools.product(attention_triton.KERNELS, (64, 128, 256)):
            every = attention_triton.candidates(kernel, width, 2, 90)
            assert every[0] == attention_triton.default(kernel, width, 2, 90)
            copied = [config for config in every if not dict(config.constants).get("TMA")]
            assert fenced or {config.num_stages for config in copied} == {1}
            narrow = (kernel, width) == ("dkv", 128)
            if (kernel, width) != ("dkv", 256):
                assert all(min(config["M"], config["N"]) >= 64 for config in (every[:1] if narrow else every))
            if kernel != "forward" and width <= 128:  # 8 warps would compute the same 64 rows twice
                rows = [config["M" if kernel == "dq" else "N"] for config in every]
                assert all(n == 16 * each.num_warps for n, each in list(zip(rows, every, strict=True))[int(narrow) :])


def test_a_chosen_launch_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    q = draw(1, 40, 1, 1, 16, torch.float32)[0]
    usable("triton")
    expected = flash_attention(q, q, q, backend="triton")
    shape = attention_triton._shape_class(q)
    other = launch.Config((("M", 16), ("N", 64), ("SPLIT", 0)), 4, 1)
    launch.choose("attention_forward", shape, other)
    try:
        assert attention_triton._launched("forward", q) == other
        torch.testing.assert_close(flash_attention(q, q, q, backend="triton"), expected)
    finally:
        launch.choose("attention_forward", shape, None)
    assert attention_triton._launched("forward", q) == attention_triton.default("forward", *shape)


@pytest.mark.parametrize("cuts", [None, [0, 9, 70, 88]])
@pytest.mark.parametrize("window", [None, 20])
def test_blocks_in_loops_of_their_own_give_the_same_bits(cuts: list[int] | None, window: int | None) -> None:
    *inputs, upstream = draw(1, 90, 2, 1, 16, torch.float32)
    usable("triton")
    shape, found = attention_triton._shape_class(inputs[0]), []
    for split in (0, 1):
        for kernel in ("forward", "dq"):
            launch.choose(f"attention_{kernel}", shape, launch.Config((("M", 16), ("N", 16), ("SPLIT", split)), 4, 1))
        try:
            function = lambda *qkv: flash_attention(*qkv, cu_seqlens=cut(cuts), window=window, backend="triton")  # noqa: E731
            found.append(run(function, inputs, (upstream,)))
        finally:
            for kernel in ("forward", "dq"):
                launch.choose(f"attention_{kernel}", shape, None)
    for whole, split in zip(*found, strict=True):
        assert torch.equal(whole, split)


@pytest.mark.skipif(not launch.INTERPRETED, reason="Triton's interpreter takes any launch")
@pytest.mark.parametrize("tma", [0, 1])
@pytest.mark.parametrize("documents", [False, True])
def test_programs_that_take_several_blocks_give_the_same_bits(
    documents: bool, tma: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 blocks for 3 programs, and 2 for 3."""
    monkeypatch.setattr(attention_triton, "multiprocessors", lambda device: 3)
    for B, T, H in ((2, 88, 2), (1, 20, 1)):
        q, k = (torch.randn(B, T, heads, 16) for heads in (H, 1))
        cu_seqlens = cut([0, 9, B * T - 3] if documents else None)
        found = []
        for persistent in (0, 1):
            sizes = (("M", 16), ("N", 16), ("SPLIT", 0), ("TMA", tma), ("PERSISTENT", persistent))
            launch.choose("attention_forward", (16, 4, 80), launch.Config(sizes, 4, 1))
            try:
                found.append(attention_triton.attention(q, k, k, cu_seqlens, True, None, 0.25))
            finally:
                launch.choose("attention_forward", (16, 4, 80), None)
        assert all(map(torch.equal, *(each[:2] for each in found)))


def test_every_launch_is_compiled_ahead_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_triton, "INTERPRETED", False)
    with compiled_launches(attention_triton):
        assert {attention_triton._width(D, 2) for D in (8, 32, 64)} == {64}
        plain, documents, window = (None, None), (torch.tensor([0, 3, 8], dtype=torch.int32), None), (None, 4)
        masks = [(True, *mask) for mask in (plain, documents, window, (documents[0], 4))]
        masks += [(False, *mask) for mask in (plain, documents)]
        cases = [(D, BF16, mask) for D in (64, 128) for mask in masks]
        cases += [(D, BF16, mask) for D in (80, 96, 112, 256) for mask in masks[:2]]
        cases += [(D, FP32, mask) for D in (64, 128) for mask in masks[:2]]
        cases += [(D, dtype, masks[0]) for D, dtype in ((32, BF16), (32, FP32), (128, FP16))]
        for arch in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, arch=arch: arch)
            for D, dtype, (causal, cu_seqlens, seen) in cases:
                for heads in ((4, 4), (4, 1), (6, 2)):
                    q, k = (torch.zeros(2, 4, H, D, dtype=dtype) for H in heads)
                    o, lse, spans = attention_triton.attention(q, k, k, cu_seqlens, causal, seen, 0.1)
                    attention_triton._attention_backward(o, q, k, k, o, lse, spans, cu_seqlens, causal, seen, 0.1)


def test_another_number_of_documents_recompiles_no_kernel() -> None:
    for kernel in (attention_triton._forward_kernel, attention_triton._dq_kernel, attention_triton._dkv_kernel):
        compiled = launch.Kernel(kernel.fn, **kernel.kwargs) if launch.INTERPRETED else kernel
        assert [param.name for param in compiled.params if param.do_not_specialize] in (
            ["documents"],
            ["documents", "B"],
        )


@pytest.mark.skipif(not launch.INTERPRETED, reason="Triton's interpreter takes any launch")
@pytest.mark.parametrize(("D", "window", "split"), [(16, None, 0), (16, 9, 1), (32, None, 1)])
def test_keys_and_values_by_descriptors_give_the_same(
    D: int, window: int | None, split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit what loads by pointers give, of views of one projection, the last block not full; not where documents
    are, which may leave padding, nor where the head is narrower than its block."""
    described = []

    class Seen(attention_triton.TensorDescriptor):
        def __post_init__(self) -> None:
            super().__post_init__()
            described.append(self)

    monkeypatch.setattr(attention_triton, "TensorDescriptor", Seen)
    (qkv,) = random_tensors([(2, 41, 8, D)], torch.float32)
    q, k, v = qkv.split([4, 2, 2], dim=2)
    plain = attention_triton.attention(q, k, v, None, True, window, 0.25)
    sizes = (("M", 32), ("N", 16), ("SPLIT", split), ("TMA", 1))
    for width in (16, 32):
        launch.choose("attention_forward", (width, 4, 80), launch.Config(sizes, 4, 1))
    try:
        found = attention_triton.attention(q, k, v, None, True, window, 0.25)
        assert len(described) == 2
        assert all(map(torch.equal, found[:2], plain[:2]))
        cuts = torch.tensor([0, 30, 70], dtype=torch.int32)
        attention_triton.attention(q, k, v, cuts, True, window, 0.25)
        attention_triton.attention(q[..., :-4], k[..., :-4], v[..., :-4], None, True, window, 0.25)
        assert len(described) == 2
    finally:
        for width in (16, 32):
            launch.choose("attention_forward", (width, 4, 80), None)
