"""Files in folders that may come from a stranger: read and extended only where they are files, and replaced whole."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


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


def read_file(path: Path) -> bytes:
    """All bytes of a file. Raises OSError."""
    with open_file(path) as file:
        return file.read()


def append(file: BinaryIO, line: bytes) -> None:
    """Add a line to an unbuffered file, whole or not at all. Raises OSError."""
    before = os.fstat(file.fileno()).st_size
    try:
        written = file.write(line)
        while written < len(line):  # a disk that fills up takes a part, and raises at the next write
            written += file.write(line[written:])
    except OSError:
        file.truncate(before)
        raise


def replace_file(path: Path, content: bytes) -> None:
    """Write a file anew: a kill or a power cut leaves what was there or all of this. A link there gives way to it.

    Raises OSError.
    """
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.unlink(missing_ok=True)  # of a kill; and were it a link, we would write where it points
    with open(unfinished, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk: a rename is safe from a power cut only then."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows opens no folders
        return
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
