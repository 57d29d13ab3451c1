from __future__ import annotations

import random
import warnings
from collections import Counter
from typing import Any

import pytest
import torch

from spt_fast.errors import SptError, SptWarning
from spt_fast.model.config import RopeScaling
from spt_fast.model.generate import _draw
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


OLMO: dict[str, Any] = {"norms": "after", "qk_norm": True, "qk_norm_over": "width"}
KINDS: list[dict[str, Any]] = [
    {},
    {"qk_norm": True},
    {"qkv_bias": True, "window": 1},
    OLMO,
    OLMO | {"window": 4, "full_layers": [0]},
    {"window": 5, "no_rope_layers": [0]},
]


def drawn_model(rng: random.Random) -> GPT:
    """Of any shape that a configuration may have, with weights that spread the logits."""
    kv_heads = rng.choice([1, 2, 3])
    scaling = RopeScaling(
        factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=rng.choice([4, 16])
    )
    config = GPTConfig(
        layers=rng.choice([1, 3]),
        width=rng.choice([16, 40]),
        heads=kv_heads * rng.choice([1, 2, 4]),
        kv_heads=kv_heads,
        ffn=24,
        context=rng.choice([9, 24]),
        vocab_size=rng.choice([17, 64]),
        head_dim=rng.choice([4, 8, 16]),
        **rng.choice(KINDS),
        tied=rng.random() < 0.5,
        rope_theta=rng.choice([100.0, 10_000.0]),
        rope_scaling=rng.choice([None, scaling]),
    )
    model = GPT(config, seed=rng.randrange(1000))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8) if parameter.dim() == 2 else parameter.add_(torch.rand(parameter.shape))
    return model


def uncached(model: GPT, tokens: list[int], new_tokens: int) -> list[int]:
    for _ in range(new_tokens):
        seen = torch.tensor([tokens[-model.config.context :]])
        tokens = [*tokens, int(model(seen)[0, -1].argmax())]
    return tokens


@pytest.mark.filterwarnings("ignore:context")
@pytest.mark.parametrize("seed", range(8))
def test_the_cache_changes_no_text_nor_does_the_batch(seed: int) -> None:
    """Prompts shorter and longer than the context, texts that grow past it, and texts that end while others go on."""
    rng = random.Random(seed)
    model = drawn_model(rng)
    vocab, context = model.config.vocab_size, model.config.context
    prompts = [
        [rng.randrange(vocab) for _ in range(length)]
        for length in (3, 1, context - 2, 3, context, context + 3, rng.randint(1, context))
    ]
    expected = [uncached(model, prompt, 14) for prompt in prompts]
    assert [model.generate(prompt, 14, temperature=0) for prompt in prompts[:3]] == expected[:3], model.config
    assert model.generate_batch(prompts, 14, temperature=0) == expected, model.config
    stop = expected[0][-4]
    ended = [
        text[: text.index(stop, len(p)) + 1] if stop in text[len(p) :] else text
        for p, text in zip(prompts, expected, strict=True)
    ]
    assert model.generate_batch(prompts, 14, temperature=0, stop_id=stop) == ended
    alone = [model.generate(prompt, 14, temperature=0.9, top_k=5, seed=seed) for prompt in prompts]
    assert model.generate_batch(prompts, 14, temperature=0.9, top_k=5, seed=seed) == alone
    assert model.generate_batch([], 14) == []


def test_a_text_beyond_the_context_says_so_once(model: GPT) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.generate([1, 2, 3], 6)  # the last token needs no reading
        assert not said
        model.generate_batch([[1, 2, 3], [1] * 9], 9)
    (warning,) = said
    assert warning.category is SptWarning
    assert "context: the text is longer than the model's context of 8 tokens" in str(warning.message)


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
    generator, halves = torch.Generator().manual_seed(0), torch.tensor([1, 4, 2, 8.0]).double().log()
    for top_p, expected in (
        (1e-9, {3}),
        (0.53, {3}),
        (0.54, {1, 3}),
        (0.79, {1, 3}),
        (0.81, {1, 2, 3}),
        (1, {0, 1, 2, 3}),
    ):
        draws = {_draw(halves.clone(), 1.0, None, top_p, generator) for _ in range(200)}
        assert draws == expected, "the fewest that sum to it"
    assert {_draw(halves.clone(), 9.0, 3, 0.5, generator) for _ in range(50)} == {1, 3}, (
        "of the top k, at the temperature"
    )
    assert model.generate([4], 8, top_p=1.0, seed=3) == model.generate([4], 8, seed=3)
    best = set(probabilities.topk(2).indices.tolist())
    assert {model.generate([4], 1, top_k=2, temperature=3.0, seed=seed)[1] for seed in range(60)} == best


def test_padding_of_the_vocabulary_is_never_drawn(model: GPT) -> None:
    assert max(model.generate([1], 8, temperature=50.0, seed=3)) >= 5
    assert max(model.generate([1], 40, temperature=50.0, seed=3, vocab_size=5)) < 5


def test_stop_id_ends_the_text(model: GPT) -> None:
    text = model.generate([1], 40, temperature=3.0, seed=2)
    stop = text[5]
    assert model.generate([1], 40, temperature=3.0, seed=2, stop_id=stop) == text[: text.index(stop, 1) + 1]
    assert model.generate([1], 40, temperature=3.0, seed=2, stop_id=[-1, stop]) == text[: text.index(stop, 1) + 1]


def test_prompts_may_be_tensors(model: GPT) -> None:
    texts = model.generate_batch([[1, 2], [3, 4]], 5, temperature=0)
    assert model.generate(torch.tensor([1, 2]), 5, temperature=0) == texts[0]
    assert model.generate_batch(torch.tensor([[1, 2], [3, 4]]), 5, temperature=0) == texts
    for prompt in (torch.tensor([[1, 2]]), torch.tensor([1.0]), "ab", 1, None):
        with pytest.raises(SptError, match=r"^tokens: .* is invalid: give a prompt as a list of ids or an integer te"):
            model.generate(prompt, 3)


def test_bad_arguments_are_refused(model: GPT) -> None:
    with pytest.raises(ValueError, match="prompt"):
        model.generate([], 3)
    with pytest.raises(ValueError, match="temperature"):
        model.generate([1], 3, temperature=-1.0)
    with pytest.raises(ValueError, match="top_k"):
        model.generate([1], 3, top_k=0)
    for top_p in (0.0, 1.1, float("nan")):
        with pytest.raises(SptError, match=r"top_p: .* is invalid: write a number above 0 and at most 1"):
            model.generate([1], 3, top_p=top_p)
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
