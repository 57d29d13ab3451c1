from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spt_fast.errors import RecipeError
from spt_fast.kernels import matmul
from spt_fast.model import flops
from spt_fast.model.gpt import GPT, GPTConfig
from spt_fast.model.presets import PRESETS

SHAPES = [
    {},
    {"qk_norm": True, "head_dim": 24},
    {"tied": False, "kv_heads": 6},
    {"layers": 1, "ffn": 7},
    {"qkv_bias": True},
    {"qk_norm": True, "qk_norm_over": "width", "norms": "after"},
    {"o_bias": True, "qkv_bias": True, "mlp_bias": True, "no_rope_layers": [0]},
    {"family": "phi3", "window": 5},
]
SMALL = {"layers": 3, "width": 48, "heads": 6, "kv_heads": 2, "ffn": 80, "context": 32, "vocab_size": 61}


@pytest.mark.parametrize("fields", SHAPES)
def test_parameter_counts_are_the_models(fields: dict) -> None:
    config = GPTConfig(**{**SMALL, **fields})
    with torch.device("meta"):
        parameters = dict(GPT(config).named_parameters())
    assert flops.parameters(config) == sum(p.numel() for p in parameters.values())
    matrices = sum(p.numel() for name, p in parameters.items() if p.dim() == 2 and name not in ("embedding", "head"))
    assert flops.matmul_parameters(config) == matrices + config.vocab_size * config.width


def test_train_flops_are_those_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """6N + 12LHQT of the convention against the products of matrices that a step really makes."""
    monkeypatch.setattr(matmul, "PAYS", False)  # the counter sees PyTorch's products, on every processor
    config = GPTConfig(**SMALL)
    with torch.device("meta"):
        model = GPT(config)
    from torch.utils.flop_counter import FlopCounterMode

    tokens = torch.zeros(2, 32, dtype=torch.long)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    # The counter knows no flash attention on a CPU, so that it counts the 6N alone, and sees no products inside custom
    # ops, of which the loss makes three, and SwiGLU's with its projection two.
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    linear = sum(n for op, n in counted.items() if "attention" not in op)
    of_the_loss = 3 * 2 * 64 * config.width * config.vocab_size
    of_swiglu = 2 * 2 * 64 * config.layers * config.width * config.ffn
    assert linear + of_the_loss + of_swiglu == 64 * 6 * flops.matmul_parameters(config)
    assert flops.train_flops_per_token(config) == 6 * flops.matmul_parameters(config) + 12 * 3 * 6 * 8 * 32
    windows = replace(config, window=8, full_layers=(1,))
    assert flops.train_flops_per_token(windows) == 6 * flops.matmul_parameters(config) + 12 * 6 * 8 * (32 + 8 + 8)
    short = replace(config, context=16)
    assert flops.train_flops_per_token(replace(short, window=20)) == flops.train_flops_per_token(short)
    assert flops.train_flops_per_token(short) == 6 * flops.matmul_parameters(config) + 12 * 3 * 6 * 8 * 16


def test_124m_by_hand() -> None:
    """GPT-2 small's depth and width: N = 12 · (4 · 768² + 3 · 768 · 2048) + 50,304 · 768."""
    config = GPTConfig.preset("124m")
    assert flops.matmul_parameters(config) == 12 * (4 * 768**2 + 3 * 768 * 2048) + 50_304 * 768
    assert flops.train_flops_per_token(config) == 6 * flops.matmul_parameters(config) + 12 * 12 * 768 * 1024


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 990),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_peaks_are_dense(name: str, tera: float) -> None:
    assert flops.peak_flops_by_name(name) == tera * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "Tesla V100-SXM2-16GB",
        "NVIDIA A1000",
        "NVIDIA A10G",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "AMD EPYC",
        "",
    ],
)
def test_unknown_devices_have_no_peak(name: str) -> None:
    assert flops.peak_flops_by_name(name) is None


def test_a_cpu_has_no_peak_and_its_label_says_so() -> None:
    assert flops.peak_flops("cpu") is None
    assert flops.mfu_label("cpu") == "6N+12LHQT, n/a"


def test_label_of_an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert flops.mfu_label("cuda") == "6N+12LHQT, bf16 dense 989"


# ---------------------------------------------------------------------------------------------------------- presets


def size_of(name: str) -> float:
    number = name.removeprefix("olmo-")
    return float(number[:-1]) * {"m": 1e6, "b": 1e9}[number[-1]]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_size_of_their_name(name: str) -> None:
    config = GPTConfig.preset(name)
    # OLMo-1B is called so at 1.18B parameters.
    assert flops.parameters(config) == pytest.approx(size_of(name), rel=0.18 if name == "olmo-1b" else 0.15)


def test_the_promised_presets_are_there() -> None:
    promised = {"1m", "3m", "10m", "30m", "60m", "124m", "350m", "1b", "3b", "8b"}
    assert promised | {"olmo-300m", "olmo-600m", "olmo-1b", "olmo-3b"} <= set(PRESETS)


def test_the_papers_sizes_differ_in_layers_as_it_says() -> None:
    """3B has twice the layers of 1B, 600M and 300M half."""
    layers = {name: GPTConfig.preset(f"olmo-{name}").layers for name in ("300m", "600m", "1b", "3b")}
    assert layers == {"300m": 8, "600m": 8, "1b": 16, "3b": 32}


def test_preset_overrides() -> None:
    config = GPTConfig.preset("10m", vocab_size=999, context=64, heads=12, kv_heads=4, qk_norm=True)
    assert (config.vocab_size, config.context, config.head_dim, config.qk_norm) == (999, 64, 32, True)


def test_wrong_presets_are_refused_with_those_that_exist() -> None:
    with pytest.raises(RecipeError, match=r"'125m' is invalid: write one of 1m, .* 124m, .*; did you mean '124m'\?"):
        GPTConfig.preset("125m")
    with pytest.raises(RecipeError, match=r"did you mean '10m'\?"):
        GPTConfig.preset("10M")
    with pytest.raises(RecipeError, match=r"model\.widht.*'width'"):
        GPTConfig.preset("10m", widht=64)
