from __future__ import annotations

import pytest
import torch

from spt_fast.model.gpt import GPT, GPTConfig
from spt_fast.model.parameters import table

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
def test_the_table_is_the_model(fields: dict) -> None:
    """Names, order and shapes; and what a parameter is: a matrix, a norm at 1 or a bias at 0."""
    config = GPTConfig(**{**SMALL, **fields})
    parameters = dict(GPT(config).named_parameters())
    rows = table(config)
    assert [(name, row.shape, row.size) for name, row in rows.items()] == [
        (name, parameter.shape, parameter.numel()) for name, parameter in parameters.items()
    ]
    for name, parameter in parameters.items():
        assert rows[name].kind.decayed == (parameter.dim() == 2), name
        if parameter.dim() == 1:
            assert (parameter == (0 if ".b" in name else 1)).all(), name


def test_untying_adds_the_heads_row() -> None:
    model = GPT(GPTConfig(**SMALL))
    model.untie()
    assert list(table(model.config)) == [name for name, _ in model.named_parameters()]
    assert torch.Size(table(model.config)["head"].shape) == model.embedding.shape
