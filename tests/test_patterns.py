"""Every regular expression in lite_mentor takes linear time, and so does what reads others' text with them."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lite_mentor import judge, prompt, quantities, units
from lite_mentor.judge import MAX_ANSWER_CHARS, is_correct, is_mathematics
from lite_mentor.quantities import MAX_CHARS, MOST_MARKS, normalized, read, stands_in
from lite_mentor.tasks import same_question
from lite_mentor.units import MAX_READINGS, read_units
from tests.pumping import attacks, is_slow, slow_text
from tests.test_layers import FILES, ROOT

BOUNDED = {
    "judge._PIECE": 5 * MAX_CHARS,  # in an answer or an accepted one, of which each character may become several
    "judge._UNIT": 5 * MAX_CHARS,
    "tasks.gsm_symbolic._TOKEN": 1000,  # lines of a file whose sha256 is pinned
}
"""Those that do take squared time, and the most characters that they are ever given."""
MADE_LATER = {"quantities.stands_in", "prompt._breaks_of"}
"""Functions that make an expression of what they are given."""
ANCHORED = {"match", "fullmatch"}
"""Methods that begin at one place alone."""


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def patterns_in(value) -> Iterator[re.Pattern[str]]:
    if isinstance(value, re.Pattern):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from patterns_in(item)
    elif isinstance(value, type) and value.__module__.startswith("lite_mentor"):
        yield from patterns_in(dict(vars(value)))


def is_searched(path: Path, name: str) -> bool:
    """Is the pattern of this name used otherwise than from one place on?"""
    nodes = list(ast.walk(tree(path)))
    used = [n for n in nodes if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load)]
    anchored = [n.value for n in nodes if isinstance(n, ast.Attribute) and n.attr in ANCHORED]
    return not used or any(node not in anchored for node in used)


def calls_of_re(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Within functions: the function's name, and a call such as re.sub(...)."""
    for function in ast.walk(tree(path)):
        for node in ast.walk(function) if isinstance(function, ast.FunctionDef) else ():
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == "re":
                yield function.name, node


def all_patterns() -> Iterator[tuple[str, re.Pattern[str], bool]]:
    """Name, pattern, and whether it is searched for: of every module's globals, and of texts in its functions."""
    for path in FILES:
        module = module_of(path).removeprefix("lite_mentor.")
        for name, value in vars(importlib.import_module(module_of(path))).items():
            for pattern in patterns_in(value):
                yield f"{module}.{name}", pattern, is_searched(path, name)
        for name, call in calls_of_re(path):
            if isinstance(call.args[0], ast.Constant):
                yield f"{module}.{name}", re.compile(call.args[0].value), call.func.attr not in ANCHORED


def test_what_is_tried_is_all_there_is():
    made_later = {
        f"{module_of(path).removeprefix('lite_mentor.')}.{name}"
        for path in FILES
        for name, call in calls_of_re(path)
        if not isinstance(call.args[0], ast.Constant) and call.func.attr != "escape"
    }
    assert made_later == MADE_LATER
    for path in FILES:  # else it would be a name that is not looked for
        assert not any(isinstance(n, ast.ImportFrom) and n.module == "re" for n in ast.walk(tree(path))), path
    names = {name for name, *_ in all_patterns()}
    assert {"judge._READINGS", "units._TOKEN", "transcript._NAMED", "teach._same_call", "prompt._TAG"} <= names
    assert set(BOUNDED) <= names


def test_every_pattern_takes_linear_time():
    slow = {}
    for name, pattern, searched in set(all_patterns()):
        found = slow_text(pattern, searched=searched, **({"length": BOUNDED[name]} if name in BOUNDED else {}))
        slow |= {name: found} if found else {}
    assert slow == {}


@pytest.mark.parametrize(
    ("pattern", "searched"),
    [
        (r"(?<=\S)(\s+[a-z]{2,}(?:[ /]?[a-z]+)*)$", True),  # exponential
        (r"(?:a+)+b", False),
        (r"(?:ab|a|b)*!", False),
        (r"\s*([+-]?)\s*(\$?)\s*5", False),  # cubic
        (r"\s+$", True),  # squared
        (r"[a-z]+@", True),
        (r"\(.*\)", True),
    ],
)
def test_slow_patterns_are_found(pattern, searched):
    assert slow_text(re.compile(pattern), searched=searched)


@pytest.mark.parametrize(("pattern", "searched"), [(r"\s+$", False), (r"(?<!\s)\s+$", True), (r"\([^()]*\)", True)])
def test_linear_patterns_pass(pattern, searched):
    assert slow_text(re.compile(pattern), searched=searched) is None


# --- what reads with them --------------------------------------------------------------------------------------

AMBIGUOUS = "".join(f" {word}^{power}" for word in ("deg", "pound", "penny") for power in (1, 2, 4, 8))
PIECES = (
    AMBIGUOUS, "⑳", "ﷺ", "½", "\u0316\u0301", "5 of ", "{(", "1 million ", "\\text{ }", "\\text{", "5 h ", " ", "~",
    "\\;", "\t", "$", "1,", "1 ", "-", "+ ", "(the ", "1 km ", "a-", "1/", "=", "min ",
)  # fmt: skip
HOSTILE = [(lead, piece, end) for piece in PIECES for lead, end in (("", ""), ("+", "5"), ("5", "!"))]
for room in (judge, quantities, units):
    HOSTILE += [found for pattern in patterns_in(list(vars(room).values())) for found in attacks(pattern, 2)]


def test_no_answer_and_no_accepted_one_takes_long(monkeypatch):
    """All but math-verify, which runs under limits of its own."""
    monkeypatch.setattr(judge, "_math_verify", lambda answer, accepted: False)

    def all_ways(lead, pump, end):
        answer, accepted = (f"{lead + pump * 400:.{most - len(end)}}{end}" for most in (MAX_ANSWER_CHARS, MAX_CHARS))
        is_correct(answer, ("7", "Paris", "x + 1", accepted), "math", accepted * 10)
        is_correct(answer, ("Paris", accepted), "text")
        is_correct("7", (accepted,), "math")
        is_mathematics(accepted)

    for hostile in HOSTILE:
        assert not is_slow(lambda hostile=hostile: all_ways(*hostile), seconds=0.5), hostile


def test_words_of_many_meanings_are_no_unit():
    assert read_units(AMBIGUOUS) == ()
    assert 1 < len(read_units(" cents per pound per ton per degree")) <= MAX_READINGS
    assert read(f"5{AMBIGUOUS}") is None


@given(st.text(), st.sampled_from(["NFC", "NFKC"]))
def test_text_is_normalized_as_unicode_says(text, form):
    assert normalized(form, text) == unicodedata.normalize(form, text)


def test_marks_are_sorted_as_far_as_any_language_writes_them():
    marks = "\u0316\u0301" * (MOST_MARKS // 2)
    assert normalized("NFC", f"xa{marks}") == unicodedata.normalize("NFC", f"xa{marks}")


QUESTIONS = (
    "\u0316\u0301",
    "5 of ",
    "\\text{ }",
    "**",
    "\\frac{1}{",
    "<tool_call>",
    "<|im_start|",
    prompt.SLOT[0],
    "9",
)


@pytest.mark.parametrize("piece", QUESTIONS)
def test_a_long_question_takes_linear_time(piece):
    question = piece * (100_000 // len(piece))
    marks = prompt._breaks_of({"<tool_call>", "<|im_start|>", "<|im_end|>"})
    assert not is_slow(lambda: same_question(question), seconds=1.0)
    assert not is_slow(lambda: stands_in("5 of of of of 9", question), seconds=1.0)
    assert not is_slow(lambda: marks.sub("", question), seconds=1.0)
