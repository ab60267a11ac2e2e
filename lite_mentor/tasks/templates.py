"""Word problems from templates: draw numbers and words, fill in a wording, solve it by running the tools.

A template's solution is written as one line per call, `tool argument argument -> what it finds`. An argument is the
name of a number or word of the template, a literal, or `#k`, the result of the k-th call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from lite_mentor.errors import UserError
from lite_mentor.tasks import Split, make_example, resolve_arguments, split_of
from lite_mentor.tools import render_call, run_call
from lite_mentor.types import Example, ToolSpec

Numbers = dict[str, Any]
Range = tuple[int, int] | tuple[float, float, int]
"""(low, high) draws a whole number, (low, high, places) a number with that many decimals; both ends included."""


@dataclass(frozen=True)
class Template:
    """A pattern of questions that share one solution."""

    name: str
    numbers: Mapping[str, Range | list[Any] | Callable[[Numbers], Any]]
    """Drawn in order: from a range, from a list, or computed from the numbers before."""
    wordings: tuple[str, ...]
    solution: tuple[str, ...]
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)
    where: Callable[[Numbers], bool] = lambda numbers: True
    """Numbers that make a senseless story are drawn again."""
    answer: str = ""
    """Without a solution: the number that is the answer, which the wording states."""

    @property
    def level(self) -> int:
        """How many calls the solution takes."""
        return len(self.solution)

    @property
    def tool_names(self) -> tuple[str, ...]:
        """The tools of the solution, in order."""
        return tuple(line.split()[0] for line in self.solution)


PEOPLE = (
    "Ada", "Amir", "Ana", "Ben", "Carla", "Chen", "Dario", "Elif", "Emma", "Farah", "George", "Hana", "Ivan", "Jamal",
    "Joon", "Kofi", "Lara", "Leo", "Maya", "Mina", "Noah", "Nora", "Omar", "Paul", "Priya", "Rosa", "Sam", "Sofia",
    "Tariq", "Uma", "Vera", "Yusuf", "Zoe",
)  # fmt: skip

DO = {
    "add": "add", "subtract": "subtract", "multiply": "multiply", "divide": "divide",
    "sum_numbers": "add up the numbers", "floor": "round down", "ceil": "round up", "round_number": "round",
    "power": "use a power", "sqrt": "take the square root", "abs_value": "take the absolute value",
    "modulo": "take the remainder", "search": "search",
}  # fmt: skip
"""How a thought speaks of a tool; a tool that is not here is `use`d."""

_ONLY = ("I {do} to find {what}.", "I need {what}, so I {do}.", "Let me {do} to get {what}.", "To get {what}, I {do}.")
_FIRST = ("First, I {do} to find {what}.", "I start with {what}: I {do}.", "First I need {what}, so I {do}.")
_MIDDLE = ("Next, I {do} to find {what}.", "Then I need {what}, so I {do}.", "Now I {do} to get {what}.")
_LAST = ("Finally, I {do} to find {what}.", "Last, I {do} to get {what}.", "Now I {do}, which gives {what}.")
_FINAL = ("The answer is {answer}.", "So the answer is {answer}.", "That gives {answer}.", "The result is {answer}.")

_CLEAN = re.compile(r"\d{1,9}(\.\d{1,4})?")
"""What a number may look like to be an answer: short, and not negative."""


def generate_examples(
    suite: str,
    templates: Sequence[Template],
    tools_for: Callable[[Random, Template], Mapping[str, ToolSpec]],
    *,
    split: Split,
    size: int,
    seed: int,
    levels: Sequence[int],
    thoughts: bool = True,
) -> list[Example]:
    """`size` examples with distinct (template, numbers), levels and the templates of a level equally likely.

    `tools_for` gives the tools that an example offers, in order, by the names that the template's solution uses.
    """
    by_level = {level: [t for t in templates if t.level == level] for level in levels}
    examples: list[Example] = []
    seen: set[tuple[Any, ...]] = set()
    for attempt in range(2000 + 200 * size):
        if len(examples) == size:
            break
        random = Random(f"{suite}/{split}/{seed}/{attempt}")
        template = random.choice(by_level[random.choice(levels)])
        numbers = draw_numbers(random, template)
        identity = (template.name, *numbers.values())
        if identity in seen or split_of(template.name, list(numbers.values())) != split:
            continue
        seen.add(identity)
        example = _fill(random, suite, template, numbers, tools_for(random, template), thoughts)
        if example is not None:
            examples.append(example)
    if len(examples) < size:
        raise UserError(
            f"Suite {suite} has only about {len(examples)} different {split} examples of levels {tuple(levels)}, "
            f"not {size}; ask for fewer, or for more levels."
        )
    return examples


def draw_numbers(random: Random, template: Template) -> Numbers:
    """The template's numbers, by name; drawn again until `where` accepts them."""
    for _ in range(1000):
        numbers: Numbers = {}
        for name, source in template.numbers.items():
            numbers[name] = _draw(random, source, numbers)
        if template.where(numbers):
            return numbers
    raise RuntimeError(f"template {template.name}: its `where` accepts hardly any of the numbers drawn")


def _draw(random: Random, source: Any, numbers: Numbers) -> Any:
    if callable(source):
        value = source(numbers)
        return int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(source, list):
        return random.choice(source)
    low, high, *places = source
    if not places:
        return random.randint(low, high)
    scale = 10 ** places[0]
    value = random.randint(round(low * scale), round(high * scale))
    # A last digit of 0 would be lost when the number is written as JSON: 12.50 and 12.5 should not both occur.
    return (value + 1 if value % 10 == 0 else value) / scale


def _fill(
    random: Random,
    suite: str,
    template: Template,
    numbers: Numbers,
    tool_of: Mapping[str, ToolSpec],
    thoughts: bool,
) -> Example | None:
    people = random.sample(PEOPLE, 2)
    words = {name: random.choice(choices) for name, choices in template.words.items()}
    known = {"person": people[0], "person2": people[1], **words, **numbers}
    question = random.choice(template.wordings).format_map(known)
    tools = tuple(tool_of.values())
    steps = [_step(line, tool_of, known) for line in template.solution]
    answer = solve(steps, tools) if steps else str(numbers[template.answer])
    if not _CLEAN.fullmatch(answer):
        return None
    for index, step in enumerate(steps):
        what = step.pop("what").format_map(known)
        step["thought"] = draw_thought(random, step["tool"], what, index, len(steps)) if thoughts else ""
    return make_example(
        question,
        [answer],
        tools,
        suite=suite,
        level=template.level,
        template=template.name,
        steps=tuple({key: step[key] for key in ("thought", "tool", "arguments")} for step in steps),
        final=random.choice(_FINAL) if thoughts else "{answer}",
    )


def solve(steps: Sequence[Mapping[str, Any]], tools: Sequence[ToolSpec]) -> str:
    """Run a solution's calls; its last result. Raises ValueError when a call does not succeed."""
    results: list[str] = []
    for step in steps:
        call = run_call(render_call(step["tool"], resolve_arguments(step["arguments"], results)), tools)
        if call.status != "ok":
            raise ValueError(f"the call {call.raw} of a known solution failed: {call.result}")
        results.append(call.result)
    return results[-1]


def _step(line: str, tool_of: Mapping[str, ToolSpec], known: Mapping[str, Any]) -> dict[str, Any]:
    call, what = line.split(" -> ")
    name, *tokens = call.split()
    values = [_argument(token, known) for token in tokens]
    tool, schemas = tool_of[name].name, tool_of[name].parameters["properties"]
    if next(iter(schemas.values())).get("type") == "array":
        return {"tool": tool, "what": what, "arguments": {next(iter(schemas)): values}}
    return {"tool": tool, "what": what, "arguments": dict(zip(schemas, values, strict=False))}


def _argument(token: str, known: Mapping[str, Any]) -> Any:
    if token in known:
        return known[token]
    if re.fullmatch(r"-?\d+", token):
        return int(token)
    return float(token) if re.fullmatch(r"-?\d+\.\d+", token) else token


def draw_thought(random: Random, tool: str, what: str, index: int, count: int) -> str:
    """A sentence before call `index` of `count`, which finds `what`."""
    if count == 1:
        patterns = _ONLY
    elif index == 0:
        patterns = _FIRST
    else:
        patterns = _LAST if index == count - 1 else _MIDDLE
    return random.choice(patterns).format(do=DO.get(tool, f"use {tool}"), what=what)
