from __future__ import annotations

from collections import Counter

import pytest
import torch

from spt_fast.errors import SptError
from spt_fast.model.gpt import GPT, GPTConfig


@pytest.fixture(scope="module")
def model() -> GPT:
    model = GPT(GPTConfig(layers=2, width=32, heads=2, kv_heads=1, ffn=64, context=8, vocab_size=13), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() == 2 else 1)
    return model


def test_greedy_takes_the_likeliest_and_slides_past_the_context(model: GPT) -> None:
    tokens = model.generate([1, 2, 3], 20, temperature=0)
    assert len(tokens) == 23
    assert tokens[:3] == [1, 2, 3]
    for i in range(3, 23):
        seen = torch.tensor([tokens[max(0, i - 8) : i]])
        assert tokens[i] == model(seen)[0, -1].argmax().item()


def test_the_draw_depends_on_the_seed_alone(model: GPT) -> None:
    torch.manual_seed(0)
    first = model.generate([1], 30, seed=5)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert model.generate([1], 30, seed=5) == first
    assert model.generate([1], 30, seed=6) != first
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_follow_the_distribution_and_top_k(model: GPT) -> None:
    probabilities = (model(torch.tensor([[4]]))[0, -1].detach() / 0.7).softmax(0)
    drawn = Counter(model.generate([4], 1, temperature=0.7, seed=seed)[1] for seed in range(2000))
    for token, probability in enumerate(probabilities.tolist()):
        assert drawn[token] / 2000 == pytest.approx(probability, abs=4.5 * (0.25 / 2000) ** 0.5)
    best = set(probabilities.topk(2).indices.tolist())
    assert {model.generate([4], 1, top_k=2, temperature=3.0, seed=seed)[1] for seed in range(60)} == best


def test_padding_of_the_vocabulary_is_never_drawn(model: GPT) -> None:
    assert max(model.generate([1], 8, temperature=50.0, seed=3)) >= 5
    assert max(model.generate([1], 40, temperature=50.0, seed=3, vocab_size=5)) < 5


def test_stop_id_ends_the_text(model: GPT) -> None:
    text = model.generate([1], 40, temperature=3.0, seed=2)
    stop = text[5]
    assert model.generate([1], 40, temperature=3.0, seed=2, stop_id=stop) == text[: text.index(stop, 1) + 1]


def test_bad_arguments_are_refused(model: GPT) -> None:
    with pytest.raises(ValueError, match="prompt"):
        model.generate([], 3)
    with pytest.raises(ValueError, match="temperature"):
        model.generate([1], 3, temperature=-1.0)
    with pytest.raises(ValueError, match="top_k"):
        model.generate([1], 3, top_k=0)
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(SptError, match=r"seed: .* is invalid: write a whole number of at most 64 bits"):
            model.generate([1], 3, seed=seed)
    for token in (13, -1):
        with pytest.raises(SptError, match=f"tokens: {token} is invalid: the model knows ids from 0 to 12"):
            model.generate([1, token], 3)


@pytest.mark.parametrize("temperature", [1e-30, 1e-45, 1e-320])
def test_the_coldest_temperatures_take_the_likeliest(model: GPT, temperature: float) -> None:
    assert model.generate([1], 5, temperature=temperature) == model.generate([1], 5, temperature=0)


def test_weights_of_a_run_that_diverged_are_refused() -> None:
    model = GPT(GPTConfig(layers=1, width=32, heads=2, kv_heads=1, ffn=64, context=8, vocab_size=13))
    with torch.no_grad():
        model.final_norm.fill_(float("nan"))
    for temperature in (0, 1):
        with pytest.raises(SptError, match="logits that are not finite"):
            model.generate([1], 3, temperature=temperature)
