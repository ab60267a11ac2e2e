"""Files and folders that are whole or absent, and nothing outside the run's folder that a run could be led to."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
from pathlib import Path

import pytest

from lite_mentor import files
from lite_mentor.errors import UserError
from lite_mentor.files import check_folder, open_file, read_file, remove, replace_file, replace_folder

posix = pytest.mark.skipif(os.name != "posix", reason="its kinds of files")


def link(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def dangling_link(path: Path, outside: Path) -> None:
    path.symlink_to(outside.with_name("nothing"))


def link_to_a_folder(path: Path, outside: Path) -> None:
    path.symlink_to(outside.parent)


def pipe(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def listening_socket(path: Path, outside: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # its whole path may be too long for a socket
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


FOREIGN = [link, dangling_link, link_to_a_folder, pipe, listening_socket]


@posix
@pytest.mark.parametrize("make", FOREIGN, ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    "name", [".lock", "config.json", "metrics.jsonl", "quarantine.jsonl", "checkpoints", "best", ".tmp-report.html"]
)
def test_what_leads_elsewhere_is_refused(tmp_path, make, name):
    run, outside = tmp_path / "run", tmp_path / "theirs"
    run.mkdir()
    outside.write_text("precious")
    make(run / name, outside)
    with pytest.raises(UserError, match=f"{name} is a .*only to plain files and folders of its own"):
        check_folder(run)


@posix
@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "quarantine.jsonl"])
def test_a_second_name_of_what_is_written_in_place_is_refused(tmp_path, name):
    run, outside = tmp_path / "run", tmp_path / "theirs"
    run.mkdir()
    outside.write_text("precious")
    (run / name).hardlink_to(outside)
    with pytest.raises(UserError, match=f"{name} has a second name .* copy the run .cp -r {run} {run}-copy. and go on"):
        check_folder(run)
    check_folder(run, written=False)


@posix
def test_a_second_name_of_what_is_replaced_keeps_its_file(tmp_path):
    run, outside = tmp_path / "run", tmp_path / "theirs"
    run.mkdir()
    outside.write_text("precious")
    for name in ("config.json", "report.html", ".tmp-config.json"):
        (run / name).hardlink_to(outside)
    check_folder(run)
    replace_file(run / "config.json", b"mine")
    assert ((run / "config.json").read_text(), outside.read_text()) == ("mine", "precious")


@posix
def test_what_a_run_does_not_write_to_may_be_anything(tmp_path):
    check_folder(tmp_path / "nothing yet")
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("")
    link(run / "notes", tmp_path / "notes")
    pipe(run / "pipe", tmp_path)
    link(tmp_path / "elsewhere", run)
    check_folder(run)
    check_folder(tmp_path / "elsewhere")


@posix
@pytest.mark.parametrize("make", [link, pipe], ids=lambda make: make.__name__)
def test_a_file_that_leads_elsewhere_is_neither_read_nor_written(tmp_path, make):
    outside = tmp_path / "theirs"
    outside.write_text("precious")
    make(tmp_path / "file", outside)
    make(tmp_path / ".tmp-file", outside)
    with pytest.raises(OSError):  # noqa: PT011 - each kind has its own
        read_file(tmp_path / "file", follow=False)
    replace_file(tmp_path / "file", b"mine")
    assert (read_file(tmp_path / "file", follow=False), outside.read_text()) == (b"mine", "precious")


@posix
def test_removing_a_link_leaves_what_it_leads_to(tmp_path):
    (tmp_path / "theirs" / "deep").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    link(tmp_path / "mine" / "link", tmp_path / "theirs")
    link(tmp_path / "link", tmp_path / "theirs")
    (tmp_path / "file").write_text("")
    for name in ("mine", "link", "file", "nothing"):
        remove(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["theirs"]
    assert (tmp_path / "theirs" / "deep").is_dir()


class Killed(BaseException):
    """Stands for SIGKILL: no handler of ours may run."""


OLD, NEW = {"a": b"old", "b": b"old"}, {"a": b"new", "b": b"new"}


def content(folder: Path) -> dict[str, bytes] | None:
    return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.exists() else None


@pytest.mark.parametrize("there", [None, OLD], ids=["nothing", "something"])
def test_a_folder_is_whole_or_absent_whenever_it_is_killed(tmp_path, monkeypatch, there):
    target = tmp_path / "best"
    for moment in range(30):
        shutil.rmtree(target, ignore_errors=True)
        if there:
            replace_folder(target, there)
        calls = iter(range(100))
        with monkeypatch.context() as patch:
            owners = {"fsync": os, "open": os, "unlink": os, "rename": Path, "mkdir": Path, "rmtree": shutil}
            for name, owner in owners.items():
                real = getattr(owner, name)

                def stop(*args, real=real, moment=moment, calls=calls, **kwargs):
                    if next(calls) == moment:
                        raise Killed
                    return real(*args, **kwargs)

                patch.setattr(owner, name, stop)
            try:
                replace_folder(target, NEW)
                break
            except Killed:
                pass
        assert content(target) in (there, None, NEW)
        replace_folder(target, NEW)
        assert content(target) == NEW
        assert [p.name for p in tmp_path.iterdir()] == ["best"]
    else:
        pytest.fail("it never came to its end")
    assert moment > 8


def test_a_disk_without_room_leaves_what_was_there(tmp_path, monkeypatch):
    replace_folder(tmp_path / "best", OLD)
    replace_file(tmp_path / "file", b"old")
    before = sorted(p.name for p in tmp_path.iterdir())

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_folder(tmp_path / "best", NEW)
    with pytest.raises(OSError, match="No space"):
        replace_file(tmp_path / "file", b"new")
    assert content(tmp_path / "best") == OLD
    assert read_file(tmp_path / "file", follow=False) == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@posix
@pytest.mark.parametrize("code", [errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_syncs_no_folder_is_one_to_write_to(tmp_path, monkeypatch, code):
    real = os.fsync

    def sync(number: int) -> None:
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(code, os.strerror(code))
        real(number)

    monkeypatch.setattr(os, "fsync", sync)
    if code == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(code)):
            replace_file(tmp_path / "file", b"new")
    else:
        replace_file(tmp_path / "file", b"new")
        replace_folder(tmp_path / "best", NEW)
        assert ((tmp_path / "file").read_bytes(), content(tmp_path / "best")) == (b"new", NEW)


def test_a_folder_that_cannot_be_named_leaves_the_old_one_in_its_place(tmp_path, monkeypatch):
    replace_folder(tmp_path / "best", OLD)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == ".tmp-best":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        replace_folder(tmp_path / "best", NEW)
    assert content(tmp_path / "best") == OLD
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


@posix
@pytest.mark.usefixtures("soon")
def test_what_is_no_file_is_waited_for_by_nobody(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "link", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match=r"it is not a file|Is a directory"):
            read_file(path)
    with pytest.raises(OSError, match="it is not a file"):
        open_file(tmp_path / "pipe", "a+b")


@posix
def test_links_are_read_and_not_written(tmp_path):
    (tmp_path / "outside").write_bytes(b"theirs")
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    assert read_file(tmp_path / "link") == b"theirs"
    for mode in ("ab", "a+b", "wb", "r+b"):
        with pytest.raises(OSError, match="it is a link"):
            open_file(tmp_path / "link", mode, follow=False)
    (tmp_path / ".tmp-link").symlink_to(tmp_path / "outside")
    replace_file(tmp_path / "link", b"ours")
    assert (tmp_path / "outside").read_bytes() == b"theirs"
    assert not (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "outside"]


@posix
def test_a_file_is_on_the_disk_before_it_has_its_name_and_then_the_name_is(tmp_path, monkeypatch):
    done = []
    rename, sync = Path.replace, os.fsync
    monkeypatch.setattr(Path, "replace", lambda self, to: (done.append("rename"), rename(self, to)))
    monkeypatch.setattr(
        files.os, "fsync", lambda n: (done.append("folder" if os.path.isdir(f"/proc/self/fd/{n}") else "file"), sync(n))
    )
    replace_file(tmp_path / "a", b"new")
    assert done == ["file", "rename", "folder"]
