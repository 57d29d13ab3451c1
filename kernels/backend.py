"""The choice of the implementation that runs an op.

Each op is a `torch.library` custom op whose last argument is the name of a backend, and an `Op` with its backends, the
order in which `auto` prefers them on a device, with the measured reason, and the launches of its Triton kernels. Code
that needs a list of the ops uses `OPS`.

triton      kernels for GPUs; on a CPU only in Triton's interpreter (TRITON_INTERPRET=1), for tests
cpu         csrc/, vectorised C++ for float32 and bf16
reference   PyTorch ops, for every device and dtype

Attention has more: sdpa, which is PyTorch's own, and the versions of the flash-attn package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad

from spt_fast import native
from spt_fast.errors import invalid
from spt_fast.kernels import flash_attn
from spt_fast.kernels.launch import INTERPRETED, TRITON_VERSION, Config, Variant, choose

CONTRACT_BACKENDS = ("auto", "triton", "cpu", "reference")

OPS: dict[str, Op] = {}
"""Every op by name. Importing `spt_fast.kernels` imports every file of the folder, which completes it."""

_preferred: list[str] = []

_passed_over: set[tuple[str, str]] = set()

_installed: dict[str, Candidate] = {}

CPU_LIBRARY = native.is_built()


class BackendError(ValueError):
    """A backend that the op doesn't have, or that cannot run for these tensors."""


@dataclass(frozen=True)
class Candidate:
    """A way for an op to run: a backend, or "auto", and the kernels' launches if they differ from the default.

    launches  kernel, shape and Config, by the names in `launch.launched`
    """

    backend: str
    launches: tuple[tuple[str, tuple, Config], ...] = ()

    def __str__(self) -> str:
        said = [self.backend]
        for kernel, _, config in self.launches:
            sizes = [f"{name} {value:,}" for name, value in config.constants]
            warps = [f"{config.num_warps} warps", f"{config.num_stages} stages"] if config.num_warps else []
            said.append(f"{kernel} with {', '.join([*sizes, *warps])}")
        return ", ".join(said)

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> Candidate:
        """The inverse of `plain`."""
        launches = [
            (kernel, tuple(shape), Config(**{**config, "constants": tuple(map(tuple, config["constants"]))}))
            for kernel, shape, config in plain["launches"]
        ]
        return cls(plain["backend"], tuple(launches))


@dataclass(frozen=True)
class Op:
    """One op, which registers itself in `OPS`.

    name      of its public function
    auto      by type of device the backends that `auto` tries, in order, each with its reason
    variants  the launches of its file's Triton kernels, for ahead-of-time compilation
    launches  launches to try for such inputs besides the default; each changes one kernel's
    backends  those of all devices
    """

    name: str
    auto: Mapping[str, Mapping[str, str]]
    variants: Callable[[], list[Variant]]
    launches: Callable[..., list[Candidate]] = lambda *inputs: []

    backends: list[str] = field(init=False)

    def __post_init__(self) -> None:
        # Not a cached_property: Python 3.11's takes a lock, which torch.compile can't trace.
        object.__setattr__(
            self, "backends", list(dict.fromkeys(name for order in self.auto.values() for name in order))
        )
        OPS[self.name] = self

    def candidates(self, *inputs: Tensor) -> list[Candidate]:
        """Ways to run for such inputs, the default first."""
        device, dtype = inputs[0].device.type, inputs[0].dtype
        usual = self.pick("auto", inputs[0])
        backends = [name for name in self.auto.get(device, {}) if obstacle(name, device, dtype) is None]
        others = [Candidate(name) for name in backends if name != usual]
        return [Candidate("auto"), *others, *self.launches(*inputs)]

    def pick(self, backend: str, x: Tensor, *, passed_over: tuple[str, ...] = (), **obstacles: str | None) -> str:
        """The backend that runs for tensors like x; BackendError for an unknown one or one that cannot run for them.

        `obstacles`: by backend, further reasons why it cannot run, besides device and dtype; `auto` also leaves out
        `passed_over` ones. ValueError for x of no floating dtype.
        """
        if not x.dtype.is_floating_point:
            raise ValueError(invalid(f"{self.name}(dtype)", x.dtype, "a floating dtype, as of x.float()"))
        if backend == "auto":
            tuned = [_installed[self.name].backend] if self.name in _installed else []
            for name in (*_preferred, *tuned, *self.auto.get(x.device.type, {})):
                if name not in self.backends or name in passed_over or (self.name, name) in _passed_over:
                    continue
                if obstacle(name, x.device.type, x.dtype) is None and obstacles.get(name) is None:
                    return name
            return "reference"
        if backend in self.backends:
            problem = obstacle(backend, x.device.type, x.dtype) or obstacles.get(backend)
            if problem is None:
                return backend
        else:
            problem = "this op has no such backend" if backend in CONTRACT_BACKENDS else "unknown"
        known = ", ".join(("auto", *self.backends))
        raise BackendError(invalid(f"{self.name}(backend)", backend, f"{problem}; the op has {known}"))


@contextmanager
def prefer(backend: str) -> Iterator[None]:
    """Inside, `auto` uses this backend for every op that has it and can run it; "auto" itself changes nothing.

    It holds for all threads of the process: on autograd's own a checkpointed block is computed again. BackendError for
    one that no op has.
    """
    known = dict.fromkeys(["auto", *(name for op in OPS.values() for name in op.backends)])
    if backend not in known:
        raise BackendError(invalid("prefer(backend)", backend, f"unknown; there are {', '.join(known)}"))
    _preferred.insert(0, backend)
    try:
        yield
    finally:
        _preferred.remove(backend)


def install(chosen: Mapping[str, Candidate]) -> None:
    """From now on `auto` means these, by op, instead of anything installed before."""
    for candidate in _installed.values():
        for kernel, shape, _ in candidate.launches:
            choose(kernel, shape, None)
    _installed.clear()
    _installed.update(chosen)
    for candidate in chosen.values():
        for launch in candidate.launches:
            choose(*launch)


def tried_on_gpus(x: Tensor, kernel: str, shape: tuple, configs: Sequence[Config]) -> list[Candidate]:
    """Candidates with this launch of a Triton kernel, for tensors like x; none on a CPU."""
    return [Candidate("triton", ((kernel, shape, config),)) for config in configs] if x.is_cuda else []


def pass_over(op: str, backend: str) -> None:
    """From now on `auto` doesn't use this backend for this op."""
    _passed_over.add((op, backend))


def obstacle(backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why a backend can't run for tensors of this device and dtype; None if it can."""
    if backend == "triton":
        if TRITON_VERSION is None:
            return "triton is not installed"
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"Triton kernels support float32, bfloat16 and float16, not {dtype}"
        if device != "cuda" and not INTERPRETED:
            return f"Triton kernels need a GPU, the tensors are on {device}"
    if backend == "cpu":
        if not CPU_LIBRARY:
            return "the C++ extension is not built"
        if device != "cpu":
            return f"the tensors are on {device}"
        if dtype not in (torch.float32, torch.bfloat16):
            return f"the C++ kernels support float32 and bfloat16, not {dtype}"
    if backend in flash_attn.BACKENDS:
        if device != "cuda":
            return f"flash-attn needs a GPU, the tensors are on {device}"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"flash-attn supports bfloat16 and float16, not {dtype}"
        return flash_attn.obstacle(backend)
    return None


def auto_backends() -> dict[str, str]:
    """By op, the backend that `auto` means on this machine for tensors in bf16."""
    return {name: op.pick("auto", _example()) for name, op in sorted(OPS.items())}


def chosen_backends() -> dict[str, str]:
    """By op, the backend that `auto` means on this machine for tensors in bf16, and why."""
    device = _example().device.type
    return {name: f"{chosen}: {OPS[name].auto[device][chosen]}" for name, chosen in auto_backends().items()}


def _example() -> Tensor:
    return torch.empty(0, dtype=torch.bfloat16, device="cuda" if torch.cuda.is_available() else "cpu")


_LIBRARY = torch.library.Library("spt_fast", "FRAGMENT")
"""Not `torch.library.custom_op`: the first call of one imports torch.compile, a second of every process."""

_formulas: dict[Callable, tuple[Callable, Callable]] = {}
"""By custom op, the functions that save for its gradients and compute them."""


def custom_op(name: str, empty: Callable[..., Any], mutates: Sequence[str] = ()) -> Callable[[Callable], Callable]:
    """Makes a function of positional arguments the custom op `spt_fast::name`.

    The registered op costs 30 µs of Python and dispatcher per call, and its gradients as much again. Only code that
    looks at ops needs it: torch.compile and export, selective checkpointing, transforms, fake and meta tensors. All
    others get the function itself, under autograd as a `torch.autograd.Function`.

    empty    (the leading arguments, *_) -> new tensors of the results' shapes, with which torch.compile traces the op
    mutates  the arguments, each a list of tensors, that the op changes in place; such an op has no gradients
    """

    def register(function: Callable) -> Callable:
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"spt_fast::{name}", empty, lib=_LIBRARY)
        op = getattr(torch.ops.spt_fast, name).default
        places = [place for place, argument in enumerate(op._schema.arguments) if argument.name in mutates]

        @wraps(function)
        def call(*arguments: Any) -> Any:
            if not torch.compiler.is_compiling():
                _refuse_derivatives(name, arguments)
            if is_looked_at(arguments):
                return op(*arguments)
            if mutates:
                for place in places:
                    torch.autograd.graph.increment_version(arguments[place])
                return function(*arguments)
            return apply(*arguments) if torch.is_grad_enabled() else function(*arguments)

        class direct(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *arguments: Any) -> Any:
                output = function(*arguments)
                _save(call, ctx, arguments, output)
                return output

            @staticmethod
            def backward(ctx: Any, *gradients: Tensor) -> Any:
                return _differentiate(call, ctx, *gradients)

        apply = super(torch.autograd.Function, direct).apply  # skips its check for transforms
        if mutates:
            _LIBRARY.impl(name, _in_place(op, places), "Autograd", with_keyset=True)
        else:
            saved, computed = partial(_save, call), partial(_differentiate, call)
            torch.library.register_autograd(op, computed, setup_context=saved, lib=_LIBRARY)
        return call

    return register


def is_looked_at(arguments: Sequence[Any]) -> bool:
    """Whether the called ops are observed, or a tensor isn't plain memory."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    if torch._C._are_functorch_transforms_active():
        return True
    for given in arguments:
        kind = type(given)
        if kind is Tensor or kind is torch.nn.Parameter:
            if given.is_meta:
                return True
        elif isinstance(given, Tensor):
            return True
    return False


def _refuse_derivatives(name: str, arguments: Sequence[Any]) -> None:
    """NotImplementedError where torch.func or forward mode would differentiate a custom op: PyTorch itself returns
    tangents of zeros, without a word."""
    inner = torch._C._functorch.peek_interpreter_stack() if torch._C._are_functorch_transforms_active() else None
    forward = forward_ad._current_level >= 0
    if not forward and (inner is None or inner.key() != torch._C._functorch.TransformType.Grad):
        return
    for given in arguments:
        if not isinstance(given, Tensor):
            continue
        if not forward:
            differentiated = given.requires_grad and torch.is_grad_enabled()
        elif torch._C._functorch.is_functorch_wrapped_tensor(given):
            differentiated = True  # perhaps: only the innermost transform's tangent can be seen
        else:
            differentiated = forward_ad.unpack_dual(given).tangent is not None
        if differentiated:
            raise NotImplementedError(
                f"{name}: forward mode and torch.func's grad, vjp, jvp and the like cannot differentiate it; use "
                "backward() or torch.autograd.grad"
            )


def is_transformed() -> bool:
    """Whether vmap or another of torch.func's transforms is active; these support only ops, no autograd Function."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def differentiable(op: Callable, gradients: Callable, setup_context: Callable) -> None:
    """Gives a custom op its gradients, in the form of `torch.library.register_autograd`."""
    _formulas[op] = setup_context, gradients


def _save(op: Callable, ctx: Any, inputs: tuple, output: Any) -> None:
    if op in _formulas:
        _formulas[op][0](ctx, inputs, output)


def _differentiate(op: Callable, ctx: Any, *gradients: Tensor) -> Any:
    if op not in _formulas:
        raise RuntimeError(f"ops are differentiable once: {op.__name__.strip('_')} has no derivative")
    return _formulas[op][1](ctx, *gradients)


def _in_place(op: OpOverload, places: Sequence[int]) -> Callable:
    """The op without autograd, which is told that these arguments are overwritten."""

    def run(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        for place in places:
            torch.autograd.graph.increment_version(arguments[place])
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    return run


def with_dense_rows(*tensors: Tensor) -> list[Tensor]:
    """Each unchanged if the numbers of its last dimension are contiguous; else a copy."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def new_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """New contiguous tensors of these shapes and dtypes, not written yet."""
    return tuple(x.new_empty(x.shape) for x in tensors)


def autocasts(x: Tensor) -> bool:
    """Whether torch.autocast is on where x is; the meta device has none."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float32, the dtype of every sum inside an op; float64 for float64 inputs, so that gradcheck is meaningful."""
    return torch.promote_types(x.dtype, torch.float32)
