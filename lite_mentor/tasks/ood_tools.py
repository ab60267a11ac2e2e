"""Out of domain: questions that need tools no training suite offers.

Each example offers six of the twelve tools below, in random order, and no calculator of the training suites.
"""

from __future__ import annotations

import datetime
import functools
import math
import statistics
from collections.abc import Sequence
from decimal import Decimal
from random import Random

from lite_mentor.calculators import ToolError, as_decimal, divide, multiply, subtract, sum_numbers
from lite_mentor.tasks import Split
from lite_mentor.tasks.templates import Template, generate_examples
from lite_mentor.tools import tool_spec
from lite_mentor.types import Example, ToolSpec

LEVELS = (1, 2)
OFFERED = 6

_UNITS = {
    "mm": ("length", "0.001"), "cm": ("length", "0.01"), "m": ("length", "1"), "km": ("length", "1000"),
    "inch": ("length", "0.0254"), "foot": ("length", "0.3048"), "mile": ("length", "1609.344"),
    "g": ("mass", "1"), "kg": ("mass", "1000"), "pound": ("mass", "453.59237"), "ounce": ("mass", "28.349523125"),
    "second": ("time", "1"), "minute": ("time", "60"), "hour": ("time", "3600"), "day": ("time", "86400"),
}  # fmt: skip


def gcd(a: int, b: int) -> int:
    """greatest common divisor of two integers"""
    return math.gcd(a, b)


def lcm(a: int, b: int) -> int:
    """least common multiple of two integers"""
    return math.lcm(a, b)


def percent_of(percent: float, amount: float) -> Decimal:
    """a percentage of an amount"""
    return divide(multiply(percent, amount), 100)


def mean_of(values: list[float]) -> Decimal:
    """arithmetic mean of a list"""
    return divide(sum_numbers(_numbers(values)), len(values))


def median_of(values: list[float]) -> Decimal:
    """middle value of a list"""
    return as_decimal(statistics.median(_numbers(values)))


def max_of(values: list[float]) -> Decimal:
    """largest value of a list"""
    return max(_numbers(values))


def min_of(values: list[float]) -> Decimal:
    """smallest value of a list"""
    return min(_numbers(values))


def range_of(values: list[float]) -> Decimal:
    """largest minus smallest value of a list"""
    return subtract(max(_numbers(values)), min(_numbers(values)))


def factorial(n: int) -> int:
    """n! = 1 * 2 * ... * n"""
    if not 0 <= n <= 20:
        raise ToolError("n must be between 0 and 20")
    return math.factorial(n)


def choose(n: int, k: int) -> int:
    """number of ways to pick k of n things"""
    if not 0 <= k <= n <= 60:
        raise ToolError("this needs 0 <= k <= n <= 60")
    return math.comb(n, k)


def days_between(start: str, end: str) -> int:
    """days from one date to another, dates as YYYY-MM-DD"""
    return (_date(end) - _date(start)).days


def convert_units(value: float, source: str, target: str) -> Decimal:
    """convert a length, mass or time, such as km to mile"""
    for unit in (source, target):
        if unit not in _UNITS:
            raise ToolError(f"unknown unit {unit[:20]!r}, use one of {', '.join(_UNITS)}")
    (kind, size), (target_kind, target_size) = _UNITS[source], _UNITS[target]
    if kind != target_kind:
        raise ToolError(f"{source} is a {kind} and {target} a {target_kind}")
    return divide(multiply(value, Decimal(size)), Decimal(target_size))


def _numbers(values: list[float]) -> list[Decimal]:
    if not values:
        raise ToolError("the list is empty")
    return [as_decimal(value) for value in values]


def _date(text: str) -> datetime.date:
    try:
        return datetime.datetime.strptime(text, "%Y-%m-%d").date()
    except ValueError:
        raise ToolError(f"{text[:20]!r} is not a date like 2024-03-31") from None


@functools.cache
def unseen_tools() -> tuple[ToolSpec, ...]:
    """The twelve tools of this suite."""
    functions = (
        gcd, lcm, percent_of, mean_of, median_of, max_of, min_of, range_of, factorial, choose, days_between,
        convert_units,
    )  # fmt: skip
    return tuple(tool_spec(function) for function in functions)


def generate(split: Split, *, size: int, seed: int, levels: Sequence[int]) -> list[Example]:
    """Questions for the unseen tools; level 2 uses two of them in a row."""
    return generate_examples("ood_tools", TEMPLATES, _offer, split=split, size=size, seed=seed, levels=levels)


def _offer(random: Random, template: Template) -> dict[str, ToolSpec]:
    needed = [tool for tool in unseen_tools() if tool.name in template.tool_names]
    others = [tool for tool in unseen_tools() if tool not in needed]
    offered = needed + random.sample(others, OFFERED - len(needed))
    return {tool.name: tool for tool in random.sample(offered, len(offered))}


def _day(numbers: dict[str, int], number: str) -> str:
    return (datetime.date(1900, 1, 1) + datetime.timedelta(days=numbers[number])).isoformat()


_DATES = {
    "first": (36_525, 43_000),
    "length": (101, 2999),
    "last": lambda n: n["first"] + n["length"],
    "start": lambda n: _day(n, "first"),
    "end": lambda n: _day(n, "last"),
}
_FIVE = dict.fromkeys("abcde", (113, 9887))

# fmt: off
TEMPLATES = (
    Template("gcd", {"g": (12, 97), "x": (11, 89), "y": (11, 89), "a": lambda n: n["g"] * n["x"],
                     "b": lambda n: n["g"] * n["y"]}, (
        "What is the largest whole number that divides both {a} and {b}?",
        "Ropes of {a} and {b} centimetres are to be cut into equal pieces without waste. What is the longest possible "
        "piece, in centimetres?",
    ), ("gcd a b -> the greatest common divisor",), where=lambda n: n["a"] != n["b"]),
    Template("lcm", {"a": (24, 189), "b": (24, 189)}, (
        "Two bells ring every {a} and every {b} minutes. They ring together now. After how many minutes do they ring "
        "together again?",
        "What is the smallest positive number that both {a} and {b} divide?",
    ), ("lcm a b -> the least common multiple",)),
    Template("percent_of", {"percent": (3, 97), "amount": (1203, 98765)}, (
        "A film earned {amount} dollars, and {percent} percent of that go to its director. How many dollars is that?",
        "What is {percent}% of {amount}?",
    ), ("percent_of percent amount -> the part",)),
    Template("mean_of", _FIVE, (
        "Find the arithmetic mean of {a}, {b}, {c}, {d} and {e}.",
        "Five hens' weekly feed was {a}, {b}, {c}, {d} and {e} grams. What was the mean?",
    ), ("mean_of a b c d e -> the mean",)),
    Template("median_of", _FIVE, (
        "What is the median of the prices {a}, {b}, {c}, {d} and {e}?",
        "Runners took {a}, {b}, {c}, {d} and {e} seconds. What was the middle time?",
    ), ("median_of a b c d e -> the median",)),
    Template("range_of", _FIVE, (
        "How far apart are the highest and the lowest of {a}, {b}, {c}, {d} and {e}?",
        "What is the range of the readings {a}, {b}, {c}, {d} and {e}?",
    ), ("range_of a b c d e -> the range",)),
    Template("max_of", dict.fromkeys("abcdefgh", (10113, 98887)), (
        "Which is the largest of the numbers {a}, {b}, {c}, {d}, {e}, {f}, {g} and {h}?",
        "Eight players scored {a}, {b}, {c}, {d}, {e}, {f}, {g} and {h} points. How many did the winner score?",
    ), ("max_of a b c d e f g h -> the largest value",)),
    Template("min_of", dict.fromkeys("abcdefgh", (10113, 98887)), (
        "Which is the smallest of {a}, {b}, {c}, {d}, {e}, {f}, {g} and {h}?",
        "Eight offers came in at {a}, {b}, {c}, {d}, {e}, {f}, {g} and {h} dollars. What was the cheapest, in dollars?",
    ), ("min_of a b c d e f g h -> the smallest value",)),
    Template("choose", {"n": (14, 32), "k": (3, 6)}, (
        "In how many ways can a team of {k} be picked from {n} players?",
        "A menu lists {n} dishes. How many different selections of {k} dishes are there?",
    ), ("choose n k -> the number of ways",)),
    Template("days_between", _DATES, (
        "How many days pass from {start} to {end}?",
        "A ship left on {start} and came back on {end}. For how many days was it away?",
        "A loan ran from {start} until {end}. How many days is that?",
    ), ("days_between start end -> the number of days",)),
    Template("convert_down", {"value": (12.13, 987.89, 2), "units": [("km", "m"), ("m", "cm"), ("kg", "g"),
                                                                   ("inch", "cm"), ("foot", "cm")],
                            "source": lambda n: n["units"][0], "target": lambda n: n["units"][1]}, (
        "Express {value} {source} in {target}.",
        "A label says {value} {source}. What is that in {target}?",
    ), ("convert_units value source target -> the amount in {target}",)),
    Template("convert_time", {"value": (113, 9887), "units": [("day", "hour"), ("hour", "minute"), ("day", "minute"),
                                                            ("minute", "second")],
                            "source": lambda n: n["units"][0], "target": lambda n: n["units"][1]}, (
        "How many {target}s are there in {value} {source}s?",
        "A machine ran for {value} {source}s. Give that time in {target}s.",
    ), ("convert_units value source target -> the time in {target}s",)),
    Template("gcd_of_three", {"g": (12, 67), "x": (11, 49), "y": (11, 49), "z": (11, 49),
                              "a": lambda n: n["g"] * n["x"], "b": lambda n: n["g"] * n["y"],
                              "c": lambda n: n["g"] * n["z"]}, (
        "What is the largest whole number that divides all of {a}, {b} and {c}?",
        "{a} roses, {b} tulips and {c} lilies go into equal bouquets with nothing left. How many bouquets at most?",
    ), ("gcd a b -> the greatest common divisor of the first two", "gcd #1 c -> the divisor of all three")),
    Template("lcm_of_three", {"a": (12, 45), "b": (12, 45), "c": (12, 45)}, (
        "Three lamps flash every {a}, {b} and {c} seconds. They flash together now. In how many seconds will they do "
        "so again?",
        "What is the least common multiple of {a}, {b} and {c}?",
    ), ("lcm a b -> the common multiple of the first two", "lcm #1 c -> the multiple of all three")),
    Template("percent_of_max", {**_FIVE, "percent": (11, 89)}, (
        "Five cities bid {a}, {b}, {c}, {d} and {e} dollars. The highest bidder pays {percent}% of its bid now. "
        "How many dollars is that?",
        "Take the largest of {a}, {b}, {c}, {d} and {e}. What is {percent}% of it?",
    ), ("max_of a b c d e -> the highest value", "percent_of percent #1 -> the percentage of it")),
    Template("percent_of_median", {**_FIVE, "percent": (11, 89)}, (
        "Incomes are {a}, {b}, {c}, {d} and {e} dollars. A grant pays {percent}% of the median income. "
        "How many dollars does it pay?",
        "What is {percent}% of the median of {a}, {b}, {c}, {d} and {e}?",
    ), ("median_of a b c d e -> the median", "percent_of percent #1 -> the percentage of it")),
    Template("days_in_hours", _DATES, (
        "How many hours are there between {start} and {end}, counting whole days?",
        "A clock ran without a break from {start} to {end}. How many hours did it run, at 24 hours a day?",
    ), ("days_between start end -> the number of days", "convert_units #1 day hour -> the number of hours")),
    Template("mean_converted", dict.fromkeys("abcde", (1.13, 98.87, 2)), (
        "Five logs measure {a}, {b}, {c}, {d} and {e} m. What is their mean length in cm?",
        "Find the mean of {a}, {b}, {c}, {d} and {e} m and express it in cm.",
    ), ("mean_of a b c d e -> the mean", "convert_units #1 m cm -> the mean in cm")),
    Template("percent_of_ways", {"n": (14, 26), "k": (3, 5), "percent": [5, 10, 20, 25, 50]}, (
        "A lottery draws {k} of {n} balls. How many results are {percent}% of all possible results?",
        "There are {n} songs. What is {percent}% of the number of ways to choose {k} of them?",
    ), ("choose n k -> the number of ways", "percent_of percent #1 -> the percentage of it"),
        where=lambda n: math.comb(n["n"], n["k"]) * n["percent"] % 100 == 0),
    Template("orders", {"n": (6, 11), "percent": [5, 10, 15, 20, 25, 30, 40, 45, 50, 60, 70, 75, 80, 85, 90, 95]}, (
        "{n} books can be put on a shelf in {n}! orders. How many orders are {percent}% of them?",
        "What is {percent}% of the factorial of {n}?",
    ), ("factorial n -> the number of orders", "percent_of percent #1 -> the percentage of it")),
)
# fmt: on
