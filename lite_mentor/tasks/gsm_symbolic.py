"""Grade-school word problems of reasoning-gym's `gsm_symbolic`, with calculator calls derived from their solutions.

Their worked solutions contain equations such as "39 x 7 = 273". Each becomes one or more calls; a problem is kept
only when every equation is true, every operand is a number of the question, an earlier result or an everyday
constant, and running the calls gives the stated answer. Needs the extra `eval`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from random import Random
from typing import Any

from lite_mentor.errors import UserError
from lite_mentor.tasks import Split, make_example, split_of
from lite_mentor.tasks.templates import draw_thought, solve
from lite_mentor.tools import calculator_tools
from lite_mentor.types import Example

LEVELS = (1, 2, 3, 4, 5, 6, 7, 8)

_SUFFIX = " Give the result as your final answer. Do not include units."
_CONSTANTS = {Decimal(n) for n in ("1", "2", "3", "4", "7", "12", "24", "30", "52", "60", "100", "365", "0.5")}
_TOOL = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide"}
_SIGNS = str.maketrans({"×": "*", "÷": "/", "−": "-", "–": "-"})
_TOKEN = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?![\d.]*[A-Za-z])|(?P<word>[A-Za-z0-9'’]+)|(?P<sign>\S)")

Token = tuple[str, str]
Expression = list[str]
"""Operands and operators in turn, as written: ["39", "*", "7"]."""


class _NoTrajectory(Exception):
    """This worked solution does not give a sequence of calls."""


def generate(split: Split, *, size: int, seed: int, levels: Sequence[int]) -> list[Example]:
    """Problems in the generator's order. Raises UserError when reasoning-gym is not installed."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise UserError(
            "The suite gsm_symbolic needs reasoning-gym: install lite-mentor with its extra `eval`."
        ) from error
    # Item i is drawn from seed + i, so neighbouring seeds would share nearly all items.
    source = reasoning_gym.create_dataset("gsm_symbolic", size=500 + 60 * size, seed=seed * 1_000_003)
    examples: dict[str, Example] = {}
    for index, template in enumerate(source.task_indices):
        if len(examples) == size:
            break
        example = _example(f"gsm_{template}", source[index], split, Random(f"gsm_symbolic/{seed}/{index}"))
        if example is not None and example.meta["level"] in levels:
            examples.setdefault(example.key, example)
    if len(examples) < size:
        raise UserError(
            f"Suite gsm_symbolic gave {len(examples)} {split} examples of levels {tuple(levels)}, not {size}; "
            "ask for fewer, or for more levels."
        )
    return list(examples.values())


def _example(template: str, item: dict[str, Any], split: Split, random: Random) -> Example | None:
    question = item["question"].removesuffix(_SUFFIX)
    if split_of(template, _numbers(question)) != split:
        return None
    try:
        steps = derive_steps(question, item["metadata"]["answer_cot"], item["answer"])
    except _NoTrajectory:
        return None
    for index, step in enumerate(steps):
        step["thought"] = draw_thought(random, step["tool"], step.pop("what"), index, len(steps))
    return make_example(
        question,
        [solve(steps, calculator_tools())],
        calculator_tools(),
        suite="gsm_symbolic",
        level=len(steps),
        template=template,
        steps=tuple(steps),
        final="The answer is {answer}.",
    )


def derive_steps(question: str, solution: str, answer: str) -> list[dict[str, Any]]:
    """The calls behind a worked solution, dead ones removed. Raises _NoTrajectory when there is no sound sequence."""
    given = {Decimal(text) for text in _numbers(question)}
    known = given | {value / 100 for value in given} | {1 - value / 100 for value in given} | _CONSTANTS
    steps: list[dict[str, Any]] = []
    results: list[Decimal] = []
    for line in solution.split("####")[0].splitlines():
        for expression, stated in equations(line):
            for operand in map(Decimal, expression[::2]):
                if operand not in known and operand not in results:
                    raise _NoTrajectory(f"{operand} comes from nowhere")
            _append_calls(expression, steps, results)
            if results[-1] != Decimal(stated):
                raise _NoTrajectory(f"{expression} is not {stated}")
    if not results or results[-1] != Decimal(answer.replace(",", "")):
        raise _NoTrajectory("the last equation does not give the answer")
    return _alive(steps)


def equations(line: str) -> list[tuple[Expression, str]]:
    """Every `number operator number ... = number` of a line, units and currency signs left out."""
    plain = re.sub(r"(?<=\d),(?=\d{3})", "", re.sub(r"[$€£¥]", "", line.translate(_SIGNS)))
    plain = re.sub(r"(?<=[\d ])x(?= ?\d)", "*", plain)
    tokens = [(match.lastgroup or "", match.group()) for match in _TOKEN.finditer(plain)]
    found = []
    for index, token in enumerate(tokens):
        if token != ("sign", "=") or index + 1 == len(tokens) or tokens[index + 1][0] != "number":
            continue
        expression = _left_side(tokens[:index])
        if len(expression) >= 3:
            found.append((expression, tokens[index + 1][1]))
    return found


def _left_side(tokens: Sequence[Token]) -> Expression:
    """Read backwards from the equals sign: operand, operator, operand ...; words beside an operand are its unit."""
    expression: Expression = []
    index = len(tokens) - 1
    while True:
        while index >= 0 and (tokens[index][0] == "word" or _is_per(tokens, index)):
            index -= 1
        if index < 0 or tokens[index][0] != "number":
            if expression:
                raise _NoTrajectory("an operator without an operand")
            return []
        expression.insert(0, tokens[index][1])
        index -= 1
        if index < 0 or tokens[index][1] not in _TOOL:
            return expression
        expression.insert(0, tokens[index][1])
        index -= 1


def _is_per(tokens: Sequence[Token], index: int) -> bool:
    """Is this the slash of a unit, as in "orders/day"?"""
    return tokens[index][1] == "/" and index > 0 and tokens[index - 1][0] == "word"


def _append_calls(expression: Expression, steps: list[dict[str, Any]], results: list[Decimal]) -> None:
    """Add the calls that evaluate the expression, and their results; earlier results become references."""
    operands: list[Any] = [_reference(text, results) for text in expression[::2]]
    signs = expression[1::2]
    if len(signs) > 1 and set(signs) == {"+"}:
        _append("sum_numbers", {"numbers": operands}, " + ".join(expression[::2]), steps, results)
        return
    shown = list(expression[::2])
    for pass_signs in ("*/", "+-"):
        at = 0
        while at < len(signs):
            if signs[at] not in pass_signs:
                at += 1
                continue
            what = f"{shown[at]} {signs[at]} {shown[at + 1]}"
            _append(_TOOL[signs[at]], {"a": operands[at], "b": operands[at + 1]}, what, steps, results)
            operands[at : at + 2] = [f"#{len(steps)}"]
            shown[at : at + 2] = [f"{results[-1]:f}"]
            del signs[at]


def _append(
    tool: str, arguments: dict[str, Any], what: str, steps: list[dict[str, Any]], results: list[Decimal]
) -> None:
    steps.append({"tool": tool, "arguments": arguments, "what": what})
    try:
        results.append(Decimal(solve(steps, calculator_tools())))
    except ValueError as error:
        raise _NoTrajectory(str(error)) from error


def _reference(text: str, results: Sequence[Decimal]) -> Any:
    value = Decimal(text)
    for index in range(len(results) - 1, -1, -1):
        if results[index] == value:
            return f"#{index + 1}"
    return int(value) if value == int(value) else float(value)


def _alive(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Only the steps that the last one needs, references renumbered."""
    needed = {len(steps)}
    for number in range(len(steps), 0, -1):
        if number in needed:
            needed |= {int(reference[1:]) for reference in _references(steps[number - 1]["arguments"])}
    new = {old: index for index, old in enumerate(sorted(needed), 1)}

    def renumber(value: Any) -> Any:
        if isinstance(value, list):
            return [renumber(item) for item in value]
        return f"#{new[int(value[1:])]}" if isinstance(value, str) else value

    return [
        {**steps[old - 1], "arguments": {k: renumber(v) for k, v in steps[old - 1]["arguments"].items()}}
        for old in sorted(needed)
    ]


def _references(arguments: dict[str, Any]) -> list[str]:
    flat = [item for value in arguments.values() for item in (value if isinstance(value, list) else [value])]
    return [item for item in flat if isinstance(item, str)]


def _numbers(question: str) -> list[str]:
    return re.findall(r"\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", question))
