"""The estimate against the allocator: the peak of a step as PyTorch's profiler sees it, byte by byte, on the CPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from spt_fast.kernels import attention_cpu
from spt_fast.model import gpt
from spt_fast.model.flops import block_matrices, parameters
from spt_fast.model.gpt import GPT, GPTConfig
from spt_fast.model.memory import DISTRIBUTIONS, Memory, Step
from spt_fast.model.parameters import hidden_matrices
from spt_fast.optimizers import AdamW, Muon, Optimizer
from spt_fast.train.optim import ModelOptimizer

SHAPE = {"layers": 4, "width": 128, "heads": 4, "kv_heads": 4, "ffn": 384, "context": 256, "vocab_size": 1024}
GROUPED = {"kv_heads": 1, "qk_norm": True, "layers": 6}
UNTIED = {"tied": False, "vocab_size": 8192, "kv_heads": 2}
WIDE_HEAD = {"vocab_size": 16_384, "qk_norm": True}
OLMO = {"norms": "after", "qk_norm": True, "qk_norm_over": "width"}
BF16, FP32 = torch.bfloat16, torch.float32
ADAMW = AdamW(lr=1e-3)

CASES: list[tuple[dict[str, Any], int, torch.dtype, str, dict[str, Any]]] = [
    ({}, 1, BF16, "none", {}),
    ({}, 8, FP32, "none", {}),
    (GROUPED, 8, BF16, "none", {}),
    (GROUPED, 4, FP32, "none", {"documents": True}),
    (GROUPED, 4, BF16, "selective", {"documents": True}),
    (GROUPED, 8, FP32, "selective", {}),
    (GROUPED, 8, BF16, "full", {"anchor": True}),
    (GROUPED, 4, FP32, "full", {"documents": True}),
    (UNTIED, 4, BF16, "none", {"micro_batches": 2, "anchor": True}),
    (UNTIED, 4, FP32, "selective", {}),
    (UNTIED, 1, BF16, "full", {"micro_batches": 2}),
    (WIDE_HEAD, 2, FP32, "none", {"micro_batches": 3}),
    (WIDE_HEAD, 1, BF16, "none", {}),
    (WIDE_HEAD, 2, FP32, "full", {}),
    (UNTIED, 4, BF16, "none", {"micro_batches": 2, "freeze": "embeddings", "anchor": True}),
    (UNTIED, 4, FP32, "full", {"freeze": "embeddings"}),
    ({"qkv_bias": True}, 4, BF16, "selective", {}),
    ({"width": 256, "ffn": 1024, "layers": 2, "vocab_size": 4096}, 4, FP32, "full", {}),
    (OLMO, 4, FP32, "selective", {"documents": True}),
    (OLMO | {"kv_heads": 1}, 4, FP32, "full", {}),
    ({"window": 64, "full_layers": [1], "no_rope_layers": [0, 1, 2, 3]}, 1, FP32, "none", {}),
]


def allocated_at_most(
    config: GPTConfig,
    micro: int,
    dtype: torch.dtype,
    checkpointing: str,
    *,
    micro_batches: int = 1,
    documents: bool = False,
    anchor: bool = False,
    freeze: str = "none",
    settings: Optimizer = ADAMW,
) -> int:
    """Bytes that the CPU's allocator has given out at the peak of a step, model and optimizer included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = GPT(config).to(dtype)
        model.checkpointing = checkpointing
        model.embedding.requires_grad_(freeze == "none")
        optimizer = ModelOptimizer(model, settings, 0.1 if anchor else 0.0)
        T = config.context
        cuts = torch.tensor([0, T // 3, T, micro * T], dtype=torch.int32) if documents else None
        batches = [torch.randint(config.vocab_size, (2, micro, T)).unbind() for _ in range(micro_batches)]
        for tokens, targets in batches:
            model(tokens, targets, cuts, scale=1 / micro_batches).backward()
        norm = optimizer.grad_norm()
        optimizer.step(1e-3, norm, ~torch.isfinite(norm))
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize(("fields", "micro", "dtype", "checkpointing", "more"), CASES)
def test_the_estimate_is_the_allocators_peak(
    fields: dict[str, Any], micro: int, dtype: torch.dtype, checkpointing: str, more: dict[str, Any]
) -> None:
    """Within 5%, of what comes and goes too, since what stays is easily counted."""
    config = GPTConfig(**{**SHAPE, **fields})
    peak = allocated_at_most(config, micro, dtype, checkpointing, **more)
    estimate = Step(config, micro, dtype=dtype, checkpointing=checkpointing, device="cpu", **more).memory()
    stays = estimate.parameters + estimate.optimizer
    assert estimate.total == pytest.approx(peak, rel=0.05)
    assert estimate.total - stays == pytest.approx(peak - stays, rel=0.05)


@pytest.mark.parametrize(
    ("preset", "context", "micro", "peak_gb"),
    [("10m", 1024, 32, 3.352), ("124m", 1024, 32, 12.626), ("350m", 2048, 16, 32.733), ("1b", 2048, 16, 57.531)],
)
def test_the_estimate_is_what_an_h200_allocated(preset: str, context: int, micro: int, peak_gb: float) -> None:
    """Peaks of benchmarks/results/2026-11-29-nvidia-h200.json: the profiles', and that without graphs at 10m."""
    config = GPTConfig.preset(preset, context=context, vocab_size=50_304)
    assert Step(config, micro, dtype=BF16).memory().total == pytest.approx(peak_gb * 1e9, rel=0.01)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_what_muon_needs_for_an_update_is_counted(dtype: torch.dtype) -> None:
    config = GPTConfig(**{**SHAPE, "width": 256, "ffn": 640, "context": 16, "vocab_size": 64, "kv_heads": 2})
    muon = Muon(lr=1e-3)
    peak = allocated_at_most(config, 1, dtype, "none", settings=muon)
    states = {"states": len(muon.kinds_of(hidden=False)), "hidden_states": len(muon.kinds_of(hidden=True))}
    update = muon.update_bytes(hidden_matrices(config), dtype.itemsize)
    without = Step(config, 1, dtype=dtype, device="cpu", **states).memory()
    estimate = Step(config, 1, dtype=dtype, device="cpu", **states, update=update).memory()
    assert estimate.total == pytest.approx(peak, rel=0.05)
    assert estimate.total > 1.1 * without.total
    assert estimate.optimizer == without.optimizer + update


@pytest.mark.parametrize(
    "case", [case for case in CASES if case[2] == FP32 and (case[4].get("documents") or case[0].get("window"))]
)
def test_without_our_attention_the_estimate_is_the_allocators_peak_too(
    case: tuple[dict[str, Any], int, torch.dtype, str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's attention takes a mask of T x T for documents and windows."""
    monkeypatch.setattr(attention_cpu, "SUPPORTED", frozenset())
    test_the_estimate_is_the_allocators_peak(*case)


def test_what_stays_is_counted_by_hand() -> None:
    config = GPTConfig(**{**SHAPE, "context": 1})
    count = parameters(config)
    low, full, held = (
        Step(config, 1, dtype=dtype, micro_batches=2, anchor=anchor).memory()
        for dtype, anchor in ((BF16, False), (FP32, False), (BF16, True))
    )
    assert (low.parameters, low.gradients, low.optimizer) == (2 * count, 4 * count, 12 * count)
    assert (full.parameters, full.gradients, full.optimizer) == (4 * count, 4 * count, 8 * count)
    assert held.optimizer == 16 * count
    assert low.total == sum(size for part, size in vars(low).items() if part not in ("total", "host"))


@pytest.mark.parametrize(("more", "dtype"), [({}, BF16), (OLMO, FP32), ({"kv_heads": 1}, FP32)])
def test_what_fp8_keeps_is_what_autograd_keeps(
    more: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than without it: of a layer's weights both layouts once, and of each token what its wide layers read."""
    monkeypatch.setattr(gpt, "FP8_WIDTH", 16)
    config = GPTConfig(**(SHAPE | more | {"layers": 1}))

    def kept(fp8: bool) -> tuple[int, int]:
        model = GPT(config).to(dtype)
        model.fp8 = fp8
        optimizer = ModelOptimizer(model, AdamW(lr=1e-3))
        storages: dict[int, int] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        held = {param.untyped_storage().data_ptr() for param in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(*torch.zeros(2, 2, config.context, dtype=torch.int64))
        weights = [x for p in model.parameters() if p.in_place.in_fp8 for x in p.in_place.in_fp8[1]]
        layouts = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in weights}
        assert loss.isfinite()
        del optimizer
        others = sum(size for at, size in storages.items() if at not in held and at not in layouts)
        return sum(layouts.values()), others

    def counted(fp8: bool) -> Memory:
        monkeypatch.setattr(Step, "_chunk_of_logits", lambda _: 1 << 30)  # so that the peak is where all is kept
        return Step(config, 2, dtype=dtype, device="cpu", fp8=fp8).memory()

    (weights, more_kept), (none, plain) = kept(True), kept(False)
    assert none == 0
    assert counted(True).parameters - counted(False).parameters == weights > 0
    assert counted(True).activations - counted(False).activations == pytest.approx(more_kept - plain, abs=64)


def test_a_recording_takes_what_a_step_needs_for_a_while() -> None:
    config, narrow = GPTConfig.preset("1b"), GPTConfig.preset("124m")
    plain, recorded = (Step(config, 2, dtype=BF16, recorded=recorded).memory() for recorded in (False, True))
    assert recorded.recording == plain.activations + plain.logits
    assert recorded.total == plain.total + recorded.recording
    assert Step(config, 2, dtype=BF16, recorded=True, stage=1, world=2).memory().recording == 0
    assert Step(config, 2, dtype=BF16, fp8=True).memory().parameters > 1.9 * plain.parameters
    one, other = (Step(narrow, 2, dtype=BF16, fp8=fp8).memory() for fp8 in (False, True))
    assert one == other, "no layer is wide enough"


def test_each_stage_of_zero_divides_its_parts() -> None:
    """An 8B model on 8 processes, in the middle of a step: of 18 bytes a parameter stage 1 leaves 7.5, stage 2 4, and
    stage 3 2.25. Autograd's own gradients in bf16 (stages 1 and 2) and what stage 3 gathers come on top.
    """
    config, world = GPTConfig.preset("8b"), 8
    count = parameters(config)

    def parts(stage: int, offload: str = "none") -> Memory:
        step = Step(config, 1, dtype=BF16, micro_batches=4, stage=stage, world=world, offload=offload)
        return step.memory()

    zero, one, two, three = (parts(stage) for stage in range(4))
    assert zero.optimizer == 12 * count
    assert one.optimizer == two.optimizer == three.optimizer == 12 * count // world
    assert zero.gradients == 4 * count
    assert one.gradients == (4 + 2) * count
    assert two.gradients == 4 * count // world + 2 * count
    assert three.gradients == 4 * count // world
    assert one.parameters == two.parameters == 2 * count
    assert 2 * count // world < three.parameters < 2 * count
    assert parts(2, "optimizer").optimizer == 0
    assert parts(3, "optimizer").host == 16 * count // world
    assert parts(2, "optimizer").host == (16 + 4) * count // world + 2 * config.vocab_size * config.width
    assert parts(3, "all").host == 18 * count // world
    assert three.parameters - parts(3, "all").parameters == 2 * count // world


@pytest.mark.parametrize(("stage", "offload"), DISTRIBUTIONS)
def test_checkpointing_keeps_less(stage: int, offload: str) -> None:
    totals = [
        Step(
            GPTConfig.preset("350m"), 16, dtype=BF16, stage=stage, world=4, offload=offload, checkpointing=checkpointing
        )
        .memory()
        .total
        for checkpointing in ("none", "selective", "full")
    ]
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == 3


def test_an_optimizer_with_one_state_takes_half_of_what_two_take() -> None:
    config = GPTConfig.preset("1m")
    one, two = (Step(config, 1, dtype=FP32, states=states).memory().optimizer for states in (1, 2))
    assert (one, two) == (4 * parameters(config), 8 * parameters(config))
    muon = Step(config, 1, dtype=FP32, states=2, hidden_states=1).memory().optimizer
    assert muon == two - 4 * block_matrices(config)
