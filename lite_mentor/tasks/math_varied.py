"""The math suite with other tools in every question: a student has to read what it is offered.

A student that always sees the same twelve calculators learns their names by heart and calls them even where others are
offered (bench/LOG.md). So each example here offers only a few calculators, in random order, and each of them under a
name, with argument names, drawn for it: a common one, or one without a meaning. Their descriptions stay.

Level 0, which the math suite does not have, are questions that need none of them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from lite_mentor.tasks import Split, math
from lite_mentor.tasks.math_plain import PLAIN
from lite_mentor.tasks.templates import Template, generate_examples
from lite_mentor.tools import calculator_tools
from lite_mentor.types import Example, ToolSpec

LEVELS = (0, *math.LEVELS)
TEMPLATES = PLAIN + math.TEMPLATES
OFFERED = 4
"""Tools of an example; more where a solution needs more."""
NAMELESS = 0.2
"""Share of tools whose name says nothing, so that only the description tells what they do."""

_NAMES = {
    "add": ("add", "plus", "add_two", "combine", "addition"),
    "subtract": ("subtract", "minus", "difference", "take_away", "deduct"),
    "multiply": ("multiply", "times", "product", "multiplication"),
    "divide": ("divide", "quotient", "split_by", "division", "ratio"),
    "sum_numbers": ("sum_numbers", "add_up", "total_of", "sum_list", "grand_total"),
    "floor": ("floor", "round_down", "whole_part", "cut_decimals"),
    "ceil": ("ceil", "round_up", "next_whole"),
    "round_number": ("round_number", "round_to", "nearest", "to_decimals"),
    "power": ("power", "raise_to", "exponentiate", "to_the_power"),
    "sqrt": ("sqrt", "square_root", "root_of"),
    "abs_value": ("abs_value", "magnitude", "absolute", "distance_from_zero"),
    "modulo": ("modulo", "remainder", "left_over", "mod_by"),
}
_ARGUMENTS = {
    "a": ("a", "x", "first", "left", "p"), "b": ("b", "y", "second", "right", "q"),
    "numbers": ("numbers", "items", "list", "data", "xs"), "number": ("number", "x", "input", "num", "v"),
    "digits": ("digits", "places", "decimals", "k"),
    "base": ("base", "x", "num"), "exponent": ("exponent", "n", "times"),
}  # fmt: skip
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def generate(split: Split, *, size: int, seed: int, levels: Sequence[int]) -> list[Example]:
    """The questions of the math suite, each with tools of its own."""
    return generate_examples("math_varied", TEMPLATES, _offer, split=split, size=size, seed=seed, levels=levels)


def _offer(random: Random, template: Template) -> dict[str, ToolSpec]:
    calculators = {tool.name: tool for tool in calculator_tools()}
    needed = set(template.tool_names)
    others = [name for name in calculators if name not in needed]
    offered = [*sorted(needed), *random.sample(others, max(0, OFFERED - len(needed)))]
    random.shuffle(offered)
    taken: set[str] = set()
    return {name: _renamed(random, calculators[name], taken) for name in offered}


def _renamed(random: Random, tool: ToolSpec, taken: set[str]) -> ToolSpec:
    """The same function under other names, none of them in `taken`, to which its name is added."""
    while (name := _nonsense(random) if random.random() < NAMELESS else random.choice(_NAMES[tool.name])) in taken:
        pass
    taken.add(name)
    names = {old: random.choice(_ARGUMENTS[old]) for old in tool.parameters["properties"]}

    @functools.wraps(tool.function)
    def call(**arguments: Any) -> Any:
        return tool.function(**{old: arguments[new] for old, new in names.items() if new in arguments})

    return ToolSpec(name, tool.description, _with_names(tool.parameters, names), function=call)


def _with_names(schema: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    properties = {names[old]: part for old, part in schema["properties"].items()}
    return {**schema, "properties": properties, "required": [names[old] for old in schema["required"]]}


def _nonsense(random: Random) -> str:
    """Two or three syllables, such as `runo` or `tibake`."""
    return "".join(random.choice(_CONSONANTS) + random.choice(_VOWELS) for _ in range(random.choice((2, 3))))
