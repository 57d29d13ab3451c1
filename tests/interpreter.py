"""Triton's interpreter, without what it computes again and again. Its results stay the same.

Most of its time goes into the types of small blocks and into patching `triton.language`:

- Types of blocks, shapes and NumPy's types are remembered.
- Two operands of one shape need no broadcasting.
- Triton computes whether integers overflow, and asserts it only in debug mode. Outside of that mode it is left out.
- A launch patches `triton.language` again whenever a kernel calls a function. The launch itself has patched what our
  functions use, and what Triton's own use stays patched for ever.
- Which members of a module are to be patched is looked up once.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

find_numpy_dtype = interpreter._get_np_dtype
NUMPY_DTYPES: dict[str, Any] = {}


def numpy_dtype(kind: Any) -> Any:
    if kind.name not in NUMPY_DTYPES:
        NUMPY_DTYPES[kind.name] = find_numpy_dtype(kind)
    return NUMPY_DTYPES[kind.name]


make_block_type = core.block_type.__init__
BLOCK_TYPES: dict[tuple[str, tuple[int, ...]], tuple[Any, int, str]] = {}
"""Shape, size and name by the element's type and the sizes."""


def block_type(self: Any, element_ty: Any, shape: Any) -> None:
    sizes = tuple([size.value if isinstance(size, core.constexpr) else size for size in shape])
    key = element_ty.name, sizes
    if key in BLOCK_TYPES:
        self.element_ty = element_ty
        self.shape, self.numel, self.name = BLOCK_TYPES[key]
    else:
        make_block_type(self, element_ty, shape)
        BLOCK_TYPES[key] = self.shape, self.numel, self.name


SHAPES: dict[tuple[int, ...], tuple[Any, Any]] = {}
"""Size and shape of a tensor, as compile-time constants, by the sizes."""


def tensor(self: Any, handle: Any, type: Any) -> None:
    sizes = tuple(type.shape.values) if type.is_block() else ()
    if sizes not in SHAPES:
        SHAPES[sizes] = core.constexpr(math.prod(sizes)), core.tuple([core.constexpr(size) for size in sizes])
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = SHAPES[sizes]


make_broadcast = TritonSemantic.broadcast_impl_value


def broadcast(self: TritonSemantic, lhs: Any, rhs: Any) -> tuple[Any, Any]:
    if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape.values == rhs.type.shape.values:
        return lhs, rhs
    return make_broadcast(self, lhs, rhs)


def check_overflow_in_debug_mode(self: TritonSemantic, *operands_and_operation: Any) -> None:
    if self.builder.options.debug:
        check_overflow(self, *operands_and_operation)


check_overflow = TritonSemantic.binary_op_sanitize_overflow_impl

BUILTINS: dict[Any, list[tuple[str, Any]]] = {}


def patch_builtins(package: Any, builder: Any, scope: Any) -> None:
    if package not in BUILTINS:
        BUILTINS[package] = [(name, one) for name, one in inspect.getmembers(package) if core.is_builtin(one)]
    for name, member in BUILTINS[package]:
        interpreter._patch_attr(package, name, member, builder, scope)


patch_and_call, PATCHED = interpreter.InterpretedFunction.__call__, {"spt_fast"}


def call_function(self: Any, *arguments: Any, **named: Any) -> Any:
    package = self.fn.__module__.partition(".")[0]
    if package in PATCHED:
        return self.rewrite()(*arguments, **named)
    PATCHED.add(package)
    return patch_and_call(self, *arguments, **named)


FASTER = {
    (interpreter, "_get_np_dtype"): numpy_dtype,
    (interpreter, "_patch_builtin"): patch_builtins,
    (interpreter.InterpretedFunction, "__call__"): call_function,
    (core.block_type, "__init__"): block_type,
    (core.tensor, "__init__"): tensor,
    (TritonSemantic, "broadcast_impl_value"): broadcast,
    (TritonSemantic, "binary_op_sanitize_overflow_impl"): check_overflow_in_debug_mode,
}
TRITONS_OWN = {place: getattr(*place) for place in FASTER}


def speed_up() -> None:
    """For the rest of the process."""
    for (owner, name), faster in FASTER.items():
        setattr(owner, name, faster)
