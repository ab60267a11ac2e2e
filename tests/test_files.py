"""Files in a stranger's folder: read and extended only where they are files, and replaced whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lite_mentor import files
from lite_mentor.files import open_file, read_file, replace_file

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links, pipes and devices of POSIX")


def test_what_is_no_file_is_waited_for_by_nobody(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "link", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match=r"it is not a file|Is a directory"):
            read_file(path)
    with pytest.raises(OSError, match="it is not a file"):
        open_file(tmp_path / "pipe", "a+b")


def test_links_are_read_and_not_written(tmp_path):
    (tmp_path / "outside").write_bytes(b"theirs")
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    assert read_file(tmp_path / "link") == b"theirs"
    for mode in ("ab", "a+b", "wb", "r+b"):
        with pytest.raises(OSError, match="it is a link"):
            open_file(tmp_path / "link", mode, follow=False)
    (tmp_path / "link.tmp").symlink_to(tmp_path / "outside")
    replace_file(tmp_path / "link", b"ours")
    assert (tmp_path / "outside").read_bytes() == b"theirs"
    assert not (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "outside"]


def test_a_file_is_on_the_disk_before_it_has_its_name_and_then_the_name_is(tmp_path, monkeypatch):
    done = []
    rename, sync = Path.replace, os.fsync
    monkeypatch.setattr(Path, "replace", lambda self, to: (done.append("rename"), rename(self, to)))
    monkeypatch.setattr(
        files.os, "fsync", lambda n: (done.append("folder" if os.path.isdir(f"/proc/self/fd/{n}") else "file"), sync(n))
    )
    replace_file(tmp_path / "a", b"new")
    assert done == ["file", "rename", "folder"]
