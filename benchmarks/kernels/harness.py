"""The common parts of single-op benchmarks: contenders, check, cold caches, interleaved rounds, ceilings, table.

A case is an op at a shape: its inputs, the least bytes to move or FLOPs to compute as derived in the op's file, and the
contenders: eager PyTorch, the same compiled, ours on each backend, other libraries.

First all outputs and gradients are checked against float64. A contender is wrong if its error exceeds four times that
of the eager composition of the same dtype (relative to the exact result, in the L2 norm) and four roundings. Only
correct ones are timed and ranked; one that cannot be imported is "absent" and gets no rank.

Timed are forward (keeping what a backward pass needs), backward, both. A round runs every contender once, each on its
own copy of the same inputs, restored before; the next round begins with another one. Before each run a buffer larger
than the last cache is written. On a GPU the time is that between two CUDA events, and the GPU is kept busy while the
host prepares, so that launches cost nothing unless the contender itself waits for the device, or the host takes more
than 20 ms (in the first round, one); the host's time is listed separately. The figure is the median over the rounds,
with the quartiles.

Ceilings are measured by the same process before anything else, the best of several: a copy for bytes, a square bf16
matmul for FLOPs.
Extra memory is the peak of forward and backward above the inputs, outputs and gradients included.

With --check nothing is timed: the error of ours must be at most twice that of the eager composition (or half a
rounding), and a second call must give the same bits.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import PEERS, machine
from spt_fast.files import write_text
from spt_fast.kernels import keep_freed_memory
from spt_fast.kernels.backend import BackendError
from spt_fast.kernels.launch import INTERPRETED
from spt_fast.kernels.measured import gpu_seconds, host_seconds
from spt_fast.train.precision import pick_dtype

ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-23}
PASSES = ("forward", "backward", "both")
MIN_ROUNDS, MAX_ROUNDS = 5, 50
CASE_SECONDS = 12.0
"""Enough for one case and pass; more rounds don't narrow the quartiles."""

COPY_BYTES = {"cuda": 1 << 30, "cpu": 256 << 20}
MATMUL_SIZE = {"cuda": 8192, "cpu": 2048}
FLUSH_BYTES = {"cuda": 256 << 20, "cpu": 128 << 20}
HEAD_START_CYCLES = 2_000_000
"""About a millisecond of an idle GPU, in which the host fills the queue."""
CYCLES_PER_S = 3e9
"""Hardly a GPU has more."""
LONGEST_HEAD_START_S = 0.02
"""Else each wait of a contender for the device, which is also one for the last head start, would lengthen the next."""

Function = Callable[..., Any]
"""Inputs of a case to a tensor or a tuple of tensors; one that works in place returns the changed tensors."""


@dataclass(frozen=True)
class Contender:
    """A contender: load() imports and returns the function; ImportError and a refused backend mean absent.

    kind   "torch" | "ours" | "peer", or "floor": a bound that computes nothing useful, not checked and not ranked
    """

    name: str
    load: Callable[[], Function]
    kind: str = "peer"


@dataclass(frozen=True)
class Case:
    """inputs: those that require grad are differentiated. contenders: eager PyTorch first.

    work    by pass ("step" for an op that works in place): bytes for GB/s, FLOPs for TFLOP/s
    exact   results in float64, given the upstream gradients; None: the eager function's on float64 inputs
    spot    the checked part of all results, outputs then gradients
    calls   number of calls before the check
    alike   the passes in which all contenders do the same work; only these are ranked; None: all of them
    allowed relative error; None: the rule above
    """

    op: str
    shape: str
    inputs: Sequence[Tensor]
    contenders: Sequence[Contender]
    work: Mapping[str, float]
    unit: str = "GB/s"
    exact: Callable[[Sequence[Tensor]], list[Tensor]] | None = None
    spot: Callable[[list[Tensor]], list[Tensor]] = list
    calls: int = 1
    alike: Sequence[str] | None = None
    allowed: float | None = None


@dataclass
class Row:
    """One line of the table.

    pass_   forward, backward, both or step; "all" for a contender that was not timed
    status  timed, absent, wrong, failed or skipped, with the reason in note; for a check right, wrong, "bits differ", …
    """

    op: str
    shape: str
    pass_: str
    contender: str
    kind: str
    status: str
    note: str = ""
    seconds: tuple[float, float, float] | None = None
    """Lower quartile, median, upper quartile."""
    rounds: int = 0
    host_seconds: float | None = None
    rate: float | None = None
    unit: str = ""
    of_ceiling: float | None = None
    extra_bytes: int | None = None
    error: float | None = None
    """Largest relative L2 error of a result."""
    rank: int | None = None

    def plain(self) -> dict[str, Any]:
        fields = {name.rstrip("_"): value for name, value in dataclasses.asdict(self).items()}
        return {name: value for name, value in fields.items() if value not in (None, "")}


@dataclass(frozen=True)
class Run:
    """Settings of one benchmark process."""

    device: torch.device
    dtype: torch.dtype
    dry: bool = False
    compiled: bool = True
    rounds: int = MAX_ROUNDS
    deadline: float = float("inf")
    """End, by time.monotonic()."""

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def randn(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0, grad: bool = True) -> Tensor:
        x = torch.randn(shape, device=self.device, dtype=torch.float32).mul_(scale).to(dtype or self.dtype)
        return x.requires_grad_(grad)

    def sizes(self, *, gpu: Any, cpu: Any, dry: Any) -> Any:
        """The list of shapes for this machine."""
        return dry if self.dry else gpu if self.gpu else cpu

    def torch_contenders(self, eager: Function) -> list[Contender]:
        """Eager PyTorch, and the same compiled."""
        return [
            Contender("eager", lambda: eager, "torch"),
            Contender("compiled", partial(self._compile, eager), "torch"),
        ]

    def ours(self, function: Function, *more_backends: str) -> list[Contender]:
        """Our op on each backend for this device."""
        names = ["triton"] if self.gpu else ["cpu", *(["triton"] if INTERPRETED else [])]
        return [
            Contender(f"ours, {name}", partial(partial, function, backend=name), "ours")
            for name in (*names, *more_backends, "reference")
        ]

    def _compile(self, eager: Function) -> Function:
        if not self.compiled:
            raise ImportError("not asked for")
        torch._dynamo.reset()  # its caches are per function: after eight shapes it would fall back to eager
        return torch.compile(eager, fullgraph=True, dynamic=False)


# ------------------------------------------------------------------------------------------------ time


class Clock:
    """Times a function on cold caches."""

    head_start = HEAD_START_CYCLES
    """Cycles of a GPU before the function: as long as the host was seen to take for any, up to a limit."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush = torch.zeros(FLUSH_BYTES[device.type], dtype=torch.int8, device=device)

    def seconds(self, work: Callable[[], object]) -> tuple[float, float]:
        """Times (of the device, of the host)."""
        self._flush.add_(1)
        if self.device.type != "cuda":
            return (host_seconds(work),) * 2
        host: list[float] = []
        device = gpu_seconds(lambda: host.append(host_seconds(work)), self.head_start)
        self.head_start = max(self.head_start, round(CYCLES_PER_S * min(host[0], LONGEST_HEAD_START_S)))
        return device, host[0]


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile, both ends counted in."""
    if len(samples) == 1:
        return (samples[0],) * 3
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, median, high


def measure_ceilings(clock: Clock) -> dict[str, float]:
    """GB/s of a copy (read and written), TFLOP/s of a bf16 matmul."""
    device = clock.device
    numbers, n = COPY_BYTES[device.type] // 4, MATMUL_SIZE[device.type]
    source, target = torch.ones(numbers, device=device), torch.zeros(numbers, device=device)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = a @ b
    works = {
        "GB/s": (2 * 4e-9 * numbers, lambda: target.copy_(source)),
        "TFLOP/s": (2e-12 * n**3, lambda: torch.mm(a, b, out=product)),
    }
    ceilings = {}
    for unit, (amount, work) in works.items():
        for _ in range(5):
            clock.seconds(work)
        ceilings[unit] = amount / min(clock.seconds(work)[0] for _ in range(11))
    return ceilings


# ------------------------------------------------------------------------------------------------ one contender


def call(function: Function, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    outputs = function(*inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
    """The inputs that require grad; none if nothing does."""
    wanted = [x for x in inputs if x.requires_grad]
    given = [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)]
    return list(torch.autograd.grad(outputs, wanted, given)) if wanted else []


def results(function: Function, inputs: Sequence[Tensor], upstream: Sequence[Tensor], calls: int = 1) -> list[Tensor]:
    """Outputs and gradients."""
    for _ in range(calls):
        outputs = call(function, inputs)
    return [*(o.detach() for o in outputs), *gradients(outputs, inputs, upstream)]


def copy_of(inputs: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Leaves with the same numbers, with gradients in the same dtype unless `dtype` gives another."""
    copies = [
        x.detach().to(dtype if dtype and x.is_floating_point() else x.dtype, copy=True).requires_grad_(x.requires_grad)
        for x in inputs
    ]
    for copy, x in zip(copies, inputs, strict=True):
        if x.requires_grad and dtype is None:
            copy.grad_dtype = x.grad_dtype
    return copies


def relative_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest of the results' relative L2 errors; infinite if one is not finite or has another shape."""
    worst = 0.0
    for f, e in zip(found, exact, strict=True):
        if f.shape != e.shape or not bool(f.isfinite().all()):
            return float("inf")
        norm = torch.linalg.vector_norm(e).item()
        worst = max(worst, torch.linalg.vector_norm(f.double() - e).item() / (norm or 1.0))
    return worst


def peak_extra_bytes(device: torch.device, work: Callable[[], object]) -> int:
    """Peak memory of `work` above the start; on a CPU from PyTorch's allocator only."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        held = work()
        torch.cuda.synchronize(device)
        del held
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        held = work()
    del held
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held_bytes = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held_bytes += event.nbytes()
        peak = max(peak, held_bytes)
    return peak


@dataclass
class Ready:
    """A correct contender, with its own inputs."""

    contender: Contender
    function: Function
    inputs: list[Tensor]
    upstream: list[Tensor]
    error: float | None
    extra_bytes: int | None


# ------------------------------------------------------------------------------------------------ one case


class Absent(Exception):
    """A contender that is not installed."""


def check(case: Case) -> list[Row]:
    """A row for eager PyTorch and each backend of ours."""
    upstream, exact = _expected(case)
    allowed, rows = case.allowed, []
    for contender in case.contenders:
        if rows and contender.kind != "ours":
            continue
        row = Row(case.op, case.shape, "all", contender.name, contender.kind, "right")
        rows.append(row)
        try:
            found, again = (
                results(_loaded(contender), copy_of(case.inputs), copy_of(upstream), case.calls) for _ in range(2)
            )
            row.error = relative_error(case.spot(found), exact)
            if allowed is None:
                allowed = 2 * max(row.error, _rounding(case) / 2)
            if row.error > allowed:
                row.status, row.note = "wrong", f"error {row.error:.2g}, allowed {allowed:.2g}"
            elif not all(map(torch.equal, found, again)):
                row.status = "bits differ"
        except Exception as problem:
            row.status, row.note = _told(problem)
    return rows


def _expected(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """(upstream gradients, exact results)."""
    eager = case.contenders[0].load()
    outputs = call(eager, copy_of(case.inputs))
    upstream = [torch.randn_like(o) if o.dim() else torch.ones_like(o) for o in outputs]
    del outputs
    return upstream, _exact(case, eager, upstream)


def _rounding(case: Case) -> float:
    return max(ROUNDING[x.dtype] for x in case.inputs if x.is_floating_point())


def _loaded(contender: Contender) -> Function:
    try:
        return contender.load()
    except (ImportError, AttributeError) as problem:
        raise Absent(f"{type(problem).__name__}: {problem}") from None


def measure(case: Case, run: Run, clock: Clock, ceilings: dict[str, float]) -> list[Row]:
    """A row for every contender and pass."""
    clock.head_start = HEAD_START_CYCLES
    passes = tuple(case.work)
    upstream, exact = _expected(case)
    allowed = case.allowed
    rows, ready = [], []
    for contender in case.contenders:
        status, note, error, extra = "timed", "", None, None
        function: Function | None = None
        try:
            function = _loaded(contender)
            if contender.kind != "floor":
                found = case.spot(results(function, copy_of(case.inputs), copy_of(upstream), case.calls))
                error = relative_error(found, exact)
                del found
                if allowed is None:
                    allowed = 4 * max(error, _rounding(case))
                if error > allowed:
                    status, note = "wrong", f"error {error:.2g}, allowed {allowed:.2g}"
                else:
                    inputs, grads = copy_of(case.inputs), copy_of(upstream)
                    extra = peak_extra_bytes(run.device, partial(results, function, inputs, grads))
        except Exception as problem:  # the others are still measured
            status, note = _told(problem)
        if status == "timed":
            assert function is not None
            own = [u.detach() for u in copy_of(upstream)]
            ready.append(Ready(contender, function, copy_of(case.inputs), own, error, extra))
        else:
            rows.append(Row(case.op, case.shape, "all", contender.name, contender.kind, status, note, error=error))
    del exact
    for number, pass_ in enumerate(passes):
        left = (run.deadline - time.monotonic()) / (len(passes) - number)
        timed = _timed(case, pass_, ready, upstream, run, clock, min(left, CASE_SECONDS))
        rows += timed
        for row in timed:
            if row.seconds:
                row.rate = rate(case.work[pass_], row.seconds[1], case.unit)
                row.of_ceiling = row.rate / ceilings[case.unit]
    rank([row for row in rows if case.alike is None or row.pass_ in case.alike])
    return rows


def _exact(case: Case, eager: Function, upstream: Sequence[Tensor]) -> list[Tensor]:
    if case.exact is not None:
        return case.exact(upstream)
    doubled = [u.double() for u in upstream]
    return case.spot(results(eager, copy_of(case.inputs, torch.float64), doubled, case.calls))


def _told(problem: Exception) -> tuple[str, str]:
    """(status, note) of a contender that raised."""
    lines = str(problem).strip().splitlines()
    said = f"{type(problem).__name__}: {lines[0][:160] if lines else ''}"
    if isinstance(problem, Absent):
        return "absent", said.removeprefix("Absent: ")
    return "absent" if isinstance(problem, BackendError) else "failed", said


def _timed(
    case: Case, pass_: str, ready: list[Ready], upstream: list[Tensor], run: Run, clock: Clock, budget_s: float
) -> list[Row]:
    """Rounds of all contenders in turn until the budget is used up."""
    entered = [r for r in ready if r.contender.kind != "floor" or pass_ in ("both", "step")]
    samples: dict[str, list[tuple[float, float]]] = {r.contender.name: [] for r in entered}
    problems: dict[str, tuple[str, str]] = {}
    began = time.monotonic()
    for round_ in range(-1, run.rounds):  # the first only warms up
        if round_ >= MIN_ROUNDS and time.monotonic() - began > budget_s:
            break
        shift = round_ % max(1, len(entered))
        for one in entered[shift:] + entered[:shift]:
            name = one.contender.name
            if name in problems:
                continue
            try:
                sample = _sample(case, one, upstream, pass_, clock)
            except Exception as problem:
                problems[name] = _told(problem)
                continue
            if round_ >= 0:
                samples[name].append(sample)
    rows = []
    for one in entered:
        name, kind = one.contender.name, one.contender.kind
        status, note = problems.get(name, ("timed", ""))
        row = Row(case.op, case.shape, pass_, name, kind, status, note, unit=case.unit, error=one.error)
        if status == "timed":
            row.seconds = quartiles([device for device, _ in samples[name]])
            row.rounds = len(samples[name])
            row.host_seconds = quartiles([host for _, host in samples[name]])[1]
            row.extra_bytes = one.extra_bytes
        rows.append(row)
    return rows


def _sample(case: Case, one: Ready, upstream: list[Tensor], pass_: str, clock: Clock) -> tuple[float, float]:
    """One run, with its inputs and upstream gradients restored, since some contenders overwrite them."""
    for own, original in zip([*one.inputs, *one.upstream], [*case.inputs, *upstream], strict=True):
        own.data.copy_(original.data)
    if pass_ == "backward":
        outputs = call(one.function, one.inputs)
        return clock.seconds(lambda: gradients(outputs, one.inputs, one.upstream))
    if pass_ == "both" and one.contender.kind != "floor":
        return clock.seconds(lambda: gradients(call(one.function, one.inputs), one.inputs, one.upstream))
    return clock.seconds(lambda: call(one.function, one.inputs))


def rate(work: float, seconds: float, unit: str) -> float:
    """Work in bytes or FLOPs per second, in `unit`."""
    return work / seconds / {"GB/s": 1e9, "TFLOP/s": 1e12}[unit]


def rank(rows: Sequence[Row]) -> None:
    """Ranks timed contenders, from the fastest, within each op, shape and pass. Others have no rank."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        row.rank = None
        if row.seconds and row.status == "timed" and row.kind != "floor":
            groups.setdefault((row.op, row.shape, row.pass_), []).append(row)
    for group in groups.values():
        for number, row in enumerate(sorted(group, key=median), 1):
            row.rank = number


def median(row: Row) -> float:
    assert row.seconds is not None
    return row.seconds[1]


# ------------------------------------------------------------------------------------------------ the table


def table(rows: Sequence[Row]) -> str:
    """Markdown, one table per shape; after each pass a line with ours against the best of the others."""
    lines: list[str] = []
    for op, shape in dict.fromkeys((row.op, row.shape) for row in rows):
        here = [row for row in rows if (row.op, row.shape) == (op, shape)]
        unit = next((row.unit for row in here if row.unit), "rate")
        lines += [
            f"\n**{op}, {shape}**\n",
            f"| pass | contender | ms [quartiles] | {unit} | of ceiling | x eager | host ms | extra MB | error | |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        passes = list(dict.fromkeys(row.pass_ for row in here))
        for pass_ in passes:
            group = [row for row in here if row.pass_ == pass_]
            lines += [_line(row, group) for row in group]
        ranked = {row.pass_ for row in here if row.rank}
        lines += ["", *(verdict(here, pass_) for pass_ in passes if pass_ in ranked)]
    return "\n".join(lines)


def checked(rows: Sequence[Row]) -> str:
    """A line per backend."""
    return "\n".join(
        f"{row.op}, {row.shape}: {row.contender}: {row.status} {_short(row.error)} {row.note}".strip() for row in rows
    )


def _line(row: Row, group: Sequence[Row]) -> str:
    if not row.seconds:
        return (
            f"| {row.pass_} | {row.contender} | {row.status}: {row.note} | | | | | | {_short(row.error)} | unranked |"
        )
    low, median, high = (1e3 * s for s in row.seconds)
    eager = next((r.seconds[1] for r in group if r.contender == "eager" and r.seconds), None)
    place = row.rank or ("floor" if row.kind == "floor" else "unranked")
    return (
        f"| {row.pass_} | {row.contender} | {median:.3f} [{low:.3f}, {high:.3f}] | {row.rate or 0:,.4g} "
        f"| {row.of_ceiling or 0:.0%} | {f'{eager / row.seconds[1]:.2f}' if eager else ''} "
        f"| {1e3 * (row.host_seconds or 0):.3f} | {'' if row.extra_bytes is None else f'{row.extra_bytes / 1e6:,.1f}'} "
        f"| {_short(row.error)} | {place} |"
    )


def _short(error: float | None) -> str:
    return "" if error is None else f"{error:.1e}"


def verdict(rows: Sequence[Row], pass_: str) -> str:
    """Our fastest backend against the fastest of the others in one pass, and the missing ones."""
    group = [row for row in rows if row.pass_ in (pass_, "all")]
    ranked = sorted((row for row in group if row.rank), key=lambda row: row.rank or 0)
    ours = next((row for row in ranked if row.kind == "ours"), None)
    other = next((row for row in ranked if row.kind in ("torch", "peer")), None)
    missing = [f"{r.contender} ({r.status})" for r in group if r.kind in ("torch", "peer") and not r.rank]
    unranked = f"; unranked against {', '.join(missing)}" if missing else ""
    if not ours or not ours.seconds or not other or not other.seconds:
        return f"{pass_}: no comparison{unranked}"
    return f"{pass_}: {ours.contender} is {other.seconds[1] / ours.seconds[1]:.2f}x {other.contender}{unranked}"


# ------------------------------------------------------------------------------------------------ command line

Cases = Callable[[Run], list[Callable[[], Case]]]
"""The cases of an op, each created when it runs."""


def main(cases: Cases, description: str | None, arguments: Sequence[str] | None = None) -> list[Row]:
    """The command line of an op's benchmark."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU (default 1)")
    parser.add_argument("--seconds", type=float, default=600.0, help="the time for all cases; later ones are skipped")
    parser.add_argument("--rounds", type=int, default=MAX_ROUNDS, help="at most")
    parser.add_argument("--only", default="", help="only shapes that contain this")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--check", action="store_true", help="check ours, and that the bits agree twice; nothing is timed"
    )
    parser.add_argument("--dry", action="store_true", help="tiny shapes: runs every line, measures nothing of use")
    parser.add_argument("--json", type=Path, help="also write the rows here, after every case")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as in the trainer on a CPU
    torch.manual_seed(0)
    device = torch.device(options.device)
    run = Run(
        device,
        torch.float32 if INTERPRETED else pick_dtype("auto", device),
        dry=options.dry,
        compiled=not options.no_compile,
        rounds=options.rounds,
        deadline=time.monotonic() + options.seconds,
    )
    clock = Clock(device)
    ceilings = {} if options.check else measure_ceilings(clock)
    about = machine("torch", "triton", *PEERS)
    how = {"device": device.type, "dtype": str(run.dtype).removeprefix("torch."), "threads": options.threads}
    print(", ".join(f"{key} {value}" for key, value in {**about, **how}.items()))
    if ceilings:
        print("ceilings: " + ", ".join(f"{value:,.4g} {unit}" for unit, value in ceilings.items()), flush=True)
    rows: list[Row] = []
    makers = cases(run)
    for number, make in enumerate(makers):
        case, left_s = make(), run.deadline - time.monotonic()
        if options.only not in case.shape:
            continue
        if left_s > 0:
            share_s = left_s / (len(makers) - number)
            until = dataclasses.replace(run, deadline=time.monotonic() + share_s)
            new = check(case) if options.check else measure(case, until, clock, ceilings)
        else:
            new = [Row(case.op, case.shape, "all", "all", "", "skipped", "no time left")]
        rows += new
        print(checked(new) if options.check else table(new), flush=True)
        del case
        if run.gpu:
            torch.cuda.empty_cache()
        if options.json:
            report = {"machine": about, **how, "ceilings": ceilings}
            write_text(options.json, json.dumps({**report, "rows": [row.plain() for row in rows]}, indent=1) + "\n")
    if options.check and not all(map(_is_right, rows)):
        raise SystemExit(1)
    return rows


def _is_right(row: Row) -> bool:
    """Other libraries may add in any order."""
    return row.status in ("right", "absent", "skipped") or (
        row.status == "bits differ" and row.contender not in ("ours, triton", "ours, cpu")
    )
