"""In which order a program makes files durable and gives them their names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


class DiskOrder:
    """Records each `os.fsync`, and each rename of a Path as `> NAME`, from when it is made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self._seen: list[int | str] = []
        fsync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda file: self._seen.append(os.fstat(file).st_ino) or fsync(file))
        for name in ("rename", "replace"):
            move = getattr(Path, name)

            def moved(path: Path, target: Path, move=move) -> Path:
                self._seen.append(f"> {Path(target).name}")
                return move(path, target)

            monkeypatch.setattr(Path, name, moved)

    def seen(self, *folders: Path) -> list[str]:
        """What happened so far; files and folders by the names that they have now in and as these folders."""
        names = {path.stat().st_ino: path.name for folder in folders for path in (folder, *folder.iterdir())}
        return [names[what] if isinstance(what, int) else what for what in self._seen]
