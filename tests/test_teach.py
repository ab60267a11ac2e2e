"""Filling the teacher's cache: from solutions, from a scripted server, from a random student; killed and resumed."""

from __future__ import annotations

import ast
import datetime
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from lite_mentor import prompt, teach
from lite_mentor.errors import UserError
from lite_mentor.prompt import Chat
from lite_mentor.sft import teacher_rollout
from lite_mentor.tasks import SUITES, load_suite, make_example
from lite_mentor.teach import Options, call_text, command, main, oracle
from lite_mentor.teacher import open_cache
from lite_mentor.template import ASK_FOR_BOX, json_schema
from lite_mentor.tiny import tiny_tokenizer
from lite_mentor.tools import calculator_tools, caller

TOOLS = [tool for tool in calculator_tools() if tool.name in ("add", "multiply")]
ROOT = Path(teach.__file__).parent


run = caller()


def solved(**meta):
    steps = (
        {"thought": "", "tool": "multiply", "arguments": {"a": 2, "b": 3}},
        {"thought": "Now add one.", "tool": "add", "arguments": {"a": "#1", "b": 1}},
    )
    meta = {"steps": steps, "final": "It is {answer}."} | meta
    return make_example("What is 2 * 3 + 1?", ["7"], TOOLS, suite="made", **meta)


# --- the oracle ------------------------------------------------------------------------------------------------


def test_the_oracle_writes_the_solution_one_call_a_turn():
    record = oracle(solved(), run)
    assert record.messages == (
        {
            "role": "assistant",
            "content": '<tool_call>{"name": "multiply", "arguments": {"a": 2, "b": 3}}</tool_call>',
        },
        {"role": "tool", "content": "6"},
        {
            "role": "assistant",
            "content": 'Now add one.\n<tool_call>{"name": "add", "arguments": {"a": 6, "b": 1}}</tool_call>',
        },
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "It is \\boxed{7}."},
    )
    assert [(c.name, dict(c.arguments), c.status, c.result) for c in record.calls] == [
        ("multiply", {"a": 2, "b": 3}, "ok", "6"),
        ("add", {"a": 6, "b": 1}, "ok", "7"),
    ]
    assert (record.example_key, record.teacher, record.answer, record.correct) == (solved().key, "oracle", "7", True)


def test_the_oracle_answers_at_once_where_no_tool_is_needed():
    for example in load_suite("math_varied", split="train", size=40, seed=0, levels=(0,)):
        record = oracle(example, run)
        assert record.correct
        assert record.calls == ()
        assert [message["role"] for message in record.messages] == ["assistant"]
        assert f"\\boxed{{{example.answer[0]}}}" in record.messages[0]["content"]


def test_the_oracles_words_are_what_the_student_learns_to_say():
    chat, record = Chat(tiny_tokenizer()), oracle(solved(), run)
    rollout = teacher_rollout(chat, solved(), record)
    said = chat.decode(rollout.ids[rollout.sampled].tolist())
    assert said == "".join(m["content"] + "<|im_end|>" for m in record.messages if m["role"] == "assistant")


@pytest.mark.parametrize("suite", SUITES)
def test_the_oracle_solves_every_suite(suite):
    for example in load_suite(suite, split="validation", size=20, seed=1):
        record = oracle(example, run)
        assert record.correct
        assert len(record.calls) == len(example.meta["steps"]) == example.meta["level"]


def test_the_oracle_needs_solutions():
    example = make_example("What is 2 * 3?", ["6"], TOOLS, suite="mine")
    with pytest.raises(UserError, match=r"The oracle needs built-in tasks: example \w+ of mine comes without"):
        oracle(example, run)


def test_a_solution_that_does_not_run_stops_everything():
    broken = solved(steps=({"thought": "", "tool": "add", "arguments": {"a": "one", "b": 1}},))
    with pytest.raises(ValueError, match=r"the solution of example \w+ does not run"):
        oracle(broken, run)


# --- the command -----------------------------------------------------------------------------------------------


def tiny(out, *flags):
    return main(["--suite", "tiny", "--size", "5", "--out", str(out), *flags])


def test_fill_then_fill_more(tmp_path, capsys):
    assert tiny(tmp_path) == 0
    assert capsys.readouterr().out == f"{tmp_path}: 5 records, 5 of them new; 5 correct, 0 rejected\n"
    five = (tmp_path / "records.jsonl").read_bytes()
    assert tiny(tmp_path) == 0
    assert capsys.readouterr().out == f"{tmp_path}: 5 records, 0 of them new; 5 correct, 0 rejected\n"
    assert (tmp_path / "records.jsonl").read_bytes() == five
    assert tiny(tmp_path, "--size", "8", "--seed", "3") == 0
    assert (tmp_path / "records.jsonl").read_bytes().startswith(five)
    cache = open_cache(tmp_path)
    cache.covers(load_suite("tiny", split="train", size=5, seed=0) + load_suite("tiny", split="train", size=8, seed=3))
    assert cache.manifest.command == ("--suite", "tiny", "--source", "oracle", "--size", "8", "--seed", "3")


def test_after_a_kill_in_the_middle_of_a_line(tmp_path, caplog):
    assert tiny(tmp_path) == 0
    file = tmp_path / "records.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(UserError, match=r"records.jsonl is cut short after line 4"):
        open_cache(tmp_path)
    assert tiny(tmp_path) == 0
    assert file.read_bytes() == whole
    dropped = len(whole.splitlines()[-1]) - 9
    assert caplog.messages == [f"{file}: dropped {dropped} bytes of an unfinished last line"]
    assert len(open_cache(tmp_path)) == 5


def test_another_source_is_refused(tmp_path, capsys):
    assert tiny(tmp_path) == 0
    assert tiny(tmp_path, "--source", "local", "--student", "tiny") == 2
    error = f"error: {tmp_path} was filled with teacher 'oracle', not 'local:tiny'; choose another --out.\n"
    assert capsys.readouterr().err == error


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--suite", "nope"], "error: There is no task suite 'nope'"),
        (["--suite", "nope.jsonl"], "error: There is no file nope.jsonl"),
        (["--source", "endpoint"], "error: --source endpoint needs --base-url and --model.\n"),
        (["--source", "local"], "error: --source local needs --student: a folder, a hub id, or smollm2-135m.\n"),
        (["--max-turns", "0"], "error: --max-turns is 0; it must be at least 1.\n"),
        (["--source", "local", "--max-new-tokens", "0"], "error: --max-new-tokens is 0; it must be at least 1.\n"),
        (["--concurrency", "0"], "error: --concurrency is 0; it must be at least 1.\n"),
    ],
)
def test_a_user_error_is_one_sentence(tmp_path, capsys, flags, sentence):
    assert tiny(tmp_path, *flags) == 2
    assert capsys.readouterr().err.startswith(sentence)


def test_ctrl_c_keeps_what_was_answered(tmp_path, capsys, monkeypatch):
    asked = []

    def interrupted(example, run):
        asked.append(example)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return oracle(example, run)

    monkeypatch.setattr(teach, "oracle", interrupted)
    assert tiny(tmp_path) == 130
    assert capsys.readouterr().err.startswith("stopped; what was answered is kept")
    assert tiny(tmp_path) == 0
    assert capsys.readouterr().out == f"{tmp_path}: 5 records, 3 of them new; 5 correct, 0 rejected\n"


def test_unknown_flags_are_errors(tmp_path):
    with pytest.raises(SystemExit) as caught:
        tiny(tmp_path, "--sise", "3")
    assert caught.value.code == 2


def test_the_command_is_told_in_full():
    options = Options(Path("x"), suite="math", size=2000, levels=(1, 2), max_turns=3)
    assert command(options) == ["--suite", "math", "--source", "oracle", "--levels", "1", "2", "--max-turns", "3"]


def test_the_users_own_tasks_are_no_work_for_the_oracle(tmp_path, capsys):
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"question": "What is 2 * 3?", "answer": "6", "tools": ["multiply"]}\n')
    assert main(["--suite", str(tasks), "--out", str(tmp_path / "cache")]) == 2
    assert capsys.readouterr().err.startswith("error: The oracle needs built-in tasks")


def test_training_does_not_import_it():
    for file in [*ROOT.rglob("*.py"), ROOT.parent / "train.py"]:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            assert not {"teach", "lite_mentor.teach"} & set(names), file


# --- an endpoint -----------------------------------------------------------------------------------------------


class Server:
    """Answers POSTs from a script of (status, body), one script for each question; remembers what it was asked."""

    def __init__(self, scripts: dict[str, list]):
        self.asked: list[dict] = []
        self.keys: list[str | None] = []
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.asked.append({"path": self.path, **body})
                    outer.keys.append(self.headers["Authorization"])
                    status, reply = scripts[body["messages"][0]["content"].split("\n")[0]].pop(0)
                text = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                html = isinstance(reply, bytes) and reply.startswith(b"<")
                self.send_header("Content-Type", "text/html" if html else "application/json")
                self.send_header("Retry-After-Ms", "1")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


def reply(content, *calls, finish="stop"):
    message = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [
            {"id": f"id{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for i, (name, arguments) in enumerate(calls)
        ]
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return 200, {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


REFUSED = {"error": {"message": "too long", "type": "invalid_request_error"}}
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
            {"id": "id0", "type": "function", "function": {"name": "multiply", "arguments": '{"a":2,"b":3}'}}
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
        ([reply("", ("add", "{}")), (400, REFUSED)], ""),
        ([reply("", ("add", "not json")), reply("\\boxed{}")], ""),
    ],
    ids=["wrong", "no box", "nothing", "cut off", "too many turns", "context full", "empty box"],
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
    ("arguments", "text"),
    [
        ('{"a":1}', '{"name": "f", "arguments": {"a": 1}}'),
        ("", '{"name": "f", "arguments": {}}'),
        ("[1]", '{"name": "f", "arguments": [1]}'),
        ("{", '{"name": "f", "arguments": {}'),
    ],
)
def test_a_call_is_written_as_a_student_should_write_it(arguments, text):
    assert call_text("f", arguments) == text


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((401, {"error": {"message": "bad key"}}), "failed (AuthenticationError: "),
        ((400, REFUSED), "failed (BadRequestError: "),
        ((404, b"<html>not here</html>"), "failed (NotFoundError: "),
        ((200, b"<html>welcome</html>"), "answers, but not as a chat-completions server"),
        ((200, b'{"choices": ['), "answers, but not as a chat-completions server"),
        ((200, b"\xff"), "answers, but not as a chat-completions server"),
        ((200, b"[" * 100_000), "answers, but not as a chat-completions server"),
        ((200, {"choices": []}), "answers, but not as a chat-completions server"),
        ((200, {"error": "overloaded"}), "answers, but not as a chat-completions server"),
        ((200, []), "answers, but not as a chat-completions server"),
        ((200, {"choices": [{"message": {"content": {"a": 1}}}]}), "answers, but not as a chat-completions server"),
        ((200, {"choices": [{"message": {"tool_calls": [{"id": "x"}]}}]}), "answers, but not as a chat-completions"),
        (reply("", ("add", {"a": 1})), "answers, but not as a chat-completions server"),
    ],
)
def test_a_server_that_cannot_be_used(ask, capsys, answer, words):
    status, out, server = ask({"Q": [answer]})
    assert status == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: The endpoint {server.url} {words}")
    assert (out / "records.jsonl").read_bytes() == b""


def test_half_a_character_cannot_be_sent_back(ask):
    script = [reply("\ud800", ("add", '{"a": 3, "b": 4}'), ("\udfff", '{"a": "\\ud800"}')), reply("\\boxed{7}")]
    status, out, server = ask({"Q": script})
    assert status == 0
    (record,) = open_cache(out).values()
    assert [c.status for c in record.calls] == ["ok", "bad_json"]
    assert server.asked[1]["messages"][1]["content"] == "?"


def test_a_server_that_stays_busy(ask, capsys, monkeypatch):
    monkeypatch.setattr(teach, "RETRIES", 2)
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
    monkeypatch.setattr(teach, "time", SimpleNamespace(monotonic=lambda: 100.0, sleep=slept.append))
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


# --- a model on this machine -----------------------------------------------------------------------------------


def test_a_random_student_teaches_nothing(tmp_path, capsys, monkeypatch):
    flags = ["--source", "local", "--student", "tiny", "--max-new-tokens", "40", "--concurrency", "3"]
    assert tiny(tmp_path, *flags) == 0
    assert capsys.readouterr().out.endswith("5 records, 5 of them new; 0 correct, 5 rejected\n")
    cache = open_cache(tmp_path)
    assert (len(cache), cache.rejected, cache.manifest.teacher) == (0, 5, "local:tiny")
    decoding = dict(cache.manifest.decoding)
    assert (decoding.pop("date"), len(decoding.pop("prompt"))) == (str(datetime.date.today()), 16)
    assert decoding == {"temperature": 0.0, "max_turns": 8, "max_new_tokens": 40}
    with pytest.raises(UserError, match=r"\(local:tiny\) answered none of the 5 examples correctly"):
        cache.usable(load_suite("tiny", split="train", size=5, seed=0))
    monkeypatch.setattr(prompt, "datetime", SimpleNamespace(date=SimpleNamespace(today=lambda: "2031-01-01")))
    assert tiny(tmp_path, *flags) == 0  # under the day on which the cache was begun
    assert "0 of them new" in capsys.readouterr().out
    monkeypatch.setattr(Chat, "fingerprint", lambda self: "another template")
    assert tiny(tmp_path, *flags) == 2
    assert "was filled with decoding" in capsys.readouterr().err
