"""The twelve calculators of the paper, total and exact in the way a person expects.

Arithmetic is decimal, so 0.1 + 0.2 is 0.3 on every machine. Any arguments give a number or, at once, a ToolError or
an ArithmeticError; nothing overflows into inf, and no power takes long.
"""

from __future__ import annotations

import decimal
import math
from decimal import Decimal
from typing import Any


class ToolError(Exception):
    """A tool has no result for these arguments; its text tells the student why, in a few words."""


_CONTEXT = decimal.Context(
    prec=40,
    Emax=300,
    Emin=-300,
    rounding=decimal.ROUND_HALF_EVEN,
    traps=[decimal.InvalidOperation, decimal.DivisionByZero, decimal.Overflow],
)


def as_decimal(value: Any) -> Decimal:
    """A JSON number as the decimal that it shows: 0.1 is one tenth. Raises ToolError for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        raise ToolError("a number is needed")
    if isinstance(value, float) and not math.isfinite(value):
        raise ToolError("a finite number is needed")
    return _CONTEXT.plus(Decimal(repr(value) if isinstance(value, float) else value))


def number_text(value: Decimal) -> str:
    """As a student can copy it: 12 and not 12.0, about ten digits, an exponent only for very large or small."""
    if not value.is_finite():
        return str(value)
    if value.is_zero():
        return "0"
    size = value.adjusted() + 1  # digits before the point
    whole = value == value.to_integral_value() if size <= 40 else True
    if whole and size <= 20:
        return f"{int(value)}"
    rounded = decimal.Context(prec=max(10, size + 2) if size <= 15 else 10).plus(value)
    if -8 < rounded.adjusted() < 20:
        text = f"{rounded:f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    mantissa, exponent = f"{rounded:.9e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def add(a: float, b: float) -> Decimal:
    """a + b"""
    return _CONTEXT.add(as_decimal(a), as_decimal(b))


def subtract(a: float, b: float) -> Decimal:
    """a - b"""
    return _CONTEXT.subtract(as_decimal(a), as_decimal(b))


def multiply(a: float, b: float) -> Decimal:
    """a * b"""
    return _CONTEXT.multiply(as_decimal(a), as_decimal(b))


def divide(a: float, b: float) -> Decimal:
    """a / b"""
    if as_decimal(b).is_zero():
        raise ToolError("division by zero")
    return _CONTEXT.divide(as_decimal(a), as_decimal(b))


def sum_numbers(numbers: list[float]) -> Decimal:
    """sum of a list of numbers"""
    total = Decimal(0)
    for value in numbers:
        total = _CONTEXT.add(total, as_decimal(value))
    return total


def floor(number: float) -> Decimal:
    """round down to a whole number"""
    return as_decimal(number).to_integral_value(decimal.ROUND_FLOOR)


def ceil(number: float) -> Decimal:
    """round up to a whole number"""
    return as_decimal(number).to_integral_value(decimal.ROUND_CEILING)


def round_number(number: float, digits: int = 0) -> Decimal:
    """round to a number of decimals"""
    if abs(digits) > 15:
        raise ToolError("digits must be between -15 and 15")
    value = as_decimal(number)
    if -value.as_tuple().exponent <= digits:
        return value
    # Halves go away from zero, as taught at school; Python's own round() would make 0.5 and 2.5 even.
    return value.quantize(Decimal(1).scaleb(-digits), decimal.ROUND_HALF_UP, context=_CONTEXT)


def power(base: float, exponent: float) -> Decimal:
    """base to the power of exponent"""
    if as_decimal(base).is_zero() and as_decimal(exponent) <= 0:
        if as_decimal(exponent).is_zero():
            return Decimal(1)
        raise ToolError("division by zero")
    if as_decimal(base) < 0 and as_decimal(exponent) != as_decimal(exponent).to_integral_value():
        raise ToolError("there is no real result")
    return _CONTEXT.power(as_decimal(base), as_decimal(exponent))


def sqrt(number: float) -> Decimal:
    """square root"""
    if as_decimal(number) < 0:
        raise ToolError("there is no real square root of a negative number")
    return _CONTEXT.sqrt(as_decimal(number))


def abs_value(number: float) -> Decimal:
    """absolute value"""
    return as_decimal(number).copy_abs()


def modulo(a: float, b: float) -> Decimal:
    """remainder of a / b"""
    if as_decimal(b).is_zero():
        raise ToolError("division by zero")
    remainder = _CONTEXT.remainder(as_decimal(a), as_decimal(b))
    if remainder and (remainder < 0) != (as_decimal(b) < 0):  # as with Python's %, b decides the sign
        return _CONTEXT.add(remainder, as_decimal(b))
    return remainder


CALCULATORS = (
    add, subtract, multiply, divide, sum_numbers, floor, ceil, round_number, power, sqrt, abs_value, modulo,
)  # fmt: skip
