"""A suite for a random model of about a million parameters: one call, three tools, one rigid wording each."""

from __future__ import annotations

from collections.abc import Sequence

from lite_mentor.tasks import Split
from lite_mentor.tasks.templates import Template, generate_examples
from lite_mentor.tools import calculator_tools
from lite_mentor.types import Example

LEVELS = (1,)
TOOLS = tuple(tool for tool in calculator_tools() if tool.name in ("add", "subtract", "multiply"))
_BELOW_100 = {"a": (10, 99), "b": (10, 99)}

TEMPLATES = (
    Template("plus", _BELOW_100, ("What is {a} plus {b}?",), ("add a b -> the sum",)),
    Template(
        "minus",
        _BELOW_100,
        ("What is {a} minus {b}?",),
        ("subtract a b -> the difference",),
        where=lambda n: n["a"] >= n["b"],
    ),
    Template("times", _BELOW_100, ("What is {a} times {b}?",), ("multiply a b -> the product",)),
)


def generate(split: Split, *, size: int, seed: int, levels: Sequence[int]) -> list[Example]:
    """The known solutions have no thoughts: a call, then the box."""
    return generate_examples(
        "tiny",
        TEMPLATES,
        lambda random, template: {tool.name: tool for tool in TOOLS},
        split=split,
        size=size,
        seed=seed,
        levels=levels,
        thoughts=False,
    )
