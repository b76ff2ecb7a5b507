"""Makes Triton's interpreter faster for the tests, with the same operations and results.

The interpreter's cost is per operation, not per element, and the tests of the Hessian kernel run millions of
operations. Most of the time goes into descriptions of types and shapes, which it makes again for each operation, and
into replacing all of triton.language at each call of a device function. The tests also pass without this module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import triton
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

KNOWN = "3.7."  # the Triton versions whose code remember_types and describe_tuples_when_asked replace


def interpret_quickly() -> None:
    replace_language_once_a_launch()
    if triton.__version__.startswith(KNOWN):
        remember_types()
        describe_tuples_when_asked()


def replace_language_once_a_launch() -> None:
    """Replace triton.language at the first call of a launch, instead of at each call of a device function."""
    replace, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    nothing = getattr(interpreter, "_LangPatchScope", lambda: None)  # not in every version of Triton
    replaced: set[frozenset[int]] = set()

    @functools.cache
    def languages(fn: Callable[..., object]) -> frozenset[int]:
        return frozenset(id(value) for value in fn.__globals__.values() if value is tl or value is tl.core)

    def replace_once(fn: Callable[..., object]) -> object:
        if languages(fn) in replaced:
            return nothing()
        replaced.add(languages(fn))
        return replace(fn)

    def run_afresh(self: object, *arguments: object, **options: object) -> None:
        replaced.clear()
        run(self, *arguments, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = replace_once, run_afresh


def remember_types() -> None:
    """Cache a type's NumPy dtype, its variants of other element types, and a tensor's shape, by the type's name."""
    np_dtype_of, like, to_ir = interpreter._get_np_dtype, core.block_type.with_element_ty, core.block_type.to_ir
    make_tensor, broadcast = core.tensor.__init__, TritonSemantic.broadcast_impl_value
    np_dtypes: dict[str, Any] = {}
    likes: dict[tuple[str, str], core.block_type] = {}
    shapes: dict[str, tuple[Any, Any]] = {}

    def np_dtype(type: Any) -> Any:
        if type.name not in np_dtypes:
            np_dtypes[type.name] = np_dtype_of(type)
        return np_dtypes[type.name]

    def with_element_ty(self: core.block_type, scalar: Any) -> core.block_type:
        key = self.name, scalar.name
        if key not in likes:
            likes[key] = like(self, scalar)
        return likes[key]

    def to_itself(self: core.block_type, builder: Any) -> Any:
        return self if isinstance(builder, interpreter.InterpreterBuilder) else to_ir(self, builder)

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        if (known := shapes.get(type.name)) is None:
            make_tensor(self, handle, type)
            shapes[type.name] = self.shape, self.numel
        else:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = known

    def broadcast_what_differs(self: Any, lhs: Any, rhs: Any) -> Any:
        both = isinstance(lhs.type, core.block_type) and isinstance(rhs.type, core.block_type)
        return (lhs, rhs) if both and lhs.type.shape.values == rhs.type.shape.values else broadcast(self, lhs, rhs)

    interpreter._get_np_dtype = np_dtype
    core.block_type.with_element_ty, core.block_type.to_ir = with_element_ty, to_itself
    core.tensor.__init__ = init_tensor
    TritonSemantic.broadcast_impl_value = broadcast_what_differs


def describe_tuples_when_asked() -> None:
    """Compute a tuple's type on demand: the interpreter makes a tuple for every tensor, and seldom needs its type."""

    def init(self: Any, args: Sequence[Any], type: Any = None) -> None:
        self.values = list(args)
        self._type = type if type is None or isinstance(type, core.tuple_type) else core.tuple_type(type)

    def get_type(self: Any) -> core.tuple_type:
        if self._type is None:
            self._type = core._type_for_tuple_values(self.values)
        return self._type

    core.tuple.__init__ = init
    core.tuple.type = property(get_type, lambda self, type: setattr(self, "_type", type))
