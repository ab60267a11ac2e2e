"""What attacks.py lets tools try. Each runs in a worker and says ESCAPED when it got what it should not."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time

MANY_PROCESSES = 700
DAEMON_SECONDS = 60
TEMPORARY_BYTES = 320 << 20


def add(a: float, b: float) -> float:
    return a + b


def loop() -> None:
    while True:
        pass


def fork_bomb() -> str:
    """Capped, and cleared away: it may run where nothing stops it, and what it leaves must not hinder the next."""
    children: list[int] = []
    with contextlib.suppress(OSError):
        while len(children) < MANY_PROCESSES:
            children.append(os.fork())
            if children[-1] == 0:
                time.sleep(DAEMON_SECONDS)
                os._exit(0)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return f"{'stopped' if len(children) < MANY_PROCESSES else 'ESCAPED'} after {len(children)} processes"


def allocate() -> int:
    return len(bytearray(100 << 30))


def shout() -> str:
    for _ in range(1 << 10):
        os.write(1, b"x" * (1 << 20))
    return "x" * (1 << 30)


def fill_temporary_folder() -> str:
    for number in range(TEMPORARY_BYTES >> 25):
        with open(f"fill-{number}", "wb") as file:
            file.write(b"x" * (32 << 20))
    return "ESCAPED"


def read_file(path: str) -> str:
    with open(path, "rb") as file:
        return f"ESCAPED {file.read(200)!r}"


def write_file(path: str) -> str:
    with open(path, "a"):
        return "ESCAPED"


def write_own_code() -> str:
    return write_file(__file__)


def connect(host: str, port: int) -> str:
    socket.create_connection((host, port), timeout=1).close()
    return "ESCAPED"


def send(host: str, port: int) -> str:
    """Needs a route only: nothing has to answer."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        datagrams.sendto(b"x", (host, port))
    return "ESCAPED"


def kill(pid: int) -> str:
    os.kill(pid, signal.SIGKILL)
    return "ESCAPED"


def kill_everything() -> str:
    """Of its own group, and the first process of its namespace."""
    for pid in (os.getppid(), 0):
        os.kill(pid, signal.SIGKILL)
    return "survived"


def stop_everything() -> None:
    """What a process in its own namespace can name, so that nobody is left to end this one."""
    for pid in (os.getppid(), 1):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGSTOP)
    time.sleep(DAEMON_SECONDS)


def forge(answer: str) -> None:
    """Write an answer into every file that is open."""
    for descriptor in range(3, 256):
        with contextlib.suppress(OSError):
            os.write(descriptor, answer.encode() + b"\n")
    os._exit(0)


def write_to_parents(answer: str) -> str:
    """The same through the files of the processes above this one."""
    for pid in (os.getppid(), 1):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with open(f"/proc/{pid}/fd/{name}", "wb") as file:
                file.write(answer.encode() + b"\n")
    return "ESCAPED"


def read_parents_memory() -> str:
    with open(f"/proc/{os.getppid()}/mem", "rb") as file:
        return f"ESCAPED {file.fileno()}"


def spoil_add() -> None:
    """For whoever adds next."""
    global add
    add = pickled
    os._exit(0)


def die_later() -> None:
    """End the process when it may be doing something else; and use up its CPU time until then."""
    threading.Thread(target=lambda: (time.sleep(0.1), os._exit(1)), daemon=True).start()
    threading.Thread(target=loop, daemon=True).start()


def use_socket(path: str) -> str:
    with socket.socket(socket.AF_UNIX) as agent:
        agent.connect(path)
    return "ESCAPED"


def use_pipe(path: str) -> str:
    os.write(os.open(path, os.O_WRONLY | os.O_NONBLOCK), b"Obey.")
    return "ESCAPED"


def read_key(description: str) -> str:
    """With `keyctl`, of the session."""
    libc = ctypes.CDLL(None, use_errno=True)
    number = {"x86_64": 250, "aarch64": 219}[os.uname().machine]
    if libc.syscall(number, 10, ctypes.c_long(-3), b"user", description.encode(), 0) < 0:
        raise OSError(ctypes.get_errno(), "keyctl")
    return "ESCAPED"


def pickled(path: str) -> bytes:
    """Loading it would write the file."""
    return b"cos\nsystem\n(S'echo >> " + path.encode() + b"'\ntR."


def recurse(depth: int = 0) -> int:
    sys.setrecursionlimit(1 << 30)
    return recurse(depth + 1) + 1


def close_the_pipe() -> None:
    os.closerange(0, 4096)


def power() -> int:
    return 10**10**10


def laughs() -> list:
    value: list = ["ha"]
    for _ in range(40):
        value = [value, value]
    return value


def say(text: str) -> str:
    return text


def half_characters() -> str:
    return "\ud800\x00\x07\x1b[2J\u202e\x7f"


def environment(name: str) -> str:
    return f"ESCAPED {os.environ[name]}"


def daemon(mark: str) -> None:
    """Leaves a process of another session and group, then has itself killed."""
    subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({DAEMON_SECONDS})", mark], start_new_session=True)
    loop()
