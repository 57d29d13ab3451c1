"""Tokens per second of our whole training step against PyTorch and Hugging Face models of equal shape, in one run.

    python -m benchmarks.train_step [--preset 124m …] [--rounds 7] [--steps 3] [--no-compile]
        [--tune SECONDS | --fp8 | --graphs] [--sides "plain, compiled" …] [--dry] [--json FILE]

All sides read the same file of token ids and do everything that a step needs: data, forward, backward, clipping to
norm 1, AdamW; losses are read one step late.

ours          the trainer's own loader, engine and optimizer: bf16 parameters, float32 masters, gradients summed in
              float32, no autocast, nothing compiled; --tune: with the kernels that the tuner chooses, as a run has
              them, and "ours by default" beside it
plain         a typical user's code (nanoGPT with RMSNorm, RoPE and SwiGLU): float32 parameters, bf16 autocast, SDPA,
              fused torch.optim.AdamW, windows at random offsets of a memory map; with and without torch.compile; on a
              CPU also compiled in bf16 only and in float32 only, and ours is compared with the fastest of them
ours in fp8   the same, the blocks' wide products in fp8; --fp8 measures only it and ours, --graphs only steps with and
              without CUDA graphs
Hugging Face  its Llama with Liger's kernels patched in (fused loss, norms, RoPE, SwiGLU), else as plain, not compiled

On a CPU: small shapes, a fixed batch, freed memory kept by the process as in the trainer, which speeds up all sides;
ours also in float32. On a GPU: the presets, one micro-batch a step, each side's as large as fits, down from 32K tokens.

A round runs `steps` steps of each in turn, so that a machine whose speed drifts slows all of them; the figure is the
median over the rounds, with the quartiles. If models, gradients and moments of all sides don't fit a GPU together, each
runs all its rounds in turn, and ours again at the end.

Legend: B sequences, T positions, D width, H heads, Q head dimension, V vocabulary.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.kernels.harness import quartiles
from benchmarks.machine import PEERS, machine
from spt_fast.config import Phase
from spt_fast.data.loader import Loader
from spt_fast.data.mixture import Mixture
from spt_fast.data.order import SampleOrder
from spt_fast.data.ring import Ring
from spt_fast.data.shards import TokenDataset
from spt_fast.files import write_text
from spt_fast.kernels import keep_freed_memory
from spt_fast.kernels.backend import install
from spt_fast.kernels.tuner import chosen, describe, tune
from spt_fast.model import gpt
from spt_fast.model.flops import mfu_label, parameters, peak_flops, train_flops_per_token
from spt_fast.model.gpt import GPT, GPTConfig
from spt_fast.optimizers import AdamW
from spt_fast.train.local import STEPS_TO_WARM_UP, LocalEngine
from spt_fast.train.precision import pick_precision
from spt_fast.train.snapshot import weights_of
from spt_fast.train.tuning import asked_of

LR, BETAS, WEIGHT_DECAY, CLIP = 1e-3, (0.9, 0.95), 0.1, 1.0
FILE_TOKENS = 4_000_000
VOCAB_SIZE = 50_304
CONTEXTS = {"10m": 1024, "124m": 1024, "350m": 2048, "1b": 2048}
"""The presets that a GPU is measured with."""
CPU_SHAPES = ("6x384", "1m", "3m", "10m")
"""What a CPU may be measured with, the first by default."""
MICRO_TOKENS = 32 * 1024
STATE_BYTES = 18
"""Bytes per parameter that one side holds between steps."""
RESIDENT_SHARE = 0.5
"""Share of a GPU's memory for the states of all sides, if they are to stay there together."""

WARM_UP = STEPS_TO_WARM_UP + 1
"""Steps before any is timed: the last is the one that ours records as a CUDA graph."""

COMPILED = "plain, compiled"

Step = Callable[[], Callable[[], float]]
"""Runs one step and returns a function that reads its loss, which waits for it."""
Build = Callable[[GPTConfig, Path, int, torch.device], Step]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = list(dict.fromkeys((*CPU_SHAPES, *CONTEXTS)))
    parser.add_argument(
        "--preset", nargs="+", choices=names, help=f"default: on a GPU {[*CONTEXTS]}, else {CPU_SHAPES[0]}"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps of each in a round")
    parser.add_argument("--batch", type=int, help="sequences in a step; on a GPU the first that is tried")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="for one shape, compiling included; at least a round is run"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (compiling takes a minute)")
    kinds = parser.add_mutually_exclusive_group()  # of ours
    kinds.add_argument("--fp8", action="store_true", help="ours in bf16 and in fp8, nothing else")
    kinds.add_argument("--graphs", action="store_true", help="ours recorded as CUDA graphs and not, nothing else")
    kinds.add_argument("--tune", type=float, default=0.0, help="seconds for the tuner to choose ours' kernels")
    parser.add_argument("--sides", nargs="+", help="beside ours only these (default all)")
    parser.add_argument(
        "--dry", action="store_true", help="what a GPU would run, tiny: runs every line, measures nothing"
    )
    parser.add_argument("--json", type=Path, help="write the figures here as well, after every round")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.dry else "cpu")
    if options.graphs and device.type == "cpu" and not options.dry:
        parser.error("--graphs needs a GPU")
    if options.dry:
        gpt.FP8_WIDTH = 16
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    about = machine("torch", "triton", "transformers", *PEERS)
    print(", ".join(f"{key} {value}" for key, value in about.items()), f"threads {options.threads}")

    results: list[dict[str, Any]] = []
    presets = options.preset or (CONTEXTS if device.type == "cuda" else CPU_SHAPES[:1])
    for config in shapes(device, presets, dry=options.dry):
        torch._dynamo.reset()  # its caches are per function: after eight models it would fall back to eager
        batch = options.batch or (16 if device.type == "cpu" else MICRO_TOKENS // config.context)
        sides = contenders(on_gpu=device.type == "cuda" or options.dry, compiled=not options.no_compile)
        trial = Trial(config, device, batch, options.rounds, options.steps, options.seconds)
        sides["ours"] = partial(ours, say=trial.notes.append)
        if options.fp8:
            sides = {"ours": sides["ours"], "ours in fp8": partial(ours, fp8=True)}
        if options.graphs:
            recorded = partial(sides["ours"], graphs=device.type == "cuda")
            sides = {"ours": recorded, "ours without graphs": partial(ours, graphs=False)}
        if options.tune:
            sides = sides | {"ours": partial(sides["ours"], tune_seconds=options.tune), "ours by default": ours}
        unknown = set(options.sides or ()) - set(sides)
        if unknown:
            parser.error(f"--sides: {', '.join(sorted(unknown))} is invalid: expected some of {', '.join(sides)}")
        if options.sides:
            sides = {name: side for name, side in sides.items() if name in ("ours", *options.sides)}

        def save(trial: Trial) -> None:
            if options.json:
                report = {"machine": about, "threads": options.threads, "runs": [*results, trial.report()]}
                write_text(options.json, json.dumps(report, indent=1) + "\n")

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "tokens.bin"
            write_tokens(file, config.vocab_size)
            trial.run(sides, file, save)
        save(trial)
        results.append(trial.report())
        print(table(results[-1]), flush=True)


def shapes(device: torch.device, presets: Sequence[str], *, dry: bool) -> list[GPTConfig]:
    if dry:
        return [GPTConfig(layers=2, width=32, heads=2, kv_heads=2, ffn=64, context=16, vocab_size=128)]
    if device.type == "cpu":
        ours = GPTConfig(layers=6, width=384, heads=6, kv_heads=6, ffn=1024, context=256, vocab_size=4096)
        return [ours if name == CPU_SHAPES[0] else GPTConfig.preset(name) for name in presets]
    return [GPTConfig.preset(name, context=CONTEXTS[name], vocab_size=VOCAB_SIZE) for name in presets]


def contenders(*, on_gpu: bool, compiled: bool) -> dict[str, Build]:
    """The slowest to build last, so that an interrupted run has the others."""
    sides: dict[str, Build] = {"ours": ours}
    if on_gpu:
        sides["Hugging Face + Liger"] = hugging_face
    else:
        sides["ours in fp32"] = partial(ours, precision="fp32")
        sides["plain, eager"] = partial(plain, compiled=False)
    if compiled:
        sides[COMPILED] = partial(plain, compiled=True)
    if compiled and not on_gpu:
        sides[f"{COMPILED} in bf16"] = partial(plain, compiled=True, dtype=torch.bfloat16)
        sides[f"{COMPILED} in fp32"] = partial(plain, compiled=True, dtype=torch.float32)
    return sides


def write_tokens(file: Path, vocab_size: int) -> None:
    """Frequencies like those of text: token i in proportion to 1 / i."""
    ids = np.exp(np.random.default_rng(0).uniform(0, np.log(vocab_size), FILE_TOKENS)) - 1
    ids.astype(np.uint16).tofile(file)


# ------------------------------------------------------------------------------------------------ measuring


@dataclass
class Side:
    """One contender, built and warm, or the reason why it isn't."""

    batch: int = 0
    step: Step | None = None
    problem: str = ""
    state_bytes: int = 0
    peak_bytes: int = 0
    rates: list[float] = field(default_factory=list)
    """Tokens per second of each round."""


@dataclass
class Trial:
    """All contenders at one shape."""

    config: GPTConfig
    device: torch.device
    batch: int
    rounds: int
    steps: int
    seconds: float
    sides: dict[str, Side] = field(default_factory=dict)
    resident: bool = True
    notes: list[str] = field(default_factory=list)
    """The dtype of ours and the tuner's choices for it."""

    def run(self, builds: dict[str, Build], file: Path, save: Callable[[Trial], None]) -> None:
        deadline = time.monotonic() + self.seconds
        self.resident = self._all_fit(len(builds))
        order = list(builds)
        if not self.resident:
            order.append(order[0])
        for place, name in enumerate(order):
            before, side = self.sides.get(name), self.built(name, builds[name], file)
            if before and before.rates and side.batch != before.batch:  # other memory is in the way now
                before.problem = f"in turn only once: {side.problem or f'{side.batch} sequences the second time'}"
                continue
            self.sides[name] = side
            side.rates = before.rates if before else []
            if side.step is None:
                continue
            left_s = (deadline - time.monotonic()) / (len(order) - place)
            self._rounds([side], 1 if self.resident else self.rounds, time.monotonic() + left_s)
            if not self.resident:
                side.step = None
                self._clear()
            save(self)
        if self.resident:
            ready = [side for side in self.sides.values() if side.step is not None]
            for side in ready:
                side.rates.clear()  # not in turns with the others: it counts only if the run ends before this
            self._rounds(ready, self.rounds, deadline, lambda: save(self))

    def _all_fit(self, count: int) -> bool:
        if self.device.type != "cuda":
            return True
        memory = torch.cuda.get_device_properties(self.device).total_memory
        return count * STATE_BYTES * parameters(self.config) < RESIDENT_SHARE * memory

    def built(self, name: str, build: Build, file: Path) -> Side:
        """With the largest batch that fits the first steps, halving from the given one."""
        batch, problem = self.batch, ""
        while batch:
            before = self._allocated()
            try:
                step = build(self.config, file, batch, self.device)
                state_bytes = self._allocated() - before
                self._forget_peak()
                losses = [step()() for _ in range(WARM_UP)]
                print(f"{name}, {batch} sequences: first losses {losses[0]:.3f} {losses[1]:.3f}", flush=True)
                state_bytes = max(state_bytes, self._allocated() - before)
                return Side(batch, step, state_bytes=state_bytes, peak_bytes=self._peak() - before)
            except torch.OutOfMemoryError:
                problem = "out of memory at one sequence"
                batch //= 2
            except ImportError as missing:
                problem, batch = f"absent: {missing}", 0
            except Exception as failed:  # the others are still measured
                problem, batch = f"failed: {type(failed).__name__}: {str(failed)[:160]}", 0
            step = None
            self._clear()
        print(f"{name}: {problem}", flush=True)
        return Side(problem=problem)

    def _rounds(
        self, ready: list[Side], rounds: int, deadline: float, after: Callable[[], None] = lambda: None
    ) -> None:
        for number in range(rounds):
            if number and time.monotonic() > deadline:
                break
            for side in [side for side in ready if side.step is not None]:
                others = self._allocated() - side.state_bytes
                self._forget_peak()
                try:
                    if not number:
                        side.step()()  # not timed: it compiles again if the failure of another emptied the caches
                    seconds = seconds_of(side.step, self.steps, self.device)
                except torch.OutOfMemoryError:  # memory of the others is in the way
                    side.step, side.problem = None, f"out of memory after {len(side.rates)} rounds"
                    continue
                side.rates.append(self.steps * side.batch * self.config.context / seconds)
                # A recorded step's memory counts as allocated only while it is recorded, in the warm-up.
                side.peak_bytes = max(side.peak_bytes, self._peak() - others)
            after()

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def _forget_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _clear(self) -> None:
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def report(self) -> dict[str, Any]:
        c = self.config
        flops, peak = train_flops_per_token(c), peak_flops(self.device)
        figures: dict[str, Any] = {}
        for name, side in self.sides.items():
            if not side.rates:
                figures[name] = {"problem": side.problem}
                continue
            low, median, high = quartiles(side.rates)
            figures[name] = {
                "sequences": side.batch,
                "tokens_per_s": {"low": round(low, 1), "median": round(median, 1), "high": round(high, 1)},
                "tflops_per_s": median * flops / 1e12,
                "mfu": median * flops / peak if peak else None,
                "peak_gb": side.peak_bytes / 1e9 if side.peak_bytes else None,
                "rounds": len(side.rates),
                **({"stopped": side.problem} if side.problem else {}),
            }
        return {
            "shape": f"{c.layers} x {c.width}, T {c.context}, V {c.vocab_size:,}",
            "parameters": parameters(c),
            "flops_per_token": flops,
            "mfu_label": mfu_label(self.device),
            "interleaved": self.resident,
            "notes": list(dict.fromkeys(self.notes)),  # a side that didn't fit says them again
            "sides": figures,
        }


def seconds_of(step: Step, steps: int, device: torch.device) -> float:
    """Run this many steps, reading each loss while the next step runs."""
    began, late = time.perf_counter(), None
    for _ in range(steps):
        now = step()
        if late is not None:
            late()
        late = now
    if late is not None:
        late()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def table(report: dict[str, Any]) -> str:
    how = "interleaved" if report["interleaved"] else "in turn, ours first and last"
    ours_median = report["sides"]["ours"].get("tokens_per_s", {}).get("median")
    lines = [
        f"\n**{report['shape']}: {report['parameters']:,} parameters, {how}**\n",
        f"| | sequences | tokens/s [quartiles] of rounds | TFLOP/s | mfu[{report['mfu_label']}] | peak GB | ours is |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, side in report["sides"].items():
        if "problem" in side:
            lines.append(f"| {name} | | {side['problem']} | | | | unranked |")
            continue
        rate = side["tokens_per_s"]
        mfu = "n/a" if side["mfu"] is None else f"{side['mfu']:.1%}"
        gb = "n/a" if side["peak_gb"] is None else f"{side['peak_gb']:.1f}"
        ratio = "" if ours_median is None else f"{ours_median / rate['median']:.2f}x"
        of_rounds = f"of {side['rounds']}" + (f", {side['stopped']}" if "stopped" in side else "")
        lines.append(
            f"| {name} | {side['sequences']} | {rate['median']:,.0f} [{rate['low']:,.0f}, {rate['high']:,.0f}] "
            f"{of_rounds} | {side['tflops_per_s']:.4g} | {mfu} | {gb} | {ratio} |"
        )
    compiled = {
        name: side["tokens_per_s"]["median"]
        for name, side in report["sides"].items()
        if name.startswith(COMPILED) and "problem" not in side
    }
    if ours_median is not None and len(compiled) > 1:
        fastest = max(compiled, key=compiled.__getitem__)
        lines.append(f"\nThe fastest compiled one is {fastest}: ours is {ours_median / compiled[fastest]:.2f}x.")
    return "\n".join([*lines, *(f"\nours: {note}" for note in report["notes"])])


# ------------------------------------------------------------------------------------------------ the sides


def ours(
    config: GPTConfig,
    file: Path,
    batch: int,
    device: torch.device,
    *,
    fp8: bool = False,
    graphs: bool | str = "auto",
    precision: str = "auto",
    tune_seconds: float = 0.0,
    say: Callable[[str], object] = lambda note: None,
) -> Step:
    """A step of the trainer itself; graphs: as `engine.cuda_graphs`; tune_seconds: for the tuner, 0 for the default
    kernels. say: gets the dtype and the tuner's choices. Raises what makes it another step than its arguments say: a
    graph that can't be recorded, fp8 without a matmul that is wide enough for it."""
    picked, kernels = pick_precision(precision, device, config), {}
    dtype = picked.dtype
    say(str(picked))
    if tune_seconds:
        batches = {"sequences": batch, "context": config.context, "documents": False}
        questions = asked_of(config, dtype, device, **batches, deterministic=False, fp8=fp8)
        records = tune(questions, seconds=tune_seconds, say=say)
        kernels = chosen(records)
        for op, record in records.items():
            say(f"{op}: {kernels[op]}: {describe(record)}")
    dataset = TokenDataset.open(file, dtype="uint16")
    order = SampleOrder(
        mixture=Mixture({"text": 1}),
        rings={"text": Ring(dataset.num_tokens, config.context, seed=0, source_name="text")},
        sequences=batch,
        start_counts={"text": 0},
        seed=0,
        phase=0,
    )
    loader = Loader(
        order,
        {"text": dataset},
        config.context,
        micro=batch,
        vocab_size=config.vocab_size,
        last_step=1 << 40,
        device=device,
    )
    model = GPT(config)
    model.fp8 = fp8
    if fp8 and not model.fp8_share:
        raise ValueError("none of the blocks' matmuls is wide enough for fp8")
    engine = LocalEngine(model, device=device, dtype=dtype, cuda_graphs=graphs)
    optimizer = AdamW(lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, clip=CLIP)
    engine.begin(Phase(name="step", tokens=1, mixture={}, optimizer=optimizer), weights_of(model))
    steps = iter(loader)

    def step() -> Callable[[], float]:
        install(kernels)  # another side may have had others
        _, micro_batches = next(steps)
        result = engine.step(micro_batches, LR, lambda: False)
        assert result is not None
        if graphs is True and not engine.cuda_graphs:
            raise RuntimeError("a step could not be recorded as a CUDA graph")
        return lambda: result.read()[0]

    return step


def plain(
    config: GPTConfig,
    file: Path,
    batch: int,
    device: torch.device,
    *,
    compiled: bool,
    dtype: torch.dtype | None = None,
) -> Step:
    """A step of the plain GPT in typical code. dtype: of parameters and everything else, instead of autocast."""
    with device:
        model = PlainGPT(config).to(dtype)
    forward = torch.compile(model) if compiled else model
    return torch_step(model, forward, config, file, batch, device, autocast=dtype is None)


def hugging_face(config: GPTConfig, file: Path, batch: int, device: torch.device) -> Step:
    """A step of Hugging Face's Llama with Liger's kernels."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers import LlamaConfig, LlamaForCausalLM

    apply_liger_kernel_to_llama()
    shape = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=config.ffn,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.context,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tied,
        attn_implementation="sdpa",
        use_cache=False,
    )
    with device:
        model = LlamaForCausalLM(shape).train()

    def forward(tokens: Tensor, targets: Tensor) -> Tensor:
        return model(input_ids=tokens, labels=targets, shift_labels=targets.contiguous()).loss

    return torch_step(model, forward, config, file, batch, device)


def torch_step(
    model: nn.Module,
    forward: Callable[[Tensor, Tensor], Tensor],
    config: GPTConfig,
    file: Path,
    batch: int,
    device: torch.device,
    *,
    autocast: bool = True,
) -> Step:
    """The model's own parameters, bf16 autocast, PyTorch's fused AdamW."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    kept = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)
    batches = random_windows(file, batch, config.context, device)

    def step() -> Callable[[], float]:
        tokens, targets = next(batches)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            loss = forward(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach().item

    return step


def random_windows(file: Path, batch: int, context: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    ids = np.memmap(file, dtype=np.uint16, mode="r")
    while True:
        starts = torch.randint(len(ids) - context, (batch,)).tolist()
        windows = torch.stack([torch.from_numpy(ids[i : i + context + 1].astype(np.int64)) for i in starts])
        if device.type == "cuda":
            windows = windows.pin_memory().to(device, non_blocking=True)
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


if __name__ == "__main__":
    main()
