"""Bits of a float and blocks of registers, as LLVM instructions for the CPU's kernel.

numba would make every integer 64 bits wide, and that halves the lanes of float32. (A kernel in its
cache does not see a change here: then touch `cpu.py` too.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

from llvmlite import ir
from numba.core import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

SIDE = 8  # of the blocks that move between layouts through registers

F = TypeVar("F", bound=Callable[..., Any])

typed_intrinsic: Callable[[F], F] = intrinsic


def constant(kind: Any, x: float) -> Any:
    """x as a number of LLVM's type `kind`, or as a vector of it."""
    if isinstance(kind, ir.VectorType):
        return ir.Constant(kind, [x] * kind.count)
    return ir.Constant(kind, x)


def layout(real: Any) -> tuple[Any, int, int]:
    """The integer type of a float's width, the bits of its mantissa, the bias of its exponent."""
    return (ir.IntType(32), 23, 127) if real == types.float32 else (ir.IntType(64), 52, 1023)


@typed_intrinsic
def fma(_: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c, rounded once."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return multiply_add(builder, *args)

    return a(a, b, c), emit


def multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """llvmlite's own `fma` takes no vectors."""
    if not isinstance(a.type, ir.VectorType):
        return builder.fma(a, b, c)
    bits = 32 if isinstance(a.type.element, ir.FloatType) else 64
    kind = ir.FunctionType(a.type, [a.type] * 3)
    name = f"llvm.fma.v{a.type.count}f{bits}"
    return builder.call(get_or_insert_function(builder.module, kind, name), [a, b, c])


@typed_intrinsic
def normal_power(_: Any, x: Any) -> Any:
    """2^x for a whole x ≤ the bias of x's type, and 0 where that would be a subnormal number."""
    integer, mantissa_bits, bias = layout(x)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        real = args[0].type
        much = builder.fcmp_ordered(">", args[0], real(-float(bias)))
        clamped = builder.select(much, args[0], real(-bias))
        # Adding 1.5 · 2^mantissa_bits moves a whole number to the low bits.
        shifted = builder.fadd(clamped, real(1.5 * 2.0**mantissa_bits + bias))
        bits = builder.shl(builder.bitcast(shifted, integer), integer(mantissa_bits))
        return builder.bitcast(bits, real)

    return x(x), emit


@typed_intrinsic
def power_of_fraction(_: Any, x: Any) -> Any:
    """2^x for |x| ≤ ½, to the last bit, by the Taylor series; of a float or of lanes."""
    degree = 7 if getattr(x, "element", x) == types.float32 else 13
    series = [math.log(2) ** k / math.factorial(k) for k in range(degree, -1, -1)]

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        power, *rest = [constant(args[0].type, coefficient) for coefficient in series]
        for coefficient in rest:
            power = multiply_add(builder, power, args[0], coefficient)
        return power

    return x(x), emit


@typed_intrinsic
def order_of_size(_: Any, x: Any) -> Any:
    """|x| as an integer of the same order: 0 for +∞, and −∞ and NaN come last."""
    integer, mantissa_bits, bias = layout(x)
    result = types.int32 if x == types.float32 else types.int64

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        infinity = integer((2 * bias + 1) << mantissa_bits)
        sign = 1 << (integer.width - 1)
        bits = builder.bitcast(args[0], integer)
        barred = builder.icmp_signed("==", bits, infinity)
        return builder.select(barred, integer(0), builder.and_(bits, integer(sign - 1)))

    return result(x), emit


@typed_intrinsic
def of_order(_: Any, size: Any, x: Any) -> Any:
    """The float of x's type which has this `order_of_size`."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], args[1].type)

    return x(size, x), emit


@typed_intrinsic
def transpose(
    _: Any, source: Any, at: Any, rows: Any, target: Any, to: Any, columns: Any, limit: Any
) -> Any:
    """target[to + k · columns + i] = source[at + i · rows + k] for i, k < SIDE, within ±`limit`.

    Both arrays by flat index. A step may go any way, so that a block may be a slanted one.
    """

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        types_ = signature.args
        flat = {i: context.make_array(types_[i])(context, builder, args[i]).data for i in (0, 3)}
        real, index = flat[0].type.pointee, args[1].type
        vector = ir.VectorType(real, SIDE)
        size = context.get_abi_sizeof(real)

        def place(array: int, start: Any, step: Any, i: int) -> Any:
            offset = builder.add(start, builder.mul(step, index(i)))
            pointer = builder.gep(flat[array], [offset])
            return builder.bitcast(pointer, vector.as_pointer())

        def shuffle(a: Any, b: Any, order: list[int]) -> Any:
            return builder.shuffle_vector(a, b, ir.VectorType(ir.IntType(32), SIDE)(order))

        lines = [builder.load(place(0, args[1], args[2], i), align=size) for i in range(SIDE)]
        # Each round swaps halves, quarters, … of pairs of lines, as one transposes by hand.
        width = SIDE // 2
        while width:
            for i in range(SIDE):
                if not i & width:
                    a, b = lines[i], lines[i | width]
                    first = [k if not k & width else SIDE + (k ^ width) for k in range(SIDE)]
                    second = [k | width if not k & width else SIDE + k for k in range(SIDE)]
                    lines[i], lines[i | width] = shuffle(a, b, first), shuffle(a, b, second)
            width //= 2
        most = vector([ir.Constant(real, ir.Undefined)] * SIDE)
        most = builder.insert_element(most, args[6], ir.IntType(32)(0))
        most = shuffle(most, most, [0] * SIDE)
        least = builder.fneg(most)
        for k, line in enumerate(lines):
            line = builder.select(builder.fcmp_ordered(">", line, most), most, line)
            line = builder.select(builder.fcmp_ordered("<", line, least), least, line)
            builder.store(line, place(3, args[4], args[5], k), align=size)
        return context.get_dummy_value()

    return types.void(source, at, rows, target, to, columns, limit), emit
