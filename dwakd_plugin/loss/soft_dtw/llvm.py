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
from numba.extending import intrinsic

SIDE = 8  # of the blocks that move between layouts through registers

F = TypeVar("F", bound=Callable[..., Any])

_typed_intrinsic: Callable[[F], F] = intrinsic


def _layout(real: Any) -> tuple[Any, int, int]:
    """The integer type of a float's width, the bits of its mantissa, the bias of its exponent."""
    return (ir.IntType(32), 23, 127) if real == types.float32 else (ir.IntType(64), 52, 1023)


@_typed_intrinsic
def fma(_: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c, rounded once."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return a(a, b, c), emit


def _power_above(least: Callable[[int, int], int]) -> Callable[..., Any]:
    """2^x for a whole x ≤ bias that is larger than least(mantissa_bits, bias), and 0 for others."""

    def power(_: Any, x: Any) -> Any:
        integer, mantissa_bits, bias = _layout(x)

        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            real = args[0].type
            much = builder.fcmp_ordered(">", args[0], real(float(least(mantissa_bits, bias))))
            clamped = builder.select(much, args[0], real(-bias))
            # Adding 1.5 · 2^mantissa_bits moves a whole number to the low bits.
            shifted = builder.fadd(clamped, real(1.5 * 2.0**mantissa_bits + bias))
            bits = builder.shl(builder.bitcast(shifted, integer), integer(mantissa_bits))
            return builder.bitcast(bits, real)

        return x(x), emit

    return power


# 0 where that is nothing beside 1, 2^(−2 · mantissa_bits), so that products of weights keep clear
# of subnormal numbers, at which processors are slow.
power_of_whole = _typed_intrinsic(_power_above(lambda mantissa_bits, bias: -2 * mantissa_bits))
# 0 where it would be a subnormal number.
normal_power = _typed_intrinsic(_power_above(lambda mantissa_bits, bias: -bias))


@_typed_intrinsic
def power_of_fraction(_: Any, x: Any) -> Any:
    """2^x for |x| ≤ ½, to the last bit, by the Taylor series."""
    degree = 7 if x == types.float32 else 13
    series = [math.log(2) ** k / math.factorial(k) for k in range(degree, -1, -1)]

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        real = args[0].type
        power = real(series[0])
        for coefficient in series[1:]:
            power = builder.fma(power, args[0], real(coefficient))
        return power

    return x(x), emit


@_typed_intrinsic
def exponent_of(_: Any, x: Any) -> Any:
    """The exponent of x > 0, as a float; within −bias .. bias + 1 for any bits."""
    integer, mantissa_bits, bias = _layout(x)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        real = args[0].type
        bits = builder.lshr(builder.bitcast(args[0], integer), integer(mantissa_bits))
        bits = builder.and_(bits, integer(2 * bias + 1))
        # The float 2^mantissa_bits, with the exponent in its low bits.
        bits = builder.or_(bits, integer((mantissa_bits + bias) << mantissa_bits))
        return builder.fsub(builder.bitcast(bits, real), real(2.0**mantissa_bits + bias))

    return x(x), emit


@_typed_intrinsic
def mantissa_of(_: Any, x: Any) -> Any:
    """The mantissa of x > 0; within [1, 2) for any bits."""
    integer, mantissa_bits, bias = _layout(x)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.and_(builder.bitcast(args[0], integer), integer((1 << mantissa_bits) - 1))
        bits = builder.or_(bits, integer(bias << mantissa_bits))
        return builder.bitcast(bits, args[0].type)

    return x(x), emit


@_typed_intrinsic
def order_of_size(_: Any, x: Any) -> Any:
    """|x| as an integer of the same order: 0 for an infinity, and a NaN comes last."""
    integer, mantissa_bits, bias = _layout(x)
    result = types.int32 if x == types.float32 else types.int64

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        infinity = integer((2 * bias + 1) << mantissa_bits)
        sign = 1 << (integer.width - 1)
        bits = builder.and_(builder.bitcast(args[0], integer), integer(sign - 1))
        return builder.select(builder.icmp_signed("==", bits, infinity), integer(0), bits)

    return result(x), emit


@_typed_intrinsic
def of_order(_: Any, size: Any, x: Any) -> Any:
    """The float of x's type which has this `order_of_size`."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], args[1].type)

    return x(size, x), emit


@_typed_intrinsic
def transpose(
    _: Any, source: Any, at: Any, rows: Any, target: Any, to: Any, columns: Any, barred: Any
) -> Any:
    """target[to + k · columns + i] = source[at + i · rows + k] for i, k < SIDE, at most `barred`.

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
        limit = vector([ir.Constant(real, ir.Undefined)] * SIDE)
        limit = builder.insert_element(limit, args[6], ir.IntType(32)(0))
        limit = shuffle(limit, limit, [0] * SIDE)
        for k, line in enumerate(lines):
            line = builder.select(builder.fcmp_ordered(">=", line, limit), limit, line)
            builder.store(line, place(3, args[4], args[5], k), align=size)
        return context.get_dummy_value()

    return types.void(source, at, rows, target, to, columns, barred), emit
