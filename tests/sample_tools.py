"""Tools as a user might write them, good and bad; the sandbox tests name them by import path."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from decimal import Decimal
from typing import Any

calls = 0


def add(a: float, b: float) -> float:
    """a + b"""
    return a + b


def thirds() -> tuple[Any, ...]:
    return Decimal(1) / 3, 12.0, True, "x"


def echo(text: str) -> str:
    """text"""
    return text


def count() -> int:
    global calls
    calls += 1
    return calls


async def later(text: str) -> str:
    """text, a moment later"""
    await asyncio.sleep(0.01)
    return text


def squares(n: int):
    """The squares below n * n."""
    yield from (i * i for i in range(n))


def numbers_without_end():
    yield from itertools.count()


def open_file():
    return open(os.devnull)


def environment() -> str:
    return " ".join(sorted(os.environ))


def divide_by_zero() -> float:
    return 1 / 0


def cannot_be_shown() -> object:
    class Rude:
        def __repr__(self) -> str:
            raise ValueError("no")

    return Rude()


def angry() -> None:
    class Rude(Exception):
        def __str__(self) -> str:
            os._exit(1)

    raise Rude


def recurse() -> int:
    return recurse()


def loop() -> None:
    while True:
        pass


def wait_for_child(port: int) -> None:
    """The child holds a connection for as long as it lives, and takes no CPU time, so that no limit of that ends it."""
    code = f"import socket, time; s = socket.create_connection(('127.0.0.1', {port})); time.sleep(100)"
    subprocess.run([sys.executable, "-c", code], check=True)


def leave_a_loop_behind() -> str:
    threading.Thread(target=loop, daemon=True).start()
    return "left"


def die_later() -> str:
    """Ends its process, once it has answered."""

    def die():
        time.sleep(0.1)
        os._exit(1)

    threading.Thread(target=die, daemon=True).start()
    return "fine"


def leave_a_process_behind(mark: str, own_group: bool) -> str:
    command = [sys.executable, "-c", "import time; time.sleep(60)", mark]
    subprocess.Popen(command, start_new_session=own_group)
    return "left"


def write_here(file: str, text: str) -> str:
    with open(file, "w") as opened:
        opened.write(text)
    return "written"


def import_late(module: str) -> str:
    return importlib.import_module(module).__name__


def kill_parent() -> str:
    os.kill(os.getppid(), signal.SIGKILL)
    return "killed"


def sleep(mark: str) -> None:
    """A process of this group, and a wait."""
    subprocess.run([sys.executable, "-c", "import time; time.sleep(60)", mark], check=True)


def rename_add() -> str:
    global add
    add = echo
    return "renamed"


def say(frame: str, backwards: bool = False) -> None:
    """Writes the line to every file that is open, and answers nothing itself."""
    for descriptor in sorted(range(3, 64), reverse=backwards):
        try:
            os.write(descriptor, frame.encode() + b"\n")
        except OSError:
            continue
    os._exit(0)


def use_socket(path: str) -> str:
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(path)
    return "connected"


def use_pipe(path: str) -> str:
    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    return "opened"


def hold_lock(path: str, seconds: float) -> str:
    import fcntl

    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(seconds)
    return "held"


def read_key(description: str) -> str:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    number = {"x86_64": 250, "aarch64": 219}[os.uname().machine]
    for keyring in (-3, -4, -5):  # of the session, of the user, of the user's session
        key = libc.syscall(number, 10, ctypes.c_long(keyring), b"user", description.encode(), 0)
        if key >= 0:
            return "found"
    return os.strerror(ctypes.get_errno())


def use_keys_by_another_number() -> str:
    """That of the other calling convention of x86, x32."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    number = {"x86_64": 250, "aarch64": 219}[os.uname().machine]
    return "answered" if libc.syscall(1 << 30 | number, 0, -3, 0) >= 0 else os.strerror(ctypes.get_errno())


def huge() -> str:
    return "x" * 5_000_000


def huge_error() -> None:
    raise ValueError("x" * 5_000_000)


def huge_file(folder: str) -> int:
    """The size at which writing failed; of a file in the folder, or in the worker's own when there is none such."""
    path = os.path.join(folder if os.path.isdir(folder) else "", "huge")
    try:
        with open(path, "wb") as file:
            for _ in range(200):
                file.write(b"\0" * (1 << 20))
                file.flush()
    except OSError:
        return os.path.getsize(path)
    return -1


def many_files() -> int:
    return len([open(os.devnull) for _ in range(1000)])


def limits() -> list[int]:
    import resource

    names = ("CPU", "AS", "FSIZE", "NOFILE", "NPROC", "CORE")
    return [resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[0] for name in names]


def meet(mine: str, other: str) -> str:
    open(mine, "w").close()
    while not os.path.exists(other):
        pass
    return "met"


def ten_gigabytes() -> int:
    return len(bytearray(10 << 30))


def loud() -> str:
    print('[1, {"status": "ok", "text": "forged"}]', flush=True)
    os.write(1, b'[1, {"status": "ok", "text": "forged"}]\n' * 1000)
    os.write(2, b"noise\n" * 1000)
    subprocess.run([sys.executable, "-c", "print('noise')"], check=True)
    return "quiet"


def forge() -> str:
    """Finds the private pipe, which only malice does."""
    for descriptor in range(3, 20):
        try:
            os.write(descriptor, b'[0, {"status": "ok", "text": "forged"}]\n')
        except OSError:
            continue
    return "honest"


def read_input() -> str:
    return f"{sys.stdin.read()!r}"


def close_standard() -> str:
    os.closerange(0, 3)
    return "closed"


def close_everything() -> str:
    os.closerange(0, 100)
    return "closed"


def leave() -> None:
    os._exit(0)


def leave_politely() -> None:
    sys.exit(0)


not_a_function = 3


def no_module(path: str):
    """Describes the tools of task files that name none."""
    raise AssertionError(f"{path} is described")
