"""Filling the teacher's cache from a scripted server: what is kept, what is sent back, and when it is no use."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lite_mentor import endpoint, teach_options, teacher, transcript
from lite_mentor.endpoint import FEW, MANY, MAX_CALLS, BrokenOff, Endpoint
from lite_mentor.errors import UserError
from lite_mentor.prompt import Chat, parse_turn
from lite_mentor.sft import teacher_rollout
from lite_mentor.tasks import make_example
from lite_mentor.teach import Options, main
from lite_mentor.teacher import open_cache
from lite_mentor.template import ASK_FOR_BOX, json_schema
from lite_mentor.tiny import tiny_tokenizer
from lite_mentor.tools import calculator_tools, caller, run_call
from lite_mentor.transcript import record_of
from tests.pumping import is_slow

ROOT = Path(__file__).parent.parent
TOOLS = [tool for tool in calculator_tools() if tool.name in ("add", "multiply")]


class Server:
    """Answers POSTs from a script of (status, body), one script for each question; remembers what it was asked."""

    def __init__(self, scripts: dict[str, list]):
        self.asked: list[dict] = []
        self.keys: list[str | None] = []
        self.ended = threading.Event()
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.asked.append({"path": self.path, **body})
                    outer.keys.append(self.headers["Authorization"])
                    status, reply = scripts[body["messages"][0]["content"].split("\n")[0]].pop(0)
                if reply is NEVER:
                    outer.ended.wait()
                    return
                text = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                html = isinstance(reply, bytes) and reply.startswith(b"<")
                self.send_header("Content-Type", "text/html" if html else "application/json")
                self.send_header("Retry-After-Ms", "50000" if reply is LATER else "1")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


def reply(content, *calls, finish="stop", **beside):
    message = {"role": "assistant", "content": content, **beside}
    if calls:
        message["tool_calls"] = [
            {"id": f"id{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for i, (name, arguments) in enumerate(calls)
        ]
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return 200, {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


REFUSED = {"error": {"message": "too long", "type": "invalid_request_error"}}
NO_CHAT = "answers, but not as a chat-completions server"
LATER, NEVER = {"error": "later"}, {"error": "never"}
BUSY = (429, {"error": {"message": "slow down"}})


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """Fill a cache from scripted conversations -> (exit status, cache folder, server)."""
    servers = []
    for proxy in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
        monkeypatch.delenv(proxy.upper(), raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")

    def fill(scripts, *flags, answer="7", tools=("add", "multiply")):
        server = Server({question: list(script) for question, script in scripts.items()})
        servers.append(server)
        rows = [{"question": question, "answer": answer, "tools": list(tools)} for question in scripts]
        tasks = tmp_path / "tasks.jsonl"
        tasks.write_text("".join(json.dumps(row) + "\n" for row in rows))
        out = tmp_path / "cache"
        words = ["--suite", str(tasks), "--source", "endpoint", "--base-url", server.url, "--model", "m"]
        return main([*words, "--out", str(out), *flags]), out, server

    yield fill
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def only_record(out):
    (line,) = (out / "records.jsonl").read_bytes().splitlines()
    return json.loads(line)


def test_a_conversation_with_a_busy_server(ask):
    status, out, server = ask(
        {
            "Q": [
                BUSY,
                reply("First.", ("multiply", '{"a":2,"b":3}')),
                BUSY,
                reply(None, ("add", '{"a": 6, "b": 1}'), ("add", '{"a": "x"}')),
                reply("It is \\boxed{7}."),
            ]
        },
        "--temperature", "0.25", "--max-new-tokens", "99",
    )  # fmt: skip
    assert status == 0
    (record,) = open_cache(out).values()
    add = '<tool_call>{"name": "add", "arguments": {"a": 6, "b": 1}}</tool_call>'
    bad = '<tool_call>{"name": "add", "arguments": {"a": "x"}}</tool_call>'
    problem = record.calls[2].result
    assert [tuple(m.values()) for m in map(dict, record.messages)] == [
        ("First.\n<tool_call>{\"name\": \"multiply\", \"arguments\": {\"a\": 2, \"b\": 3}}</tool_call>", "assistant"),
        ("6", "tool"),
        (f"{add}\n{bad}", "assistant"),
        ("7", "tool"),
        (problem, "tool"),
        ("It is \\boxed{7}.", "assistant"),
    ]  # fmt: skip
    assert problem.startswith("Error: ")
    assert [(c.name, c.status, c.result) for c in record.calls[:2]] == [("multiply", "ok", "6"), ("add", "ok", "7")]
    assert record.calls[2].status == "bad_arguments"
    assert (record.teacher, record.answer) == ("endpoint:m", "7")
    manifest = open_cache(out).manifest
    assert manifest.decoding == {"temperature": 0.25, "max_turns": 8, "max_new_tokens": 99}
    assert "secret" not in (out / "manifest.json").read_text()

    assert len(server.asked) == 5
    assert set(server.keys) == {"Bearer secret"}
    first, last = server.asked[0], server.asked[-1]
    assert (first["path"], first["model"], first["temperature"], first["max_tokens"]) == (
        "/v1/chat/completions", "m", 0.25, 99,
    )  # fmt: skip
    assert first["tools"] == [json_schema(tool) for tool in sorted(TOOLS, key=lambda tool: tool.name)]
    assert first["messages"] == [{"role": "user", "content": "Q" + ASK_FOR_BOX}]
    assert last["messages"][1] == {
        "role": "assistant",
        "content": "First.",
        "tool_calls": [
            {"id": "id0", "type": "function", "function": {"name": "multiply", "arguments": '{"a": 2, "b": 3}'}}
        ],
    }
    assert last["messages"][2] == {"role": "tool", "tool_call_id": "id0", "content": "6"}
    assert [m["content"] for m in last["messages"][4:]] == ["7", problem]


@pytest.mark.parametrize(
    ("script", "answer"),
    [
        ([reply("It is \\boxed{8}.")], "8"),
        ([reply("It is 7.")], ""),
        ([reply("")], ""),
        ([reply("\\boxed{7} or", finish="length")], ""),
        ([reply("\\boxed{7}", ("add", '{"a": 1, "b": 1}'))] * 2, ""),
        ([reply("", ("add", "not json")), reply("\\boxed{}")], ""),
    ],
    ids=["wrong", "no box", "nothing", "cut off", "too many turns", "empty box"],
)
def test_what_is_not_a_right_answer_is_rejected(ask, script, answer):
    status, out, _ = ask({"Q": script}, "--max-turns", "2")
    assert status == 0
    record = only_record(out)
    assert (record["correct"], record["answer"]) == (False, answer)
    cache = open_cache(out)
    assert (len(cache), cache.rejected) == (0, 1)


def test_one_question_that_the_server_refuses_does_not_hold_up_the_others(ask):
    """A content filter, or a question that is too long: a wrong record, once the server has answered anything."""
    status, out, _ = ask({"Q": [reply("\\boxed{7}")], "R": [(400, REFUSED)]}, "--concurrency", "1")
    assert status == 0
    cache = open_cache(out)
    assert (len(cache), cache.rejected) == (1, 1)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((401, {"error": {"message": "bad key"}}), "failed (AuthenticationError: Error code: 401 - bad key)"),
        ((404, b"<html>not here</html>"), "failed (NotFoundError: "),
        ((200, {"choices": []}), "failed in all 2 tries: InternalServerError: Error code: 502 - {'choices': []}"),
        ((200, {"choices": None}), "failed in all 2 tries: InternalServerError: "),
        (
            (200, {"error": {"message": "overloaded"}}),
            "failed in all 2 tries: InternalServerError: Error code: 502 - overloaded",
        ),
        ((200, {"choices": [{"error": {"message": "x"}}]}), "failed in all 2 tries: InternalServerError: "),
        ((400, REFUSED), "broke off 1 of 1 conversations"),
        ((200, b"<html>welcome</html>"), NO_CHAT),
        ((200, b'{"choices": ['), NO_CHAT),
        ((200, b"\xff"), NO_CHAT),
        ((200, b"[" * 100_000), NO_CHAT),
        ((200, []), NO_CHAT),
        ((200, {}), NO_CHAT),
        ((200, {"choices": [[]]}), NO_CHAT),
        ((200, {"choices": [{"message": []}]}), NO_CHAT),
        ((200, {"choices": [{"message": {"content": {"a": 1}}}]}), NO_CHAT),
        ((200, {"choices": [{"message": {"content": [{"type": "text"}]}}]}), NO_CHAT),
        ((200, {"choices": [{"message": {"tool_calls": [{"id": "x"}]}}]}), NO_CHAT),
        ((200, {"choices": [{"message": {"tool_calls": [{"function": {"name": 1}}]}}]}), NO_CHAT),
    ],
)
def test_a_server_that_cannot_be_used(ask, capsys, monkeypatch, answer, words):
    monkeypatch.setattr(endpoint, "RETRIES", 1)
    status, out, server = ask({"Q": [answer] * 2})
    assert status == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: The endpoint {server.url} ")
    assert words in error
    assert (out / "records.jsonl").read_bytes() == b""


# --- many forms of one answer ----------------------------------------------------------------------------------


def add(arguments, **change):
    return {"id": "x", "type": "function", "function": {"name": "add", "arguments": arguments}} | change


@pytest.mark.parametrize(
    "message",
    [
        {"tool_calls": [add({"a": 3, "b": 4})]},
        {"tool_calls": [add(json.dumps('{"a": 3, "b": 4}'))]},
        {"tool_calls": [add('{"a": 3, "b": 4}', id=None)]},
        {"tool_calls": [{"function": {"name": "add", "arguments": '{"a": 3, "b": 4}'}}]},
        {"content": '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 4}}\n</tool_call>'},
        {"content": '<tool_call>{"name": "add", "parameters": "{\\"a\\": 3, \\"b\\": 4}"}'},
        {"content": '{"name": "add", "parameters": {"a": 3, "b": 4}}'},
        {"content": '```json\n{"name": "add", "arguments": {"a": 3, "b": 4}}\n```'},
        {"content": '[{"type": "function", "name": "add", "arguments": {"a": 3, "b": 4}}]'},
        {
            "content": '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 4}}',
            "tool_calls": [add('{"a":3,"b":4}')],
        },
        {"content": "\n\n", "tool_calls": [add('{"a":3,"b":4}')]},
        {"content": "<tool_call>", "tool_calls": [add('{"a":3,"b":4}')]},
        {"content": [{"type": "thinking", "thinking": "hm"}], "tool_calls": [add('{"a":3,"b":4}')]},
    ],
    ids=lambda message: json.dumps(message)[:60],
)
def test_a_call_in_any_form_is_one_call_and_goes_back_as_one(ask, message):
    end = reply([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "\\boxed{7}"}])
    status, out, server = ask({"Q": [reply(**{"content": None} | message), end]})
    assert status == 0
    (record,) = open_cache(out).values()
    raw = '{"name": "add", "arguments": {"a": 3, "b": 4}}'
    assert [m["content"] for m in record.messages] == [f"<tool_call>{raw}</tool_call>", "7", "\\boxed{7}"]
    assert [(call.raw, call.status) for call in record.calls] == [(raw, "ok")]
    _, said, result = server.asked[1]["messages"]
    (sent,) = said["tool_calls"]
    assert said["content"] is None  # an empty text is refused by some
    assert sent["function"] == {"name": "add", "arguments": '{"a": 3, "b": 4}'}
    assert sent["id"] == result["tool_call_id"] in ("x", "call00000")


@pytest.mark.parametrize("arguments", ["{}", "", " ", None, {}, "null", '""'])
def test_a_call_without_arguments(ask, tmp_path, monkeypatch, arguments):
    (tmp_path / "my_clock.py").write_text('def lunch() -> str:\n    """When lunch is."""\n    return "noon"\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    script = [reply("", ("lunch", arguments)), reply("\\boxed{noon}")]
    status, out, server = ask({"Q": script}, "--sandbox", "off", answer="noon", tools=["my_clock:lunch"])
    assert (status, len(open_cache(out))) == (0, 1)
    assert server.asked[1]["messages"][1]["tool_calls"][0]["function"]["arguments"] == "{}"


def test_what_the_server_left_in_the_text_is_run_too_and_said(ask, capsys):
    """One call was read by the server, another stands in the text: the student that says both makes both."""
    text = 'First.\n<tool_call>{"name": "add", "arguments": {"a": 1, "b": 1}}</tool_call>'
    status, out, server = ask({"Q": [reply(text, ("add", '{"a": 3, "b": 4}')), reply("\\boxed{7}")]})
    assert status == 0
    (record,) = open_cache(out).values()
    assert [call.result for call in record.calls] == ["7", "2"]
    assert record.messages[0]["content"].startswith("First.\n<tool_call>")
    assert list(parse_turn(record.messages[0]["content"]).calls) == [call.raw for call in record.calls]
    assert server.asked[1]["messages"][1]["content"] == "First."
    assert [c["id"] for c in server.asked[1]["messages"][1]["tool_calls"]] == ["id0", "call00001"]
    assert "turns with calls that the server left in the text, which were run: 1\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "script",
    [
        [reply('<tool_call>{"name": "add", "arguments": {"a": 3, </tool_call>\\boxed{7}')],
        [reply('{"name": "add", "parameters": {"a": 3, "b": 4}}\n\\boxed{7}')],
        [reply('I call {"parameters": {"a": 3, "b": 4}, "name": "add"}: \\boxed{7}')],
        [reply("<think>I should", ("add", '{"a": 3, "b": 4}')), reply("\\boxed{7}")],
        [reply("", ("add", '{"a": 3, "b": 4'), finish="length"), reply("\\boxed{7}")],
        [reply("", ("add", '{"a": 3, "b": 4}'), finish="length"), reply("\\boxed{7}")],
        [reply("<think>perhaps \\boxed{7}")],
    ],
    ids=["broken in tags", "bare, and a box", "bare, after words", "in a thought", "cut off", "cut after", "thought"],
)
def test_a_student_could_not_do_the_same_by_the_same_words(ask, script):
    status, out, _ = ask({"Q": script})
    assert status == 0
    assert only_record(out)["correct"] is False


def test_why_a_right_answer_is_no_correct_record(ask, capsys):
    ask({"Q": [reply('{"name": "add", "parameters": {"a": 3, "b": 4}}\n\\boxed{7}')]})
    error = capsys.readouterr().err
    assert "records that are marked as wrong, for its last words hold a call that was not run: 1\n" in error


@pytest.mark.parametrize(
    "broken", ['{"a": 7, "b": ', "not json", "[1]", '{"a": NaN}', '{"a": 1e999}', '{"a": "\\ud800"}']
)
def test_broken_arguments_are_answered_and_never_sent_back(ask, broken):
    right = reply("", ("add", '{"a": 3, "b": 4}'))
    status, out, server = ask({"Q": [reply("", ("add", broken)), right, reply("\\boxed{7}")]})
    assert status == 0
    (record,) = open_cache(out).values()
    assert [call.status for call in record.calls] == ["bad_json", "ok"]
    _, said, result = server.asked[1]["messages"]
    assert said["tool_calls"][0]["function"] == {"name": "add", "arguments": "{}"}
    assert result["content"].startswith("Error: bad call, ")


def test_thoughts_that_stand_beside_the_answer_go_back(ask):
    beside = {"reasoning_content": "hm \ud800", "reasoning": "ah", "refusal": None}
    script = [reply(None, ("add", '{"a": 3, "b": 4}'), **beside), reply("\\boxed{7}", reasoning_content="so")]
    status, out, server = ask({"Q": script})
    assert (status, len(open_cache(out))) == (0, 1)
    said = server.asked[1]["messages"][1]
    assert (said["reasoning_content"], said["reasoning"]) == ("hm ?", "ah")
    assert "refusal" not in said
    assert "hm" not in (out / "records.jsonl").read_text()


def test_a_failure_under_status_200_is_tried_again(ask):
    spoilt = [{"error": {"message": "x", "code": 524}, "choices": None}, {"choices": []}, {"choices": [{"error": "x"}]}]
    status, out, server = ask({"Q": [*((200, body) for body in spoilt), reply("\\boxed{7}")]})
    assert (status, len(open_cache(out)), len(server.asked)) == (0, 1, 4)


def test_a_turn_of_very_many_calls_ends_the_conversation(ask, capsys):
    many = reply("", *[("add", '{"a": 3, "b": 4}')] * (MAX_CALLS + 1))
    status, out, server = ask({"Q": [many], "P": [CALLS, SEVEN]})
    assert (status, len(server.asked)) == (0, 3)
    assert f"conversations that ended at a turn with more than {MAX_CALLS} calls: 1" in capsys.readouterr().err
    assert (len(open_cache(out)), open_cache(out).rejected) == (1, 1)


def test_very_many_calls_are_not_compared_each_with_each():
    left = "".join(f'<tool_call>{{"name": "add", "arguments": {{"a": {i}}}}}</tool_call>' for i in range(10_000))
    read = [("", transcript.request("add", {"a": -i})) for i in range(1, 10_000)]
    asks = endpoint.Reply(left, read, {}, True)
    assert not is_slow(lambda: Endpoint._calls_of(SimpleNamespace(_note=print), asks, EXAMPLE), seconds=2.0)


# --- whose fault it is -----------------------------------------------------------------------------------------

CALLS, SEVEN, TOO_LONG = reply("", ("add", '{"a": 3, "b": 4}')), reply("\\boxed{7}"), (400, REFUSED)


def test_a_server_that_refuses_every_second_turn_leaves_no_record_and_is_asked_again(ask, capsys):
    questions = [f"Q{i}" for i in range(30)]
    status, out, server = ask({q: [CALLS, TOO_LONG] for q in questions}, "--concurrency", "1")
    assert status == 2
    assert f"broke off {FEW} of {FEW} conversations; the last: example" in capsys.readouterr().err
    assert len(server.asked) < 2 * len(questions)
    assert (out / "records.jsonl").read_bytes() == b""
    status, out, _ = ask({q: [CALLS, SEVEN] for q in questions})
    assert (status, len(open_cache(out))) == (0, len(questions))


def test_a_conversation_that_outgrows_the_context_is_the_teachers_when_others_do_not(ask):
    scripts = {f"Q{i}": [CALLS, TOO_LONG if i % 3 == 0 else SEVEN] for i in range(9)}
    status, out, _ = ask(scripts)
    assert status == 0
    cache = open_cache(out)
    assert (len(cache), cache.rejected) == (6, 3)


def test_a_refusal_before_a_failure_is_no_record(ask):
    """Nothing went well before the key ran out, so it may have been the server that was wrong."""
    denied = (401, {"error": {"message": "no credit"}})
    status, out, _ = ask({"P": [CALLS, TOO_LONG], "Q": [denied], "R": []}, "--concurrency", "1")
    assert status == 2
    assert (out / "records.jsonl").read_bytes() == b""


def test_refusals_come_sooner_than_answers(ask):
    """What is under way may still end well, so a filter's quick refusals do not outvote slow teachers."""
    held = endpoint._Held("url", proven=False)
    refused = BrokenOff("x", record_of(EXAMPLE, "m", [{"role": "assistant", "content": ""}], [], None))
    for _ in range(FEW + 2):
        assert held.take(refused) == []
        assert held.fault(under_way=8) is None
    assert held.fault(under_way=FEW + 1).args[0].startswith("The endpoint url broke off 7 of 7")


FAILURES = [
    (200, b"{"),
    (500, {"error": {"message": "cannot parse the call"}}),
    (403, {"error": {"message": "flagged"}}),
]


@pytest.mark.parametrize("failure", FAILURES)
def test_what_fails_each_time_costs_one_example(ask, capsys, monkeypatch, failure):
    monkeypatch.setattr(endpoint, "RETRIES", 1)
    scripts = {"P": [CALLS, SEVEN], "Q": [CALLS, failure, failure], "R": [CALLS, SEVEN]}
    status, out, _ = ask(scripts, "--concurrency", "1")
    assert status == 0
    cache = open_cache(out)
    assert (len(cache), cache.rejected) == (2, 1)
    assert "ends early, the server " in capsys.readouterr().err


def test_what_is_no_answer_is_asked_for_once_more(ask):
    status, out, server = ask({"Q": [CALLS, (200, b"{"), SEVEN]})
    assert (status, len(open_cache(out)), len(server.asked)) == (0, 1, 3)


def test_a_server_that_begins_to_fail_ends_the_fill(ask, capsys, monkeypatch):
    """However much it answered before: what it fails at would else be wrong for good."""
    monkeypatch.setattr(endpoint, "RETRIES", 0)
    scripts = {f"P{i}": [CALLS, SEVEN] for i in range(9)} | {f"Q{i}": [(503, {})] for i in range(9)}
    status, out, server = ask(scripts, "--concurrency", "1")
    assert status == 2
    assert "broke off 3 of 12 conversations" in capsys.readouterr().err
    cache = open_cache(out)
    assert (len(cache), cache.rejected, len(server.asked)) == (9, 0, 22)  # one was under way


@pytest.mark.parametrize("failure", FAILURES)
def test_a_server_that_is_down_leaves_no_record_of_a_row_that_was_added(ask, capsys, monkeypatch, failure):
    monkeypatch.setattr(endpoint, "RETRIES", 0)
    ask({"P": [CALLS, SEVEN]})
    status, out, _ = ask({"P": [], "Q": [failure, failure]})
    assert (status, open_cache(out).rejected) == (2, 0)
    assert "1 examples have no record, for the endpoint http" in capsys.readouterr().err
    status, out, _ = ask({"P": [], "Q": [CALLS, SEVEN]})
    assert (status, len(open_cache(out))) == (0, 2)


def test_a_cache_speaks_for_its_server(ask, capsys):
    """One row more that it refuses, or some that need no tool, are no sign of a server that cannot be used."""
    ask({"P": [CALLS, SEVEN]})
    more = {"P": [], "Q": [(400, REFUSED)], **{f"R{i}": [SEVEN] for i in range(MANY + 9)}}
    status, out, _ = ask(more, "--concurrency", "1")
    cache = open_cache(out)
    assert (status, len(cache), cache.rejected) == (0, MANY + 10, 1)
    status, out, _ = ask({question: [] for question in more} | {"S": [(400, REFUSED)]})
    assert (status, open_cache(out).rejected) == (0, 2)


def test_a_call_without_a_name_is_the_teachers_mistake(ask):
    status, out, _ = ask({"P": [CALLS, SEVEN], "Q": [reply("", ("", "{}"))]})
    cache = open_cache(out)
    assert (status, len(cache), cache.rejected) == (0, 1, 1)


def test_a_server_without_tools_leaves_no_record(ask, capsys):
    status, out, server = ask({f"Q{i}": [SEVEN] for i in range(90)}, "--concurrency", "2")
    assert status == 2
    assert f"answered {MANY + 2} conversations, and no tool was called in them" in capsys.readouterr().err
    assert MANY + 2 <= len(server.asked) < 90
    assert (out / "records.jsonl").read_bytes() == b""


def test_questions_that_need_no_tool_are_kept_where_others_do(ask, capsys):
    scripts = {f"Q{i}": [CALLS, SEVEN] if i == MANY - 2 else [SEVEN] for i in range(MANY + 9)}
    status, out, _ = ask(scripts, "--concurrency", "1")
    assert (status, len(open_cache(out))) == (0, MANY + 9)
    assert capsys.readouterr().err == ""


def test_a_few_answers_without_calls_are_kept_and_said(ask, capsys):
    status, out, _ = ask({"P": [SEVEN], "Q": [SEVEN]})
    assert (status, len(open_cache(out))) == (0, 2)
    assert capsys.readouterr().err == "none of the 2 correct records calls a tool: a student learns to call none\n"


@pytest.mark.usefixtures("hears_interrupts")
def test_an_interrupt_waits_for_no_answer(ask, capsys, monkeypatch):
    """The second question's answer never comes: what was answered is kept, and nobody waits."""
    kept, never = threading.Event(), threading.Event()

    def append(self, record):
        write(self, record)
        kept.set()

    def interrupt(self, asked, example):
        if example.question == "Q":
            kept.wait()
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            never.wait()
            raise AssertionError("long after")
        return turn(self, asked, example)

    turn, write = Endpoint._reply, teacher.CacheWriter.append
    monkeypatch.setattr(teacher.CacheWriter, "append", append)
    monkeypatch.setattr(Endpoint, "_reply", interrupt)
    status, out, _ = ask({"P": [CALLS, SEVEN], "Q": []}, "--concurrency", "1")
    assert status == 130
    assert capsys.readouterr().err.startswith("stopped; finished records are kept")
    assert len(open_cache(out)) == 1
    never.set()


def test_ctrl_c_ends_the_process_whatever_its_threads_wait_for(tmp_path):
    """One for an answer, and one for the time to try again; a third question was answered before."""
    scripts = {"P": [CALLS, SEVEN], "Q": [(200, NEVER)], "R": [(503, LATER)]}
    server = Server(scripts)
    tasks, out = tmp_path / "tasks.jsonl", tmp_path / "cache"
    rows = [{"question": question, "answer": "7", "tools": ["add"]} for question in scripts]
    tasks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--suite", str(tasks), "--source", "endpoint", "--base-url", server.url, "--model", "m", "--out", str(out)]
    words += ["--concurrency", "3", "--sandbox", "off"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lite_mentor.teach", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while len(server.asked) < 4 or not (out / "records.jsonl").read_bytes():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=30)  # far less than any of the waits
    finally:
        process.kill()
        server.ended.set()
        server.http.shutdown()
        server.http.server_close()
    assert (process.returncode, said[1].splitlines()[-1][:35]) == (130, "stopped; finished records are kept:")
    assert len(open_cache(out)) == 1


# --- what a server is not to do ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://me:PASSWORD@host/v1", "http://PASSWORD@host", "https://host/v1?api_key=PASSWORD", "host/PASSWORD",
        "http://host/v1?PASSWORD", "http://host/v1#PASSWORD", "http://host/v1/?", "http://a@b:PASSWORD@host/v1",
        "http:me:PASSWORD@host/v1", "//me:PASSWORD@host/v1", "http://host\\PASSWORD@x/v1", "http://host/v1 PASSWORD",
        "http://me:PASS/PASSWORD@host/v1", "ftp://host/PASSWORD", "http:///PASSWORD", "http://host\nPASSWORD",
    ],
)  # fmt: skip
def test_an_address_holds_no_secret(tmp_path, capsys, url):
    with pytest.raises(UserError, match="must be an address alone"):
        teach_options.check(Options(Path("x"), base_url=url))
    command = [
        "--suite",
        "tiny",
        "--source",
        "endpoint",
        "--model",
        "m",
        "--base-url",
        url,
        "--out",
        str(tmp_path / "c"),
    ]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --base-url must be an address alone")
    assert "OPENAI_API_KEY" in said
    assert "PASS" not in said
    assert not (tmp_path / "c").exists()
    kept = teach_options.command(Options(Path("x"), source="endpoint", base_url=url, model="m"))
    assert not any(word.startswith("http") and ("@" in word or "?" in word or "#" in word) for word in kept)


@pytest.mark.parametrize(
    "url", ["http://localhost:8000/v1", "https://a-b_c.example.com/v1/", "http://[::1]:80/v1", "http://10.0.0.1", ""]
)
def test_an_address_is_taken(url):
    teach_options.check(Options(Path("x"), base_url=url))


@pytest.mark.parametrize("key", ["secret\n", "two words", "s\xe9cret", "\x1b[2J"])
def test_a_key_that_cannot_be_one(ask, monkeypatch, capsys, key):
    monkeypatch.setattr(endpoint, "RETRIES", 0)
    monkeypatch.setenv("OPENAI_API_KEY", key)
    status, _, server = ask({"Q": []})
    assert (status, server.asked) == (2, [])
    said = capsys.readouterr().err
    assert said.startswith("error: OPENAI_API_KEY holds a space")
    assert key not in said


@pytest.mark.parametrize("status", [400, 401, 500])
def test_a_server_that_repeats_the_key_and_paints_the_screen(ask, monkeypatch, capsys, status):
    """Also where only a part of what it says is quoted."""
    monkeypatch.setattr(endpoint, "RETRIES", 0)
    key = "sk-" + "x" * 60
    monkeypatch.setenv("OPENAI_API_KEY", key)
    words = [f"\x1b[2J\u202eBearer {key}", f"{key} " * 30]
    bodies = [body for text in words for body in ({"error": {"message": text}}, {"detail": text}, text.encode())]
    assert ask({f"Q{i}": [(status, body)] for i, body in enumerate(bodies)}, "--concurrency", "1")[0] == 2
    said = capsys.readouterr()
    assert "OPENAI_API_KEY" in said.err
    assert "sk-" not in said.err + said.out
    assert "xxx" not in said.err + said.out
    assert (said.err + said.out).replace("\n", "").isprintable()


# --- any reply at all ------------------------------------------------------------------------------------------

good = '{"a": 3, "b": 4}'
values = st.sampled_from(
    [good, json.dumps(good), "", "null", "{", "[1]", '{"a": "</tool_call>", "b": 1}', '{"a": NaN}']
)
arguments = values | st.sampled_from([None, [], 1, {"a": 3, "b": 4}, {"a": "<think>", "b": "<tool_call>"}])
names = st.sampled_from(["add", "add", "add", "multiply", "none", "<tool_call>", "</think>", "\ud800"])
marks = ["<think>", "</think>", "<tool_call>", "</tool_call>", "```json", "```", "\\boxed{7}", "So ", "\n", "\udfff"]
keys = st.sampled_from(["arguments", "parameters"])
texts = st.builds(lambda name, key, value: f'{{"name": {json.dumps(name)}, "{key}": {value}}}', names, keys, values)
pieces = st.sampled_from(marks) | texts | texts.map(lambda text: f"<tool_call>{text}</tool_call>")
contents = st.lists(pieces, max_size=6).map("".join)
calls = st.builds(
    lambda name, value, rest: {"function": {"name": name, "arguments": value}, **rest},
    names, arguments, st.sampled_from([{}, {"id": None}, {"id": ""}, {"id": "x"}]),
)  # fmt: skip
messages = st.fixed_dictionaries(
    {"content": st.none() | contents | contents.map(lambda text: [{"type": "text", "text": text}])},
    optional={"tool_calls": st.none() | st.lists(calls, max_size=2), "reasoning_content": contents},
)
finishes = st.sampled_from(["stop", "tool_calls", "stop", "tool_calls", None, "length"])
bodies = st.builds(lambda m, f: {"choices": [{"message": m, "finish_reason": f}]}, messages, finishes)
EXAMPLE = make_example("What is 3 + 4?", ["7"], TOOLS, suite="made")
TEACHER = Endpoint(Options(Path("x"), source="endpoint", base_url="http://x/v1", model="m", max_turns=3), caller())
CHAT = Chat(tiny_tokenizer())


class Scripted:
    """The client's place, without a network: answers in turn, each request checked as a strict server would."""

    def __init__(self, replies):
        self.replies = iter(replies)
        self.chat = SimpleNamespace(completions=SimpleNamespace(with_raw_response=self))

    def create(self, *, messages, **_):
        json.dumps(messages, ensure_ascii=False).encode()
        waiting: list[str] = []
        for message in messages[1:]:
            if message["role"] == "tool":
                waiting.remove(message["tool_call_id"])
            else:
                assert not waiting
                assert message["content"] != ""
                waiting = [call["id"] for call in message["tool_calls"]]
                assert waiting
                assert all(type(json.loads(call["function"]["arguments"])) is dict for call in message["tool_calls"])
        assert not waiting
        body = json.dumps(next(self.replies)).encode()
        return SimpleNamespace(http_response=SimpleNamespace(content=body))


@settings(max_examples=250, deadline=None)
@given(st.lists(bodies, min_size=1, max_size=2))
def test_words_and_calls_agree_whatever_the_server_says(replies):

    TEACHER.client = Scripted([*replies, SEVEN[1]])  # so that many a record is correct
    record = TEACHER.ask(EXAMPLE)
    assert teacher._record(teacher.render_record(record)[:-1]) == record
    if record.correct:
        rollout = teacher_rollout(CHAT, EXAMPLE, record)
        turns = [m["content"] for m in record.messages if m["role"] == "assistant"]
        said = [CHAT.decode(CHAT.turn_ids(text)[:-1]) for text in turns]
        again = [run_call(raw, TOOLS) for text in said for raw in parse_turn(text).calls]
        assert [(c.status, c.result) for c in again] == [(c.status, c.result) for c in record.calls]
        assert not parse_turn(said[-1]).calls
        learned = CHAT.decode(rollout.ids[rollout.sampled].tolist()).split("<|im_end|>")
        assert all(run_call(raw, TOOLS).status != "bad_json" for turn in learned for raw in parse_turn(turn).calls)


def test_half_a_character_cannot_be_sent_back(ask):
    script = [reply("\ud800", ("add", '{"a": 3, "b": 4}'), ("\udfff", '{"a": "\\ud800"}')), reply("\\boxed{7}")]
    status, out, server = ask({"Q": script})
    assert status == 0
    (record,) = open_cache(out).values()
    assert [c.status for c in record.calls] == ["ok", "bad_json"]
    assert server.asked[1]["messages"][1]["content"] == "?"


def test_a_server_that_stays_busy(ask, capsys, monkeypatch):
    monkeypatch.setattr(endpoint, "RETRIES", 2)
    status, _, server = ask({"Q": [BUSY] * 3})
    assert status == 2
    assert "failed (RateLimitError: " in capsys.readouterr().err
    assert len(server.asked) == 3


def test_after_a_failure_what_was_answered_is_kept(ask):
    seven, denied = reply("\\boxed{7}"), (401, {"error": {"message": "no credit"}})
    status, out, server = ask({"P": [seven], "Q": [denied], "R": [seven]}, "--concurrency", "1")
    assert status == 2
    assert len((out / "records.jsonl").read_bytes().splitlines()) == 1
    assert len(server.asked) == 2
    status, out, server = ask({"P": [], "Q": [seven], "R": [seven]}, "--concurrency", "1")
    assert status == 0
    assert len(open_cache(out)) == 3
    assert len(server.asked) == 2


def test_many_conversations_at_once(ask):
    scripts = {f"Q{i}": [reply("", ("add", f'{{"a": {i}, "b": 0}}')), reply("\\boxed{7}")] for i in range(20)}
    status, out, _ = ask(scripts, "--concurrency", "4")
    assert status == 0
    cache = open_cache(out)
    assert sorted(int(record.calls[0].result) for record in cache.values()) == list(range(20))


def test_the_users_own_tools_run_in_the_sandbox(ask, tmp_path, monkeypatch):
    (tmp_path / "my_teach_tools.py").write_text('def twice(a: int) -> int:\n    """Double."""\n    return 2 * a\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    script = [reply("", ("twice", '{"a": 4}')), reply("\\boxed{8}")]
    status, out, _ = ask({"Q": script}, answer="8", tools=["my_teach_tools:twice"])
    assert status == 0
    (record,) = open_cache(out).values()
    assert [(c.name, c.status, c.result) for c in record.calls] == [("twice", "ok", "8")]


def test_requests_are_spaced_over_the_minute(ask, monkeypatch):
    slept = []
    monkeypatch.setattr(endpoint, "time", SimpleNamespace(monotonic=lambda: 100.0, sleep=slept.append))
    script = [reply("", ("add", '{"a": 1, "b": 1}'))] * 2 + [reply("\\boxed{7}")]
    status, _, _ = ask({"Q": script}, "--requests-per-minute", "6")
    assert status == 0
    assert slept == [0.0, 10.0, 20.0]


def test_no_key_and_no_limit_are_the_servers_business(ask, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    status, _, server = ask({"Q": [reply("\\boxed{7}")]}, "--max-new-tokens", "0")
    assert status == 0
    assert "max_tokens" not in server.asked[0]
    assert server.keys == ["Bearer none"]


def test_without_the_client(ask, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openai", None)
    status, _, _ = ask({"Q": []})
    assert status == 2
    error = "error: --source endpoint needs the openai client: pip install 'lite-mentor[teach]'\n"
    assert capsys.readouterr().err == error
