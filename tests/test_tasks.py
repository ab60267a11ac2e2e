"""The built-in suites: every known solution is run, splits share nothing, and the same seed gives the same examples."""

from __future__ import annotations

import json
import re
from collections import Counter
from decimal import Decimal
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_tools import no_module

from lite_mentor.errors import UserError
from lite_mentor.tasks import (
    SPLITS,
    SUITES,
    load_suite,
    load_task,
    make_example,
    math_varied,
    resolve_arguments,
    split_of,
)
from lite_mentor.tasks import math as math_suite
from lite_mentor.tasks.gsm_symbolic import _NoTrajectory, derive_steps, equations
from lite_mentor.tasks.math_plain import PLAIN
from lite_mentor.tasks.ood_lookup import lookup_tools, search, world
from lite_mentor.tasks.ood_tools import unseen_tools
from lite_mentor.tasks.templates import Template, draw_numbers, generate_examples, solve
from lite_mentor.tools import ToolError, calculator_tools, render_call, run_call

CALCULATORS = {tool.name for tool in calculator_tools()}


def load(name, split="train", size=100, seed=0, levels=None):
    return load_suite(name, split=split, size=size, seed=seed, levels=levels)


@pytest.fixture(scope="module")
def math_train():
    return load("math", size=2000)


# --- what all suites have in common ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUITES)
def test_known_solutions_run_and_give_the_answer(name):
    if name == "gsm_symbolic":
        pytest.importorskip("reasoning_gym")
    for example in load(name):
        assert len(example.meta["steps"]) == example.meta["level"]
        assert "{answer}" in example.meta["final"]
        offered = [tool.name for tool in example.tools]
        assert len(set(offered)) == len(offered)
        if not example.meta["steps"]:
            assert re.search(rf"(?<![\d.]){re.escape(example.answer[0])}(?![\d]|\.\d)", example.question)
            continue
        result = solve(example.meta["steps"], example.tools)
        if example.checker == "math":
            assert result == example.answer[0]
        else:
            assert example.answer[0] in result


@pytest.mark.parametrize("name", SUITES)
def test_splits_share_no_question(name):
    if name == "gsm_symbolic":
        pytest.importorskip("reasoning_gym")
    questions = [{example.question for example in load(name, split, 60, seed)} for split in SPLITS for seed in (0, 1)]
    for i, first in enumerate(questions):
        for j, second in enumerate(questions):
            if i // 2 != j // 2:
                assert not first & second


@pytest.mark.parametrize("name", SUITES)
def test_examples_are_distinct_and_the_same_every_time(name):
    if name == "gsm_symbolic":
        pytest.importorskip("reasoning_gym")
    first, second = load(name, size=50, seed=3), load(name, size=50, seed=3)
    assert first == second
    assert len({example.key for example in first}) == 50
    assert {example.suite for example in first} == {name}
    assert [e.key for e in first] != [e.key for e in load(name, size=50, seed=4)]


def test_examples_are_the_same_on_every_machine():
    """Literal values: when they change, teachers' caches and published figures no longer fit."""
    example = load("tiny", "test", 1)[0]
    assert (example.question, example.answer) == ("What is 92 minus 82?", ("10",))
    assert example.key == "b2c22b728833848c"
    assert load("math", "test", 1)[0].key == "6d070baf0334eab8"
    assert load("ood_tools", "test", 1)[0].key == "04fa5855bf5883f7"
    assert load("ood_lookup", "test", 1)[0].key == "2bf64af79d7c34bb"


def test_tiny_ood_differs_from_what_is_trained_in_the_length_of_one_number_alone():
    def lengths(example):
        return tuple(len(number) for number in re.findall(r"[0-9]+", example.question))

    assert {lengths(e) for e in load("tiny", size=200)} == {(2, 2)}
    unseen = load("tiny_ood", "test", 100)
    assert {lengths(e) for e in unseen} == {(2, 1), (3, 2)}
    assert {e.meta["steps"][0]["tool"] for e in unseen} == {"add", "subtract", "multiply"}
    assert all(e.tools == load("tiny", size=1)[0].tools for e in unseen[:10])


def test_the_key_is_the_content():
    example = make_example("q", ["1"], calculator_tools(), suite="s", level=1)
    assert example.key == make_example("q", ["1"], calculator_tools(), suite="other").key
    assert example.key != make_example("q", ["2"], calculator_tools(), suite="s").key
    assert example.key != make_example("q", ["1"], calculator_tools()[1:], suite="s").key


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"name": "maths"}, "no task suite 'maths'"),
        ({"name": "math", "split": "dev"}, "no split 'dev'"),
        ({"name": "math", "levels": (7,)}, "has none of the levels \\(7,\\); it has 1, 2, 3, 4, 5, 6"),
        ({"name": "ood_lookup", "split": "test", "size": 5000}, "test examples of levels \\(1, 2\\), not 5000"),
    ],
)
def test_wrong_requests_are_the_users_error(arguments, reason):
    with pytest.raises(UserError, match=reason):
        load(**arguments)


def test_levels_that_a_suite_lacks_are_ignored():
    assert {e.meta["level"] for e in load("tiny", size=10, levels=(1, 2))} == {1}
    assert {e.meta["level"] for e in load("math", size=60, levels=(2, 5))} == {2, 5}


def test_a_split_is_the_hash_of_template_and_numbers():
    assert [split_of("plus", [a, 10]) for a in range(10, 20)] == ["train"] * 6 + ["test"] + ["train"] * 2 + [
        "validation"
    ]
    shares = Counter(split_of("t", [n]) for n in range(5000))
    assert 3900 < shares["train"] < 4100
    assert 430 < shares["validation"] < 570


@pytest.fixture
def load_file(tmp_path):
    """One split of a file in which every question stands three times: tools shuffled, and words in other case."""
    rows = [
        {"question": question, "answer": 7 * i, "tools": tools}
        for i in range(200)
        for question, tools in (
            (f"What is {i} times 7?", ["multiply"]),
            (f"What  is {i} times 7?", ["multiply", "add"]),
            (f"WHAT IS {i} TIMES 7?", ["add", "multiply"]),
        )
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def load_split(split, size=10**6, note=None):
        return load_task(
            str(path),
            split=split,
            size=size,
            seed=0,
            levels=None,
            quarantine=tmp_path / "aside.jsonl",
            describe=no_module,
            note=note,
        )

    return load_split


def test_a_file_is_split_by_its_questions(load_file):
    examples = {split: load_file(split) for split in SPLITS}
    assert sum(map(len, examples.values())) == 600
    assert 0.7 < len(examples["train"]) / 600 < 0.9
    questions = [{" ".join(e.question.casefold().split()) for e in examples[split]} for split in SPLITS]
    assert [3 * len(asked) for asked in questions] == [len(examples[split]) for split in SPLITS]
    assert sum(map(len, questions)) == len(set.union(*questions)) == 200


def test_examples_of_a_file_that_are_not_used_are_counted(load_file):
    notes = []
    available = len(load_file("train", note=notes.append))
    assert notes == []
    assert len(load_file("train", 100, notes.append)) == 100
    (note,) = notes
    assert note.endswith(
        f"the first 100 of {available} examples for train are used and {available - 100} are not; "
        "raise --train-size to use more"
    )
    load_file("validation", 5, notes.append)
    assert "--eval-size" in notes[1]


def test_references_become_results():
    results = ["12", "0.5", "Tarn", "1.5e30"]
    arguments = {"a": "#1", "list": [3, "#2", "#4"], "text": "#3", "other": "#x", "n": 7}
    assert resolve_arguments(arguments, results) == {
        "a": 12, "list": [3, 0.5, 1.5e30], "text": "Tarn", "other": "#x", "n": 7,
    }  # fmt: skip


# --- templates ---------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6))
def test_drawn_decimals_never_end_in_zero(seed):
    template = Template("t", {"x": (-9.9, 9.9, 1), "n": (5, 7), "twice": lambda n: n["n"] * 2.0}, (), ())
    numbers = draw_numbers(Random(seed), template)
    assert -9.9 <= numbers["x"] <= 9.9
    assert not str(numbers["x"]).endswith(".0")
    assert 5 <= numbers["n"] <= 7
    assert numbers["twice"] == 2 * numbers["n"]
    assert isinstance(numbers["twice"], int)


def test_a_template_without_enough_numbers_says_so():
    small = Template("small", {"a": (1, 4)}, ("{a}?",), ("abs_value a -> it",))
    tools = {tool.name: tool for tool in calculator_tools()}
    with pytest.raises(UserError, match="only about"):
        generate_examples("s", [small], lambda r, t: tools, split="train", size=9, seed=0, levels=[1])


def test_a_wrong_solution_in_a_template_does_not_pass():
    with pytest.raises(ValueError, match="division by zero"):
        solve([{"tool": "divide", "arguments": {"a": 1, "b": 0}}], calculator_tools())


# --- math --------------------------------------------------------------------------------------------------------


def test_math_uses_every_calculator_and_offers_all(math_train):
    used = Counter(step["tool"] for example in math_train for step in example.meta["steps"])
    assert set(used) == CALCULATORS
    assert min(used.values()) > 100
    assert all(example.tools == calculator_tools() for example in math_train)
    per_level = Counter(example.meta["level"] for example in math_train)
    assert set(per_level) == {1, 2, 3, 4, 5, 6}
    assert min(per_level.values()) > 250


def test_every_calculator_is_used_at_level_one():
    used = {step["tool"] for example in load("math", size=300, levels=[1]) for step in example.meta["steps"]}
    assert used == CALCULATORS


def test_math_has_many_templates_with_unique_names_and_several_wordings():
    names = [template.name for template in math_suite.TEMPLATES]
    assert len(names) == len(set(names)) >= 60
    assert all(len(template.wordings) >= 2 for template in math_suite.TEMPLATES)


def test_questions_that_need_no_tool_offer_some():
    names = [template.name for template in math_varied.TEMPLATES]
    assert len(names) == len(set(names))
    plain, one_call = (load("math_varied", size=300, levels=[level]) for level in (0, 1))
    assert {e.meta["template"] for e in plain} == {template.name for template in PLAIN}
    for examples in (plain, one_call):
        assert {len(e.tools) for e in examples} == {4}
    assert {tool.description for e in plain for tool in e.tools} == {tool.description for tool in calculator_tools()}


def test_math_shares_no_template_with_its_numbers_between_splits(math_train):
    def identity(example):
        return example.meta["template"], tuple(re.findall(r"\d+(?:\.\d+)?", example.question))

    seen = {identity(example) for example in math_train}
    for split in ("validation", "test"):
        assert not seen & {identity(example) for example in load("math", split, 200)}


def test_math_questions_show_every_number_that_is_not_a_result_or_a_constant(math_train):
    for example in math_train:
        shown = set(re.findall(r"-?\d+(?:\.\d+)?", example.question)) | {"2", "3", "4", "6", "100", "1"}
        for step in example.meta["steps"]:
            for value in step["arguments"].values():
                for item in value if isinstance(value, list) else [value]:
                    assert str(item) in shown or str(item).startswith("#"), example


def test_math_answers_are_short_and_questions_readable(math_train):
    for example in math_train:
        assert re.fullmatch(r"\d{1,9}(\.\d{1,4})?", example.answer[0])
        assert 6 <= len(example.question.split()) <= 60
        assert not re.search(r"[{}]|  |\.\.", example.question)
        assert example.question[0].isupper() or example.question[0].isdigit()
        assert example.question[-1] in "?."
        for step in example.meta["steps"]:
            assert re.fullmatch(r"[A-Z][^{}]+\.", step["thought"])


def test_tiny_is_rigid_and_offers_three_tools():
    for example in load("tiny", size=50):
        assert re.fullmatch(r"What is \d\d (plus|minus|times) \d\d\?", example.question)
        assert [tool.name for tool in example.tools] == ["add", "subtract", "multiply"]
        assert (example.meta["steps"][0]["thought"], example.meta["final"]) == ("", "{answer}")


# --- out of domain -----------------------------------------------------------------------------------------------


def call(name, **arguments):
    result = run_call(render_call(name, arguments), unseen_tools())
    return result.status, result.result


@pytest.mark.parametrize(
    ("name", "arguments", "result"),
    [
        ("gcd", {"a": 84, "b": -36}, "12"),
        ("lcm", {"a": 4, "b": 6}, "12"),
        ("percent_of", {"percent": 15, "amount": 80}, "12"),
        ("mean_of", {"values": [1, 2, 3, 4]}, "2.5"),
        ("median_of", {"values": [9, 1, 4, 2]}, "3"),
        ("max_of", {"values": [1, 9.5, -3]}, "9.5"),
        ("min_of", {"values": [1, 9.5, -3]}, "-3"),
        ("range_of", {"values": [1, 9.5, -3]}, "12.5"),
        ("factorial", {"n": 5}, "120"),
        ("choose", {"n": 5, "k": 2}, "10"),
        ("days_between", {"start": "2024-02-28", "end": "2024-03-01"}, "2"),
        ("convert_units", {"value": 3, "source": "mile", "target": "km"}, "4.828032"),
        ("convert_units", {"value": 36, "source": "hour", "target": "day"}, "1.5"),
    ],
)
def test_unseen_tools(name, arguments, result):
    assert call(name, **arguments) == ("ok", result)


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("mean_of", {"values": []}, "Error: the list is empty."),
        ("factorial", {"n": 10**9}, "Error: n must be between 0 and 20."),
        ("choose", {"n": 3, "k": 5}, "Error: this needs 0 <= k <= n <= 60."),
        ("days_between", {"start": "2023-02-29", "end": "x"}, "Error: 'x' is not a date like 2024-03-31."),
        ("convert_units", {"value": 1, "source": "km", "target": "kg"}, "Error: km is a length and kg a mass."),
    ],
)
def test_unseen_tools_say_why_there_is_no_result(name, arguments, sentence):
    assert call(name, **arguments) == ("error", sentence)


def test_math_varied_disguises_a_few_calculators():
    examples = load("math_varied", "train", 300)
    description_of = {tool.description for tool in calculator_tools()}
    unseen = {tool.name for tool in unseen_tools()}
    names = Counter(tool.name for example in examples for tool in example.tools)
    for example in examples:
        offered = [tool.name for tool in example.tools]
        assert len(offered) == len(set(offered)) == max(4, len({s["tool"] for s in example.meta["steps"]}))
        assert not unseen & set(offered)
        assert len({tool.description for tool in example.tools} & description_of) == len(offered)
    # Each of twelve tools has about four names of its own; two in ten offers have one that was made up for it.
    made_up = sum(count for count in names.values() if count <= 3)
    assert 0.15 < made_up / names.total() < 0.25


def test_a_disguised_calculator_is_the_same_function():
    example = next(
        e for e in load("math_varied", "train", 300) if any("round to a number" in t.description for t in e.tools)
    )
    tool = next(t for t in example.tools if "round to a number" in t.description)
    number, digits = tool.parameters["properties"]
    assert tool.parameters["required"] == [number]
    results = [
        run_call(render_call(tool.name, arguments), example.tools)
        for arguments in ({number: 2.345, digits: 2}, {number: 2.345}, {"else": 2.345})
    ]
    assert [(r.status, r.result) for r in results[:2]] == [("ok", "2.35"), ("ok", "2")]
    assert results[2].status == "bad_arguments"


def test_ood_tools_offers_six_tools_none_of_them_seen_in_training():
    examples = load("ood_tools", "test", 150)
    for example in examples:
        names = {tool.name for tool in example.tools}
        assert len(names) == 6
        assert not names & CALCULATORS
        assert {step["tool"] for step in example.meta["steps"]} <= names
    assert {step["tool"] for e in examples for step in e.meta["steps"]} == {tool.name for tool in unseen_tools()}


def test_the_invented_country_is_whole():
    facts = world().facts
    assert len(world().documents) == 300
    for town in facts["town"].values():
        assert town["river"] in facts["river"]
        assert town["mayor"] in facts["person"]
    assert len({name for about in facts.values() for name in about}) == 300


def test_search_finds_a_town_by_name():
    name, town = next(iter(world().facts["town"].items()))
    assert search(f"Who is the mayor of {name}?") == (
        f"{name} is a town on the river {town['river']}. "
        f"It has {town['inhabitants']} inhabitants and its mayor is {town['mayor']}."
    )


@pytest.mark.parametrize(
    ("query", "reason"), [("", "no words"), ("the of", "no words"), ("?!", "no words"), ("qqqq", "nothing was found")]
)
def test_a_search_without_a_hit_says_so(query, reason):
    with pytest.raises(ToolError, match=reason):
        search(query)


def test_lookup_answers_are_texts_and_take_one_or_two_searches():
    for example in load("ood_lookup", "test", 150):
        assert example.checker == "text"
        assert example.tools == lookup_tools()
        assert example.answer[0] not in example.question
        assert all(step["tool"] == "search" for step in example.meta["steps"])


# --- gsm_symbolic ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("He can place 39 x 7 = 273 olives.", [(["39", "*", "7"], "273")]),
        ("Emma, 42 orders in a day, does 42 orders/day * 4 = 168 orders/day.", [(["42", "*", "4"], "168")]),
        ("The fee is $410,000 x 7/100 = $28,700.", [(["410000", "*", "7", "/", "100"], "28700")]),
        ("Thus 12 ÷ 2 = 6 and 900 x 6 = 5400.", [(["12", "/", "2"], "6"), (["900", "*", "6"], "5400")]),
        ("So 3 + 8 + 11 = 22 = all", [(["3", "+", "8", "+", "11"], "22")]),
        ("Let x = 5, nothing here", []),
    ],
)
def test_equations_are_read_from_a_worked_solution(line, found):
    assert equations(line) == found


def test_calls_are_derived_and_dead_ones_removed():
    question = "Ann has 410000 dollars, pays 7% and 30000 dollars. 5 and 6 do not matter. What remains?"
    solution = (
        "5 + 6 = 11 is not needed.\nThe fee is $410,000 x 7/100 = $28,700.\n"
        "That is 28700 + 30000 = 58700.\n410000 - 58700 = 351300\n#### 351300"
    )
    steps = derive_steps(question, solution, "351300")
    assert [(step["tool"], step["arguments"]) for step in steps] == [
        ("multiply", {"a": 410000, "b": 7}),
        ("divide", {"a": "#1", "b": 100}),
        ("add", {"a": "#2", "b": 30000}),
        ("subtract", {"a": 410000, "b": "#3"}),
    ]


@pytest.mark.parametrize(
    ("solution", "reason"),
    [
        ("9 * 5 = 44\n44 + 1 = 45", "is not 44"),
        ("9 * 77 = 693", "77 comes from nowhere"),
        ("9 * 5 = 45\n9 + 5 = 14", "does not give the answer"),
        ("It is 45.", "does not give the answer"),
        ("9 / 0.0 = 45", "comes from nowhere"),
        ("2x + 5 = 45", "without an operand"),
    ],
)
def test_solutions_that_do_not_hold_are_dropped(solution, reason):
    with pytest.raises(_NoTrajectory, match=reason):
        derive_steps("Nine rows of 5: 9 and 5.", solution, "45")


def test_gsm_symbolic_answers_are_the_sources_own():
    reasoning_gym = pytest.importorskip("reasoning_gym")
    source = reasoning_gym.create_dataset("gsm_symbolic", size=120, seed=0)
    answers = {item["question"].split(" Give the result")[0]: item["answer"] for item in source}
    common = [example for example in load("gsm_symbolic", size=60) if example.question in answers]
    assert len(common) > 40
    assert all(Decimal(answers[example.question]) == Decimal(example.answer[0]) for example in common)


def test_gsm_symbolic_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(UserError, match="extra `eval`"):
        load("gsm_symbolic", size=1)
