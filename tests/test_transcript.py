"""What a teacher wrote, read as calls; and whether a student that says the same words does the same."""

from __future__ import annotations

import json

import pytest

from lite_mentor.prompt import parse_turn
from lite_mentor.tasks import make_example
from lite_mentor.tools import calculator_tools, run_call
from lite_mentor.transcript import calls_in, flaw, record_of, request, with_calls
from tests.linear_time import is_linear

TOOLS = [tool for tool in calculator_tools() if tool.name in ("add", "multiply")]
ADD, ONE = '{"name": "add", "arguments": {"a": 1, "b": 2}}', '{"name": "add", "arguments": {"a": 1}}'


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ('{"a":1}', '{"name": "f", "arguments": {"a": 1}}'),
        ({"a": 1}, '{"name": "f", "arguments": {"a": 1}}'),
        (json.dumps('{"a":1}'), '{"name": "f", "arguments": {"a": 1}}'),
        ("", '{"name": "f", "arguments": {}}'),
        (None, '{"name": "f", "arguments": {}}'),
        ("[1]", '{"name": "f", "arguments": [1]}'),
        ([1], '{"name": "f", "arguments": [1]}'),
        ("{", '{"name": "f", "arguments": {}'),
        (json.dumps(json.dumps('{"a":1}')), r'{"name": "f", "arguments": "\"{\\\"a\\\":1}\""}'),
    ],
)
def test_a_call_is_written_as_a_student_should_write_it(arguments, text):
    assert request("f", arguments).raw == text


@pytest.mark.parametrize(
    ("text", "rest", "raws"),
    [
        (f"Now.\n<tool_call>\n{ADD}\n</tool_call>\n", "Now.", [ADD]),
        (f"<tool_call>{ADD}<tool_call>{ONE}", "", [ADD, ONE]),
        (f"<think><tool_call>{ONE}</tool_call></think>So <tool_call>{ADD}</tool_call>.",
         f"<think><tool_call>{ONE}</tool_call></think>So .", [ADD]),
        ("<tool_call>{broken</tool_call>", "", ["{broken"]),
        ('<tool_call>{"name": 1, "arguments": {}}</tool_call>', "", ['{"name": 1, "arguments": {}}']),
        (f"<think>I add.</think>\n\n{ADD}\n", "<think>I add.</think>", [ADD]),
        (f"```\n[{ADD}, {ONE}]\n```", "", [ADD, ONE]),
        (ADD.replace("arguments", "parameters"), "", [ADD]),
        # no calls: in thoughts, beside words, of no tool, not an object
        (f"<think>{ADD}</think>", f"<think>{ADD}</think>", []),
        (f"<think>{ADD}", f"<think>{ADD}", []),
        (f"I call {ADD}", f"I call {ADD}", []),
        (ADD.replace("add", "rm"), ADD.replace("add", "rm"), []),
        ("12", "12", []),
        ("[]", "[]", []),
        ("", "", []),
    ],
)  # fmt: skip
def test_calls_that_stand_in_the_text(text, rest, raws):
    found, calls = calls_in(text, TOOLS)
    assert (found, [call.raw for call in calls]) == (rest, raws)
    assert list(parse_turn(with_calls(found, raws)).calls) == raws


@pytest.mark.parametrize("piece", ["[", "<tool_call>{", "<think><tool_call>", "```", '{"name":"add","arguments":', " "])
def test_any_text_is_read_in_linear_time(piece):
    assert is_linear(lambda text: (calls_in(text, TOOLS), flaw(EXAMPLE, [said(text)], [])), piece)


EXAMPLE = make_example("What is 1 + 2?", ["3"], TOOLS, suite="made")
CALL, END = run_call(ADD, TOOLS), {"role": "assistant", "content": "\\boxed{3}"}
RESULT = {"role": "tool", "content": "3"}


def said(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("messages", "calls", "correct"),
    [
        ([said(f"<tool_call>{ADD}</tool_call>"), RESULT, END], [CALL], True),
        ([END], [], True),
        ([said("<tool_call>" + ADD + "</tool_call>\\boxed{3}")], [], False),
        ([said("I add."), RESULT, END], [CALL], False),
        ([said(f"<tool_call>{ONE}</tool_call>"), RESULT, END], [CALL], False),
        ([said(f"<tool_call>{ADD}</tool_call>" * 2), RESULT, END], [CALL], False),
        ([said(f"<think><tool_call>{ADD}</tool_call>"), RESULT, END], [CALL], False),
        ([said(f"{ADD} \\boxed{{3}}")], [], False),
        ([said('The tool is {"name": "add"}: \\boxed{3}')], [], True),
        ([said(f"<think>{ADD}?</think> \\boxed{{3}}")], [], True),
    ],
)
def test_a_record_is_correct_where_its_words_make_its_calls(messages, calls, correct):
    assert record_of(EXAMPLE, "t", messages, calls, "3").correct is correct
    assert record_of(EXAMPLE, "t", messages, calls, "4").correct is False
    assert record_of(EXAMPLE, "t", messages, calls, None).correct is False
