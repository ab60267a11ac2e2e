"""Tools that misbehave in every way we could think of; after each, the same sandbox adds two numbers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sample_tools import add, echo

from lite_mentor.errors import UserError
from lite_mentor.sandbox import Sandbox, Worker, problem_with
from lite_mentor.tools import render_call, run_call, tool_spec

ADD, ECHO = "sample_tools:add", "sample_tools:echo"
ENDED = "Error: the tool ended its process or broke a limit."
needs_limits = pytest.mark.skipif(os.name == "nt", reason="Windows has no resource limits")


@pytest.fixture(scope="module", params=["limits only", "user namespaces", "bubblewrap"])
def sandbox(request):
    if request.param != "limits only" and problem_with(request.param):
        pytest.skip(problem_with(request.param))
    with Sandbox(workers=1, way=request.param) as sandbox:
        yield sandbox


@pytest.fixture
def call(sandbox):
    """Calls a sample tool; whatever it did, the next call must work."""
    yield lambda name, **arguments: sandbox.call(f"sample_tools:{name}", arguments)
    assert sandbox.call(ADD, {"a": 1, "b": 2}) == ("ok", "3")


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("add", {"a": 0.5, "b": 1.5}, ("ok", "2")),
        ("thirds", {}, ("ok", "0.3333333333, 12, true, x")),
        ("echo", {"text": "né\n\u2028 \ud800"}, ("ok", "né\n\u2028 \ud800")),
        ("echo", {"text": "x" * 300_000}, ("ok", "x" * 4000 + "... [296000 more characters]")),
        ("huge", {}, ("ok", "x" * 4000 + "... [4996000 more characters]")),
        ("divide_by_zero", {}, ("error", "Error: ZeroDivisionError: division by zero")),
        ("later", {"text": "now"}, ("ok", "now")),
        ("squares", {"n": 4}, ("ok", "0, 1, 4, 9")),
        ("numbers_without_end", {}, ("error", "Error: the tool yields more than 1000 values.")),
        ("cannot_be_shown", {}, ("error", "Error: ValueError: no")),
        ("echo", {}, ("error", "Error: TypeError: echo() missing 1 required positional argument: 'text'")),
        ("loud", {}, ("ok", "quiet")),
        ("read_input", {}, ("ok", "''")),
        ("close_standard", {}, ("ok", "closed")),
        ("close_everything", {}, ("error", ENDED)),
        ("leave", {}, ("error", ENDED)),
        ("leave_politely", {}, ("error", ENDED)),
        ("angry", {}, ("error", ENDED)),
        ("forge", {}, ("error", ENDED)),
    ],
)
def test_every_end_of_a_call(call, name, arguments, expected):
    assert call(name, **arguments) == expected


def test_a_result_without_a_text_is_an_error(call):
    status, text = call("open_file")
    assert status == "error"
    assert text.startswith("Error: the tool's result is of the type TextIOWrapper, which has no text; it must return")


def test_long_errors_are_cut_visibly(call):
    status, text = call("huge_error")
    assert status == "error"
    assert text.startswith("Error: ValueError: xxx")
    assert text.endswith("more characters]")
    assert len(text) < 4100


def test_endless_recursion_is_an_error(call):
    status, text = call("recurse")
    assert status == "error"
    assert text == ENDED or text.startswith("Error: RecursionError")


@needs_limits
def test_memory_is_limited(call):
    assert call("ten_gigabytes") == ("error", "Error: MemoryError")


@needs_limits
def test_file_size_is_limited(call, tmp_path):
    status, text = call("huge_file", folder=str(tmp_path))
    assert (status, text) == ("ok", str(64 << 20))


@needs_limits
def test_open_files_are_limited(call):
    status, text = call("many_files")
    assert status == "error"
    assert "Too many open files" in text


@pytest.mark.skipif(sys.platform != "linux", reason="other systems lack some of the limits")
def test_every_limit_is_set(call):
    status, text = call("limits")
    limits = [int(limit) for limit in text.split(", ")]
    most = [6, 4 << 30, 64 << 20, 128, 4096, 0]  # of CPU seconds one more than the wall-clock limit of the call
    assert (status, len(limits)) == ("ok", 6)
    assert all(0 <= limit <= bound for limit, bound in zip(limits, most, strict=True))


def test_an_endless_call_times_out():
    with Sandbox(workers=1, timeout_s=1.0) as sandbox:
        assert sandbox.call(ADD, {"a": 1, "b": 2}) == ("ok", "3")
        process = next(iter(sandbox._workers))._process
        assert sandbox.call("sample_tools:loop", {}) == ("timeout", "Error: the tool took longer than 1 s.")
        assert process.returncode is not None
        assert sandbox.call(ADD, {"a": 1, "b": 2}) == ("ok", "3")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no process groups")
def test_what_a_tool_started_ends_with_it():
    with socket.create_server(("127.0.0.1", 0)) as server, Sandbox(1, 2.0, "limits only") as sandbox:
        server.settimeout(30)
        status, _ = sandbox.call("sample_tools:wait_for_child", {"port": server.getsockname()[1]})
        assert status == "timeout"
        connection, _ = server.accept()
        with connection:
            connection.settimeout(5)
            assert connection.recv(1) == b""


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="all calls share a process")


def test_a_loop_left_behind_does_not_stop_the_next_call(call):
    assert call("leave_a_loop_behind") == ("ok", "left")


@needs_fork
def test_a_thread_that_ends_its_process_later_ends_no_other_call(call):
    assert call("die_later") == ("ok", "fine")
    time.sleep(0.2)


@needs_fork
def test_nothing_that_a_call_changes_is_there_in_the_next_one(call):
    assert call("rename_add") == ("ok", "renamed")


@needs_fork
def test_what_is_random_differs_from_call_to_call(tmp_path, monkeypatch):
    code = "import random\nimport numpy.random\ndef tool():\n    return random.random(), float(numpy.random.random())\n"
    (tmp_path / "module_of_chance.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with Sandbox(workers=1) as sandbox:
        drawn = [sandbox.call("module_of_chance:tool", {})[1].split(", ") for _ in range(3)]
    assert [len(set(numbers)) for numbers in zip(*drawn, strict=True)] == [3, 3]


@needs_fork
def test_a_call_cannot_end_the_calls_after_it(call):
    assert call("kill_parent") == ("error", ENDED)


@needs_fork
def test_a_worker_or_a_module_that_dies_between_calls_is_replaced(sandbox):
    """As where the system is short of memory."""
    assert sandbox.call(ADD, {"a": 1, "b": 2}) == ("ok", "3")
    worker = next(worker for worker, module in sandbox._workers.items() if module == "sample_tools")
    for pid in descendants(worker.pid) or pytest.skip("cannot tell here who is whose child"):
        with contextlib.suppress(ProcessLookupError):  # it may have ended with another
            os.kill(pid, signal.SIGKILL)
        assert sandbox.call(ADD, {"a": 1, "b": 2}) == ("ok", "3")


def descendants(pid: int) -> list[int]:
    """The process and all below it, the deepest first."""
    found = []
    for children in Path("/proc", str(pid), "task").glob("*/children"):
        found += [below for child in children.read_text().split() for below in descendants(int(child))]
    return [*found, pid] if Path("/proc", str(pid), "task").exists() else []


@needs_fork
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_what_a_call_leaves_running_ends_with_it(sandbox, call, tmp_path):
    """Without namespaces, unless it has left the worker's group."""
    own_group = sandbox.way != "limits only"
    assert call("leave_a_process_behind", mark=str(tmp_path), own_group=own_group) == ("ok", "left")
    wait_until(lambda: not marked(str(tmp_path)))


FORGED = (
    '{"status": "ok"}',
    '{"status": "ok", "text": 7}',
    '{"status": "gold", "text": "x"}',
    '["ok"]',
    "7",
    "{" * 9000,
)


@pytest.mark.parametrize("frame", [*FORGED, '[1, {"status": "ok", "text": "forged"}]'])
def test_what_a_tool_writes_to_its_pipes_is_no_answer(call, frame):
    assert call("say", frame=frame) == ("error", ENDED)


@needs_fork
@pytest.mark.parametrize("backwards", [False, True])  # it is killed as soon as it has answered
def test_a_call_answers_for_itself_alone(call, backwards):
    assert call("say", frame='{"status": "ok", "text": "mine"}', backwards=backwards) == ("ok", "mine")


def test_an_answer_to_another_request_is_none(tmp_path, monkeypatch):
    stale = """for line in open(0): print('["0123456789abcdef", {}]', flush=True)"""
    (tmp_path / "stale_worker.py").write_text(stale)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match=r"-m stale_worker` does not start as a worker"):
        Worker("stale_worker").request({}, 1.0)


def test_a_request_has_a_name_that_cannot_be_guessed(tmp_path, monkeypatch):
    code = "import json\nfor line in open(0): print(json.dumps([json.loads(line)[0], {'line': line}]), flush=True)"
    (tmp_path / "telling_worker.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with contextlib.closing(Worker("telling_worker")) as worker:
        names = {json.loads(worker.request({}, 60.0)["line"])[0] for _ in range(20)}
    assert len(names) == 20
    assert all(len(name) >= 16 for name in names)


def test_a_worker_that_has_ended_meanwhile_is_replaced():
    worker = Worker("lite_mentor.worker")
    try:
        assert worker.request({}, 60.0) == {}
        worker._process.kill()
        worker._process.wait()
        assert worker.request({}, 60.0) == {}
    finally:
        worker.close()


@pytest.mark.parametrize("answer", [{}, {"status": "ok"}, {"status": "ok", "text": 7}, {"status": "gold", "text": "x"}])
def test_an_answer_of_another_form_is_an_error(monkeypatch, answer):
    monkeypatch.setattr(Worker, "request", lambda self, payload, seconds: answer if "arguments" in payload else {})
    assert Sandbox(1, way="limits only").call(ADD, {}) == ("error", ENDED)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_no_process_outlives_a_trainer_that_is_killed(sandbox, tmp_path):
    mark = str(tmp_path)
    code = f"from lite_mentor.sandbox import Sandbox; Sandbox(1, 50, {sandbox.way!r}).call('sample_tools:sleep', "
    trainer = subprocess.Popen([sys.executable, "-c", f"{code}{{'mark': {mark!r}}})"], env=with_path())
    wait_until(lambda: marked(mark))
    family = descendants(trainer.pid)
    trainer.kill()
    trainer.wait()
    wait_until(lambda: not any(map(alive, family)))
    assert len(family) >= 5  # a supervisor, a module, a call, and what it has started


def with_path() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def wait_until(true) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def marked(mark: str) -> list[int]:
    """Processes with this word on their command line."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if mark in file.read_text(errors="replace").split("\0"):
                found.append(int(file.parent.name))
    return found


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("sample_tools:missing", "AttributeError: module 'sample_tools' has no attribute 'missing'"),
        ("no_such_module:tool", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("sample_tools:not_a_function", "TypeError: not_a_function is not a function"),
        ("", "ValueError: Empty module name"),
    ],
)
def test_a_tool_that_cannot_be_loaded_stops_the_run(sandbox, path, reason):
    with pytest.raises(UserError) as caught:
        sandbox.call(path, {})
    assert str(caught.value) == f"The tool {path} cannot be loaded in the sandbox ({reason}); put its module right."
    assert sandbox.call(ADD, {"a": 1, "b": 2}) == ("ok", "3")


@pytest.mark.parametrize(
    ("body", "reason"),
    [("import os; os._exit(0)", "importing it ended the process or broke a limit"), ("raise SystemExit", "SystemExit")],
)
def test_a_module_that_ends_the_process_stops_the_run(tmp_path, monkeypatch, body, reason):
    (tmp_path / "deadly_module.py").write_text(body, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with Sandbox(workers=1) as sandbox:
        with pytest.raises(UserError, match=rf"deadly_module:tool cannot be loaded in the sandbox \({reason}\)"):
            sandbox.call("deadly_module:tool", {})
        with pytest.raises(UserError, match=rf"deadly_module:tool cannot be imported \({reason}\)"):
            sandbox.describe("deadly_module:tool")


def test_a_tool_is_described_without_importing_its_module_here(tmp_path, monkeypatch):
    code = "import os\nseen = ' '.join(os.environ)\ndef tool(a: int = 1) -> str:\n    'What it saw.'\n    return seen\n"
    (tmp_path / "curious_module.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with Sandbox(workers=1) as sandbox:
        spec, (_, seen) = sandbox.describe("curious_module:tool"), sandbox.call("curious_module:tool", {})
    properties = {"a": {"type": "integer", "default": 1}}
    assert (spec.name, spec.description, spec.path) == ("tool", "What it saw.", "curious_module:tool")
    assert spec.parameters == {
        "type": "object", "properties": properties, "required": [], "additionalProperties": False,
    }  # fmt: skip
    assert "PATH" in seen.split()
    assert "OPENAI_API_KEY" not in seen
    assert "curious_module" not in sys.modules


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("def tool(a):\n    'A.'", "Tool odd_module:tool: parameter a has no annotation; say its type."),
        ("import pathlib\ndef tool(a: str = pathlib.Path('x')):\n    'A.'",
         "Tool odd_module:tool: the default of a, PosixPath('x'), is nothing that JSON can hold; use None and choose "
         "in the function."),
        ("raise ValueError('no')", "The tool odd_module:tool cannot be imported (ValueError: no); is its folder on "
         "PYTHONPATH?"),
        ("import sys\nsys.modules['lite_mentor.tools'].tool_spec = lambda *a, **k: type('', (), dict(name='tool', "
         "description='', parameters={'type': 'object', 'patternProperties': {'(a+)+$': {}}}))()\n"
         "def tool():\n    'A.'",
         "Tool odd_module:tool: its module says of it what no function is; describe it by hints and docstring."),
    ],
)  # fmt: skip
def test_what_cannot_be_described_is_the_users_error(tmp_path, monkeypatch, code, reason):
    (tmp_path / "odd_module.py").write_text("import lite_mentor.tools\n" + code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with Sandbox(workers=1) as sandbox, pytest.raises(UserError) as caught:
        sandbox.describe("odd_module:tool")
    assert str(caught.value) == reason


def test_secrets_of_the_environment_stay_here(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    with Sandbox(workers=1) as sandbox:
        status, names = sandbox.call("sample_tools:environment", {})
    assert status == "ok"
    assert {"PATH", "PYTHONPATH"} <= set(names.split())
    assert "HF_TOKEN" not in names
    assert "HOME" not in names.split()


def test_workers_start_when_needed_and_are_reused_and_calls_leave_nothing_behind():
    with Sandbox(workers=3) as sandbox:
        assert not sandbox._workers
        assert [sandbox.call("sample_tools:count", {}) for _ in range(3)] == [("ok", "1")] * 3
        (worker,), pids = sandbox._workers, {worker.pid for worker in sandbox._workers}
        sandbox.call(ADD, {"a": 1, "b": 2})
        assert {worker.pid} == pids


def test_every_module_has_a_worker_of_its_own_and_the_idlest_makes_room(tmp_path, monkeypatch):
    monkeypatch.setattr("lite_mentor.sandbox.MAX_WORKERS", 2)
    monkeypatch.syspath_prepend(tmp_path)
    code = "import os\ndef tool(name: str, text: str):\n    open(name, 'w').write(text)\n    return os.listdir('.')\n"
    for name in "abc":
        (tmp_path / f"module_{name}.py").write_text(code)
    with Sandbox(workers=1) as sandbox:
        files = {n: sandbox.call(f"module_{n}:tool", {"name": n, "text": ""})[1] for n in "aba"}
        modules, (first, second) = [*sandbox._workers.values()], sandbox._workers
        sandbox.call("module_c:tool", {"name": "c", "text": ""})
        assert [*sandbox._workers.values()] == ["module_a", "module_c"]
        assert (first.pid, second.pid is None) == (None, False)
    assert modules == ["module_b", "module_a"]
    if sandbox.way != "limits only":
        assert [n for n in "ab" if n in files["a"].split(", ")] == ["a"]  # its second call sees what the first wrote
        assert [n for n in "ab" if n in files["b"].split(", ")] == ["b"]


def test_a_module_that_buries_its_children_unseen_works(tmp_path, monkeypatch):
    code = "import signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\ndef tool():\n    return 'fine'\n"
    (tmp_path / "module_that_ignores.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with Sandbox(workers=1) as sandbox:
        assert [sandbox.call("module_that_ignores:tool", {}) for _ in range(2)] == [("ok", "fine")] * 2


def test_a_module_with_threads_runs_its_calls_itself(tmp_path, monkeypatch):
    """They would not be there after a fork, and whoever waits for them would wait for ever."""
    (tmp_path / "module_with_threads.py").write_text(
        "import os\nfrom concurrent.futures import ThreadPoolExecutor\npool = ThreadPoolExecutor(1)\n"
        "pool.submit(int).result()\ndef tool():\n    print('noise')\n    return pool.submit(lambda: 5).result()\n"
        "def leave():\n    os._exit(0)\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    with Sandbox(1, 10.0) as sandbox:
        assert [sandbox.call("module_with_threads:tool", {}) for _ in range(2)] == [("ok", "5")] * 2
        assert sandbox.call("module_with_threads:leave", {}) == ("error", ENDED)
        assert sandbox.call("module_with_threads:tool", {}) == ("ok", "5")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux chooses whom to end when memory is short")
def test_a_worker_is_what_a_system_short_of_memory_ends_first(sandbox):
    sandbox.call(ADD, {"a": 1, "b": 2})
    worker = next(worker for worker, module in sandbox._workers.items() if module == "sample_tools")
    scores = [Path("/proc", str(pid), "oom_score_adj").read_text() for pid in descendants(worker.pid)]
    assert "1000\n" in scores


def test_calls_from_many_threads_get_their_own_answers():
    with Sandbox(workers=2) as sandbox, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: sandbox.call(ADD, {"a": i, "b": 0}), range(100)))
    assert found == [("ok", str(i)) for i in range(100)]


def test_two_workers_run_side_by_side(tmp_path):
    """Each call waits until the other has begun: one after the other, both would time out."""
    names = [str(tmp_path / name) for name in ("one", "two")]
    calls = [{"mine": a, "other": b} for a, b in (names, names[::-1])]
    with Sandbox(2, 60.0, "limits only") as sandbox, ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda one: sandbox.call("sample_tools:meet", one), calls)) == [("ok", "met")] * 2


def test_closing_ends_the_workers_and_a_call_in_flight():
    sandbox = Sandbox(workers=1)
    sandbox.call(ADD, {"a": 1, "b": 2})
    (worker,) = sandbox._workers
    process, results = worker._process, []
    thread = threading.Thread(target=lambda: results.append(sandbox.call("sample_tools:loop", {})))
    thread.start()
    time.sleep(0.5)
    sandbox.close()
    sandbox.close()
    thread.join()
    assert results == [("error", ENDED)]
    assert process.poll() is not None
    with pytest.raises(RuntimeError, match="closed"):
        sandbox.call(ADD, {"a": 1, "b": 2})


def test_a_worker_that_does_not_start_is_a_loud_error():
    with pytest.raises(RuntimeError, match=r"-m lite_mentor\.errors` does not start"):
        Worker("lite_mentor.errors").request({}, 1.0)


def test_the_sandbox_runs_the_calls_of_a_student(sandbox):
    spec = tool_spec(add, path=ADD)
    call = run_call('{"name": "add", "arguments": {"a": 2, "b": 3.5}}', [spec], run_path=sandbox.call)
    assert (call.status, call.result) == ("ok", "5.5")
    long = run_call(render_call("echo", {"text": "x" * 5000}), [tool_spec(echo, path=ECHO)], run_path=sandbox.call)
    assert long.result == "x" * 4000 + "... [1000 more characters]"
