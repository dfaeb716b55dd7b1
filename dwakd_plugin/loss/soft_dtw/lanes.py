"""Numbers side by side in SIMD registers, as a type of numba's, for the CPU's soft-DTW.

`Lanes` are LANES floats, or as many integers of the same width: LLVM makes of them whatever
registers the machine has. Left to itself, the compiler would keep what one step hands to the next
in memory, make integers 64 bits wide, and turn a loop into SIMD on one kind of machine and not on
another. (A kernel in numba's cache does not see a change here: then touch `cpu.py` too.)
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import lower_builtin, models, register_model

from dwakd_plugin.loss.soft_dtw.llvm import constant, layout, typed_intrinsic

LANES = 32  # a multiple of SIDE


class Lanes(types.Type):
    """LANES numbers of one type."""

    def __init__(self, element: Any) -> None:
        self.element = element
        super().__init__(name=f"lanes({element})")


@register_model(Lanes)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: Lanes) -> None:
        element = manager.lookup(lanes.element).get_value_type()
        super().__init__(manager, lanes, ir.VectorType(element, LANES))


def _arithmetic(operation: Callable[..., Any], of_floats: str, of_integers: str = "") -> None:
    """lanes ∘ lanes, lane by lane, by the instruction of that name."""

    @infer_global(operation)
    class _Typing(AbstractTemplate):
        def generic(self, args: Any, keywords: Any) -> Any:
            if len(args) != 2 or not isinstance(args[0], Lanes) or args[0] != args[1]:
                return None
            known = of_integers or isinstance(args[0].element, types.Float)
            return signature(args[0], *args) if known else None

    @lower_builtin(operation, Lanes, Lanes)  # type: ignore[untyped-decorator]
    def _lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        floats = isinstance(signature.return_type.element, types.Float)
        return getattr(builder, of_floats if floats else of_integers)(*args)


_arithmetic(operator.add, "fadd", "add")
_arithmetic(operator.sub, "fsub", "sub")
_arithmetic(operator.mul, "fmul")
_arithmetic(operator.truediv, "fdiv")


@typed_intrinsic
def spread(_: Any, x: Any) -> Any:
    """x in each lane."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _spread(builder, args[0])

    return Lanes(x)(x), emit


@typed_intrinsic
def load(_: Any, array: Any, at: Any) -> Any:
    """LANES numbers from the flat index `at` of a contiguous array on."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place, size = _place(context, builder, signature, args)
        return builder.load(place, align=size)

    return Lanes(array.dtype)(array, at), emit


@typed_intrinsic
def store(_: Any, array: Any, at: Any, lanes: Any) -> Any:
    """The inverse of `load`."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place, size = _place(context, builder, signature, args)
        builder.store(args[2], place, align=size)
        return context.get_dummy_value()

    return types.void(array, at, lanes), emit


def _place(context: Any, builder: Any, signature: Any, args: Any) -> tuple[Any, int]:
    """The address of lanes in an array, and the bytes of one number, to which it is aligned."""
    data = context.make_array(signature.args[0])(context, builder, args[0]).data
    number = data.type.pointee
    place = builder.gep(data, [args[1]])
    vector = ir.VectorType(number, LANES)
    return builder.bitcast(place, vector.as_pointer()), context.get_abi_sizeof(number)


@typed_intrinsic
def lane(_: Any, lanes: Any, place: Any) -> Any:
    """The number in the lane at `place`."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.extract_element(*args)

    return lanes.element(lanes, place), emit


@typed_intrinsic
def with_lane(_: Any, lanes: Any, place: Any, x: Any) -> Any:
    """`lanes`, but x in the lane at `place`."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.insert_element(args[0], args[2], args[1])

    return lanes(lanes, place, x), emit


@typed_intrinsic
def from_lane_before(_: Any, lanes: Any, x: Any) -> Any:
    """In each lane what the one before it has, and x in the first."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _shuffled(builder, args[0], _spread(builder, args[1]), [LANES, *range(LANES - 1)])

    return lanes(lanes, x), emit


@typed_intrinsic
def from_lane_after(_: Any, lanes: Any, x: Any) -> Any:
    """In each lane what the one after it has, and x in the last."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _shuffled(builder, args[0], _spread(builder, args[1]), [*range(1, LANES), LANES])

    return lanes(lanes, x), emit


def _spread(builder: Any, x: Any) -> Any:
    lanes = ir.Constant(ir.VectorType(x.type, LANES), ir.Undefined)
    lanes = builder.insert_element(lanes, x, ir.IntType(32)(0))
    return _shuffled(builder, lanes, lanes, [0] * LANES)


def _shuffled(builder: Any, a: Any, b: Any, order: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.VectorType(ir.IntType(32), LANES)(order))


@typed_intrinsic
def larger(_: Any, a: Any, b: Any) -> Any:
    """Of integers, lane by lane."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.icmp_signed(">", *args), *args)

    return a(a, b), emit


@typed_intrinsic
def without_tiny(_: Any, lanes: Any, tiny: Any) -> Any:
    """0 for what is smaller than `tiny` in size; a NaN stays."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind, integer = args[0].type, context.get_value_type(_integers(lanes))
        sign = constant(integer, (1 << (integer.element.width - 1)) - 1)
        size = builder.bitcast(builder.and_(builder.bitcast(args[0], integer), sign), kind)
        return builder.select(
            builder.fcmp_ordered("<", size, args[1]), constant(kind, 0.0), args[0]
        )

    return lanes(lanes, tiny), emit


def _integers(lanes: Any) -> Any:
    return Lanes(types.int32 if lanes.element == types.float32 else types.int64)


@typed_intrinsic
def bits(_: Any, lanes: Any) -> Any:
    """The floats' bits, as integers."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return _integers(lanes)(lanes), emit


@typed_intrinsic
def exponents(_: Any, lanes: Any) -> Any:
    """The exponents of floats > 0, as integers."""
    _, mantissa_bits, bias = layout(lanes.element)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        integer = context.get_value_type(signature.return_type)
        bits = builder.lshr(builder.bitcast(args[0], integer), constant(integer, mantissa_bits))
        return builder.sub(bits, constant(integer, bias))

    return _integers(lanes)(lanes), emit


@typed_intrinsic
def mantissas(_: Any, lanes: Any) -> Any:
    """The mantissas of floats > 0, within [1, 2)."""
    _, mantissa_bits, bias = layout(lanes.element)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        integer = context.get_value_type(_integers(lanes))
        bits = builder.bitcast(args[0], integer)
        bits = builder.and_(bits, constant(integer, (1 << mantissa_bits) - 1))
        bits = builder.or_(bits, constant(integer, bias << mantissa_bits))
        return builder.bitcast(bits, args[0].type)

    return lanes(lanes), emit


@typed_intrinsic
def powers(_: Any, x: Any, like: Any) -> Any:
    """2^x for integers x ≤ 0, as floats of the type `like`.

    0 where that is nothing beside 1, so that products of such powers keep clear of subnormal
    numbers, at which processors are slow.
    """
    _, mantissa_bits, bias = layout(like.element)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        integer = args[0].type
        much = builder.icmp_signed(">", args[0], constant(integer, -2 * mantissa_bits))
        power = builder.add(args[0], constant(integer, bias))
        power = builder.shl(power, constant(integer, mantissa_bits))
        power = builder.select(much, power, constant(integer, 0))
        return builder.bitcast(power, args[1].type)

    return like(x, like), emit
