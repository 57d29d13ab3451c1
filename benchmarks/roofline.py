"""The least cost of a training step on a GPU, kernel by kernel: launches, bytes, FLOPs, and the resulting MFU.

    python -m benchmarks.roofline [--gpu H100 | H200] [--preset 10m 124m 350m 1b] [--gemm TFLOP/s] [--memory TB/s]
        [--attention SHARE] [--host µs] [--tokens 32768] [--micro 1] [--graphs] [--kernels] [--json FILE]

Every figure is predicted, from ceilings that one H200 reached in steps of ours at the same shapes
(results/2026-11-29-nvidia-h200.json). An H100 has the same multiprocessors, so the same rates, but slower memory.

products   731, 723 and 711 TFLOP/s at the shapes of 124m, 350m and 1b, in bf16, of 989; at those of 10m 350 is assumed.
           In fp8 1.9 times that: with it a step at 1b takes the time that was measured. Triton's products with more in
           them 0.95 times that, an assumption: 0.92 to 1.04 are public (kernels/persistent.py).
attention  cuDNN's, causal: 302 TFLOP/s forward and 229 backward at 1K positions and head 64, 354 and 279 at 2K, 490 and
           353 at 2K and head 128. Its FLOPs count the pairs that the mask leaves, half of all. All sides have the same.
memory     3.6 TB/s for passes over numbers, 85% of what a copy reaches; on an H100, where a copy reaches 3.0, 2.55.
host       42 µs a launch of ours, 1.3 ms for a layer of 31; a tenth of that for a compiled step. With graphs 0.

A kernel takes the longer of its bytes over the memory's rate and its FLOPs over the products', plus 2 µs for its start
and end. A step takes the time of its kernels, or of the host if that is longer. MFU counts 6N + 12·L·H·Q·T a token
(spt_fast/model/flops.py), with no discount for the mask, against a peak of 989.

Bytes are the least that a kernel must read and write, each tensor once, in bf16 unless said otherwise. Caching between
two kernels is not considered.

ours        the kernels of spt_fast's step, a row of `ours` each: a change of an op needs a change of its row. With the
            tuner's fused kernels, and with separate ones as by default. In fp8 if both sides of the layers' matrices
            are wide enough for it
plain       benchmarks.train_step's plain GPT, compiled: fp32 parameters and stream, bf16 autocast, Inductor's fusions
            as its passes over memory: what can be one loop over rows is one kernel, a norm's weight gradient two more
products    only the products and attention of ours: a bound for any fusion

Legend: N tokens of a micro-batch, T positions, D width, E width of q, k and v together, F feed-forward width, H heads,
Q head dimension, V vocabulary, P parameters, M those of a layer's matrices.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.train_step import CONTEXTS, MICRO_TOKENS, VOCAB_SIZE
from spt_fast.files import write_text
from spt_fast.kernels.cross_entropy import CHUNK_BYTES_ELSEWHERE, HELD_BYTES
from spt_fast.model.flops import MFU_CONVENTION, block_matrices, parameters, peak_flops_by_name, train_flops_per_token
from spt_fast.model.gpt import GPTConfig, gains_by_fp8
from spt_fast.model.parameters import table as parameter_table

MEMORY_TBS = {"H100": 2.55, "H200": 3.6}
HOST_US, COMPILED_HOST_US = 42.0, 4.2
START_US = 2.0
FP8_RATE = 1.9
FUSED_RATE = 0.95
PROGRAMS = 4 * 132
"""Programs that sum a norm weight's gradient, in parts."""


@dataclass(frozen=True)
class Rates:
    """TFLOP/s."""

    products: float
    attention_forward: float
    attention_backward: float


RATES = {
    "10m": Rates(350, 302, 229),
    "124m": Rates(731, 302, 229),
    "350m": Rates(723, 354, 279),
    "1b": Rates(711, 490, 353),
}


@dataclass(frozen=True)
class Shape:
    """A model and its batch, in the letters of the legend; `micro` micro-batches of N tokens a step."""

    config: GPTConfig
    N: int = MICRO_TOKENS
    micro: int = 1

    @property
    def T(self) -> int:
        return self.config.context

    @property
    def D(self) -> int:
        return self.config.width

    @property
    def Q(self) -> int:
        return self.config.head_dim

    @property
    def HQ(self) -> int:
        return self.config.heads * self.config.head_dim

    @property
    def E(self) -> int:
        return self.HQ + 2 * self.config.kv_heads * self.config.head_dim

    @property
    def F(self) -> int:
        return self.config.ffn

    @property
    def V(self) -> int:
        return self.config.vocab_size

    @property
    def P(self) -> int:
        return parameters(self.config)

    @property
    def M(self) -> int:
        return block_matrices(self.config) // self.config.layers

    @property
    def tensors(self) -> int:
        return len(parameter_table(self.config))

    @property
    def chunks(self) -> int:
        """Chunks of the loss, whose logits are computed some rows at a time."""
        return -(-self.N // max(1024, CHUNK_BYTES_ELSEWHERE // (2 * self.V) // 128 * 128))

    @property
    def added(self) -> float:
        """Bytes of a weight gradient in fp32 that a product adds to: written, and read except the first time."""
        return 8 - 4 / self.micro

    @property
    def parts(self) -> float:
        """Bytes of a norm weight's gradient in parts, each program's in fp32: as in `added`."""
        return PROGRAMS * self.D * self.added


Amount = Callable[[Shape], float]


@dataclass(frozen=True)
class Kernel:
    """A kernel, or several that run together.

    where     "layer": once a layer and micro-batch; "layer step": once a layer and step; "batch": once a micro-batch;
              "step": once a step
    launches  of one occurrence
    rate      what its FLOPs are divided by: "products", "fused", "fp8", "attention forward" or "attention backward"
    """

    name: str
    where: str
    pass_: str
    bytes: Amount
    flops: Amount | None = None
    launches: int | Callable[[Shape], int] = 1
    rate: str = "products"

    @property
    def multiplies(self) -> bool:
        return self.flops is not None

    def count(self, shape: Shape) -> int:
        return self.launches if isinstance(self.launches, int) else self.launches(shape)

    def times(self, shape: Shape) -> int:
        layers = shape.config.layers
        return {"layer": layers * shape.micro, "layer step": layers, "batch": shape.micro, "step": 1}[self.where]


def product(name: str, inputs: Amount, outputs: Amount, *, fp8: bool = False, dw_bytes: Amount) -> list[Kernel]:
    """A linear layer's three products: y, dx, and dw with `dw_bytes` per number."""

    def flops(s: Shape) -> float:
        return 2.0 * s.N * inputs(s) * outputs(s)

    def moved(s: Shape, weight_bytes: float = 2.0) -> float:
        return (1.0 if fp8 else 2.0) * s.N * (inputs(s) + outputs(s)) + weight_bytes * inputs(s) * outputs(s)

    rate = "fp8" if fp8 else "products"
    return [
        Kernel(name, "layer", "forward", moved, flops, rate=rate),
        Kernel(f"{name}, dx", "layer", "backward", moved, flops, rate=rate),
        Kernel(f"{name}, dw", "layer", "backward", lambda s: moved(s, dw_bytes(s)), flops, rate=rate),
    ]


FOUND, BY_ROWS, BY_PARTS = (6.0, 3), (4.0, 2), (4.0, 3)
"""Bytes per number and launches of the passes that convert a tensor to fp8: if its maxima must be computed, and if the
op that wrote it knows those of its rows, or of parts of them."""


def quantised(name: str, inputs: Amount, outputs: Amount, x: tuple[float, int], dy: tuple[float, int]) -> list[Kernel]:
    """The passes to fp8 before a product."""
    return [
        Kernel(f"{name}, x to fp8", "layer", "forward", lambda s: x[0] * s.N * inputs(s), launches=x[1]),
        Kernel(f"{name}, dy to fp8", "layer", "backward", lambda s: dy[0] * s.N * outputs(s), launches=dy[1]),
        Kernel(f"{name}, weight to fp8", "layer step", "forward", lambda s: 8.0 * inputs(s) * outputs(s), launches=6),
    ]


def logits(name: str, pass_: str, bytes_: Amount, launches: int | Callable[[Shape], int]) -> Kernel:
    return Kernel(name, "batch", pass_, bytes_, lambda s: 2.0 * s.N * s.V * s.D, launches)


def attention(backward_launches: int) -> list[Kernel]:
    def forward(s: Shape) -> float:
        return 4.0 * s.N * (s.T + 1) / 2 * s.HQ

    return [
        Kernel("attention", "layer", "forward", lambda s: 2.0 * s.N * (s.E + s.HQ), forward, 1, "attention forward"),
        Kernel("attention backward", "layer", "backward", lambda s: 4.0 * s.N * (s.E + s.HQ),
               lambda s: 2.5 * forward(s), backward_launches, "attention backward"),
    ]  # fmt: skip


def joined(kernel: Kernel, name: str, more: Amount) -> Kernel:
    """A product with what follows it in one kernel, which moves these bytes more."""
    return replace(kernel, name=name, bytes=lambda s: kernel.bytes(s) + more(s), rate="fused")


def ours(*, fp8: bool = False, fused: bool = True) -> list[Kernel]:
    """The kernels of spt_fast's step. Attention backward is Triton's; PyTorch's has one more. fused: with those kernels
    that are matmuls and more, which the tuner chooses where they are faster; not in fp8."""

    def linear(name: str, inputs: Amount, outputs: Amount, x: tuple[float, int], dy: tuple[float, int]) -> list[Kernel]:
        rows = product(name, inputs, outputs, fp8=fp8, dw_bytes=lambda s: s.added)
        return rows + (quantised(name, inputs, outputs, x, dy) if fp8 else [])

    found = [
        *linear("qkv", lambda s: s.D, lambda s: s.E, x=BY_ROWS, dy=FOUND),
        Kernel("rope", "layer", "forward", lambda s: 2.0 * s.N * (s.E + s.HQ)),
        *attention(backward_launches=2),
        Kernel("rope backward", "layer", "backward", lambda s: 2.0 * s.N * (s.E + s.HQ)),
        *linear("out", lambda s: s.HQ, lambda s: s.D, x=FOUND, dy=BY_ROWS),
        Kernel("add and norm, two", "layer", "forward", lambda s: 16.0 * s.N * s.D, launches=2),
        Kernel("add and norm backward, two", "layer", "backward", lambda s: 16.0 * s.N * s.D + 2 * s.parts, launches=2),
        *linear("gate and up", lambda s: s.D, lambda s: 2 * s.F, x=BY_ROWS, dy=BY_PARTS),
        Kernel("swiglu", "layer", "forward", lambda s: 6.0 * s.N * s.F),
        Kernel("swiglu backward", "layer", "backward", lambda s: (10.0 if fp8 else 12.0) * s.N * s.F),
        *linear("down", lambda s: s.F, lambda s: s.D, x=BY_PARTS, dy=BY_ROWS),
        Kernel("embedding", "batch", "forward", lambda s: 4.0 * s.N * s.D),
        Kernel("first norm", "batch", "forward", lambda s: 4.0 * s.N * s.D),
        logits("logits", "forward", lambda s: 2.0 * (s.N * (s.D + s.V) + s.chunks * s.V * s.D), lambda s: s.chunks),
        Kernel("logits to their gradient", "batch", "forward",
               lambda s: (4.0 if 2 * s.V <= HELD_BYTES else 6.0) * s.N * s.V,
               launches=lambda s: 2 * s.chunks),
        logits("logits, dx", "forward", lambda s: 2.0 * (s.N * (s.D + s.V) + s.chunks * s.V * s.D), lambda s: s.chunks),
        logits("logits, dw", "forward", lambda s: 2.0 * s.N * (s.D + s.V) + 8.0 * s.chunks * s.V * s.D,
               lambda s: s.chunks),
        Kernel("loss's scale and sum", "batch", "forward", lambda s: 4.0 * s.N, launches=8),
        Kernel("first norm backward", "batch", "backward", lambda s: 6.0 * s.N * s.D + s.parts),
        Kernel("the stream's two gradients", "batch", "backward", lambda s: 6.0 * s.N * s.D),
        Kernel("embedding backward", "batch", "backward", lambda s: 2.0 * s.N * s.D + 8.0 * s.V * s.D, launches=9),
        Kernel("norm weights' gradients", "step", "update",
               lambda s: 4.0 * PROGRAMS * s.D * (2 * s.config.layers + 1), launches=2),
        Kernel("gradient norm", "step", "update", lambda s: 4.0 * s.P, launches=3),
        Kernel("AdamW", "step", "update", lambda s: 30.0 * s.P),
        Kernel("scalars", "step", "update", lambda s: 0.0, launches=16),
    ]  # fmt: skip
    if not fused or fp8:
        return found
    more: dict[str, tuple[str, Amount]] = {
        "qkv": ("qkv, rope", lambda s: 0.0),
        "gate and up": ("gate and up, swiglu", lambda s: 2.0 * s.N * s.F),
        "down, dx": ("down, dx, swiglu backward", lambda s: 8.0 * s.N * s.F),
    }
    found = [kernel for kernel in found if kernel.name not in ("rope", "swiglu", "swiglu backward")]
    return [joined(kernel, *more[kernel.name]) if kernel.name in more else kernel for kernel in found]


PLAIN = [
    Kernel("weights to bf16", "layer", "forward", lambda s: 6.0 * s.M, launches=4),
    *product("qkv", lambda s: s.D, lambda s: s.E, dw_bytes=lambda s: 2),
    Kernel("rope", "layer", "forward", lambda s: 2.0 * s.N * (s.E + s.HQ), launches=2),
    *attention(backward_launches=3),
    Kernel("rope backward, side by side", "layer", "backward", lambda s: 4.0 * s.N * s.E),
    *product("out", lambda s: s.HQ, lambda s: s.D, dw_bytes=lambda s: 2),
    Kernel("add and norm, two", "layer", "forward", lambda s: 24.0 * s.N * s.D, launches=2),
    Kernel("add and norm backward, two", "layer", "backward", lambda s: 32.0 * s.N * s.D, launches=2),
    Kernel("norm weights' gradients, two", "layer", "backward", lambda s: 12.0 * s.N * s.D, launches=4),
    *product("gate and up", lambda s: s.D, lambda s: 2 * s.F, dw_bytes=lambda s: 2),
    Kernel("swiglu", "layer", "forward", lambda s: 6.0 * s.N * s.F),
    Kernel("swiglu backward", "layer", "backward", lambda s: 10.0 * s.N * s.F),
    *product("down", lambda s: s.F, lambda s: s.D, dw_bytes=lambda s: 2),
    Kernel("dw to fp32", "layer", "backward", lambda s: (6.0 + 12 * (s.micro - 1) / s.micro) * s.M, launches=4),
    Kernel("embedding and first norm", "batch", "forward", lambda s: 14.0 * s.N * s.D),
    logits("logits", "forward", lambda s: 2.0 * s.N * (s.D + s.V) + 8.0 * s.V * s.D, 2),
    Kernel("log-softmax", "batch", "forward", lambda s: 2.0 * s.N * s.V, launches=2),
    Kernel("logits to their gradient", "batch", "backward", lambda s: 4.0 * s.N * s.V),
    logits("logits, dx", "backward", lambda s: 2.0 * (s.N * (s.D + s.V) + s.V * s.D), 1),
    logits("logits, dw", "backward", lambda s: 2.0 * (s.N * (s.D + s.V) + s.V * s.D), 1),
    Kernel("first norm backward", "batch", "backward", lambda s: 20.0 * s.N * s.D, launches=3),
    Kernel("embedding backward", "batch", "backward", lambda s: 4.0 * s.N * s.D + 4.0 * s.V * s.D, launches=2),
    Kernel("the head's gradient added to the embedding's", "batch", "backward", lambda s: 10.0 * s.V * s.D),
    Kernel("gradient norm and clipping", "step", "update", lambda s: 12.0 * s.P, launches=12),
    Kernel("AdamW", "step", "update", lambda s: 28.0 * s.P, launches=lambda s: -(-s.tensors // 24)),
]  # fmt: skip


@dataclass(frozen=True)
class Ceilings:
    """memory in bytes/s, fp8 and fused in shares of the products' rate, host and start in seconds per launch."""

    rates: Rates
    memory: float
    fp8: float = FP8_RATE
    fused: float = FUSED_RATE
    host: float = HOST_US * 1e-6
    start: float = START_US * 1e-6
    peak: float = peak_flops_by_name("NVIDIA H100") or math.nan

    def rate(self, kind: str) -> float:
        """FLOP/s."""
        rates = {
            "products": self.rates.products,
            "fp8": self.rates.products * self.fp8,
            "fused": self.rates.products * self.fused,
            "attention forward": self.rates.attention_forward,
            "attention backward": self.rates.attention_backward,
        }
        return 1e12 * rates[kind]


@dataclass(frozen=True)
class Row:
    """A kernel's share of one step: all its occurrences."""

    name: str
    where: str
    pass_: str
    launches: int
    bytes: float
    flops: float
    seconds: float

    @classmethod
    def of(cls, kernel: Kernel, shape: Shape, ceilings: Ceilings) -> Row:
        times, launches = kernel.times(shape), kernel.count(shape)
        bytes_, flops = kernel.bytes(shape), kernel.flops(shape) if kernel.flops else 0.0
        seconds = max(bytes_ / ceilings.memory, flops / ceilings.rate(kernel.rate)) + launches * ceilings.start
        return cls(
            kernel.name, kernel.where, kernel.pass_, times * launches, times * bytes_, times * flops, times * seconds
        )


@dataclass(frozen=True)
class Step:
    """A step of one side: its rows, and its time."""

    side: str
    rows: Sequence[Row]
    seconds: float
    """Seconds of the device."""
    host_seconds: float
    mfu: float

    @classmethod
    def of(cls, side: str, kernels: Iterable[Kernel], shape: Shape, ceilings: Ceilings) -> Step:
        rows = [Row.of(kernel, shape, ceilings) for kernel in kernels]
        seconds, host = sum(row.seconds for row in rows), ceilings.host * sum(row.launches for row in rows)
        flops = shape.N * shape.micro * train_flops_per_token(shape.config)
        return cls(side, rows, seconds, host, flops / max(seconds, host) / ceilings.peak)

    def in_layer(self, pass_: str, shape: Shape) -> int:
        found = sum(row.launches for row in self.rows if (row.where, row.pass_) == ("layer", pass_))
        return found // (shape.config.layers * shape.micro)


def steps(shape: Shape, ceilings: Ceilings) -> list[Step]:
    layers_in_fp8 = gains_by_fp8((shape.D, shape.E)) and gains_by_fp8((shape.D, shape.F))
    compiled = replace(ceilings, host=ceilings.host * COMPILED_HOST_US / HOST_US)
    return [
        Step.of("ours", ours(), shape, ceilings),
        Step.of("ours, separate kernels", ours(fused=False), shape, ceilings),
        *([Step.of("ours in fp8", ours(fp8=True), shape, ceilings)] if layers_in_fp8 else []),
        Step.of("plain, compiled", PLAIN, shape, compiled),
        Step.of("products and attention", [one for one in ours(fused=False) if one.multiplies], shape, compiled),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", nargs="+", choices=CONTEXTS, default=list(CONTEXTS))
    parser.add_argument("--gpu", choices=MEMORY_TBS, default="H100")
    parser.add_argument("--gemm", type=float, help="TFLOP/s of the products (default by preset)")
    parser.add_argument("--memory", type=float, help="TB/s (default by GPU)")
    parser.add_argument("--attention", type=float, default=1.0, help="share of cuDNN's rate")
    parser.add_argument("--fp8", type=float, default=FP8_RATE, help="share of the products' rate")
    parser.add_argument("--fused", type=float, default=FUSED_RATE, help="the same, for products with more in them")
    parser.add_argument("--host", type=float, default=HOST_US, help="microseconds a launch")
    parser.add_argument("--tokens", type=int, default=MICRO_TOKENS, help="of a micro-batch")
    parser.add_argument("--micro", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--graphs", action="store_true", help="launches by a CUDA graph, without the host")
    parser.add_argument("--kernels", action="store_true", help="also every kernel")
    parser.add_argument("--json", type=Path, help="also write all of it here")
    options = parser.parse_args()
    report: dict[str, Any] = {"gpu": options.gpu, "mfu": MFU_CONVENTION, "predicted": True, "presets": {}}
    print(f"Predicted for one {options.gpu}, MFU by {MFU_CONVENTION}; nothing is measured.\n")
    lines = [
        "| preset | side | launches a layer | launches a step | device ms | host ms | MFU | ours is |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in options.preset:
        config = GPTConfig.preset(name, context=CONTEXTS[name], vocab_size=VOCAB_SIZE)
        shape = Shape(config, options.tokens, options.micro)
        host = 0.0 if options.graphs else options.host * 1e-6
        known, memory = RATES[name], 1e12 * (options.memory or MEMORY_TBS[options.gpu])
        attention = (options.attention * known.attention_forward, options.attention * known.attention_backward)
        ceilings = Ceilings(Rates(options.gemm or known.products, *attention), memory, options.fp8, options.fused, host)
        found = steps(shape, ceilings)
        lines += [line(name, step, found[0], shape) for step in found]
        report["presets"][name] = {"ceilings": asdict(ceilings), "sides": [asdict(step) for step in found]}
        if options.kernels:
            print("\n\n".join(kernels(name, step) for step in found) + "\n")
    print("\n".join(lines))
    if options.json:
        write_text(options.json, json.dumps(report, indent=1) + "\n")


def line(preset: str, step: Step, ours: Step, shape: Shape) -> str:
    layer = " + ".join(str(step.in_layer(pass_, shape)) for pass_ in ("forward", "backward"))
    launches = sum(row.launches for row in step.rows)
    return (
        f"| {preset} | {step.side} | {layer} | {launches:,} | {1e3 * step.seconds:.1f} | {1e3 * step.host_seconds:.1f} "
        f"| {step.mfu:.1%} | {ours.mfu / step.mfu:.2f}x |"
    )


def kernels(preset: str, step: Step) -> str:
    """Every kernel's part of a step, the longest first."""
    lines = [
        f"**{preset}, {step.side}**\n",
        "| kernel | pass | launches | GB | TFLOP | ms | of the step |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(step.rows, key=lambda row: -row.seconds):
        lines.append(
            f"| {row.name} | {row.pass_} | {row.launches} | {row.bytes / 1e9:.2f} | {row.flops / 1e12:.2f} "
            f"| {1e3 * row.seconds:.2f} | {row.seconds / step.seconds:.1%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
