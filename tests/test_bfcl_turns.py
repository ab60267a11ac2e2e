"""BFCL's multi-turn worlds: official calls pass, corrupted ones fail, both as by its own checker; and episodes share
nothing. Its turns as tasks: what they hold, that the oracle solves them all, and that a run judges them the same."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lite_mentor.engine import Engine
from lite_mentor.errors import UserError
from lite_mentor.evaluate import evaluate
from lite_mentor.judge import is_right
from lite_mentor.prompt import Chat
from lite_mentor.rollout import Limits
from lite_mentor.sandbox import Sandbox
from lite_mentor.tasks import bfcl, bfcl_calls, bfcl_turns, bfcl_world, load_suite
from lite_mentor.teach import oracle
from lite_mentor.tiny import tiny_tokenizer
from lite_mentor.tools import caller, render_call, run_call
from lite_mentor.types import Example, ToolCall
from lite_mentor.types import World as Start

pytestmark = pytest.mark.skipif(importlib.util.find_spec("bfcl_eval") is None, reason="needs bfcl-eval")

CHAT = Chat(tiny_tokenizer())
END = 257
NUMBER = itertools.count()


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=1) as sandbox:
        yield sandbox


def here(path: str, arguments: dict) -> tuple[str, str]:
    """Runs what would run in a worker, once the arguments have been JSON."""
    assert path == "lite_mentor.tasks.bfcl_calls:step"
    return "ok", bfcl_calls.step(**json.loads(json.dumps(arguments)))


def every(suite: str, split: str = "test") -> list[Example]:
    return load_suite(suite, split=split, size=10_000, seed=0)


def of_entry(entry: str, turn: int) -> Example:
    found = (e for name in bfcl_turns.SUITES for e in bfcl_turns._turns(name))
    return next(e for e in found if (e.meta["entry"], e.meta["turn"]) == (entry, turn))


def world_of(entry: str) -> bfcl_calls.World:
    return bfcl_calls.World(bfcl_world.entries(entry.rsplit("_", 1)[0])[entry])


def call(name: str, **arguments) -> dict:
    return {"name": name, "arguments": arguments}


# --- the executor and the checks -------------------------------------------------------------------------------


@pytest.mark.parametrize("category", bfcl_world.CATEGORIES)
def test_all_official_calls_pass(category):
    entries = bfcl_world.entries(category)
    assert len(entries) == 200
    assert [e.id for e in entries.values() if not bfcl_calls.passes(e, e.gold)] == []


def corruptions(entry: bfcl_world.Entry):
    """(kind, turns): each call dropped, each two neighbours of a turn swapped, each argument changed."""
    for i, turn in enumerate(entry.gold):
        for j, one in enumerate(turn):
            before, after = turn[:j], turn[j + 1 :]
            changed = [("dropped", [*before, *after])]
            if after:
                changed.append(("swapped", [*before, after[0], one, *after[1:]]))
            for name, value in one["arguments"].items():
                other = {"name": one["name"], "arguments": one["arguments"] | {name: different(value)}}
                changed.append(("changed", [*before, other, *after]))
            for kind, calls in changed:
                yield kind, [*entry.gold[:i], calls, *entry.gold[i + 1 :]]


def different(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return value + "x" if isinstance(value, str) else [*value, "x"]


def ours(entry: bfcl_world.Entry, turns) -> bool:
    """As a run judges: a call that raises is answered with an error, and has not happened."""
    world, happened = bfcl_calls.World(entry), []
    for calls in turns:
        happened.append([])
        for one in calls:
            try:
                world.call(one)
            except (ValueError, TypeError, LookupError, AttributeError):
                continue
            happened[-1].append(one)
    return bfcl_calls.passes(entry, happened)


def theirs(entry: bfcl_world.Entry, turns) -> bool:
    """The leaderboard's own checker, on fresh instances: it keeps them by the name of the model."""
    checker = importlib.import_module("bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker")
    category = entry.id.rsplit("_", 1)[0]
    row, official = published(category)[entry.id]
    texts = [[[as_python(one) for one in calls]] if calls else [] for calls in turns]
    return checker.multi_turn_checker(texts, official, row, category, f"model{next(NUMBER)}")["valid"]


@functools.cache
def published(category: str) -> dict[str, tuple[dict, list[list[str]]]]:
    official = {row["id"]: row["ground_truth"] for row in bfcl.rows(category, "possible_answer")}
    return {row["id"]: (row, official[row["id"]]) for row in bfcl.rows(category)}


def as_python(one: dict) -> str:
    return f"{one['name']}({', '.join(f'{name}={value!r}' for name, value in one['arguments'].items())})"


@pytest.mark.parametrize("category", bfcl_world.CATEGORIES)
def test_corrupted_calls_fail_where_the_leaderboard_fails_them(category):
    seen = Counter()
    for entry in list(bfcl_world.entries(category).values())[::25]:
        for kind, turns in corruptions(entry):
            right = ours(entry, turns)
            assert right is theirs(entry, turns), (entry.id, kind, turns)
            seen[kind, right] += 1
    assert seen["dropped", True] == 0  # every official call leaves a trace, in the state or in what it returns
    assert min(seen["dropped", False], seen["swapped", False], seen["changed", False]) >= 5
    assert seen["changed", False] > 5 * seen["changed", True]  # such as a file that is looked for and nowhere found


def test_every_dropped_call_of_the_base_category_fails():
    """But for one that repeats an earlier turn's question and has its answer already."""
    passed, dropped = [], 0
    for entry in bfcl_world.entries("multi_turn_base").values():
        for kind, turns in corruptions(entry):
            if kind == "dropped":
                dropped += 1
                if bfcl_calls.passes(entry, turns):
                    passed.append(entry.id)
    assert dropped == 1142
    assert passed == ["multi_turn_base_113"]


def test_the_order_matters_where_the_state_says_so():
    entry = bfcl_world.entries("multi_turn_base")["multi_turn_base_0"]
    cd, mkdir, mv = entry.gold[0]
    assert [c["name"] for c in (cd, mkdir, mv)] == ["cd", "mkdir", "mv"]
    assert bfcl_calls.passes(entry, [[cd, mkdir, mv]])
    assert not bfcl_calls.passes(entry, [[cd, mv, mkdir]])
    assert not bfcl_calls.passes(entry, [[]])
    assert bfcl_calls.passes(entry, [[call("pwd"), cd, call("ls"), mkdir, mv]])  # looking around is allowed
    assert not bfcl_calls.passes(entry, [[cd, mkdir, mv, call("touch", file_name="more")]])


def test_positional_arguments_get_their_names():
    entry = bfcl_world.entries("multi_turn_base")["multi_turn_base_0"]
    assert entry.gold[2] == (call("sort", file_name="final_report.pdf"),)


def test_literal_results():
    world = world_of("multi_turn_base_0")
    assert world.call(call("cd", folder="document")) == '{"current_working_directory": "document"}'
    assert world.call(call("pwd")) == '{"current_working_directory": "/workspace/document"}'
    assert json.loads(world.call(call("ls"))) == {
        "current_directory_content": ["final_report.pdf", "previous_report.pdf"]
    }


# --- nothing is shared -----------------------------------------------------------------------------------------


def test_only_published_functions_are_run():
    world = world_of("multi_turn_base_0")
    for name in ("_load_scenario", "__init__", "root", "get_stock_info", "eval", ""):
        with pytest.raises(ValueError, match="there is no function"):
            world.call(call(name))


def test_results_do_not_depend_on_what_was_played_before():
    entries = [e for c in bfcl_world.CATEGORIES for e in list(bfcl_world.entries(c).values())[::4]]

    def texts(entry):
        world = bfcl_calls.World(entry)
        return [world.call(one) for turn in entry.gold for one in turn]

    forwards = [texts(entry) for entry in entries]
    assert forwards == [texts(entry) for entry in entries[::-1]][::-1]


def test_a_world_keeps_neither_arguments_nor_defaults():
    """A post keeps the list of those it mentions, and `mention` appends to it."""
    login = call("authenticate_twitter", username="analyst_pro", password="Kj8#mP9$vL2")
    named = call("post_tweet", content="a", mentions=["@one"])
    calls = [login, named, call("post_tweet", content="b")]
    mention = [call("mention", tweet_id=number, mentioned_usernames=["@two"]) for number in (3, 4)]
    texts = []
    for _ in range(2):
        world = world_of("multi_turn_base_0")
        texts.append([world.call(one) for one in [*calls, *mention]])
    assert named == call("post_tweet", content="a", mentions=["@one"])
    assert texts[0] == texts[1]
    assert json.loads(texts[0][1])["mentions"] == ["@one"]
    assert json.loads(texts[1][2])["mentions"] == []


def test_long_contexts_are_not_shared():
    """They add cards that lie in a module, and a booking changes a card's balance in place."""
    entry = next(e for e in bfcl_world.entries("multi_turn_long_context").values() if "TravelAPI" in e.classes)
    module = importlib.import_module(bfcl_world.class_of("TravelAPI").__module__)
    card = next(iter(module.CREDIT_CARD_EXTENSION))
    before = dict(module.CREDIT_CARD_EXTENSION[card])
    world = bfcl_calls.World(entry)
    world.instances["TravelAPI"].credit_card_list[card]["balance"] = -1
    assert module.CREDIT_CARD_EXTENSION[card] == before
    assert bfcl_calls.World(entry).instances["TravelAPI"].credit_card_list[card] == before


def test_a_call_that_fails_has_not_happened(sandbox):
    example = of_entry("multi_turn_base_0", 0)
    run = caller(sandbox.call)
    calls: list[ToolCall] = []
    raws = [render_call(s["tool"], s["arguments"]) for s in example.meta["steps"]]
    bad = ['{"name": "cd"', '{"name": "cd", "arguments": {}}', '{"name": "_load_scenario", "arguments": {}}']
    for raw in [bad[0], raws[0], bad[1], raws[1], bad[2], raws[2]]:
        calls.append(run(raw, example, calls))
    assert [c.status for c in calls] == ["bad_json", "ok", "bad_arguments", "ok", "unknown_tool", "ok"]
    assert is_right(example, "done", calls)
    assert not is_right(example, "done", calls[:-1])
    assert not is_right(example, "done", [])


def test_episodes_of_a_group_share_nothing(sandbox):
    """Two episodes take turns on one worker: both make the folder that the other has made already."""
    example = of_entry("multi_turn_base_0", 0)
    run = caller(sandbox.call)
    one, two = [], []
    for step in example.meta["steps"]:
        for episode in (one, two):
            episode.append(run(render_call(step["tool"], step["arguments"]), example, list(episode)))
    assert [c.result for c in one] == [c.result for c in two]
    assert is_right(example, "done", one)
    assert is_right(example, "done", two)


def test_arithmetic_without_end_is_stopped_and_the_episode_goes_on():
    example = next(e for e in bfcl_turns._turns("bfcl_turns") if "power" in {t.name for t in e.tools})
    with Sandbox(workers=1, timeout_s=1.0) as sandbox:
        run = caller(sandbox.call)
        first = run('{"name": "add", "arguments": {"a": 1, "b": 2}}', example, [])  # so that all is imported
        endless = run('{"name": "power", "arguments": {"base": 9, "exponent": 99999999999}}', example, [first])
        after = run('{"name": "add", "arguments": {"a": 1, "b": 2}}', example, [first, endless])
    assert endless.status in ("timeout", "error")
    assert (after.status, after.result) == ("ok", '{"result": 3}')


def test_a_judge_that_raises_stops_the_run():
    example = replace(of_entry("multi_turn_base_0", 0), world=Start({"entry": "multi_turn_base_999", "turn": 0}, "?"))
    broken = replace(example.world, judge="lite_mentor.tasks.bfcl_calls:judge")
    with pytest.raises(RuntimeError, match=rf"judging example {example.key} of bfcl_turns failed: .*999"):
        is_right(replace(example, world=broken), "done", [])


# --- the tasks -------------------------------------------------------------------------------------------------


def test_counts_and_splits():
    train, validation, test = (every("bfcl_turns", split) for split in ("train", "validation", "test"))
    held_out = every("bfcl_turns_ood")
    assert [len(s) for s in (train, validation, test, held_out)] == [256, 39, 32, 395]
    by_api = Counter(e.meta["template"] for e in [*train, *validation, *test, *held_out])
    assert by_api == {"GorillaFileSystem": 158, "VehicleControlAPI": 169, "TradingBot": 198, "TravelAPI": 197}
    entries = [{e.meta["entry"] for e in s} for s in (train, validation, test, held_out)]
    assert [len(s) for s in entries] == [78, 11, 11, 100]
    assert len(set().union(*entries)) == 200
    assert len({e.key for e in [*train, *validation, *test, *held_out]}) == 722
    assert sum(e.meta["level"] for e in [*train, *validation, *test, *held_out]) == 1133
    said = [
        {bfcl_world.entries("multi_turn_base")[e.world.start["entry"]].asked[0] for e in s}
        for s in (train, validation, test, held_out)
    ]
    assert sum(map(len, said)) == len(set().union(*said))  # no conversation begins like one of another split


def test_turns_in_which_any_call_would_be_right_are_left_out():
    tasks = {(e.meta["entry"], e.meta["turn"]): e for name in bfcl_turns.SUITES for e in bfcl_turns._turns(name)}
    repeated = bfcl_world.entries("multi_turn_base")["multi_turn_base_33"].gold
    assert bfcl_calls.passes(
        bfcl_world.entries("multi_turn_base")["multi_turn_base_33"], [*repeated[:2], [call("pwd")]]
    )
    assert ("multi_turn_base_33", 1) in tasks
    assert ("multi_turn_base_33", 2) not in tasks
    assert ("multi_turn_base_180", 3) not in tasks  # nothing is called there
    files = [e for e in tasks.values() if e.meta["template"] == "GorillaFileSystem"]
    assert not any(bfcl_calls.judge(e.world.start, [call("pwd")]) for e in files)


def test_a_task_tells_what_went_before():
    example = of_entry("multi_turn_base_0", 2)
    assert example.question.split("\n") == [
        "User: Move 'final_report.pdf' within document directory to 'temp' directory in document. Make sure to create "
        "the directory",
        '{"name": "cd", "arguments": {"folder": "document"}} -> {"current_working_directory": "document"}',
        '{"name": "mkdir", "arguments": {"dir_name": "temp"}} -> None',
        '{"name": "mv", "arguments": {"source": "final_report.pdf", "destination": "temp"}} -> '
        "{\"result\": \"'final_report.pdf' moved to 'temp/final_report.pdf'\"}",
        "User: Perform a detailed search using grep to identify sections in the file pertaining to 'budget analysis'.",
        '{"name": "cd", "arguments": {"folder": "temp"}} -> {"current_working_directory": "temp"}',
        '{"name": "grep", "arguments": {"file_name": "final_report.pdf", "pattern": "budget analysis"}} -> '
        '{"matching_lines": ["Year2024 This is the final report content including budget analysis and other '
        'sections."]}',
        "User: Upon identifying the requisite 'budget analysis' content, sort the 'final_report.pdf' by line for "
        "improved clarity and comprehension.",
        "When all of this is done, answer \\boxed{done}.",
    ]
    assert (example.meta["level"], example.meta["template"], example.checker) == (1, "GorillaFileSystem", "state")
    assert example.world.start == {"entry": "multi_turn_base_0", "turn": 2}
    assert len(example.tools) == 18 + 14
    cd = next(tool for tool in example.tools if tool.name == "cd")
    assert cd.description == "Change the current working directory to the specified folder."
    assert cd.parameters["required"] == ["folder"]


def test_levels_and_sizes():
    ones = load_suite("bfcl_turns", split="train", size=999, seed=0, levels=(1, 99))
    assert len(ones) == 128
    assert {e.meta["level"] for e in ones} == {1}
    ten = load_suite("bfcl_turns", split="train", size=10, seed=0)
    assert [e.key for e in ten] == [e.key for e in every("bfcl_turns", "train")[:10]]
    assert [e.key for e in ten] != [e.key for e in load_suite("bfcl_turns", split="train", size=10, seed=1)]


@pytest.mark.parametrize(
    ("name", "split", "levels", "sentence"),
    [
        ("bfcl_turns_ood", "train", None, "bfcl_turns_ood is held out and has only the split test, not train"),
        ("bfcl_turns", "dev", None, "There is no split 'dev' of bfcl_turns"),
        ("bfcl_turns", "train", (8, 9), r"Suite bfcl_turns has none of the levels \(8, 9\); it has 1, 2, 3"),
        ("bfcl_turns_in", "test", None, "There is no task suite 'bfcl_turns_in'"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(name, split, levels, sentence):
    with pytest.raises(UserError, match=sentence):
        load_suite(name, split=split, size=1, seed=0, levels=levels)


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for cached in (bfcl_turns._turns, bfcl_world.entries):
        monkeypatch.setattr(
            bfcl_turns if cached is bfcl_turns._turns else bfcl_world, cached.__name__, cached.__wrapped__
        )
    with pytest.raises(UserError, match=r"pip install --no-deps bfcl-eval==2026\.3\.23"):
        load_suite("bfcl_turns", split="train", size=1, seed=0)


def test_every_official_call_is_as_its_function_is_published():
    for example in [e for name in bfcl_turns.SUITES for e in bfcl_turns._turns(name)]:
        for step in example.meta["steps"]:
            raw = render_call(step["tool"], step["arguments"])
            assert run_call(raw, example.tools, run_path=lambda path, arguments: ("ok", "")).status == "ok", raw


def test_the_oracle_solves_the_tasks():
    for example in [e for name in bfcl_turns.SUITES for e in bfcl_turns._turns(name)[::12]]:
        record = oracle(example, caller(here))
        assert record.correct, example.meta
        assert [(c.name, c.status) for c in record.calls] == [(s["tool"], "ok") for s in example.meta["steps"]]
        assert record.messages[-1] == {"role": "assistant", "content": "\\boxed{done}"}


def test_the_turn_that_is_left_out_contradicts_its_function():
    (entry, turn), _ = *bfcl_turns.LEFT_OUT, None
    (official,) = bfcl_world.entries("multi_turn_base")[entry].gold[turn]
    assert official == call("close_ticket", ticket_id="ticket_001")
    tools = of_entry(entry, 0).tools
    schema = next(tool for tool in tools if tool.name == "close_ticket").parameters
    assert schema["properties"]["ticket_id"]["type"] == "integer"


# --- a run -----------------------------------------------------------------------------------------------------


def evaluated(example: Example, sandbox: Sandbox, calls, *, closing: str = "\\boxed{done}", cut: bool = False) -> int:
    """Is a student right who makes exactly these calls, one a turn, through our engine and `evaluate`?"""
    run, done = caller(sandbox.call), []
    script = prompt = CHAT.prompt_ids(example)
    for one in calls:
        raw = render_call(one["name"], one["arguments"])
        done.append(run(raw, example, done))
        script = [*script, *CHAT.turn_ids(f"<tool_call>{raw}</tool_call>"), *CHAT.result_ids([done[-1].result])]
    script = [*script, *CHAT.turn_ids(closing)]
    length = len(script) - len(prompt) - int(cut)
    script += [ord("~")] * 400

    def forward(ids_1T, positions_1T, plan):
        return F.one_hot(torch.tensor([script[p + 1] for p in positions_1T[0].tolist()]), 512).float()

    engine = Engine(
        forward, lambda h: h * 100, layers=1, kv_heads=1, head_dim=1, eos_ids=[END], slots=1, context=len(script)
    )
    result, _ = evaluate(
        engine, CHAT, [example], limits=Limits(max_turns=9, max_new_tokens=length, max_prompt_tokens=len(prompt)),
        run_call=run,
    )  # fmt: skip
    return result["correct"][0]


def test_a_run_counts_the_same(sandbox):
    example = of_entry("multi_turn_base_0", 0)
    official = [call(s["tool"], **s["arguments"]) for s in example.meta["steps"]]
    assert evaluated(example, sandbox, official) == 1
    assert evaluated(example, sandbox, official, closing="All done.") == 1
    assert evaluated(example, sandbox, official, cut=True) == 0  # it never said that it was done
    assert evaluated(example, sandbox, official[:2]) == 0
    assert evaluated(example, sandbox, [official[0], official[2], official[1]]) == 0
    assert evaluated(example, sandbox, []) == 0
