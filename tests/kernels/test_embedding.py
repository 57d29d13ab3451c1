from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spt_fast import native
from spt_fast.kernels import accumulate_in_place, embedding
from tests.kernels.compare import (
    DEVICE,
    assert_as_exact_as_torch,
    backends_and_dtypes,
    by_more_than_chance,
    random_tensors,
    usable,
)
from tests.kernels.contract import Contract, Sample
from tests.kernels.launches import BF16, FP16, FP32, compiled_launches

EMBEDDING = importlib.import_module("spt_fast.kernels.embedding")  # the function has the same name
BACKENDS = ("reference", "cpu", "triton")


def random_tokens(vocab_size: int, shape: tuple[int, ...], dtype: torch.dtype = torch.int64) -> Tensor:
    """Some tokens much more frequent than others, and the last one there."""
    (x,) = random_tensors([shape], torch.float32)
    tokens = (x.abs() * vocab_size / 4).to(dtype).clamp_max_(vocab_size - 1)
    if tokens.numel():
        tokens.flatten()[-1] = vocab_size - 1
    return tokens


class TestContract(Contract):
    samples = (
        Sample(
            "embedding",
            lambda weight, tokens, backend: embedding(tokens, weight, backend=backend),
            lambda weight, tokens: F.embedding(tokens, weight),
            lambda rows, dtype: [*random_tensors([(4, 200)], dtype), random_tokens(4, rows)],
            rows=(2, 3),
            empty=((0, 4), (0,)),
            many=(3000,),
            gradients=1,
            loose=("reference",) if DEVICE == "cuda" else (),  # which adds atomically
        ),
    )


@pytest.mark.parametrize(("backend", "dtype"), backends_and_dtypes(*BACKENDS))
@pytest.mark.parametrize(("vocab_size", "width"), [(11, 6), (30, 64), (7, 300)])
@pytest.mark.parametrize("shape", [(3, 7), (150,), (0, 4), ()])
@by_more_than_chance
def test_as_exact_as_torch(
    backend: str, dtype: torch.dtype, vocab_size: int, width: int, shape: tuple[int, ...]
) -> None:
    weight, up = random_tensors([(vocab_size, width), (*shape, width)], dtype)
    for kind in (torch.int64, torch.int32):
        tokens = random_tokens(vocab_size, shape, kind)
        assert torch.equal(embedding(tokens, weight, backend=backend), F.embedding(tokens, weight))
        assert_as_exact_as_torch(
            lambda w, t=tokens: embedding(t, w, backend=backend),
            lambda w, t=tokens: F.embedding(t, w),
            (weight,),
            (up,),
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frequent_token_keeps_its_whole_gradient(backend: str) -> None:
    """In bf16 a running sum of ones stops at 256."""
    weight = torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.bfloat16, device=DEVICE))
    weight.grad_dtype = torch.float32
    tokens = torch.ones(5000, dtype=torch.long, device=DEVICE)
    embedding(tokens, weight, backend=usable(backend)).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[0, 0], [5000, 5000], [0, 0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_it_adds_to_the_gradient_that_is_there(backend: str) -> None:
    weight, dy = random_tensors([(9, 300), (50, 300)], torch.float32)
    weight.requires_grad_()
    accumulate_in_place([weight])
    tokens = random_tokens(7, (50,)).to(DEVICE)
    for held in (None, torch.ones(9, 300, device=DEVICE)):
        weight.grad = held
        embedding(tokens, weight, backend=usable(backend)).backward(dy)
        assert held is None or weight.grad is held
        expected = torch.zeros(9, 300, device=DEVICE).index_add_(0, tokens, dy)
        torch.testing.assert_close(weight.grad, expected if held is None else 1 + expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_the_gradient_of_a_transposed_weight_is_its_own(backend: str) -> None:
    held, dy = random_tensors([(30, 9), (50, 30)], torch.float32)
    weight = torch.nn.Parameter(held.T)
    accumulate_in_place([weight])
    tokens = random_tokens(7, (50,)).to(DEVICE)
    expected = torch.zeros(9, 30, device=DEVICE).index_add_(0, tokens, dy)
    embedding(tokens, weight, backend=usable(backend)).backward(dy)
    torch.testing.assert_close(weight.grad, expected)
    weight.grad = torch.ones(30, 9, device=DEVICE).T
    embedding(tokens, weight, backend=usable(backend)).backward(dy)
    torch.testing.assert_close(weight.grad, 1 + expected)


@pytest.mark.parametrize("width", [5, 300])
def test_long_runs_of_a_word_are_summed_in_parts(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton, of any place in the order of words: at a chunk's begin, middle and end, two in one, over many. Wide
    rows by several programs."""
    usable("triton")
    monkeypatch.setattr(EMBEDDING, "CHUNK", 16)
    monkeypatch.setattr(EMBEDDING, "MAX_COLUMNS", 128)
    for counts in ([40, 2, 100, 17, 0, 16, 3], [16, 16, 17, 15], [300], [1, 31, 33], [7, 200, 1], [3, 20]):
        words = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        (dy,) = random_tensors([(len(words), width)], torch.float32)
        tokens = words[torch.randperm(len(words))].to(DEVICE)
        expected = torch.zeros(len(counts), width, dtype=torch.float64, device=DEVICE).index_add_(
            0, tokens, dy.double()
        )
        for new in (True, False):
            found = torch.full((len(counts), width), torch.nan if new else 0.0, device=DEVICE)
            EMBEDDING._triton(dy, tokens, found, new)
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(DEVICE != "cpu", reason="an error on a GPU ends the process")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("token", [5, -1])
def test_a_token_beyond_the_vocabulary_is_an_error(backend: str, token: int) -> None:
    with pytest.raises(IndexError):
        embedding(torch.tensor([token]), torch.randn(5, 3), backend=usable(backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab_size", "width"), [(3000, 200), (2, 1), (5, 63)])
def test_the_cpu_gradient_overwrites_all_that_was_there(dtype: torch.dtype, vocab_size: int, width: int) -> None:
    """However many threads zero it, in pieces that end inside a row; integers add up exactly in any order."""
    usable("cpu")
    (x,), tokens = random_tensors([(500, width)], torch.float32), random_tokens(vocab_size, (500,))
    dy = x.mul(4).round().to(dtype)
    expected = torch.zeros(vocab_size, width).index_add_(0, tokens, dy.float())
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for into in (torch.float32, torch.bfloat16):  # summed in float32 either way
            dw = torch.full((vocab_size, width), float("nan"), dtype=into)
            native.ops().cpu_embedding_backward(dy, tokens, dw, False)
            assert torch.equal(dw, expected.to(into))
    torch.set_num_threads(threads)


def test_the_cpu_gradient_writes_nowhere_else() -> None:
    dy, dw = torch.ones(2, 3), torch.zeros(5, 3)
    usable("cpu")
    with pytest.raises(RuntimeError, match="outside the vocabulary"):
        native.ops().cpu_embedding_backward(dy, torch.tensor([0, 5]), dw, False)
    assert not dw.any()


def test_every_launch_is_compiled_ahead_of_time() -> None:
    with compiled_launches(EMBEDDING):
        cases = [(D, BF16) for D in (64, 128, 384, 1000, 4096)] + [(D, FP32) for D in (384, 1000, 4096)] + [(384, FP16)]
        for D, dtype in cases:
            for new in (True, False):
                dy, tokens = torch.empty(200, D, dtype=dtype), torch.zeros(200, dtype=torch.int64)
                EMBEDDING._triton(dy, tokens, torch.empty(4, D), new)
