"""The teacher's cache, read: a folder of finished trajectories, verified byte by byte before a run trusts it.

    manifest.json     format, teacher, how it decoded, suite, counts, sha256 of records.jsonl
    records.jsonl     one TeacherRecord a line, each with the sha256 of its own content

The cache is all that a run needs of its teacher: no teacher model is in memory while the student learns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lite_mentor.errors import UserError
from lite_mentor.types import CALL_STATUSES, Example, TeacherRecord, ToolCall

FORMAT = 1


class TeacherCache(Mapping[str, TeacherRecord]):
    """The correct records by example key. `rejected` counts examples whose record has a wrong answer."""

    def __init__(self, path: Path, manifest: Mapping[str, Any], records: Sequence[TeacherRecord]):
        self.path, self.manifest = path, manifest
        self._records = {r.example_key: r for r in records if r.correct}
        self._wrong = {r.example_key for r in records if not r.correct} - set(self._records)

    @property
    def rejected(self) -> int:
        """Examples that the teacher answered wrongly: nothing is learned from those."""
        return len(self._wrong)

    def __getitem__(self, key: str) -> TeacherRecord:
        if key not in self._records:
            raise UserError(f"The teacher's cache {self.path} has no usable record of example {key}; {self._refill()}")
        return self._records[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def usable(self, examples: Sequence[Example]) -> list[Example]:
        """The examples that the teacher answered correctly.

        Raises UserError when some were never shown to the teacher (the cache is for other tasks), or none is left.
        """
        missing = [e for e in examples if e.key not in self._records and e.key not in self._wrong]
        if missing:
            raise UserError(
                f"The teacher's cache {self.path} was made for other tasks: {len(missing)} of {len(examples)} examples "
                f"have no record, the first being {missing[0].key} ({missing[0].question[:60]!r}); {self._refill()}"
            )
        kept = [e for e in examples if e.key in self._records]
        if not kept:
            raise UserError(f"The teacher of {self.path} answered none of the {len(examples)} examples correctly.")
        return kept

    def _refill(self) -> str:
        suite = self.manifest["suite"]
        return f"fill it with: python -m lite_mentor.teach --suite {suite} --source ... --out {self.path}"


def open_cache(path: Path) -> TeacherCache:
    """Read and verify a cache. Raises UserError, naming file and line, for anything that is not as it was written."""
    manifest = read_manifest(path)
    content = _read(path / "records.jsonl")
    if hashlib.sha256(content).hexdigest() != manifest["sha256"]:
        for number, line in enumerate(content.splitlines(), 1):
            parse_record(line, f"{path / 'records.jsonl'} line {number}")  # names the damaged line, when it is one
        raise UserError(
            f"{path / 'records.jsonl'} is not the file that manifest.json describes (it was cut, extended or swapped); "
            "run the same `python -m lite_mentor.teach` command again, which repairs it."
        )
    lines = content.splitlines()
    records = [parse_record(line, f"{path / 'records.jsonl'} line {n}") for n, line in enumerate(lines, 1)]
    return TeacherCache(path, manifest, records)


def read_manifest(path: Path) -> dict[str, Any]:
    """manifest.json of a cache folder, checked. Raises UserError."""
    file = path / "manifest.json"
    if not file.exists():
        raise UserError(f"{path} is not a teacher's cache: it has no manifest.json; fill one with lite_mentor.teach.")
    try:
        manifest = json.loads(_read(file))
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); fill the cache again with lite_mentor.teach.") from error
    fields = {"format": int, "teacher": str, "source": str, "suite": str, "records": int, "sha256": str}
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        version = manifest.get("format") if isinstance(manifest, dict) else None
        raise UserError(
            f"{file} has format {version!r}, and this version reads {FORMAT}; fill a new cache with lite_mentor.teach."
        )
    for name, kind in fields.items():
        if not isinstance(manifest.get(name), kind):
            raise UserError(f"{file} is damaged: {name} is missing or not a {kind.__name__}; fill the cache again.")
    return manifest


def render_record(record: TeacherRecord) -> bytes:
    """A record as its line, hash included, without the newline."""
    return _canonical({**_content(record), "sha256": record.sha256})


def seal(**content: Any) -> TeacherRecord:
    """A TeacherRecord of everything but the hash, with its hash."""
    record = TeacherRecord(**content, sha256="")
    return TeacherRecord(**content, sha256=hashlib.sha256(_canonical(_content(record))).hexdigest())


def parse_record(line: bytes, where: str) -> TeacherRecord:
    """A line -> its record. Raises UserError when its hash or its shape is not what was written."""
    try:
        row = json.loads(line)
        written = row.pop("sha256")
        if hashlib.sha256(_canonical(row)).hexdigest() != written:
            raise ValueError("its sha256 does not match")
        messages = tuple({"role": str(m["role"]), "content": str(m["content"])} for m in row["messages"])
        calls = tuple(_call(c) for c in row["calls"])
        if (
            not messages
            or {m["role"] for m in messages} - {"assistant", "tool"}
            or not isinstance(row["correct"], bool)
        ):
            raise ValueError("its messages are not a trajectory")
        return TeacherRecord(
            str(row["example_key"]), str(row["teacher"]), messages, calls, str(row["answer"]), row["correct"], written
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{where} is damaged ({error}); delete the folder and fill the cache again with lite_mentor.teach."
        ) from error


def _call(row: Mapping[str, Any]) -> ToolCall:
    if row["status"] not in CALL_STATUSES or not isinstance(row["arguments"], dict):
        raise ValueError("a call has an unknown status or no arguments")
    return ToolCall(str(row["name"]), row["arguments"], str(row["raw"]), row["status"], str(row["result"]))


def _content(record: TeacherRecord) -> dict[str, Any]:
    calls = [
        {"name": c.name, "arguments": dict(c.arguments), "raw": c.raw, "status": c.status, "result": c.result}
        for c in record.calls
    ]
    return {
        "example_key": record.example_key,
        "teacher": record.teacher,
        "messages": [dict(m) for m in record.messages],
        "calls": calls,
        "answer": record.answer,
        "correct": record.correct,
    }


def _canonical(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, sort_keys=True, ensure_ascii=True, separators=(",", ":"), allow_nan=False).encode()


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); fill the cache with lite_mentor.teach.") from error
