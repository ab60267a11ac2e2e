"""The teacher's cache: a folder of finished trajectories, every byte of which is verified before a run trusts it.

    records.jsonl     one TeacherRecord a line, each with the sha256 of its own content; it only ever grows, and of an
                      example's lines, made under other facts (facts.py) each, the last one counts
    manifest.json     the teacher, how it decoded, the suite, and the sha256 of that part of records.jsonl which counts

The cache is all that a run needs of its teacher: no teacher model is in memory while the student learns. Lines beyond
those that the manifest counts belong to a fill that is running or was killed: they are checked, but not used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lite_mentor.errors import UserError
from lite_mentor.facts import Facts, facts_of
from lite_mentor.files import append, open_file, read_file, replace_file
from lite_mentor.types import CALL_STATUSES, Example, TeacherRecord, ToolCall

try:
    import fcntl
except ImportError:  # Windows: two fills of one folder at the same time are not kept apart
    fcntl = None

FORMAT = 2
"""Of the manifest. In format 1, which is still read, records had no facts and an example had one line."""
PUBLISH_SECONDS = 20.0
"""A long fill brings its manifest up to date this often."""
WAIT_SECONDS, REMIND_SECONDS = 1800.0, 60.0
"""Another process may hold a cache for as long as it adds to it, and so long without; what is waited for is said again
and again."""
_RECORDS, _MANIFEST = "records.jsonl", "manifest.json"
_START = b'{"answer":'
"""Of every line of records.jsonl."""

_log = logging.getLogger(__name__)


class NoRecord(UserError, KeyError):
    """A KeyError too, so that `in` and `get` mean what they mean for every mapping."""

    __str__ = Exception.__str__  # KeyError would quote the sentence


@dataclass(frozen=True)
class Manifest:
    """What a cache is, and which of its bytes count."""

    teacher: str
    source: str
    decoding: Mapping[str, float | str]
    suite: str
    command: tuple[str, ...]
    """Arguments of the last `python -m lite_mentor.teach`, without --out."""
    records: int = 0
    """Lines."""
    correct: int = 0
    """Examples that were answered correctly."""
    bytes: int = 0
    sha256: str = hashlib.sha256().hexdigest()
    """Of the first `bytes` bytes of records.jsonl, which hold `records` lines."""

    def refill(self, path: Path) -> str:
        """The command that fills the cache at `path` as it was filled before."""
        return _command(path, *self.command)


# --- reading ---------------------------------------------------------------------------------------------------


class TeacherCache(Mapping[str, TeacherRecord]):
    """The correct records by example key. Wrong ones are kept in the file, counted, and never returned."""

    def __init__(self, path: Path, manifest: Manifest, records: Sequence[TeacherRecord]):
        self.path, self.manifest = path, manifest
        latest = {r.example_key: r for r in records}
        self._records = {key: r for key, r in latest.items() if r.correct}
        self._wrong = set(latest) - set(self._records)
        self._facts = {key: r.facts for key, r in latest.items()}

    @property
    def rejected(self) -> int:
        """Examples that the teacher answered wrongly: nothing is learned from those."""
        return len(self._wrong)

    def __getitem__(self, key: str) -> TeacherRecord:
        if key in self._wrong:
            raise NoRecord(
                f"The teacher of {self.path} answered example {key} wrongly, so it has no record to learn from; "
                "train on the examples that the cache's `usable` returns."
            )
        if key not in self._records:
            raise NoRecord(
                f"The teacher's cache {self.path} has no record of example {key}; "
                f"add it with: {self.manifest.refill(self.path)}"
            )
        return self._records[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def covers(self, examples: Sequence[Example]) -> None:
        """Raise UserError unless the teacher was asked every one of the examples, whatever it answered."""
        missing = [e for e in examples if e.key not in self._records and e.key not in self._wrong]
        if missing:
            other = "is not complete" if len(missing) < len(examples) else "is for other tasks"
            raise UserError(
                f"The teacher's cache {self.path} {other}: {len(missing)} of {len(examples)} examples have "
                f"no record, the first being {missing[0].key} ({missing[0].question[:60]!r}); it was filled by "
                f"`{self.manifest.refill(self.path)}`: run that with the tasks of this run."
            )

    def usable(self, examples: Sequence[Example]) -> list[Example]:
        """The examples that the teacher answered correctly.

        Raises UserError when some were never shown to the teacher, or were since changed, and when none is left.
        """
        self.covers(examples)
        self._check_facts(examples)
        kept = [e for e in examples if e.key in self._records]
        if examples and not kept:
            raise UserError(
                f"The teacher of {self.path} ({self.manifest.teacher}) answered none of the {len(examples)} examples "
                "correctly; fill a cache with another one: python -m lite_mentor.teach --help"
            )
        return kept

    def _check_facts(self, examples: Sequence[Example]) -> None:
        now = facts_of(examples)
        stale = {e.key: changed(self._facts[e.key], now[e.key]) for e in examples if self._facts[e.key] != now[e.key]}
        if stale:
            what = ", ".join(sorted({name for names in stale.values() for name in names}))
            raise UserError(
                f"{len(stale)} of {len(examples)} records in the teacher's cache {self.path} were made with {what}, "
                f"the first being that of example {next(iter(stale))}; bring them up to date with: "
                f"{self.manifest.refill(self.path)} (what still holds is not asked again)."
            )


_WORDS = {
    "tools": "other descriptions of the tools",
    "code": "other code of the tools",
    "judge": "another checker or judge",
}


def changed(then: Facts, now: Facts) -> list[str]:
    """In words, which facts are others now."""
    if not then:
        return ["tools and a judge that they do not tell"]
    return [_WORDS[name] for name in now if then.get(name) != now[name]]


def open_cache(path: Path) -> TeacherCache:
    """Read and verify a cache. Raises UserError, naming file and line, for anything that is not as it was written."""
    manifest = read_manifest(path)
    file, remedy = path / _RECORDS, manifest.refill(path)
    try:
        content = read_file(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); fill the cache again with: {remedy}") from error
    records = _read_lines(content, file, manifest.teacher, remedy)
    if len(content) < manifest.bytes:
        raise UserError(
            f"{file} is cut short after line {len(records)}: it has {len(content)} of {manifest.bytes} bytes; "
            f"fill in what is missing with: {remedy}"
        )
    records = records[: manifest.records]
    counted = (len(records), sum({r.example_key: r.correct for r in records}.values()))
    described = hashlib.sha256(content[: manifest.bytes]).hexdigest()
    if described != manifest.sha256 or counted != (manifest.records, manifest.correct):
        raise UserError(
            f"{file} has sound lines, but not those that {_MANIFEST} counts (some were changed, moved or replaced); "
            f"delete {path} and fill it again with: {remedy}"
        )
    return TeacherCache(path, manifest, records)


def read_manifest(path: Path) -> Manifest:
    """manifest.json of a cache's folder, verified. Raises UserError."""
    file, remedy = path / _MANIFEST, _command(path, "--suite", "SUITE", "--source", "SOURCE")
    try:
        content = read_file(file)
        row = _json_object(content)
        version = row.pop("format", None)
        if version not in (1, FORMAT):
            raise UserError(
                f"{file} has format {str(version)[:20]!r} and this version reads {FORMAT}; delete {path} and fill it "
                f"again with: {remedy}"
            )
        manifest = _manifest(row)
        if content != _render_manifest(
            manifest, version
        ):  # the seal covers values, and one value can be spelt in several ways
            raise ValueError("it is not spelt as it was written")
        return manifest
    except OSError as error:
        raise UserError(
            f"{path} is not a teacher's cache, for its {_MANIFEST} cannot be read ({error.strerror}); "
            f"fill one with: {remedy}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}); delete that file, then run again: {remedy}") from error


def _manifest(row: Mapping[str, Any]) -> Manifest:
    kinds = dict(teacher=str, source=str, decoding=dict, suite=str, command=list, records=int, correct=int, bytes=int)
    values = {name: _typed(row, name, kind) for name, kind in kinds.items()}
    if not all(type(word) is str for word in values["command"]):
        raise ValueError("its command is not a list of words")
    manifest = Manifest(**values | {"command": tuple(values["command"])}, sha256=_typed(row, "sha256", str))
    if _sealed(dataclasses.asdict(manifest)) != _canonical(row):
        raise ValueError("its seal does not match its content")
    return manifest


def _read_lines(content: bytes, file: Path, teacher: str, remedy: str) -> list[TeacherRecord]:
    """The records of all complete lines, verified one by one. Raises UserError."""
    records: list[TeacherRecord] = []
    facts: dict[str, Facts] = {}
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            record = _record(line)
            if record.teacher != teacher:
                raise ValueError(f"it is of the teacher {record.teacher[:60]!r} and not of {teacher!r}")
            if facts.get(record.example_key) == record.facts:
                raise ValueError(f"example {record.example_key[:40]!r} has this record already")
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{file} line {number} cannot be used ({error}); delete that line, then fill it in again with: {remedy}"
            ) from error
        records.append(record)
        facts[record.example_key] = record.facts
    return records


def _record(line: bytes) -> TeacherRecord:
    row = _json_object(line)
    messages = tuple(_typed(row, "messages", list))
    calls = tuple(_call(call) for call in _typed(row, "calls", list))
    for message in messages:
        if type(message) is not dict or {"role", "content"} != set(message) or type(message["content"]) is not str:
            raise ValueError("a message is not a role and a text")
        if message["role"] not in ("assistant", "tool"):
            raise ValueError("a message is neither the assistant's nor a tool's")
    if not messages or messages[0]["role"] != "assistant":
        raise ValueError("its messages do not begin with the assistant")
    if [m["content"] for m in messages if m["role"] == "tool"] != [call.result for call in calls]:
        raise ValueError("its tool messages are not the results of its calls")
    texts = {name: _typed(row, name, str) for name in ("example_key", "teacher", "answer")}
    facts = _typed(row, "facts", dict) if "facts" in row else {}
    record = seal(**texts, messages=messages, calls=calls, correct=_typed(row, "correct", bool), facts=facts)
    if record.correct and messages[-1]["role"] != "assistant":
        raise ValueError("it is marked as correct and has no last word")
    if render_record(record) != line + b"\n":
        raise ValueError("its sha256 does not match its content")
    return record


def _call(row: Any) -> ToolCall:
    if type(row) is not dict or row.get("status") not in CALL_STATUSES:
        raise ValueError("a call has no status that is known")
    texts = {name: _typed(row, name, str) for name in ("name", "raw", "status", "result")}
    return ToolCall(**texts, arguments=_typed(row, "arguments", dict))


def _json_object(text: bytes) -> dict[str, Any]:
    row = json.loads(text)
    if type(row) is not dict:
        raise ValueError("it is not a JSON object")
    return row


def _typed(row: Mapping[str, Any], name: str, kind: type) -> Any:
    value = row.get(name)
    if type(value) is not kind:  # and not isinstance: True is an int
        raise ValueError(f"{name} is missing or not of type {kind.__name__}")
    return value


# --- writing ---------------------------------------------------------------------------------------------------


def seal(**content: Any) -> TeacherRecord:
    """A TeacherRecord of everything but the hash, with its hash."""
    record = TeacherRecord(**content, sha256="")
    return dataclasses.replace(record, sha256=hashlib.sha256(_canonical(_content(record))).hexdigest())


def with_facts(record: TeacherRecord, facts: Facts) -> TeacherRecord:
    """The record, sealed again under these facts."""
    return seal(**{name: value for name, value in vars(record).items() if name != "sha256"} | {"facts": dict(facts)})


def render_record(record: TeacherRecord) -> bytes:
    """A record as its line of records.jsonl."""
    return _canonical({**_content(record), "sha256": record.sha256}) + b"\n"


@dataclass(frozen=True)
class _Counted:
    """What the next manifest will say of records.jsonl."""

    records: int
    correct: int
    bytes: int
    sha256: Any
    """Of hashlib."""

    def and_one(self, line: bytes, correct: int) -> _Counted:
        sha256 = self.sha256.copy()
        sha256.update(line)
        return _Counted(self.records + 1, self.correct + correct, self.bytes + len(line), sha256)

    def into(self, manifest: Manifest) -> Manifest:
        return dataclasses.replace(manifest, **vars(self) | {"sha256": self.sha256.hexdigest()})


class CacheWriter:
    """Appends records to a cache; made by `append_to`."""

    def __init__(self, path: Path, file: BinaryIO, manifest: Manifest):
        """Take up what `file` holds: a last line that a kill cut short is dropped, and said so."""
        file.seek(0)
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        records = _read_lines(whole, path / _RECORDS, manifest.teacher, manifest.refill(path))
        rest = content[len(whole) :]
        if not rest.startswith(_START[: len(rest)]):
            raise UserError(f"{path / _RECORDS} is no file of a teacher's records; choose another --out.")
        if rest:
            _log.warning("%s: dropped %d bytes of an unfinished last line", path / _RECORDS, len(rest))
            file.truncate(len(whole))
        self.done = {record.example_key: record for record in records}
        """The record of each example, by its key."""
        self.path, self.manifest, self._file = path, manifest, file
        self._published = time.monotonic()
        correct = sum(record.correct for record in self.done.values())
        # Replaced in one assignment: an interrupt between two would leave a manifest that no file fits.
        self._counted = _Counted(len(records), correct, len(whole), hashlib.sha256(whole))

    def append(self, record: TeacherRecord) -> None:
        """Add the record of an example that has none under these facts. Raises UserError when it cannot be written."""
        before = self.done.get(record.example_key)
        assert before is None or before.facts != record.facts, record.example_key
        line = render_record(record)
        with self._writing():
            append(self._file, line)
        self._counted = self._counted.and_one(line, record.correct - (before.correct if before else 0))
        self.done[record.example_key] = record
        if time.monotonic() - self._published >= PUBLISH_SECONDS:
            self.publish()

    def publish(self) -> None:
        """Let readers see what was appended: the manifest is replaced in one rename, once the records are on disk."""
        with self._writing():
            self._publish()
        self._published = time.monotonic()

    def _publish(self) -> None:
        os.fsync(self._file.fileno())
        replace_file(self.path / _MANIFEST, _render_manifest(self._counted.into(self.manifest)))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}); make room or rights there: what was answered is "
                "kept, and the same command goes on."
            ) from error


@contextlib.contextmanager
def append_to(path: Path, manifest: Manifest) -> Iterator[CacheWriter]:
    """Open a cache's folder for writing, made if need be, as soon as no other process writes to it.

    Raises UserError when it is another teacher's, was decoded or asked differently, or cannot be written; and when a
    process that adds nothing keeps it locked.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = open_file(path / _RECORDS, "a+b", follow=False)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another --out.") from error
    with file:
        _wait_for_others(file, path / _RECORDS)
        if (path / _MANIFEST).exists():
            there = read_manifest(path)
            for name in ("teacher", "source", "suite", "decoding"):
                old, new = getattr(there, name), getattr(manifest, name)
                if name == "decoding":  # an older version wrote down less
                    new = {key: value for key, value in new.items() if key in old}
                if old != new:
                    raise UserError(f"{path} was filled with {name} {old!r}, not {new!r}; choose another --out.")
        yield CacheWriter(path, file, manifest)


def _wait_for_others(file: BinaryIO, path: Path) -> None:
    """Take the lock of records.jsonl. The kernel drops it when its process ends, however it ends.

    Whoever can read the file can lock it, so none is waited for that adds nothing. Raises UserError.
    """
    size, grown, reminded = -1, 0.0, -math.inf
    while fcntl and not _locked(file, path):
        now = time.monotonic()
        if (size_now := os.fstat(file.fileno()).st_size) != size:
            size, grown = size_now, now
        if now - grown >= WAIT_SECONDS:
            raise UserError(
                f"{path} is locked by a process that has added nothing to it for {WAIT_SECONDS / 60:.0f} minutes; end "
                f"that process (fuser {shlex.quote(str(path))} names it), then run the same command again."
            )
        if now - reminded >= REMIND_SECONDS:
            _log.warning("%s: waiting for another process that fills it", path)
            reminded = now
        time.sleep(0.2)


def _locked(file: BinaryIO, path: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(f"{path} cannot be locked ({error.strerror}); choose an --out on another disk.") from error
    return True


def _content(record: TeacherRecord) -> dict[str, Any]:
    calls = [dict(vars(call), arguments=dict(call.arguments)) for call in record.calls]
    row = dict(vars(record), messages=[dict(m) for m in record.messages], calls=calls, facts=dict(record.facts))
    del row["sha256"]
    return row if row["facts"] else {name: value for name, value in row.items() if name != "facts"}


def _sealed(row: Mapping[str, Any]) -> bytes:
    """Canonical JSON of the row with its own hash in it."""
    return _canonical({**row, "seal": hashlib.sha256(_canonical(row)).hexdigest()})


def _render_manifest(manifest: Manifest, version: int = FORMAT) -> bytes:
    row = {"format": version, **json.loads(_sealed(dataclasses.asdict(manifest)))}
    return json.dumps(row, indent=1).encode()


def _canonical(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _command(path: Path, *words: str) -> str:
    return "python -m lite_mentor.teach " + shlex.join([*words, "--out", str(path)])
