"""The training suite: word problems for the twelve calculators, at six levels of difficulty.

The numbers are too large to work out without a tool, and the answers are short. Level n takes n calls: at level 1 a
student picks the tool and copies the numbers, later levels chain results.
"""

from __future__ import annotations

from collections.abc import Sequence

from lite_mentor.tasks import Split
from lite_mentor.tasks.math_chained import CHAINED
from lite_mentor.tasks.math_short import SHORT
from lite_mentor.tasks.templates import generate_examples
from lite_mentor.tools import calculator_tools
from lite_mentor.types import Example

LEVELS = (1, 2, 3, 4, 5, 6)
TEMPLATES = SHORT + CHAINED


def generate(split: Split, *, size: int, seed: int, levels: Sequence[int]) -> list[Example]:
    """Every example offers all twelve calculators, in the same order."""
    return generate_examples(
        "math",
        TEMPLATES,
        lambda random, template: {tool.name: tool for tool in calculator_tools()},
        split=split,
        size=size,
        seed=seed,
        levels=levels,
    )
