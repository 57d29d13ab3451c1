from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spt_fast.errors import RecipeError
from spt_fast.kernels import accumulate_in_place, attention_cpu, fp8, prefer
from spt_fast.model import gpt
from spt_fast.model.config import RopeScaling
from spt_fast.model.gpt import GPT, GPTConfig

SMALL = {"layers": 3, "width": 48, "heads": 6, "kv_heads": 2, "ffn": 80, "context": 32, "vocab_size": 61}


SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


OLMO = {"norms": "after", "qk_norm": True, "qk_norm_over": "width"}
WINDOWS = {"window": 3, "full_layers": [1]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}


def model_with_random_norms(seed: int = 0, **fields: object) -> GPT:
    """Norm weights away from 1 and larger matrices, so that a wrong or forgotten weight shows."""
    model = GPT(GPTConfig(**{**SMALL, **fields}), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(8)
    return model


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, SMALL["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("fields", [{}, {"qk_norm": True}, {**OLMO, **WINDOWS}, {"tied": False}], ids=str)
def test_autocast_is_the_model_in_its_dtype_with_gradients_in_the_parameters_own(
    fields: dict[str, object], checkpointing: str
) -> None:
    model, low = (model_with_random_norms(**fields) for _ in range(2))
    low.bfloat16()
    model.checkpointing = low.checkpointing = checkpointing
    tokens_BT, targets_BT = tokens(2, 32), tokens(2, 32, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens_BT, targets_BT)
        assert model(tokens_BT).dtype == torch.bfloat16
    loss.backward()
    expected = low(tokens_BT, targets_BT)
    expected.backward()
    assert torch.equal(loss, expected)
    for own, other in zip(model.parameters(), low.parameters(), strict=True):
        assert own.dtype == own.grad.dtype == torch.float32
        assert torch.equal(own.grad, other.grad.float())


def test_on_the_meta_device_it_runs_as_elsewhere() -> None:
    model, tokens_BT = GPT.without_weights(GPTConfig(**SMALL)), tokens(2, 5).to("meta")
    assert model(tokens_BT).shape == (2, 5, SMALL["vocab_size"])
    loss = model(tokens_BT, tokens_BT)
    loss.backward()
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())


def test_generation_under_autocast_takes_the_models_own_dtype() -> None:
    model, tokens_NT = model_with_random_norms(), tokens(2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.next_logits(tokens_NT)
    assert torch.equal(logits, model.next_logits(tokens_NT))


# ---------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers", 0),
        ("width", -8),
        ("heads", 2.0),
        ("kv_heads", 4),
        ("ffn", "80"),
        ("context", True),
        ("vocab_size", None),
        ("head_dim", 7),
        ("head_dim", 0),
        ("qk_norm", 1),
        ("qkv_bias", 1),
        ("tied", "yes"),
        ("rope_theta", 0.0),
        ("rope_theta", float("nan")),
        ("norm_eps", float("inf")),
        ("norm_eps", "1e-6"),
        ("rope_scaling", 8.0),
        ("rope_scaling", {"factor": 8.0}),
        ("rope_scaling", SCALING | {"rope_type": "yarn"}),
        ("rope_scaling", SCALING | {"factor": 0.5}),
        ("rope_scaling", SCALING | {"low_freq_factor": 4.0}),
        ("rope_scaling", YARN | {"factor": "much"}),
        ("rope_scaling", YARN | {"beta_slow": 32.0}),
        ("rope_scaling", YARN | {"low_freq_factor": 1.0}),
        ("rope_scaling", {"rope_type": "linear"}),
        ("heads", 5),
        ("norms", "between"),
        ("norms", "after"),
        ("qk_norm_over", "width"),
        ("window", 0),
        ("full_layers", [0]),
        ("no_rope_layers", 1),
        ("no_rope_layers", [3]),
        ("no_rope_layers", [True]),
        ("scaled_windows", False),
        ("family", "gpt2"),
        ("family", "qwen3"),
    ],
)
def test_a_wrong_field_is_named(field: str, value: object) -> None:
    named = "qk_norm" if field == "family" and value == "qwen3" else field
    with pytest.raises(RecipeError, match=rf"model\.({named}|kv_heads)"):
        GPTConfig(**{**SMALL, field: value})


def test_head_dim_is_resolved() -> None:
    assert GPTConfig(**SMALL).head_dim == 8
    assert GPTConfig(**SMALL, head_dim=16).head_dim == 16
    with pytest.raises(RecipeError, match=r"model\.heads.*head_dim"):
        GPTConfig(**{**SMALL, "width": 50})


def test_a_bias_beside_qk_norm_is_refused() -> None:
    """A run hands its weights on as Hugging Face folders, and no family has both."""
    with pytest.raises(RecipeError, match=r"model\.qkv_bias: True is invalid: no family.*qk_norm; choose one"):
        GPTConfig(**SMALL, qkv_bias=True, qk_norm=True)
    with pytest.raises(RecipeError, match=r"model\.window: 8 is invalid: the family olmo2 has no such models"):
        GPTConfig(**SMALL, **OLMO, window=8, family="olmo2")
    with pytest.raises(RecipeError, match=r"model\.rope_theta: 1\.0 is invalid: YaRN needs a number above 1"):
        GPTConfig(**SMALL, rope_scaling=YARN, rope_theta=1.0)


def test_config_is_frozen_and_round_trips() -> None:
    config = GPTConfig(**SMALL, rope_theta=500_000, rope_scaling=SCALING)
    assert GPTConfig(**dataclasses.asdict(config)) == config
    assert config.rope_scaling == RopeScaling(**SCALING)
    olmo3 = GPTConfig(**SMALL, **OLMO, **WINDOWS, rope_scaling=YARN, scaled_windows=False)
    assert GPTConfig(**dataclasses.asdict(olmo3)) == olmo3
    assert [olmo3.window_of(layer) for layer in range(3)] == [3, None, 3]
    assert [olmo3.rope_of(layer) for layer in range(3)] == ["plain", "scaled", "plain"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.layers = 5  # type: ignore[misc]


# --------------------------------------------------------------------------------------------------- initialisation


def test_init_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    a = GPT(GPTConfig(**SMALL), seed=3)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    b = GPT(GPTConfig(**SMALL), seed=3)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "the global generator moved"
    c = GPT(GPTConfig(**SMALL), seed=4)
    for (name, x), y, z in zip(a.named_parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(x, y), name
        assert x.dim() == 1 or not torch.equal(x, z), name


def test_init_is_independent_of_the_default_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        low = GPT(GPTConfig(**SMALL))
    finally:
        torch.set_default_dtype(torch.float32)
    for x, y in zip(low.parameters(), GPT(GPTConfig(**SMALL)).parameters(), strict=True):
        assert torch.equal(x, y.bfloat16())


def test_init_scales() -> None:
    config = GPTConfig(
        layers=8, width=256, heads=4, kv_heads=4, ffn=512, context=8, vocab_size=512, tied=False, qk_norm=True
    )
    for name, parameter in GPT(config).named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            expected = 0.02 / 4 if name.endswith(("wo", "w_down")) else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(parameter.mean().item()) < 0.1 * expected, name


def test_first_loss_is_that_of_guessing() -> None:
    model = GPT(GPTConfig(**SMALL))
    loss = model(tokens(4, 32), tokens(4, 32, seed=1))
    assert loss.item() == pytest.approx(torch.tensor(61.0).log().item(), abs=0.05)


def test_8b_on_the_meta_device_costs_nothing() -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig.preset("8b"))
    assert sum(p.numel() for p in model.parameters()) == 8_030_261_248
    assert all(p.is_meta for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------- forward


def plain_forward(model: GPT, tokens_BT: Tensor) -> Tensor:
    """The same network from its textbook description: separate additions and norms, explicit heads and mask."""
    c = model.config
    B, T = tokens_BT.shape
    Q = c.head_dim
    angles = torch.outer(torch.arange(T), c.rope_theta ** -(torch.arange(0, Q, 2) / Q)).to(model.embedding.dtype)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + c.norm_eps) * weight

    def rotate(x: Tensor) -> Tensor:  # [B, heads, T, Q]
        pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((pairs.real, pairs.imag), dim=-1)

    x = model.embedding[tokens_BT]
    for block in model.blocks:
        h = norm(x, block.attention_norm)
        wq, wk, wv = block.wqkv.split([c.heads * Q, c.kv_heads * Q, c.kv_heads * Q])
        biases = block.bqkv.split([w.shape[0] for w in (wq, wk, wv)]) if c.qkv_bias else (0, 0, 0)
        projected = (h @ w.T + b for w, b in zip((wq, wk, wv), biases, strict=True))
        q, k, v = (x_BTP.view(B, T, -1, Q).transpose(1, 2) for x_BTP in projected)
        if c.qk_norm:
            q, k = norm(q, block.q_norm), norm(k, block.k_norm)
        q, k = rotate(q), rotate(k)
        k, v = (y.repeat_interleave(c.heads // c.kv_heads, dim=1) for y in (k, v))
        scores = (q @ k.mT / Q**0.5).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, -1) @ block.wo.T
        gate, up = (norm(x, block.ffn_norm) @ block.w_gate_up.T).chunk(2, dim=-1)
        x = x + (gate * torch.sigmoid(gate) * up) @ block.w_down.T
    return norm(x, model.final_norm) @ (model.embedding if c.tied else model.head).T


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"qk_norm": True, "head_dim": 12},
        {"tied": False, "kv_heads": 6},
        {"layers": 1, "rope_theta": 100.0},
        {"qkv_bias": True},
    ],
)
def test_logits_and_gradients_equal_the_textbook(fields: dict) -> None:
    model = model_with_random_norms(**fields).double()
    batch = tokens(3, 17)
    expected, found = plain_forward(model, batch), model(batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # the rotary tables are float32
    upstream = torch.randn_like(found)
    names, parameters = zip(*model.named_parameters(), strict=True)
    pairs = zip(
        names,
        torch.autograd.grad(found, parameters, upstream),
        torch.autograd.grad(expected, parameters, upstream),
        strict=True,
    )
    for name, a, b in pairs:
        torch.testing.assert_close(
            a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item(), msg=lambda m, name=name: f"{name}: {m}"
        )


def test_loss_is_the_cross_entropy_of_the_logits() -> None:
    model = model_with_random_norms()
    batch, targets = tokens(2, 20), tokens(2, 20, seed=1)
    targets[0, :5] = -100
    logits = model(batch).flatten(0, 1)
    for reduction in ("mean", "sum", "none"):
        expected = F.cross_entropy(logits, targets.flatten(), reduction=reduction)
        torch.testing.assert_close(model(batch, targets, reduction=reduction), expected, rtol=1e-5, atol=1e-5)


def test_no_position_sees_a_later_one() -> None:
    model = model_with_random_norms()
    batch = tokens(1, 20)
    changed = batch.clone()
    changed[0, 11] = (changed[0, 11] + 1) % 61
    a, b = model(batch), model(changed)
    torch.testing.assert_close(a[:, :11], b[:, :11], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(a[:, 11], b[:, 11])
    assert not torch.allclose(a[:, 19], b[:, 19])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"qk_norm": True},
        {"qkv_bias": True},
        OLMO | WINDOWS | {"rope_scaling": YARN, "scaled_windows": False},
        WINDOWS | {"no_rope_layers": [2], "mlp_bias": True},
    ],
)
def test_documents_do_not_affect_each_other(fields: dict) -> None:
    """cu_seqlens across rows: every piece of a document in a row is a text by itself."""
    model = model_with_random_norms(**fields).double()
    batch = tokens(2, 16)
    cuts = [0, 5, 5, 13, 20, 32]
    logits = model(batch, cu_seqlens=torch.tensor(cuts, dtype=torch.int32)).flatten(0, 1)
    flat = batch.flatten()
    for start, end in itertools.pairwise(sorted({*cuts, 16})):
        alone = model(flat[None, start:end])[0]
        torch.testing.assert_close(logits[start:end], alone, rtol=1e-6, atol=1e-6)


def test_documents_change_the_gradient_and_one_document_does_not() -> None:
    model = model_with_random_norms().double()
    batch, targets = tokens(2, 16), tokens(2, 16, seed=1)

    def gradient(cuts: list[int] | None) -> Tensor:
        cu_seqlens = None if cuts is None else torch.tensor(cuts, dtype=torch.int32)
        return torch.autograd.grad(model(batch, targets, cu_seqlens), model.blocks[0].wqkv)[0]

    torch.testing.assert_close(gradient(None), gradient([0, 32]))
    torch.testing.assert_close(gradient(None), gradient([0, 16, 32]))
    assert not torch.allclose(gradient(None), gradient([0, 8, 32]))


def test_padding_after_the_last_document_is_finite() -> None:
    model = model_with_random_norms()
    batch, targets = tokens(2, 16), tokens(2, 16, seed=1)
    cu_seqlens = torch.tensor([0, 7, 20], dtype=torch.int32)
    logits = model(batch, cu_seqlens=cu_seqlens)
    assert logits.isfinite().all()
    targets.view(-1)[20:] = -100
    loss = model(batch, targets, cu_seqlens)
    torch.testing.assert_close(
        loss, F.cross_entropy(logits.flatten(0, 1)[:20], targets.flatten()[:20]), rtol=1e-5, atol=1e-5
    )


def test_longer_than_the_context_is_refused() -> None:
    model = GPT(GPTConfig(**SMALL))
    model(tokens(1, 32))
    with pytest.raises(ValueError, match=r"33 tokens.*context is 32"):
        model(tokens(1, 33))
    with pytest.raises(ValueError, match=r"tokens: \(32,\) is invalid: they must be \[B, T\]"):
        model(tokens(1, 32)[0])
    ids: Any = tokens(1, 4)
    for name, given in (
        ("tokens", (None,)),
        ("tokens", (ids.tolist(),)),
        ("targets", (ids, ids.numpy())),
        ("cu_seqlens", (ids, ids, [0, 4])),
    ):
        with pytest.raises(ValueError, match=f"^{name}: .* is invalid: give a tensor of integers"):
            model(*given)


# ---------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", [{}, {"qk_norm": True}, WINDOWS], ids=str)
def test_attention_is_our_kernels_where_the_cpu_has_its_instructions(
    fields: dict[str, object], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward in every layer, and nowhere PyTorch's; without the instructions only PyTorch's."""
    if dtype not in attention_cpu.SUPPORTED:
        pytest.skip(f"this CPU has no {attention_cpu.INSTRUCTIONS[dtype]}")
    called: list[str] = []

    def count(where: object, name: str) -> None:
        real = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *given, **named: called.append(name) or real(*given, **named))

    count(attention_cpu, "attention")
    count(attention_cpu, "backward_into")
    count(F, "scaled_dot_product_attention")
    model = model_with_random_norms(head_dim=16, **fields).to(dtype)
    losses = []
    for supported in (attention_cpu.SUPPORTED, frozenset()):
        monkeypatch.setattr(attention_cpu, "SUPPORTED", supported)
        loss = model(tokens(2, 32), tokens(2, 32, seed=1))
        loss.backward()
        losses.append(loss.item())
        ours = ["attention"] * 3 + ["backward_into"] * 3
        assert called == (ours if supported else ["scaled_dot_product_attention"] * 3)
        called.clear()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if dtype == torch.float32 else 0.02)


# ------------------------------------------------------------------------------------------------------------- bf16


def test_bf16_is_near_float32() -> None:
    model = model_with_random_norms(qk_norm=True)
    batch, targets = tokens(4, 32), tokens(4, 32, seed=1)
    exact = model(batch)
    loss = model(batch, targets)
    low = GPT(model.config).to(torch.bfloat16)
    low.load_state_dict(model.state_dict())
    assert low(batch).dtype == torch.bfloat16
    assert (low(batch).float() - exact).abs().mean() < 0.03 * exact.abs().mean()
    low_loss = low(batch, targets)
    assert low_loss.dtype == torch.float32
    assert low_loss.item() == pytest.approx(loss.item(), rel=0.01)
    low_loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in low.parameters())


def test_bf16_gradients_arrive_in_float32_and_sum_over_micro_batches() -> None:
    model = model_with_random_norms()
    low = GPT(model.config).to(torch.bfloat16)
    low.load_state_dict(model.state_dict())
    for parameter in low.parameters():
        parameter.grad_dtype = torch.float32
    for seed in range(2):
        (model(tokens(2, 32, seed=seed), tokens(2, 32, seed=9)) / 2).backward()
        (low(tokens(2, 32, seed=seed), tokens(2, 32, seed=9)) / 2).backward()
    for (name, exact), parameter in zip(model.named_parameters(), low.parameters(), strict=True):
        assert exact.grad is not None
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        error = (parameter.grad - exact.grad).norm() / exact.grad.norm()
        assert error < 0.05, f"{name}: {error:.3f}"


@pytest.mark.parametrize(
    ("fields", "dtype", "checkpointing"),
    [
        ({}, torch.float32, "none"),
        ({"tied": False, "qkv_bias": True, "o_bias": True, "mlp_bias": True}, torch.float32, "selective"),
        ({"tied": False}, torch.bfloat16, "none"),
        (OLMO, torch.float32, "full"),
        ({"qk_norm": True}, torch.bfloat16, "full"),
    ],
)
def test_gradients_in_place_are_those_of_autograd(fields: dict, dtype: torch.dtype, checkpointing: str) -> None:
    """Of three micro-batches, matrices, biases, norms, a tied embedding; in bf16 nearer to those of float32."""
    gradients = []
    for kind, in_place in ((torch.float32, False), (dtype, False), (dtype, True)):
        model = model_with_random_norms(**fields).to(dtype).to(kind)
        model.checkpointing = checkpointing
        for parameter in model.parameters():
            parameter.grad_dtype = torch.float32
        if in_place:
            accumulate_in_place(model.parameters())
        for seed in range(3):
            batch, targets = tokens(2, 20, seed=seed), tokens(2, 20, seed=seed + 3)
            (model(batch, targets, scale=1 / 3) if in_place else model(batch, targets) / 3).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        assert all(gradient.dtype == torch.float32 for gradient in gradients[-1])
    for exact, plain, found in zip(*gradients, strict=True):
        allowed = 1.2 * torch.linalg.vector_norm(plain - exact) + 1e-5 * torch.linalg.vector_norm(exact)
        assert torch.linalg.vector_norm(found - exact) <= allowed


def test_rotary_tables_stay_float32() -> None:
    """Angles of large positions are worthless in bf16, wherever the cast happens."""
    config = GPTConfig(**{**SMALL, "context": 4096})
    cast = GPT(config)
    cast(tokens(1, 4))
    cast.to(torch.bfloat16)
    for cuts in (None, torch.tensor([0, 4096], dtype=torch.int32)):
        tables = cast._cos_sin(1, 4096, cuts, "plain")
        exact = torch.arange(4096, dtype=torch.float64)
        assert tables[0].dtype == torch.float32
        torch.testing.assert_close(tables[0].reshape(4096, -1)[:, 0].double(), exact.cos(), rtol=0, atol=1e-5)


def test_tables_made_in_inference_mode_serve_training() -> None:
    model = GPT(GPTConfig(**SMALL))
    with torch.inference_mode():
        model(tokens(1, 8))
    model(tokens(1, 8), tokens(1, 8)).backward()


# ------------------------------------------------------------------------------------------------------------- head


def test_untie() -> None:
    model = model_with_random_norms()
    batch, targets = tokens(2, 16), tokens(2, 16, seed=1)
    before, parameters = model(batch), len(list(model.parameters()))
    model(batch, targets).backward()
    tied_grad = model.embedding.grad
    model.zero_grad()
    model.untie()
    assert model.head is not None
    assert not model.config.tied
    assert len(list(model.parameters())) == parameters + 1
    assert torch.equal(model(batch), before)
    model(batch, targets).backward()
    assert tied_grad is not None
    assert model.embedding.grad is not None
    assert model.head.grad is not None
    torch.testing.assert_close(model.embedding.grad + model.head.grad, tied_grad)
    with torch.no_grad():
        model.head.add_(1)
    assert not torch.equal(model.embedding, model.head)
    model.untie()
    assert len(list(model.parameters())) == parameters + 1


def test_untied_and_tied_shapes_load_each_others_weights_only_when_they_fit() -> None:
    model = model_with_random_norms()
    model.untie()
    fresh = GPT(model.config)
    fresh.load_state_dict(model.state_dict())
    batch = tokens(1, 8)
    assert torch.equal(fresh(batch), model(batch))


# --------------------------------------------------------------------------------------------------------- learning


def test_it_learns() -> None:
    """Forty steps on one batch: the loss of a memorised text."""
    model = GPT(GPTConfig(**SMALL))
    batch = tokens(4, 33)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"qk_norm": True, "kv_heads": 2},
        {"qkv_bias": True},
        OLMO | WINDOWS,
        {"mlp_bias": True, "no_rope_layers": [0]},
    ],
    ids=["plain", "QK-norm and grouped queries", "QKV bias", "OLMo 3", "layers without RoPE"],
)
def test_checkpointing_changes_no_bit_and_recomputes_what_it_says(fields: dict) -> None:
    config = GPTConfig(**{**SMALL, **fields})
    tokens, targets = (torch.randint(config.vocab_size, (3, config.context)) for _ in range(2))
    results, products = {}, {}
    for mode in ("none", "selective", "full"):
        model = GPT(config, seed=3).bfloat16()
        model.checkpointing = mode
        with CountProducts() as count:
            loss = model(tokens, targets)
            loss.backward()
        results[mode] = [loss.detach(), *(p.grad for p in model.parameters())]
        products[mode] = count.products
    for mode in ("selective", "full"):
        assert all(torch.equal(a, b) for a, b in zip(results["none"], results[mode], strict=True)), mode
    assert products["selective"] == products["none"]
    assert products["full"] == products["none"] + 4 * config.layers


def test_checkpointing_of_another_name_is_refused() -> None:
    model = GPT(GPTConfig(**SMALL))
    tokens = torch.zeros(1, 2, dtype=torch.long)
    for name in ("Full", None, True):
        model.checkpointing = name  # type: ignore[assignment]
        with pytest.raises(ValueError, match=f"checkpointing: {name!r} is invalid: write one of none, selective, full"):
            model(tokens, tokens)


PRODUCTS = (
    *(torch.ops.aten.mm.default, torch.ops.aten.addmm.default),
    *(torch.ops.spt_fast.swiglu_linear.default, torch.ops.spt_fast.swiglu_linear_backward.default),
)


class CountProducts(TorchDispatchMode):
    """Counts products of matrices, and those in fp8."""

    products = in_fp8 = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.products += op in PRODUCTS
        self.in_fp8 += op is torch.ops.spt_fast.fp8_linear.default
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "fields",
    [{}, {"qk_norm": True, "kv_heads": 2, "tied": False}, {"qkv_bias": True}, OLMO | WINDOWS],
    ids=["plain", "QK-norm, untied", "QKV bias", "OLMo 3"],
)
def test_it_compiles_whole(fields: dict) -> None:
    config = GPTConfig(**{**SMALL, **fields})
    tokens, targets = (torch.randint(config.vocab_size, (3, config.context)) for _ in range(2))
    results = []
    for compiled in (False, True):
        model = GPT(config, seed=3)
        loss = (torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model)(tokens, targets)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_it_compiles_for_any_number_of_tokens_and_with_full_checkpointing() -> None:
    """Dynamo, which then takes floats as unknown too, must meet them outside of an autograd Function first."""
    torch._dynamo.reset()
    model = GPT(GPTConfig(**{**SMALL, "layers": 1, "qk_norm": True}), seed=3)
    model.checkpointing = "full"
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 12), (3, 17)):
        tokens, targets = (torch.randint(model.config.vocab_size, shape) for _ in range(2))
        loss = compiled(tokens, targets)
        expected = model(tokens, targets)
        torch.testing.assert_close(loss, expected)
        for found, right in zip(
            *(torch.autograd.grad(each, model.embedding) for each in (loss, expected)), strict=True
        ):
            torch.testing.assert_close(found, right)


# -------------------------------------------------------------------------------------------------------------- fp8

FP8 = {"layers": 2, "width": 48, "heads": 6, "kv_heads": 2, "ffn": 64, "context": 32, "vocab_size": 61}
"""Weights, by block: wqkv 80 x 48, wo 48 x 48, w_gate_up 128 x 48, w_down 48 x 64."""


def loss_and_gradients(model: GPT) -> list[Tensor]:
    for parameter in model.parameters():
        parameter.grad_dtype, parameter.grad = torch.float32, None
    loss = model(tokens(2, 32), tokens(2, 32, seed=1))
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize(
    ("width", "fields", "taken"),
    [
        (48, {}, 4),
        (64, {"width": 64, "heads": 4}, 4),
        (49, {}, 0),
        (48, {"qkv_bias": True}, 4),
        (48, OLMO, 4),
        (48, {"qkv_bias": True, "o_bias": True, "mlp_bias": True}, 4),
    ],
)
def test_wide_layers_alone_are_taken_in_fp8(
    width: int, fields: dict, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpt, "FP8_WIDTH", width)
    model = GPT(GPTConfig(**{**FP8, **fields})).bfloat16()
    exact = loss_and_gradients(model)
    model.fp8 = True
    with CountProducts() as count:
        found = loss_and_gradients(model)
    assert count.in_fp8 == taken * FP8["layers"]
    assert model.fp8_share == (1.0 if taken else 0.0)
    assert torch.equal(exact[0], found[0]) == (taken == 0)
    assert all(torch.equal(a, b) for a, b in zip(exact, found, strict=True)) == (taken == 0)


def test_a_weight_that_fp8_cannot_multiply_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A feed-forward width that is no multiple of 16 makes w_down so; w_gate_up has twice that."""
    monkeypatch.setattr(gpt, "FP8_WIDTH", 48)
    model = GPT(GPTConfig(**{**FP8, "ffn": 72}))
    model.fp8 = True
    with CountProducts() as count:
        loss_and_gradients(model)
    assert count.in_fp8 == 3 * FP8["layers"]
    taken, left = 80 * 48 + 48 * 48 + 144 * 48, 72 * 48
    assert model.fp8_share == pytest.approx(taken / (taken + left))


def test_the_presets_that_fp8_is_for() -> None:
    with torch.device("meta"):
        shares = {name: GPT(GPTConfig.preset(name, layers=1)).fp8_share for name in ("350m", "1b", "8b")}
    assert shares["350m"] == 0
    assert shares["1b"] == 1
    assert shares["8b"] == 1


def test_without_gradients_nothing_is_taken_in_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt, "FP8_WIDTH", 16)
    model = GPT(GPTConfig(**FP8)).bfloat16()
    with torch.no_grad():
        exact = model(tokens(2, 32), tokens(2, 32, seed=1))
        model.fp8 = True
        assert torch.equal(model(tokens(2, 32), tokens(2, 32, seed=1)), exact)
    assert not torch.equal(model(tokens(2, 32), tokens(2, 32, seed=1)), exact)


def test_fp8_gradients_sum_over_micro_batches_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt, "FP8_WIDTH", 16)
    model = GPT(GPTConfig(**FP8)).bfloat16()
    model.fp8 = True
    alone = loss_and_gradients(model)[1:]
    loss_and_gradients(model)
    model(tokens(2, 32), tokens(2, 32, seed=1)).backward()
    for gradient, parameter in zip(alone, model.parameters(), strict=True):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert torch.equal(parameter.grad, 2 * gradient)


def test_fp8_asks_only_attention_for_its_largest_magnitudes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and SwiGLU hand over those of their results and gradients: right ones, or the model's would differ."""
    monkeypatch.setattr(gpt, "FP8_WIDTH", 16)
    asked, gradients, both = [], [], fp8._triton_both
    forgets = False

    def counted(x: Tensor, dtype: torch.dtype, largest: Tensor | None) -> tuple[Tensor, ...]:
        asked.append(largest is None)
        return both(x, dtype, None if forgets else largest)

    monkeypatch.setitem(fp8._QUANTISE_BOTH, "triton", counted)
    for forgets in (False, True):  # noqa: B007, `counted` uses it
        model = GPT(GPTConfig(**FP8 | {"layers": 1}), seed=3)
        model.fp8, model.checkpointing = True, "full"
        asked.clear()
        with prefer("triton"):
            gradients.append(loss_and_gradients(model))
        assert (sum(asked), len(asked)) == (3, 12)  # forward, forward again and backward
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_checkpointing_with_fp8_changes_no_bit_and_keeps_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt, "FP8_WIDTH", 16)
    results, products = {}, {}
    for mode in ("none", "selective", "full"):
        model = GPT(GPTConfig(**FP8), seed=3).bfloat16()
        model.fp8, model.checkpointing = True, mode
        with CountProducts() as count:
            results[mode] = loss_and_gradients(model)
        products[mode] = count.in_fp8
    for mode in ("selective", "full"):
        assert all(torch.equal(a, b) for a, b in zip(results["none"], results[mode], strict=True)), mode
    assert products == {"none": 8, "selective": 8, "full": 16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_in_fp8_compiles_whole(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt, "FP8_WIDTH", 16)
    results = []
    for compiled in (False, True):
        model = GPT(GPTConfig(**FP8), seed=3).to(dtype)
        model.fp8 = True
        if compiled:
            model.compile(fullgraph=True, backend="aot_eager")
        results.append(loss_and_gradients(model))
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-6  # compiled, all gradients pass through the parameters' dtype
    for eager, made in zip(*results, strict=True):
        assert (made - eager).norm() <= rounding * eager.norm()


def test_a_shape_may_be_given_by_position() -> None:
    shape = GPTConfig(2, 64, 4, 2, 96, 24, 80, 32, True, False, 5000.0, 1e-5)
    assert (shape.layers, shape.width, shape.heads, shape.kv_heads, shape.ffn, shape.context) == (2, 64, 4, 2, 96, 24)
    assert (shape.vocab_size, shape.head_dim, shape.qk_norm, shape.tied) == (80, 32, True, False)
    assert (shape.rope_theta, shape.norm_eps) == (5000.0, 1e-5)
