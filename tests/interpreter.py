"""Makes Triton's interpreter faster for the tests, with the same operations and results.

The interpreter's cost is per operation, not per element, and the tests of the Hessian kernel run millions of
operations. Most of the time goes into descriptions of types and shapes, which it makes again for each operation, and
into replacing all of triton.language at each call of a device function. The tests also pass without this module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
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
        skip_what_changes_nothing()
        reduce_slices()


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


# Types of two equal operands that no operator converts.
PLAIN = {"fp32", "int1", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"}
CALCULATIONS: dict[str, Callable[..., Any]] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def skip_what_changes_nothing() -> None:
    """Operands of one type and shape are not converted, numbers are made tensors once, and the check for overflow
    calculates in NumPy at once."""
    check_types, check_overflow = (
        TritonSemantic.binary_op_type_checking_impl,
        TritonSemantic.binary_op_sanitize_overflow_impl,
    )

    constants: dict[tuple[str, type, str], Any] = {}

    def constant(self: Any, value: float, like: Any) -> Any:
        """The number as a tensor of the other operand's type and shape; None where a type would be converted."""
        scalar = like.type.scalar
        whole = scalar.name != "fp32"
        if scalar.name not in PLAIN or (whole and type(value) is float):
            return None
        if whole and not scalar.get_int_min_value() <= value <= scalar.get_int_max_value():
            return None
        key = like.type.name, type(value), repr(value)
        if key not in constants:
            constants[key] = self.broadcast_impl_value(like, self.scalar_constant(value, scalar))[1]
        return constants[key]

    def offset(self: Any, value: int, pointer: Any) -> Any:
        """The number of elements as a tensor of the pointer's shape."""
        key = pointer.type.name, int, repr(value)
        if key not in constants:
            constants[key] = self.broadcast_impl_value(pointer, self.to_tensor(value))[1]
        return constants[key]

    def types(self: Any, lhs: Any, rhs: Any, *arguments: Any, **options: Any) -> Any:
        left, right = type(lhs), type(rhs)
        if left is core.tensor and right is core.tensor:
            if lhs.type.name == rhs.type.name and lhs.type.scalar.name in PLAIN:
                return lhs, rhs
        elif left is core.tensor and right is int and lhs.type.scalar.is_ptr() and arguments[:1] == (True,):
            return lhs, offset(self, rhs, lhs)
        elif left is core.tensor and right in (int, float):
            if (found := constant(self, rhs, lhs)) is not None:
                return lhs, found
        elif right is core.tensor and left in (int, float) and (found := constant(self, lhs, rhs)) is not None:
            return found, rhs
        return check_types(self, lhs, rhs, *arguments, **options)

    def overflow(self: Any, lhs: Any, rhs: Any, operator: Callable[..., object]) -> None:
        scalar = lhs.type.scalar
        calculate = CALCULATIONS.get(operator.__name__)
        if calculate is not None and scalar.int_bitwidth <= 32:
            found = calculate(lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
            if found.min() >= scalar.get_int_min_value() and found.max() <= scalar.get_int_max_value():
                return
        check_overflow(self, lhs, rhs, operator)

    def call_builtin(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        inner = getattr(member, "__wrapped__", member)  # without the check that _semantic is given
        semantic = interpreter.interpreter_semantic

        def call(*arguments: Any, **options: Any) -> Any:
            options["_semantic"] = semantic
            return inner(*arguments, **options)

        scope.set_attr(owner, name, call)

    TritonSemantic.binary_op_type_checking_impl = types
    TritonSemantic.binary_op_sanitize_overflow_impl = overflow
    interpreter._patch_attr = call_builtin


def reduce_slices() -> None:
    """A reduction by a function of its own takes slices one after the other, and not each element of them alone."""
    by_elements = interpreter.ReduceOps.generic_reduce

    def generic_reduce(self: Any, inputs: Any) -> Any:
        data = [arg.handle.data for arg in inputs]
        if self.axis is None or data[0].ndim < 2 or data[0].shape[self.axis] == 0:
            return by_elements(self, inputs)
        axis, dtypes = self.axis, [arg.dtype for arg in inputs]

        def at(number: int) -> list[Any]:
            parts = [np.take(values, number, axis=axis) for values in data]
            return [self.to_tensor(part, dtype) for part, dtype in zip(parts, dtypes, strict=True)]

        total = at(0)
        for number in range(1, data[0].shape[axis]):
            found = self.combine_fn.fn(*total, *at(number))
            total = list(found) if isinstance(found, tuple | core.tuple) else [found]
        results = [part.handle.data for part in total]
        if self.keep_dims:
            results = [np.expand_dims(result, axis) for result in results]
        return [self.to_tensor(result, dtype) for result, dtype in zip(results, dtypes, strict=True)]

    interpreter.ReduceOps.generic_reduce = generic_reduce
