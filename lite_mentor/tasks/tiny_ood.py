"""Out of domain for a student of the suite `tiny`: the same wordings and tools, but numbers of other lengths.

In training every number has two digits. Here one of the two has one digit or three, so a student that learned to copy
what the question says is right, and one that learned to write two digits is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lite_mentor.tasks import Split
from lite_mentor.tasks.templates import Template, generate_examples
from lite_mentor.tasks.tiny import LEVELS as LEVELS
from lite_mentor.tasks.tiny import TEMPLATES as TRAINED
from lite_mentor.tasks.tiny import TOOLS
from lite_mentor.types import Example

_LENGTHS = {"short": {"a": (10, 99), "b": (2, 9)}, "long": {"a": (100, 999), "b": (10, 99)}}

TEMPLATES: tuple[Template, ...] = tuple(
    replace(template, name=f"{template.name} {length}", numbers=numbers)
    for template in TRAINED
    for length, numbers in _LENGTHS.items()
)


def generate(split: Split, *, size: int, seed: int, levels: Sequence[int]) -> list[Example]:
    """As the suite `tiny`."""
    return generate_examples(
        "tiny_ood",
        TEMPLATES,
        lambda random, template: {tool.name: tool for tool in TOOLS},
        split=split,
        size=size,
        seed=seed,
        levels=levels,
        thoughts=False,
    )
