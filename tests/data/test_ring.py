from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spt_fast.data.ring import Ring
from spt_fast.errors import DataError

SHAPES = [(17, 16), (33, 16), (100, 7), (96, 16), (97, 16), (111, 16), (1000, 10), (1001, 10), (257, 128), (64, 1)]


def visits_after(ring: Ring, epochs: int) -> np.ndarray:
    starts = ring.starts(np.arange(epochs * ring.windows_per_epoch))
    read = (starts[:, None] + np.arange(ring.context)) % ring.num_tokens
    return np.bincount(read.ravel(), minlength=ring.num_tokens)


@pytest.mark.parametrize(("num_tokens", "context"), SHAPES)
def test_at_each_epoch_end_visits_of_any_two_tokens_differ_by_at_most_1(num_tokens: int, context: int) -> None:
    ring = Ring(num_tokens, context, 3, "chem")
    for epochs in range(1, 40):
        visits = visits_after(ring, epochs)
        assert visits.max() - visits.min() <= 1
        assert visits.sum() == epochs * ring.windows_per_epoch * context


@pytest.mark.parametrize(("num_tokens", "context"), SHAPES)
def test_an_epoch_lays_its_windows_end_to_end_in_an_order_of_its_own(num_tokens: int, context: int) -> None:
    ring = Ring(num_tokens, context, 3, "chem")
    w = ring.windows_per_epoch
    assert w == num_tokens // context
    starts_EW = ring.starts(np.arange(20 * w)).reshape(20, w)
    for epoch, starts in enumerate(starts_EW):
        begin = ring.epoch_start(epoch)
        assert sorted((starts - begin) % num_tokens) == [j * context for j in range(w)]
        if num_tokens % context:
            assert begin == epoch * w * context % num_tokens
    if w >= 10:
        orders = {tuple((starts - ring.epoch_start(e)) % num_tokens) for e, starts in enumerate(starts_EW)}
        assert len(orders) == 20


@pytest.mark.parametrize(("num_tokens", "context"), [(96, 16), (97, 16), (4096, 16)])
def test_the_cuts_fall_elsewhere_in_each_epoch(num_tokens: int, context: int) -> None:
    ring = Ring(num_tokens, context, 3, "chem")
    cuts = {ring.epoch_start(epoch) % context for epoch in range(200)}
    assert len(cuts) == context  # every place in a window is a cut in some epoch


def test_the_rotation_is_uniform() -> None:
    ring = Ring(1000, 10, 3, "chem")
    seen = np.bincount([ring.epoch_start(epoch) // 100 for epoch in range(5000)], minlength=10)
    assert ((seen - 500) ** 2 / 500).sum() < 28  # chi-squared with 9 degrees of freedom: p < 0.001 beyond


@settings(max_examples=150)
@given(
    context=st.integers(1, 1 << 20),
    windows=st.integers(1, 1 << 40),
    odd=st.integers(0, 1 << 20),
    seed=st.integers(0, 2**64),
    k=st.integers(0, 2**62),
)
def test_python_and_cpp_agree_up_to_2_to_the_62(context: int, windows: int, odd: int, seed: int, k: int) -> None:
    ring = Ring(max(context * windows + odd % context, context + 1), context, seed, "web")
    starts = ring.starts(np.array([k, k + 1]))
    assert starts.tolist() == [ring.start(k), ring.start(k + 1)]
    assert ((starts >= 0) & (starts < ring.num_tokens)).all()


def test_a_batch_across_many_epochs_agrees() -> None:
    for num_tokens, context in [(33, 16), (96, 16), (111, 16)]:
        ring = Ring(num_tokens, context, 0, "web")
        assert ring.starts(np.arange(60)).tolist() == [ring.start(k) for k in range(60)]


def test_seed_source_and_epoch_give_orders_of_their_own() -> None:
    k = np.arange(1000)
    orders = [Ring(16_001, 16, seed, name).starts(k) for seed in (0, 1) for name in ("a", "b")]
    orders.append((Ring(16_001, 16, 0, "a").starts(k + 1000) - 16_000) % 16_001)  # epoch 1, moved back over epoch 0
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).mean() < 0.02


@pytest.mark.parametrize(
    ("num_tokens", "says", "remedy"),
    [
        (0, "0 tokens", "more text$"),
        (1, "1 token", "more text$"),
        (2, "2 tokens", "or the batch a context of at most 1$"),
        (256, "256 tokens", "or the batch a context of at most 255$"),
    ],
)
def test_a_corpus_shorter_than_one_window(num_tokens: int, says: str, remedy: str) -> None:
    with pytest.raises(DataError, match=rf"'chem' has {says}: a corpus shorter than one window of 257 .*{remedy}"):
        Ring(num_tokens, 256, 0, "chem")
    assert Ring(257, 256, 0, "chem").windows_per_epoch == 1
