"""Files that are whole or absent, and lie where they seem to.

A file or a folder is written beside its place, fsynced, and renamed into it: a kill at any moment leaves what was there
before, what is meant, or (of a folder) nothing, and never half of it. What a kill leaves beside it has one name, so
that the next attempt replaces it: only one process at a time writes in a folder. A folder may come from a stranger:
what leads out of it is not followed, and nobody is waited for at the other end of a pipe.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO

from lite_mentor.errors import UserError

OWN = (
    ".lock", "config.json*", "*.jsonl*", "report.html*", "refused-*", "checkpoints", "cold_start", "adapter", "best",
    "tensorboard", ".tmp-*",
)  # fmt: skip
"""The names of what a run writes in its folder."""
IN_PLACE = (".lock", "*.jsonl")
"""Of those, the names of files that are written where they are; all else is replaced, whatever names it had."""


def check_folder(out: Path, *, written: bool = True) -> None:
    """Raise UserError when a write to one of OWN in the run's folder `out` would end elsewhere, or wait for a reader.

    A folder of somebody else's making may hold links to any file, and pipes. The folder itself may be a link. Not
    `written`: of IN_PLACE nothing is, and it may have a second name.
    """
    try:
        names = sorted(os.listdir(out)) if os.path.exists(out) else []
        about = {name: _about(Path(out) / name) for name in names if _is_of(name, OWN)}
    except OSError as error:
        raise UserError(f"The run's folder {out} cannot be used ({error.strerror}); choose another.") from error
    for name, found in about.items():
        if found is None or stat.S_ISDIR(found.st_mode):
            continue
        if not stat.S_ISREG(found.st_mode):
            kind = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "a pipe, a socket or a device"
            raise UserError(
                f"{Path(out) / name} is {kind}, and a run writes only to plain files and folders of its own; put a "
                "copy in its place, or choose another folder."
            )
        if written and found.st_nlink > 1 and _is_of(name, IN_PLACE):
            raise UserError(
                f"{Path(out) / name} has a second name (a hard link, as cp -l and some backups make them), under which "
                f"it would change as well; copy the run (cp -r {out} {out}-copy) and go on with the copy."
            )


def _is_of(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _about(path: Path) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except FileNotFoundError:  # a report of a run that goes on: that has just renamed it
        return None


def open_file(path: Path, mode: str = "rb", *, follow: bool = True) -> BinaryIO:
    """Open a file in binary, unbuffered. Without `follow`, a link is refused: what it names may lie anywhere.

    Raises OSError, also for a pipe or a device, on which a reader could wait for ever.
    """

    def regular(name: str, flags: int) -> int:
        flags |= getattr(os, "O_NONBLOCK", 0) | (0 if follow else getattr(os, "O_NOFOLLOW", 0))
        try:
            number = os.open(name, flags, 0o666)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise OSError(errno.ELOOP, "it is a link") from error
            raise
        if not stat.S_ISREG(os.fstat(number).st_mode):
            os.close(number)
            raise OSError(errno.EINVAL, "it is not a file")
        return number

    return open(path, mode, buffering=0, opener=regular)


def read_file(path: Path, *, follow: bool = True) -> bytes:
    """All bytes of a file. Raises OSError."""
    with open_file(path, follow=follow) as file:
        return file.read()


def append(file: BinaryIO, line: bytes) -> None:
    """Add a line to an unbuffered file, whole or not at all. Raises OSError."""
    before = os.fstat(file.fileno()).st_size
    try:
        _write(file, line)
    except OSError:
        file.truncate(before)
        raise


def replace_file(path: Path, content: bytes) -> None:
    """Put a file at `path`, in the place of one, or of a link, that is there. Raises OSError."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        _create(temporary, content)
        temporary.replace(path)
    except OSError:
        remove(temporary)
        raise
    sync_folder(path.parent)


def replace_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Put a folder of files at `path`. What is there is moved aside first: a kill just then leaves nothing there.

    Raises OSError, and what was there is there again.
    """
    temporary, replaced = (path.with_name(f".tmp-{prefix}{path.name}") for prefix in ("", "replaced-"))
    remove(temporary)
    remove(replaced)
    try:
        temporary.mkdir(parents=True)
        for name, content in files.items():
            _create(temporary / name, content)
        sync_folder(temporary)
        if os.path.lexists(path):
            path.rename(replaced)
        temporary.rename(path)
        sync_folder(path.parent)
    except OSError:
        remove(temporary)
        if os.path.lexists(replaced) and not os.path.lexists(path):
            replaced.rename(path)
        raise
    remove(replaced)


def remove(path: Path) -> None:
    """Delete a file, a link (not what it leads to) or a folder with all that is in it, as far as that is possible."""
    if path.is_symlink() or not path.is_dir():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable. Windows has no such call, and needs none after a rename.

    Some file systems (of networks, and FUSE) have none for a folder, and say so: what they do with names is their own.
    """
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)


def _create(path: Path, content: bytes) -> None:
    """A new file, on the disk. What a kill has left there, and a link, goes first."""
    path.unlink(missing_ok=True)
    with open_file(path, "xb") as file:
        _write(file, content)
        os.fsync(file.fileno())


def _write(file: BinaryIO, content: bytes) -> None:
    written = file.write(content)
    while written < len(content):  # a disk that fills up takes a part, and raises at the next write
        written += file.write(content[written:])
