"""What a worker in namespaces sees, and what is said about a machine that grants none."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
import sys
import threading
import time
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


def test_a_file_that_a_call_writes_is_no_module_of_a_later_one(way):
    """It lies in the folder in which a worker starts."""
    with Sandbox(1, way=way) as workers:
        written = workers.call("sample_tools:write_here", {"file": "colorsys.py", "text": "raise SystemExit"})
        assert written == ("ok", "written")
        assert workers.call("sample_tools:import_late", {"module": "colorsys"}) == ("ok", "colorsys")


@pytest.mark.parametrize("kind", ["a folder", "a module alone", "the root"])
def test_nothing_that_is_seen_can_be_written_to(way, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tool(tmp_path, "tool_to_write")
    place = {"a folder": tmp_path / "new", "a module alone": tmp_path / "tool_to_write.py", "the root": "/new"}[kind]
    if kind == "a module alone":
        monkeypatch.setenv("HOME", str(tmp_path))
    with Sandbox(1, way=way) as workers:
        status, text = workers.call("bench.attack_tools:write_file", {"path": str(place)})
    assert status == "error"
    assert text.startswith("Error: OSError: [Errno 30] Read-only file system")


CURIOUS = """
import contextlib, ctypes, os, resource


def rights(shared_memory: int) -> str:
    libc, temporary = ctypes.CDLL(None), os.statvfs("/tmp")
    found = {
        "a large /tmp": temporary.f_blocks * temporary.f_frsize > 256 << 20,
        "any number of processes": resource.getrlimit(resource.RLIMIT_NPROC)[1] > 512,
        "new privileges": libc.prctl(39, 0, 0, 0, 0) != 1,  # PR_GET_NO_NEW_PRIVS
        "our shared memory": libc.shmget(shared_memory, 0, 0) != -1,
        "what lies behind the root": os.listdir("/..") != os.listdir("/"),
    }
    with contextlib.suppress(PermissionError, FileNotFoundError):
        found["the supervisor's memory"] = open("/proc/1/mem", "rb")
    with contextlib.suppress(FileNotFoundError):
        stat = open(f"/proc/{os.getppid()}/stat").read()
        found["signals to the supervisor"] = stat.rpartition(")")[2].split()[1] != "1"  # whom none reaches
    return ", ".join(right for right, had in found.items() if had)
"""


@linux
def test_a_tool_has_no_rights_beyond_its_namespaces(way, tmp_path, monkeypatch):
    (tmp_path / "curious.py").write_text(CURIOUS)
    monkeypatch.chdir(tmp_path)
    libc, key = ctypes.CDLL(None), 0x10000000 + os.getpid()
    segment = libc.shmget(key, 4096, 0o1600)  # IPC_CREAT
    assert libc.shmget(key, 0, 0) == segment >= 0
    try:
        with Sandbox(1, way=way) as workers:
            assert workers.call("curious:rights", {"shared_memory": key}) == ("ok", "")
    finally:
        libc.shmctl(segment, 0, None)  # IPC_RMID


@linux
def test_sockets_pipes_and_locks_of_visible_folders_are_out_of_reach_where_these_are_overlays(way, tmp_path):
    folder = tmp_path / r"a:b,c \d"  # what an overlay's options would take for something else
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "file").touch()
    reader = os.open(folder / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(folder), Sandbox(1, 20.0, way) as workers:
        listener.bind("socket")
        listener.listen()
        exposed = workers.call("lite_mentor.isolation:exposed", {"devices": isolation.devices()})[1]
        reached = [
            workers.call(f"sample_tools:use_{kind}", {"path": str(folder / kind)})[0] == "ok"
            for kind in ("socket", "pipe")
        ]
        reached.append(not can_be_locked_meanwhile(workers, folder / "file"))
    os.close(reader)
    assert reached == [str(folder) in exposed] * 3


def can_be_locked_meanwhile(workers: Sandbox, file: Path) -> bool:
    """Can it be locked here all the time while a tool locks what it sees under that name?"""
    import fcntl

    result: list[tuple[str, str]] = []
    call = "sample_tools:hold_lock", {"path": str(file), "seconds": 0.3}
    thread = threading.Thread(target=lambda: result.append(workers.call(*call)))
    thread.start()
    free = True
    with file.open("a") as mine:
        while thread.is_alive():
            try:
                fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fcntl.flock(mine, fcntl.LOCK_UN)
            except BlockingIOError:
                free = False
            time.sleep(0.01)  # so that the tool finds it free
    thread.join()
    assert result == [("ok", "held")]
    return free


@linux
def test_the_sessions_keys_are_out_of_reach(way):
    libc, number = ctypes.CDLL(None, use_errno=True), {"x86_64": 248, "aarch64": 217}[os.uname().machine]
    if libc.syscall(number, b"user", b"a key of the tests", b"secret", ctypes.c_size_t(6), ctypes.c_long(-3)) < 0:
        pytest.skip(f"this machine keeps no keys ({os.strerror(ctypes.get_errno())})")
    answers = {}
    for how in ("limits only", way):
        with Sandbox(1, way=how) as workers:
            answers[how] = workers.call("sample_tools:read_key", {"description": "a key of the tests"})[1]
            other = workers.call("sample_tools:use_keys_by_another_number", {})
    assert answers == {"limits only": "found", way: "Operation not permitted"}
    assert other == ("ok", "Operation not permitted")


GRANTED = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
mount = lambda kind, options: libc.mount(kind, b"/sys", kind, ctypes.c_ulong(0), options) == 0
owner = f"65534 {os.getuid()} 1", f"65534 {os.getgid()} 1"
if libc.unshare(0x7C020000) == 0:
    for name, text in zip(("setgroups", "uid_map", "gid_map"), ("deny", *owner)):
        open(f"/proc/self/{name}", "w").write(text)
    if libc.mount(None, b"/", None, ctypes.c_ulong(0x44000), None) == 0 and mount(b"tmpfs", b""):
        print("namespaces")
        os.mkdir("/sys/empty")
        print("overlay" if mount(b"overlay", b"lowerdir=/sys/empty:" + sys.argv[1].encode()) else "")
"""


@linux
def test_a_machine_that_grants_isolation_isolates(tmp_path, monkeypatch):
    """What the kernel and bubblewrap grant is asked without our code: where that breaks, nothing else may skip."""
    monkeypatch.chdir(tmp_path)
    granted = subprocess.run([sys.executable, "-c", GRANTED, str(tmp_path)], capture_output=True, text=True).stdout
    if "namespaces" in granted and not isolation.unavailable("user namespaces"):
        assert problem_with("user namespaces") == ""
    if "overlay" in granted and not isolation.unavailable("user namespaces"):
        with Sandbox(1, way="user namespaces") as workers:
            assert (
                workers.call("lite_mentor.isolation:exposed", {"devices": {str(tmp_path): tmp_path.stat().st_dev}})[1]
                == ""
            )
    probe = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"]
    if not isolation.unavailable("bubblewrap") and subprocess.run(probe, capture_output=True).returncode == 0:
        assert problem_with("bubblewrap") == ""


def test_folders_that_a_tool_sees_themselves_are_named(monkeypatch):
    monkeypatch.setattr(sandbox, "_examined", lambda way: ("", "/a, /b"))
    assert Sandbox(way="bubblewrap").note.endswith("; Unix sockets, pipes and locks in /a, /b are within reach")
    assert "reach" not in Sandbox(way="limits only").note


def test_no_visible_folder_lies_in_another(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path / "b" / "c"), str(tmp_path / "b"), str(tmp_path / "absent"), ""])
    monkeypatch.setenv("LD_LIBRARY_PATH", "")
    (tmp_path / "b" / "c").mkdir(parents=True)
    monkeypatch.setattr(isolation, "_SYSTEM", (str(tmp_path),))
    shown = isolation.visible()
    assert [path for path in shown if path.startswith(str(tmp_path))] == [str(tmp_path), str(tmp_path / "b")]
    assert str(tmp_path / "b") in isolation.devices()
    assert str(tmp_path) not in isolation.devices()
    shown.remove(str(tmp_path))
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
