"""Slips: refused before any tool runs, silent in the loss, and the teacher's own turns stay as they were."""

from __future__ import annotations

import collections
import dataclasses

import pytest

from lite_mentor import sft
from lite_mentor.config import PRESETS
from lite_mentor.prompt import Chat
from lite_mentor.slips import SLIP, with_slips
from lite_mentor.student import load_student
from lite_mentor.tasks import load_suite, make_example
from lite_mentor.teach import oracle
from lite_mentor.tools import caller
from lite_mentor.types import TeacherRecord, ToolSpec


@pytest.fixture(scope="module")
def examples():
    return load_suite("math_varied", split="train", size=200, seed=0, levels=(1, 2))


@pytest.fixture(scope="module")
def records(examples):
    return [oracle(example, caller()) for example in examples]


def kind(error: str) -> str:
    return next(sign for sign in ("no tool", "bad call", "no argument", "is missing", "must be") if sign in error)


def test_a_share_of_the_records_slips_in_every_way_once(examples, records):
    slipped = with_slips(examples, records, share=0.5, seed=0)
    kinds = collections.Counter()
    for before, after in zip(records, slipped, strict=True):
        at = [i for i, message in enumerate(after.messages) if message["role"] == SLIP]
        if not at:
            assert after == before
            continue
        (at,) = at
        slip, error, turn = after.messages[at : at + 3]
        assert error["role"] == "tool"
        assert error["content"].startswith("Error: ")
        assert turn["role"] == "assistant"
        assert slip["content"] != turn["content"]
        assert (*after.messages[:at], *after.messages[at + 2 :]) == before.messages
        assert (after.calls, after.answer) == (before.calls, before.answer)
        kinds[kind(error["content"])] += 1
    assert 75 <= sum(kinds.values()) <= 125
    assert {"no tool", "bad call", "no argument", "is missing"} <= set(kinds)


def test_a_slip_depends_on_the_seed_and_not_on_the_place(examples, records):
    slipped = with_slips(examples, records, share=0.5, seed=0)
    assert with_slips(examples[::-1], records[::-1], share=0.5, seed=0) == slipped[::-1]
    assert with_slips(examples, records, share=0.5, seed=1) != slipped
    assert with_slips(examples, records, share=0.0, seed=0) == records


def spoiled(**arguments):
    raise AssertionError("a slip ran a tool")


def conversation(*contents: str) -> TeacherRecord:
    roles = ("assistant", "tool") * len(contents)
    messages = tuple({"role": role, "content": text} for role, text in zip(roles, contents, strict=False))
    return TeacherRecord("k", "t", messages, (), "3", True, "")


NOTHING = {"type": "object", "properties": {}}
NOW = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'


@pytest.mark.parametrize("where", [dict(function=spoiled), dict(path="somewhere:now")])
def test_no_tool_runs_and_one_without_arguments_slips_in_its_text(where):
    example = make_example("When?", ["3"], [ToolSpec("now", "The time.", NOTHING, **where)], suite="x")
    (record,) = with_slips([example], [conversation(NOW, "3", "\\boxed{3}")], share=1.0, seed=0)
    assert [m["role"] for m in record.messages] == [SLIP, "tool", "assistant", "tool", "assistant"]
    assert record.messages[0]["content"] == NOW.replace("{}}", "{}")
    assert record.messages[1]["content"] == "Error: bad call, it is not valid JSON."


@pytest.mark.parametrize(
    "said",
    [
        "\\boxed{3}",
        NOW + NOW,
        NOW.replace("now", "then"),
        "<tool_call>[]</tool_call>",
        "<tool_call>",
    ],
    ids=["no call", "two calls", "a call that fails by itself", "not a call", "nothing"],
)
def test_a_turn_that_cannot_be_damaged_stays(said):
    example = make_example("When?", ["3"], [ToolSpec("now", "The time.", NOTHING, function=spoiled)], suite="x")
    record = conversation(said, "3", "\\boxed{3}")
    assert with_slips([example], [record], share=1.0, seed=0) == [record]


def test_the_slip_and_its_error_are_read_and_not_learned(examples, records):
    student = load_student("tiny", quant="none", dtype="fp32", lora_rank=8, lora_alpha=8)
    chat, end = Chat(student.tokenizer), student.eos_ids[0]
    teacher = {record.example_key: record for record in records[:8]}
    for share in (0.0, 1.0):
        shown = sft.teacher_rollouts(
            chat, examples[:8], teacher, end, dataclasses.replace(PRESETS["quick"], sft_slips=share)
        )
        for example, record, rollout in zip(examples[:8], records[:8], shown, strict=True):
            turns = [chat.turn_ids(m["content"], end) for m in record.messages if m["role"] == "assistant"]
            assert rollout.ids[rollout.sampled].tolist() == [i for turn in turns for i in turn]
            plain = sft.teacher_rollout(chat, example, record, end)
            assert (len(rollout.ids) > len(plain.ids)) == (share == 1.0)
            assert rollout.turns == plain.turns + (share == 1.0)
