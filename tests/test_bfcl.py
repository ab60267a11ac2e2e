"""BFCL: official answers pass by their own checker, corrupted ones fail, and a missing package is one sentence."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys

import pytest
import torch
import torch.nn.functional as F

from lite_mentor.engine import Engine
from lite_mentor.errors import UserError
from lite_mentor.evaluate import evaluate
from lite_mentor.prompt import Chat
from lite_mentor.rollout import Limits
from lite_mentor.tasks import bfcl, load_suite
from lite_mentor.tiny import tiny_tokenizer
from lite_mentor.tools import caller, render_call, run_call
from lite_mentor.types import Example, ToolCall

COUNTS = {
    "bfcl_simple_python": 400, "bfcl_multiple": 200, "bfcl_parallel": 200, "bfcl_parallel_multiple": 200,
    "bfcl_irrelevance": 240, "bfcl_live_simple": 258, "bfcl_live_multiple": 1053, "bfcl_live_parallel": 16,
    "bfcl_live_parallel_multiple": 24, "bfcl_live_irrelevance": 884,
}  # fmt: skip
UNPASSABLE = {
    "live_simple_112-68-0": "a required parameter has an empty list of allowed values",
    "live_simple_106-63-0": "a required parameter has an empty list of allowed values",
    "live_multiple_862-181-3": "the answer demands a parameter that the function does not have",
    "live_multiple_964-207-0": "the answer has no value for the required parameter",
}
"""Entries of the published data that no call at all can pass."""
ASKING = [suite for suite in bfcl.SUITES if not suite.endswith("irrelevance")]

CHAT = Chat(tiny_tokenizer())
END = 257
installed = pytest.mark.skipif(importlib.util.find_spec("bfcl_eval") is None, reason="needs bfcl-eval")


def everything(suite: str) -> list[Example]:
    return load_suite(suite, split="test", size=10_000, seed=0)


def answered(example: Example, steps=None) -> list[ToolCall]:
    steps = example.meta["steps"] if steps is None else steps
    return [run_call(render_call(step["tool"], step["arguments"]), example.tools) for step in steps]


@installed
@pytest.mark.parametrize("suite", bfcl.SUITES)
def test_official_answers_pass(suite):
    examples = everything(suite)
    assert len(examples) == COUNTS[suite]
    missed = {e.meta["entry"] for e in examples if not bfcl.passes(e, answered(e))}
    assert missed == {e.meta["entry"] for e in examples} & set(UNPASSABLE)


@installed
@pytest.mark.parametrize("suite", ASKING)
def test_corrupted_answers_fail(suite):
    for example in everything(suite):
        steps = example.meta["steps"]
        wrong_name = [{**steps[0], "tool": steps[0]["tool"] + "_"}, *steps[1:]]
        extra_argument = copy.deepcopy(list(steps))
        extra_argument[-1]["arguments"]["no such argument"] = 1
        for corrupted in ([], steps[1:], [*steps, steps[-1]], wrong_name, extra_argument):
            assert not bfcl.passes(example, answered(example, corrupted)), example.meta["entry"]


@installed
@pytest.mark.parametrize("suite", ASKING)
def test_each_wrong_value_fails(suite):
    checked = 0
    for example in everything(suite):
        for index, step in enumerate(example.meta["steps"]):
            for name in step["arguments"]:
                corrupted = copy.deepcopy(list(example.meta["steps"]))
                corrupted[index]["arguments"][name] = "not that at all"
                assert not bfcl.passes(example, answered(example, corrupted)), (example.meta["entry"], name)
                checked += 1
    assert checked >= COUNTS[suite]


@installed
@pytest.mark.parametrize("suite", ["bfcl_irrelevance", "bfcl_live_irrelevance"])
def test_where_no_call_is_right_any_readable_call_is_wrong(suite):
    for example in everything(suite):
        assert bfcl.passes(example, [])
        assert bfcl.passes(example, [run_call("{not a call", example.tools)])
        assert not bfcl.passes(example, [run_call(render_call("anything", {}), example.tools)])


@installed
def test_one_unreadable_call_spoils_the_answer():
    example = everything("bfcl_simple_python")[0]
    assert bfcl.passes(example, answered(example))
    assert not bfcl.passes(example, [*answered(example), run_call("", example.tools)])


@installed
def test_numbers_are_judged_as_written():
    example = next(e for e in everything("bfcl_simple_python") if e.meta["entry"] == "simple_python_0")
    assert example.meta["steps"][0]["arguments"] == {"base": 10, "height": 5}
    whole, point = (render_call("calculate_triangle_area", {"base": base, "height": 5}) for base in (10, 10.0))
    assert bfcl.passes(example, [run_call(whole, example.tools)])
    assert run_call(point, example.tools).status == "ok"
    assert not bfcl.passes(example, [run_call(point, example.tools)])


@installed
@pytest.mark.parametrize("value", ["null", "[]", "{}", "[[]]", '[{"a": {}}]', '{"a": [1]}', "[null, 1]", "true", '""'])
def test_garbage_for_any_argument_is_never_more_than_wrong(value):
    for suite in ASKING:
        for example in load_suite(suite, split="test", size=40, seed=1):
            names = [name for tool in example.tools for name in tool.parameters["properties"]]
            raw = render_call(example.tools[0].name, dict.fromkeys(names, json.loads(value)))
            assert bfcl.passes(example, [run_call(raw, example.tools)]) in (True, False)


@installed
def test_a_sample_is_fixed_and_the_prompt_schema_is_json_schema():
    one, two = (load_suite("bfcl_multiple", split="test", size=20, seed=0) for _ in range(2))
    assert [e.key for e in one] == [e.key for e in two]
    assert len(one) == 20
    assert [e.key for e in everything("bfcl_multiple")][:20] == [e.key for e in one]
    first = next(e for e in everything("bfcl_simple_python") if e.meta["entry"] == "simple_python_0")
    assert first.tools[0].parameters["type"] == "object"
    assert first.tools[0].parameters["properties"]["base"]["type"] == "integer"
    assert first.question == "Find the area of a triangle with a base of 10 units and height of 5 units."


@installed
def test_their_vendors_modules_are_not_left_replaced():
    bfcl._checker()
    assert "bfcl_eval.constants.model_config" not in sys.modules


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps bfcl-eval==2026\.3\.23"):
        load_suite("bfcl_multiple", split="test", size=1, seed=0)


def test_it_is_not_trained_on_and_unknown_categories_are_refused():
    with pytest.raises(UserError, match="only the split test"):
        load_suite("bfcl_multiple", split="train", size=1, seed=0)
    with pytest.raises(UserError, match="There is no suite 'bfcl_java'"):
        load_suite("bfcl_java", split="test", size=1, seed=0)


def evaluated(example: Example, text: str, *, closed: bool = True) -> int:
    """Is a student right who says exactly `text`, through our engine and `evaluate`?"""
    prompt = CHAT.prompt_ids(example)
    script = [*prompt, *CHAT.turn_ids(text)[: None if closed else -1], *[ord("~")] * 400]

    def forward(ids_1T, positions_1T, plan):
        return F.one_hot(torch.tensor([script[p + 1] for p in positions_1T[0].tolist()]), 512).float()

    engine = Engine(
        forward, lambda h: h * 100, layers=1, kv_heads=1, head_dim=1, eos_ids=[END], slots=1, context=len(prompt) + 400
    )
    result, _ = evaluate(
        engine, CHAT, [example], limits=Limits(max_turns=4, max_new_tokens=390, max_prompt_tokens=len(prompt)),
        run_call=caller(),
    )  # fmt: skip
    return result["correct"][0]


def said(example: Example) -> str:
    calls = [render_call(step["tool"], step["arguments"]) for step in example.meta["steps"]]
    return "".join(f"<tool_call>{call}</tool_call>" for call in calls)


@installed
@pytest.mark.parametrize("suite", ["bfcl_simple_python", "bfcl_live_parallel", "bfcl_live_irrelevance"])
def test_the_engine_and_evaluate_count_the_same(suite):
    example = next(e for e in load_suite(suite, split="test", size=50, seed=0) if len(said(e)) < 350)
    assert evaluated(example, said(example)) == 1
    assert evaluated(example, said(example), closed=False) == 1
    assert evaluated(example, said(example) + '<tool_call>{"name": "other", "arguments": {}}</tool_call>') == 0
    assert evaluated(example, "\\boxed{1}") == int(suite == "bfcl_live_irrelevance")
