"""Starts a worker in Linux namespaces: no network, few files and those read-only, no processes but its own.

This file, run as a program, asks the kernel for them; where that is refused, bubblewrap may be allowed to. Both give
the worker the same view: the system's programs and libraries, this Python, the current folder and the folders of
sys.path, each under its own name and read-only; a private /tmp of at most 256 MiB, in which it starts; nothing else: no
home folder. Where the current folder or one of sys.path contains the home folder, only the Python modules in it are
shown.

Read-only does not keep anyone from talking to a Unix socket, writing into a pipe or locking a file that lies in a
folder. So folders that are not the system's are shown through an overlay, in which these are others than outside;
bubblewrap shows the folders themselves.

The worker is the user `nobody` of its own namespaces, without capabilities and keys, and their first process: no other
one there can signal it or look into it, and all end with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

Way = Literal["bubblewrap", "user namespaces", "limits only"]

TEMPORARY_BYTES = 256 << 20
PROCESSES = 512
"""In a worker's namespaces, threads included."""
_NOBODY = 65534
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache", "/etc/alternatives",
           "/etc/localtime")  # fmt: skip
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


def command(way: Way, module: str) -> list[str]:
    """The command that runs `python -m module` in the way named."""
    start = [sys.executable, "-m", module]
    itself = [sys.executable, "-I", "-S", __file__]
    if way == "bubblewrap":
        return ["bwrap", *_bubblewrap_flags(), "--as-pid-1", "--", *itself, "confine", "--", *start]
    if way == "user namespaces":
        return [*itself, "isolate", *visible(), "--", *start]
    return start


def kernel() -> tuple[int, int]:
    """(major, minor) of the running Linux."""
    major, minor = re.match(r"(\d+)\.(\d+)", os.uname().release).groups()
    return int(major), int(minor)


def unavailable(way: Way) -> str:
    """Why this way need not be tried on this machine; "" when it may work."""
    if sys.platform != "linux" or kernel() < (5, 14):
        return "namespaces need Linux 5.14 or newer"  # there, processes are counted for each namespace
    if not os.path.exists("/proc/self/ns/pid"):
        return "namespaces need /proc"
    if way == "bubblewrap" and shutil.which("bwrap") is None:
        return "bubblewrap is not installed"
    return ""


def counts_processes(way: Way) -> bool:
    """Can a worker be kept from starting any number of processes? The kernel does not count those of root otherwise."""
    return os.geteuid() != 0 or (way == "user namespaces" and kernel() >= (6, 14))


def go_first() -> None:
    """When memory is short, Linux is to end this process and its children, and not the trainer."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def look(namespace: str, folder: str, abstract_socket: str) -> str:
    """Called in a worker: what it can do to the trainer, in words; "" is nothing.

    `namespace` is what /proc calls the trainer's namespace of processes, the others are a folder and a socket of it.
    """
    found = []
    if os.path.exists("/etc/passwd"):
        found.append("read your files")
    with contextlib.suppress(OSError):
        Path(folder, "written").touch()
        found.append("write your files")
    with contextlib.suppress(OSError):
        socket.socket(socket.AF_UNIX).connect(f"\0{abstract_socket}")  # such names belong to the network
        found.append("use the network")
    with contextlib.suppress(OSError):  # without a /proc, main() has made a namespace, or it would not have got here
        if os.readlink("/proc/self/ns/pid") == namespace:
            found.append("signal your processes")
    return ", ".join(found)


def exposed(devices: Mapping[str, int]) -> str:
    """Called in a worker: which of these folders it sees themselves, and not through an overlay.

    With each is its device (st_dev) for the trainer; an overlay is a device of its own.
    """
    return ", ".join(folder for folder, device in devices.items() if os.stat(folder).st_dev == device)


def devices() -> dict[str, int]:
    """The visible folders that are not the system's, with their devices."""
    return {path: os.stat(path).st_dev for path in visible() if _overlays(path)}


def _overlays(path: str) -> bool:
    return os.path.isdir(path) and path not in _SYSTEM


def visible() -> list[str]:
    """The files and folders that a worker needs, none beneath another that is shown in the same way."""
    real = os.path.dirname(os.path.dirname(os.path.realpath(sys.executable)))
    folders = [*_SYSTEM, real, sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix]
    folders += [*os.environ.get("LD_LIBRARY_PATH", "").split(":"), str(Path(__file__).parent.parent)]
    shown: set[str] = set()
    for folder in [*folders, os.getcwd(), *sys.path]:
        if folder and os.path.exists(folder):
            folder = os.path.abspath(folder)
            shown.update(_modules(folder) if _too_much(folder) else [folder])
    return [p for p in sorted(shown) if not any(_within(p, other) for other in shown)]


def _within(path: str, other: str) -> bool:
    """A folder of the user's in one of the system's is shown otherwise than that is."""
    return path.startswith(other + "/") and (path in _SYSTEM or other not in _SYSTEM)


def _too_much(folder: str) -> bool:
    inside = os.path.realpath(folder)
    home = os.path.realpath(os.path.expanduser("~"))  # somebody without a home has a `~` in the current folder
    return any(os.path.commonpath([inside, secret]) == inside for secret in (home, "/tmp"))


def _modules(folder: str) -> list[str]:
    entries = os.scandir(folder) if os.access(folder, os.R_OK) else ()
    return [e.path for e in entries if e.name.endswith(".py") or os.path.exists(f"{e.path}/__init__.py")]


def _bubblewrap_flags() -> list[str]:
    flags = ["--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    flags += ["--uid", str(_NOBODY), "--gid", str(_NOBODY), "--cap-drop", "ALL"]
    flags += ["--size", str(TEMPORARY_BYTES), "--tmpfs", "/tmp"]
    for path in visible():
        flags += ["--ro-bind", path, path]
    for device in _DEVICES:
        flags += ["--dev-bind", device, device]
    return [*flags, "--symlink", "/tmp", "/dev/shm", "--proc", "/proc", "--remount-ro", "/", "--chdir", "/tmp"]


# --- as a program ----------------------------------------------------------------------------------------------

_USER, _MOUNTS, _PROCESSES, _NETWORK, _IPC, _HOSTNAME = 1 << 28, 1 << 17, 1 << 29, 1 << 30, 1 << 27, 1 << 26
_BIND, _RECURSIVE, _PRIVATE, _NOSUID_NODEV_NOEXEC = 0x1000, 0x4000, 0x40000, 0x2 | 0x4 | 0x8
_READ_ONLY, _NO_SETUID = 0x1, 0x2  # attributes of mount_setattr
_NR_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_NR_MOUNT_SETATTR = 442  # on every architecture
_KEYS = {"x86_64": (0xC000003E, (248, 249, 250)), "aarch64": (0xC00000B7, (217, 218, 219))}
"""What seccomp calls the architecture, and the numbers of add_key, request_key and keyctl there."""
_NOTHING = ".nothing"
_ROOT = "/sys"  # always there, and nothing in it is shown: the new root is put together on top of it


def main(how: str, *arguments: str) -> None:
    """isolate FOLDER ... -- COMMAND ...: run the command in new namespaces, where it sees these folders alone.

    confine -- COMMAND ...: run it in those that there are. Both limit it as far as namespaces do not.
    """
    split = arguments.index("--")
    go_first()  # for no worker can say so where its /proc is read-only
    if how == "isolate":
        maps = {"setgroups": "deny", "uid_map": f"{_NOBODY} {os.getuid()} 1", "gid_map": f"{_NOBODY} {os.getgid()} 1"}
        _libc("unshare", _USER | _MOUNTS | _PROCESSES | _NETWORK | _IPC | _HOSTNAME)
        for name, text in maps.items():
            Path("/proc/self", name).write_text(text)
        _leave_to_child()
        _build_root(arguments[:split])
    import resource  # here, for Windows has none

    resource.setrlimit(resource.RLIMIT_NPROC, (PROCESSES, PROCESSES))  # counts this namespace alone; root is exempt
    _libc("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    _forget_keys()
    os.execv(arguments[split + 1], arguments[split + 1 :])


def _leave_to_child() -> None:
    """Go on in a child process; the parent only waits for it."""
    child = os.fork()
    if child:
        os.closerange(0, 3)
        while True:
            ended, status = os.wait()
            if ended == child:
                os._exit(os.waitstatus_to_exitcode(status) & 255)


def _build_root(folders: Sequence[str]) -> None:
    _mount(None, "/", flags=_PRIVATE | _RECURSIVE)
    _mount("tmpfs", _ROOT, kind="tmpfs", options="mode=755")
    for name in ("tmp", "proc", "dev", _NOTHING):
        os.mkdir(f"{_ROOT}/{name}")
    _mount("tmpfs", f"{_ROOT}/tmp", kind="tmpfs", options=f"mode=700,size={TEMPORARY_BYTES}")
    for path in (*folders, *_DEVICES):
        place = Path(_ROOT + path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.mkdir(exist_ok=True) if os.path.isdir(path) else place.touch()
        if not (_overlays(path) and _overlaid(path, place)):
            _mount(path, str(place), flags=_BIND | _RECURSIVE)
    os.symlink("/tmp", f"{_ROOT}/dev/shm")
    with contextlib.suppress(OSError):  # a container may hide parts of /proc, and then grants no new one: do without
        _mount("proc", f"{_ROOT}/proc", kind="proc", flags=_NOSUID_NODEV_NOEXEC)
        if kernel() >= (6, 14):  # before, this number was not the namespace's own, but the whole machine's
            Path(f"{_ROOT}/proc/sys/kernel/pid_max").write_text(str(PROCESSES))
    _set_attributes(_ROOT, set_=_READ_ONLY | _NO_SETUID, everywhere=True)
    _set_attributes(f"{_ROOT}/tmp", clear=_READ_ONLY)
    os.chdir(_ROOT)
    _libc("syscall", _NR_PIVOT_ROOT[os.uname().machine], b".", b".")
    _libc("umount2", b".", 2)  # MNT_DETACH: the old root, which now lies on top of the new one
    os.chdir("/tmp")


def _overlaid(path: str, place: Path) -> bool:
    """Show the folder through an overlay, which some file systems refuse, and those with another mounted inside."""
    below = re.sub(r"([\\:,])", r"\\\1", path)
    with contextlib.suppress(OSError):
        _mount("overlay", str(place), kind="overlay", options=f"lowerdir={_ROOT}/{_NOTHING}:{below}")
        return True
    return False


def _forget_keys() -> None:
    """Keys know no namespaces: have a new keyring for the session, and the kernel refuse whatever deals with keys."""
    architecture, calls = _KEYS[os.uname().machine]
    with contextlib.suppress(OSError):  # a kernel without keys, or a container that refuses the same
        _libc("syscall", calls[-1], 1, None)  # KEYCTL_JOIN_SESSION_KEYRING
    load, equal, not_below, allow = 0x20, 0x15, 0x35, (0x06, 0, 0, 0x7FFF0000)
    refuse = (0x06, 0, 0, 0x00050001)  # with EPERM
    # A jump's two numbers say how many lines are left out when it holds, and when it does not.
    lines = [(load, 0, 0, 4), (equal, 1, 0, architecture), refuse]  # calls have other numbers on another architecture,
    lines += [(load, 0, 0, 0), (not_below, 0, 1, 1 << 30), refuse]  # and with this bit
    for number in calls:
        lines += [(equal, 0, 1, number), refuse]
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in [*lines, allow]))
    filter_ = struct.pack("@HP", len(lines) + 1, ctypes.addressof(program))
    _libc("prctl", 22, 2, filter_, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def _mount(source: str | None, target: str, *, kind: str | None = None, flags: int = 0, options: str = "") -> None:
    encoded = [text and text.encode() for text in (source, target, kind)]
    _libc("mount", *encoded, ctypes.c_ulong(flags), options.encode())


def _set_attributes(path: str, *, set_: int = 0, clear: int = 0, everywhere: bool = False) -> None:
    attributes = struct.pack("=4Q", set_, clear, 0, 0)
    where = (-100, path.encode(), 0x8000 if everywhere else 0)  # AT_FDCWD, AT_RECURSIVE
    _libc("syscall", _NR_MOUNT_SETATTR, *where, attributes, ctypes.c_size_t(len(attributes)))


def _libc(name: str, *arguments: int | bytes | None) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
