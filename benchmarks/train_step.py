"""Tokens per second of our whole training step against a plain PyTorch GPT of equal shape, interleaved in one run.

    python -m benchmarks.train_step [--rounds 7] [--steps 3] [--no-compile] [--json FILE]

Both sides read the same file of token ids and do everything that a step needs: data, forward, backward, clipping to
norm 1, AdamW.

ours    the trainer's own loader, engine and optimizer: bf16 parameters, float32 masters, gradients summed in float32,
        no autocast, nothing compiled
plain   what a user would write (nanoGPT with RMSNorm, RoPE and SwiGLU): float32 parameters, bf16 autocast, SDPA,
        fused torch.optim.AdamW, windows at random offsets of a memory map; compiled by torch.compile and not

Freed memory is kept by the process, as the trainer does, which speeds up both sides. A round runs `steps` steps of
each in turn, so that a machine whose speed drifts slows all of them; the figure is the median over the rounds, with
the quartiles beside it.

Legend: B sequences, T positions, D width, H heads, Q head dimension, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.machine import machine
from spt_fast.config import Optimizer
from spt_fast.data.loader import Loader
from spt_fast.data.mixture import Mixture
from spt_fast.data.ring import Ring
from spt_fast.data.schedule import Schedule
from spt_fast.data.shards import TokenDataset
from spt_fast.kernels import keep_freed_memory
from spt_fast.model.flops import parameters, train_flops_per_token
from spt_fast.model.gpt import GPT, GPTConfig
from spt_fast.train.engine import LocalEngine, pick_dtype, weights_of

LR, BETAS, WEIGHT_DECAY, CLIP = 1e-3, (0.9, 0.95), 0.1, 1.0
FILE_TOKENS = 4_000_000

Step = Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(description="our training step against plain PyTorch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps of each in a round")
    parser.add_argument("--batch", type=int, default=16, help="sequences in a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--no-compile", action="store_true", help="leave the compiled plain GPT out (compiling takes a minute)"
    )
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    config = GPTConfig(layers=6, width=384, heads=6, kv_heads=6, ffn=1024, context=256, vocab_size=4096)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokens.bin"
        # Frequencies like those of text: token i in proportion to 1 / i.
        ids = np.exp(np.random.default_rng(0).uniform(0, np.log(config.vocab_size), FILE_TOKENS)) - 1
        ids.astype(np.uint16).tofile(file)
        contenders = {"ours": ours(config, file, options.batch)}
        contenders["plain, eager"] = plain(config, file, options.batch, compiled=False)
        if not options.no_compile:
            contenders["plain, compiled"] = plain(config, file, options.batch, compiled=True)
        rates = measure(contenders, options.rounds, options.steps, options.batch * config.context)

    report = {
        "machine": machine("torch"),
        "threads": options.threads,
        "parameters": parameters(config),
        "shape": f"{config.layers}x{config.width}, batch {options.batch} x {config.context}, V {config.vocab_size}",
        "flops_per_token": train_flops_per_token(config),
        "tokens_per_s": {name: quartiles(samples) for name, samples in rates.items()},
        "rounds": options.rounds,
    }
    print_table(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def measure(contenders: dict[str, Step], rounds: int, steps: int, tokens_per_step: int) -> dict[str, list[float]]:
    """Tokens per second of every contender in every round, after two steps each to warm up."""
    for name, step in contenders.items():
        losses = [step() for _ in range(2)]
        print(f"{name}: first losses {losses[0]:.3f} {losses[1]:.3f}", flush=True)
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, step in contenders.items():
            began = time.perf_counter()
            for _ in range(steps):
                step()
            rates[name].append(steps * tokens_per_step / (time.perf_counter() - began))
    return rates


def ours(config: GPTConfig, file: Path, batch: int) -> Step:
    """A step of the trainer as it is."""
    dataset = TokenDataset.open(file, dtype="uint16")
    schedule = Schedule(
        mixture=Mixture({"text": 1}),
        rings={"text": Ring(dataset.num_tokens, config.context, seed=0, source_name="text")},
        sequences=batch,
        start_counts={"text": 0},
        seed=0,
        phase=0,
    )
    loader = Loader(
        schedule, {"text": dataset}, config.context, micro=batch, vocab_size=config.vocab_size, last_step=1 << 40
    )
    model = GPT(config)
    engine = LocalEngine(model, device=torch.device("cpu"), dtype=pick_dtype("auto", torch.device("cpu")))
    engine.begin(Optimizer(lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, clip=CLIP), 0.0, weights_of(model))
    steps = iter(loader)

    def step() -> float:
        _, micro_batches = next(steps)
        result = engine.step(micro_batches, LR, lambda: False)
        assert result is not None
        return result.read()[0]

    return step


def plain(config: GPTConfig, file: Path, batch: int, *, compiled: bool) -> Step:
    """A step of the plain GPT as its author would write it."""
    model = PlainGPT(config)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    kept = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)
    forward = torch.compile(model) if compiled else model
    batches = random_windows(file, batch, config.context)

    def step() -> float:
        tokens, targets = next(batches)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = forward(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def random_windows(file: Path, batch: int, context: int) -> Iterator[tuple[Tensor, Tensor]]:
    ids = np.memmap(file, dtype=np.uint16, mode="r")
    while True:
        starts = torch.randint(len(ids) - context, (batch,)).tolist()
        windows = torch.stack([torch.from_numpy(ids[i : i + context + 1].astype(np.int64)) for i in starts])
        yield windows[:, :-1], windows[:, 1:]


class PlainBlock(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        D = config.width
        self.heads = config.heads
        self.norm1, self.norm2 = nn.RMSNorm(D, eps=1e-6), nn.RMSNorm(D, eps=1e-6)
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.gate_up = nn.Linear(D, 2 * config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, D, bias=False)

    def forward(self, x_BTD: Tensor, cos_TQ: Tensor, sin_TQ: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = (x.view(B, T, self.heads, -1).transpose(1, 2) for x in self.qkv(self.norm1(x_BTD)).split(D, dim=-1))
        q, k = (x * cos_TQ + rotate_half(x) * sin_TQ for x in (q, k))
        o_BHTQ = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True)
        x_BTD = x_BTD + self.out(o_BHTQ.transpose(1, 2).reshape(B, T, D))
        gate, up = self.gate_up(self.norm2(x_BTD)).chunk(2, dim=-1)
        return x_BTD + self.down(F.silu(gate) * up)


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


class PlainGPT(nn.Module):
    cos_TQ: Tensor
    sin_TQ: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        self.apply(lambda m: nn.init.normal_(m.weight, std=0.02) if isinstance(m, nn.Linear | nn.Embedding) else None)
        Q = config.width // config.heads
        angles = torch.outer(torch.arange(config.context), config.rope_theta ** -(torch.arange(0, Q, 2) / Q)).repeat(
            1, 2
        )
        self.register_buffer("cos_TQ", angles.cos())
        self.register_buffer("sin_TQ", angles.sin())

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, self.cos_TQ, self.sin_TQ)
        logits_BTV = self.head(self.norm(x_BTD))
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())


def quartiles(samples: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else samples * 3
    return {"low": round(low, 1), "median": round(median, 1), "high": round(high, 1)}


def print_table(report: dict) -> None:
    print(
        "\n" + ", ".join(f"{key} {value}" for key, value in report["machine"].items()), f"threads {report['threads']}"
    )
    print(f"{report['shape']}, {report['parameters']:,} parameters; medians of {report['rounds']} rounds [quartiles]\n")
    ours_median = report["tokens_per_s"]["ours"]["median"]
    for name, figures in report["tokens_per_s"].items():
        gflops = figures["median"] * report["flops_per_token"] / 1e9
        print(
            f"{name:16} {figures['median']:8,.0f} tokens/s [{figures['low']:,.0f}, {figures['high']:,.0f}]  "
            f"{gflops:6,.0f} GFLOP/s  ours is {ours_median / figures['median']:.2f}x"
        )


if __name__ == "__main__":
    main()
