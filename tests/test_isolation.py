"""What a worker in namespaces sees, and what is said about a machine that grants none."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from lite_mentor import isolation, sandbox
from lite_mentor.sandbox import Sandbox, find_way, open_sandbox, problem_with

linux = pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")


@pytest.fixture(params=["user namespaces", "bubblewrap"])
def way(request):
    if problem_with(request.param):
        pytest.skip(problem_with(request.param))
    return request.param


@pytest.fixture
def fresh_probe():
    for function in (find_way, sandbox._examined):
        function.cache_clear()
    yield
    for function in (find_way, sandbox._examined):
        function.cache_clear()


def write_tool(folder: Path, name: str) -> None:
    code = "import os\ndef tool(path: str) -> str:\n    return f'{os.path.exists(path)} {os.getcwd()}'\n"
    (folder / f"{name}.py").write_text(code, encoding="utf-8")


def test_a_tool_starts_in_its_own_temporary_folder_and_sees_its_module_alone(way, tmp_path, monkeypatch):
    for name in ("project", "secrets"):
        (tmp_path / name).mkdir()
    (tmp_path / "secrets" / "key").write_text("secret")
    write_tool(tmp_path / "project", "tool_of_a_project")
    monkeypatch.chdir(tmp_path / "project")
    with Sandbox(1, way=way) as workers:
        seen = [workers.call("tool_of_a_project:tool", {"path": str(tmp_path / p)}) for p in ("project", "secrets")]
    assert seen == [("ok", "True /tmp"), ("ok", "False /tmp")]


def test_of_the_home_folder_only_modules_are_seen_even_when_it_is_the_current_one(way, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_tool(tmp_path, "tool_at_home")
    (tmp_path / "key").write_text("secret")
    with Sandbox(1, way=way) as workers:
        assert workers.call("tool_at_home:tool", {"path": str(tmp_path / "key")}) == ("ok", "False /tmp")


def test_no_visible_folder_lies_in_another(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path / "b" / "c"), str(tmp_path / "b"), str(tmp_path / "absent"), ""])
    monkeypatch.setenv("LD_LIBRARY_PATH", "")
    (tmp_path / "b" / "c").mkdir(parents=True)
    shown = isolation.visible()
    assert str(tmp_path / "b") in shown
    assert str(tmp_path / "absent") not in shown
    assert not any(a != b and Path(a).is_relative_to(b) for a in shown for b in shown)


def test_folders_above_the_home_folder_show_their_modules_only(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "users" / "me"))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / "users" / "me").mkdir(parents=True)
    (tmp_path / "package").mkdir()
    for file in ("package/__init__.py", "module.py", "data.json"):
        (tmp_path / file).touch()
    shown = [path for path in isolation.visible() if path.startswith(str(tmp_path))]
    assert shown == [str(tmp_path / "module.py"), str(tmp_path / "package")]


@linux
def test_the_kernels_version_is_read_whatever_follows_it(monkeypatch):
    for release, expected in {"6.18.44-fc": (6, 18), "5.4-rc1": (5, 4), "4.19.0": (4, 19)}.items():
        monkeypatch.setattr(os, "uname", lambda release=release: os.uname_result(("", "", release, "", "")))
        assert isolation.kernel() == expected


@linux
def test_who_looks_around_outside_finds_everything(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{tmp_path}")
        listener.listen()
        found = isolation.look(os.readlink("/proc/self/ns/pid"), str(tmp_path), str(tmp_path))
    assert found == "read your files, write your files, use the network, signal your processes"
    assert isolation.look("pid:[0]", str(tmp_path / "absent"), "absent") == "read your files"


@linux
def test_an_isolated_worker_is_found_where_it_can_be_had(fresh_probe):
    """This machine's own word: a way is either free of problems or says what they are."""
    way, reason = find_way()
    assert (way == "limits only") == bool(reason)
    with Sandbox() as workers:
        assert workers.way == way
        assert workers.note.startswith("sandbox: no network, read-only" if not reason else f"sandbox: {reason}: TOOLS")


@linux
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'bwrap: setting up uid map: Permission denied' >&2; exit 1", "setting up uid map: Permission denied"),
        ("exit 1", "no reason given"),
        ('while [ "$1" != -- ]; do shift; done; shift; exec "$@"', "can still read your files, write your files, use"),
    ],
)
def test_a_bubblewrap_that_does_not_isolate_is_not_taken(fresh_probe, tmp_path, monkeypatch, script, reason):
    (tmp_path / "bwrap").write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert reason in problem_with("bubblewrap")
    assert find_way()[0] != "bubblewrap"


@linux
def test_a_machine_that_grants_nothing_is_told_in_one_line(fresh_probe, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(isolation.shutil, "which", lambda name: None)
    monkeypatch.setattr(isolation, "kernel", lambda: (5, 14))
    monkeypatch.setattr(sandbox.isolation, "command", lambda way, module: [sys.executable, "-c", "raise OSError('no')"])
    with Sandbox() as workers:
        assert workers.way == "limits only"
        assert workers.note == (
            "sandbox: user namespaces cannot be had (OSError: no), bubblewrap is not installed: TOOLS CAN READ AND "
            "CHANGE YOUR FILES AND USE THE NETWORK; memory 4 GiB a process, CPU and wall-clock time limited"
        )


def test_off_is_loud():
    with open_sandbox("off") as workers:
        assert workers.way == "limits only"
        assert workers.note.startswith("sandbox: --sandbox off: TOOLS CAN READ AND CHANGE YOUR FILES AND USE THE NET")
        assert workers.call("math:isqrt", {"n": 4})[1] == "Error: TypeError: math.isqrt() takes no keyword arguments"


def test_who_is_root_is_told_that_processes_are_not_counted(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(isolation, "kernel", lambda: (6, 14))
    monkeypatch.setattr(sandbox, "_examined", lambda way: ("", ""))
    notes = {way: Sandbox(way=way).note for way in ("limits only", "bubblewrap", "user namespaces")}
    told = {way: note.endswith(", but not the number of processes, for you are root") for way, note in notes.items()}
    assert told == {"limits only": True, "bubblewrap": True, "user namespaces": False}
    monkeypatch.setattr(isolation, "kernel", lambda: (6, 13))
    assert "for you are root" in Sandbox(way="user namespaces").note
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "for you are root" not in Sandbox(way="bubblewrap").note


def test_other_systems_are_told_what_is_needed(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert isolation.unavailable("user namespaces") == "namespaces need Linux 5.14 or newer"
