"""What every op keeps, tried on the samples that its test gives: one contract for all.

    class TestContract(Contract):
        samples = (Sample("swiglu", swiglu, ...), ...)

Each sample runs on every backend and dtype that this machine has.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from spt_fast.kernels.backend import OPS
from tests.kernels.compare import DEVICE, ROUNDING, Function, backends_and_dtypes, by_more_than_chance, random_tensors

Shape = tuple[int, ...]
OURS = {"cpu", "triton"}


@dataclass(frozen=True)
class Sample:
    """One way of calling an op. Small: gradients are checked number by number, and the interpreter of Triton is slow.

    op        its public name
    call      (*inputs, backend=...) -> results; one that works in place returns what it has changed
    plain     (*inputs) -> the same results by PyTorch's ops
    inputs    (rows, dtype) -> the inputs, whose leading dimensions are `rows`
    rows      as above; `empty`: rows that hold nothing; `many`: enough for several threads of a CPU to share
    gradients how many of the inputs, from the first, have one; 0 for an op that works in place
    exact     whether gradients by differences are met in float64
    loose     backends whose PyTorch kernels round otherwise where memory is laid out otherwise
    strided   whether gradients may be laid out like inputs, as those of PyTorch's products are
    """

    op: str
    call: Callable[..., Any]
    plain: Callable[..., Any]
    inputs: Callable[[Shape, torch.dtype], Sequence[Tensor]]
    rows: Shape
    empty: tuple[Shape, ...]
    gradients: int
    many: Shape | None = None
    exact: bool = True
    loose: tuple[str, ...] = ()
    strided: bool = False

    def on(self, backend: str) -> Function:
        def call(*inputs: Tensor) -> tuple[Tensor, ...]:
            return as_tuple(self.call(*inputs, backend=backend))

        return call

    def results(self, function: Function, inputs: Sequence[Tensor], upstream: Sequence[Tensor] = ()) -> list[Tensor]:
        """Outputs and gradients; without `upstream`, of the sum of the outputs' squares."""
        given = [x.detach().requires_grad_(number < self.gradients) for number, x in enumerate(inputs)]
        outputs = as_tuple(function(*given))
        if not self.gradients:
            return list(outputs)
        gradients = torch.autograd.grad(outputs, given[: self.gradients], upstream or [2 * y.detach() for y in outputs])
        return [*(y.detach() for y in outputs), *gradients]


def as_tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


# ------------------------------------------------------------------------------------------------ layouts


def poison(shape: Sequence[int], like: Tensor) -> Tensor:
    """What nobody may read: NaN, or the largest integer."""
    worst = float("nan") if like.is_floating_point() else True if like.dtype == torch.bool else 2**31 - 1
    return torch.full(shape, worst, dtype=like.dtype, device=like.device)


def with_gaps(x: Tensor) -> Tensor:
    """Every number by itself."""
    wide = poison((*x.shape, 2), x)
    wide[..., 0] = x
    return wide[..., 0]


def last_two_swapped(x: Tensor) -> Tensor:
    return x.mT.clone(memory_format=torch.contiguous_format).mT if x.dim() > 1 else with_gaps(x)


def heads_before_positions(x: Tensor) -> Tensor:
    if x.dim() < 3:
        return with_gaps(x)
    return x.transpose(-3, -2).clone(memory_format=torch.contiguous_format).transpose(-3, -2)


def rows_apart(x: Tensor) -> Tensor:
    """Each row in one piece, others between them."""
    if not x.dim():
        return with_gaps(x)
    wide = poison((*x.shape[:-1], x.shape[-1] + 5), x)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def slices_of_a_projection(x: Tensor) -> Tensor:
    """Some of the heads of a larger tensor."""
    if x.dim() < 2:
        return rows_apart(x)
    wide = poison((*x.shape[:-2], x.shape[-2] + 3, x.shape[-1]), x)
    wide[..., 1 : 1 + x.shape[-2], :] = x
    return wide[..., 1 : 1 + x.shape[-2], :]


def in_the_middle(x: Tensor) -> Tensor:
    """Contiguous and aligned, with others right before and behind it."""
    wide = poison((x.numel() + 128,), x)
    return wide[64 : 64 + x.numel()].view(x.shape).copy_(x)


FLAT_LAYOUTS = (with_gaps, last_two_swapped, rows_apart, in_the_middle)
LAYOUTS = (*FLAT_LAYOUTS, heads_before_positions, slices_of_a_projection)


def expanded(x: Tensor) -> list[Tensor]:
    """The gradients of sums: one number everywhere, and one row everywhere."""
    if not x.dim():
        return [x, x]
    return [x.flatten()[0].expand(x.shape), x[:1].expand(x.shape)]


# ------------------------------------------------------------------------------------------------ the contract


class Contract:
    samples: ClassVar[tuple[Sample, ...]]
    usable: ClassVar[Callable[[str, torch.dtype], bool]] = staticmethod(lambda backend, dtype: True)
    """Whether the op takes what device and dtype alone allow."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """A test takes each sample; on each backend, if it wants that; in each dtype of it, if it wants that too."""
        names = [name for name in ("sample", "backend", "dtype") if name in metafunc.fixturenames]
        every = [(sample, *pair) for sample in self.samples for pair in self.pairs(sample)]
        cases = list(dict.fromkeys(case[: len(names)] for case in every))
        metafunc.parametrize(names, cases, ids=["-".join(map(self.name_of, case)) for case in cases])

    def name_of(self, part: object) -> str:
        if not isinstance(part, Sample):
            return str(part).removeprefix("torch.")
        return f"{part.op}{self.samples.index(part)}"

    def pairs(self, sample: Sample) -> list[tuple[str, torch.dtype]]:
        return [pair for pair in backends_and_dtypes(*OPS[sample.op].backends) if self.usable(*pair)]

    def dtype_of(self, sample: Sample, backend: str) -> torch.dtype:
        return dict(reversed(self.pairs(sample)))[backend]

    def test_what_torch_asks_of_a_custom_op(self, sample: Sample, backend: str, dtype: torch.dtype) -> None:
        """Of every one that is called, with what it is given; strides included, which are not the usual ones."""
        inputs = [last_two_swapped(x) for x in sample.inputs(sample.rows, dtype)]
        with Calls() as calls:
            sample.results(sample.on(backend), inputs)
        assert calls.found or backend not in OURS
        for op, arguments, tests in calls.found:
            torch.library.opcheck(op, arguments, test_utils=tests)

    def test_it_compiles_whole(self, sample: Sample, backend: str) -> None:
        self.compiles(sample, backend)

    def test_it_compiles_for_sizes_left_open(self, sample: Sample) -> None:
        if not sample.gradients:
            pytest.skip("takes ten seconds, for tensors of sizes that never change")
        if torch.__version__ < "2.12" and sample.op == "qkv_attention":
            pytest.skip("torch 2.11 compiles no autograd.Function with results of sizes left open")
        backends = [backend for backend, _ in self.pairs(sample)]
        self.compiles(sample, "reference" if "reference" in backends else backends[0], dynamic=True)

    def compiles(self, sample: Sample, backend: str, dynamic: bool | None = None) -> None:
        def function(*inputs: Tensor) -> tuple[Tensor, ...]:
            given = (2 * x if number < sample.gradients else x for number, x in enumerate(inputs))
            return tuple(2 * y for y in sample.on(backend)(*given))

        inputs = sample.inputs(sample.rows, self.dtype_of(sample, backend))
        torch._dynamo.reset()  # the limit of recompilations counts those of the other cases
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        both = [copies(inputs) for _ in range(2)]
        expected, found = (sample.results(f, given) for f, given in zip((function, compiled), both, strict=True))
        assert_same([*expected, *both[0]], [*found, *both[1]], loose=backend in sample.loose)

    def test_tensors_without_elements(self, sample: Sample, backend: str, dtype: torch.dtype) -> None:
        """Results of the right shapes; gradients of weights are zeros."""
        for rows in sample.empty:
            inputs = sample.inputs(rows, dtype)
            found = sample.results(sample.on(backend), inputs)
            expected = sample.results(sample.plain, copies(inputs))
            assert [x.shape for x in found] == [x.shape for x in expected]
            assert not any(x.any() for x in found)

    @by_more_than_chance
    def test_any_layout_and_surroundings(self, sample: Sample, backend: str, dtype: torch.dtype) -> None:
        """Inputs and upstream gradients, wherever they lie among what may not be read; and inputs are only read."""
        function, inputs = sample.on(backend), sample.inputs(sample.rows, dtype)
        upstream = [random_tensors([y.shape], y.dtype)[0] for y in sample.on(backend)(*copies(inputs))]
        expected = sample.results(function, copies(inputs), upstream)
        for layout in LAYOUTS if max(x.dim() for x in inputs) > 2 else FLAT_LAYOUTS:
            moved = [layout(x) for x in inputs]
            found = sample.results(function, moved, [layout(u) for u in upstream])
            assert_same(expected, found, loose=backend in sample.loose)
            if sample.gradients:
                assert_same(inputs, moved)
                assert backend not in OURS or sample.strided or all(x.is_contiguous() for x in found)
        for each in zip(*(expanded(u) for u in upstream), strict=True):
            expected = sample.results(function, copies(inputs), [u.contiguous() for u in each])
            assert_same(expected, sample.results(function, copies(inputs), each), loose=backend in sample.loose)

    @by_more_than_chance
    def test_it_is_mapped(self, sample: Sample) -> None:
        """Over inputs that have gradients, these too."""
        if not sample.gradients:
            pytest.skip("torch.func knows no changes in place")
        function = sample.on("auto")
        each = [sample.inputs(sample.rows, torch.float32)]
        first, others = each[0][: sample.gradients], each[0][sample.gradients :]
        each.append([*(x.flip(0) for x in first), *others])
        upstream = [random_tensors([y.shape], y.dtype)[0] for y in function(*each[0])]
        expected = [sample.results(function, inputs, upstream) for inputs in each]
        places = tuple(0 if number < sample.gradients else None for number in range(len(each[0])))
        mapped = torch.func.vmap(function, in_dims=places)
        stacked = [torch.stack(pair) for pair in zip(first, each[1], strict=False)]
        found = sample.results(mapped, [*stacked, *others], [torch.stack([u, u]) for u in upstream])
        for number in range(2):
            assert_same(expected[number], [x[number] for x in found], loose=True)

    @by_more_than_chance
    def test_a_result_changed_in_place(self, sample: Sample, backend: str) -> None:
        """Has the right gradients, or PyTorch says that they needed it."""
        if not sample.gradients:
            pytest.skip("it works in place itself")
        inputs = sample.inputs(sample.rows, self.dtype_of(sample, backend))
        given = [x.requires_grad_(number < sample.gradients) for number, x in enumerate(copies(inputs))]
        outputs = sample.on(backend)(*given)
        upstream = [random_tensors([y.shape], y.dtype)[0] for y in outputs]
        changed = [y.mul_(2) for y in outputs]
        try:
            found = torch.autograd.grad(changed, given[: sample.gradients], upstream)
        except RuntimeError as error:
            assert "has been modified by an inplace operation" in str(error)  # noqa: PT017
        else:
            expected = sample.results(sample.on(backend), inputs, [2 * u for u in upstream])[len(outputs) :]
            assert_same(expected, found, loose=backend in sample.loose)

    @by_more_than_chance
    def test_memory_that_was_never_written(self, sample: Sample, backend: str, dtype: torch.dtype) -> None:
        """Where PyTorch fills new memory with NaN, the results are the same."""
        inputs = sample.inputs(sample.rows, dtype)
        expected = sample.results(sample.on(backend), copies(inputs))
        with filled_memory():
            found = sample.results(sample.on(backend), copies(inputs))
        assert_same(expected, found, loose=backend not in OURS)  # PyTorch may take other kernels then

    def test_the_same_every_time_with_any_number_of_threads(self, sample: Sample, backend: str) -> None:
        if backend not in OURS:
            pytest.skip("what PyTorch's ops promise")
        share = sample.many is not None and (backend == "cpu" or DEVICE == "cuda")
        inputs = sample.inputs(sample.many if share else sample.rows, self.dtype_of(sample, backend))
        threads, found = torch.get_num_threads(), []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count if share else threads)
                found.append(sample.results(sample.on(backend), copies(inputs)))
        finally:
            torch.set_num_threads(threads)
        assert_same(found[0], found[1])
        assert_same(found[0], found[2])

    def test_gradients_by_differences(self, sample: Sample) -> None:
        """Also of each result alone, and by each input alone."""
        if not sample.gradients or not sample.exact:
            pytest.skip("none, or of numbers that were rounded")
        inputs = [x.cpu() for x in sample.inputs(sample.rows, torch.float64)]
        leaves = [x.requires_grad_(number < sample.gradients) for number, x in enumerate(inputs)]
        assert torch.autograd.gradcheck(sample.on("auto"), leaves)
        outputs = range(len(sample.on("auto")(*leaves)))
        for number, output in product(range(sample.gradients), outputs):
            alone = [x.detach().requires_grad_(place == number) for place, x in enumerate(inputs)]
            one = sample.on("auto")(*alone)[output]
            if one.requires_grad:
                assert torch.autograd.gradcheck(lambda *x, y=output: sample.on("auto")(*x)[y], alone)

    def test_an_unknown_backend_is_refused(self, sample: Sample) -> None:
        inputs = sample.inputs(sample.rows, torch.float32)
        sample.on("auto")(*copies(inputs))
        sample.on("reference")(*copies(inputs))
        problem = f"{sample.op}(backend): 'tirton' is invalid: unknown; the op has auto, "
        with pytest.raises(ValueError, match="^" + re.escape(problem)):
            sample.on("tirton")(*inputs)


class Calls(TorchDispatchMode):
    """The calls of our custom ops, what they were given, and what opcheck is to test. What a backward pass calls has no
    gradient of its own, and is traced with the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, tuple, tuple[str, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), options: Any = None) -> Any:
        if function.namespace == "spt_fast":
            forward = torch._C._current_graph_task_id() < 0
            keep = lambda x: copy.deepcopy(x.detach()).requires_grad_(x.requires_grad and forward)  # noqa: E731
            tests = ("test_schema", "test_faketensor")
            tests += ("test_autograd_registration", "test_aot_dispatch_dynamic") if forward else ()
            self.found.append((function, tree_map_only(Tensor, keep, arguments), tests))
        return function(*arguments, **(options or {}))


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().clone() for x in tensors]


def assert_same(expected: Sequence[Tensor], found: Sequence[Tensor], *, loose: bool = False) -> None:
    """Bit for bit, or within some roundings of the largest number."""
    for e, f in zip(expected, found, strict=True):
        allowed = 12 * ROUNDING[e.dtype] * float(e.abs().max()) if loose and e.is_floating_point() else 0.0
        torch.testing.assert_close(f, e, rtol=0, atol=allowed, equal_nan=True)


@contextmanager
def filled_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
