"""The teacher's cache: what was written is read, and nothing else is."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import itertools
import json
import math
import os
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lite_mentor import files, teacher
from lite_mentor.errors import UserError
from lite_mentor.facts import facts_of
from lite_mentor.tasks import make_example
from lite_mentor.teacher import Manifest, append_to, open_cache, render_record, seal, with_facts
from lite_mentor.tools import calculator_tools
from lite_mentor.types import TeacherRecord, ToolCall
from tests.disk_order import DiskOrder

MANIFEST = Manifest(
    teacher="endpoint:m", source="endpoint", decoding={"temperature": 0.5}, suite="math", command=("--suite", "math")
)
REFILL = "python -m lite_mentor.teach --suite math --out "
CALL = ToolCall("add", {"a": 1, "b": 2}, '{"name": "add", "arguments": {"a": 1, "b": 2}}', "ok", "3")
MESSAGES = (
    {"role": "assistant", "content": "<tool_call>...</tool_call>"},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "\\boxed{3}"},
)


def record(key: str, *, correct: bool = True, **changes) -> TeacherRecord:
    content = dict(teacher="endpoint:m", messages=MESSAGES, calls=(CALL,), answer="3", correct=correct)
    return seal(example_key=key, **content | changes)


A, B, C = record("a"), record("b", correct=False), record("c")


def fill(path: Path, *records: TeacherRecord, manifest: Manifest = MANIFEST) -> Path:
    with append_to(path, manifest) as cache:
        for r in records:
            cache.append(r)
        cache.publish()
    return path


class Full:
    """A file on a disk with room for a few more bytes."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken, self.room = data[: self.room], max(0, self.room - len(data))
        return self.file.write(taken)

    def __getattr__(self, name: str):
        return getattr(self.file, name)


def test_a_full_disk_is_one_sentence_and_what_was_answered_is_kept(tmp_path):
    with append_to(tmp_path, MANIFEST) as cache:
        cache.append(A)
        cache.publish()
        cache._file = Full(cache._file, room=10)
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
            cache.append(C)
    assert (tmp_path / "records.jsonl").read_bytes() == render_record(A)
    assert dict(open_cache(fill(tmp_path, C))) == {"a": A, "c": C}


def example(key: str):
    made = make_example("What is 1 plus 2?", ["3"], calculator_tools(), suite="math")
    return dataclasses.replace(made, key=key)


def test_what_is_written_is_read_and_wrong_answers_are_counted(tmp_path):
    cache = open_cache(fill(tmp_path / "new" / "cache", A, B, C))
    assert dict(cache) == {"a": A, "c": C}
    assert (len(cache), cache.rejected) == (2, 1)
    assert (cache.manifest.records, cache.manifest.correct) == (3, 2)
    assert (cache.manifest.teacher, cache.manifest.decoding) == ("endpoint:m", {"temperature": 0.5})


def test_a_line_is_canonical_json_with_its_own_hash(tmp_path):
    content = (
        '{"answer":"3","calls":[{"arguments":{"a":1,"b":2},"name":"add",'
        '"raw":"{\\"name\\": \\"add\\", \\"arguments\\": {\\"a\\": 1, \\"b\\": 2}}","result":"3","status":"ok"}],'
        '"correct":true,"example_key":"a","messages":[{"content":"<tool_call>...</tool_call>","role":"assistant"},'
        '{"content":"3","role":"tool"},{"content":"\\\\boxed{3}","role":"assistant"}]%s,"teacher":"endpoint:m"}'
    )
    digest = hashlib.sha256((content % "").encode()).hexdigest()
    assert A.sha256 == digest
    written = (content % f',"sha256":"{digest}"' + "\n").encode()
    assert fill(tmp_path, A).joinpath("records.jsonl").read_bytes() == written
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["format"] == 2
    assert manifest["bytes"] == len(written)
    assert manifest["sha256"] == hashlib.sha256(written).hexdigest()


texts = st.text(st.characters(codec=None))  # lone surrogates too


@given(key=texts, text=texts, result=texts, number=st.floats(allow_nan=False, allow_infinity=False) | st.integers())
def test_any_text_survives(key, text, result, number):
    call = ToolCall("f", {text: [number]}, text, "error", result)
    messages = ({"role": "assistant", "content": text}, {"role": "tool", "content": result})
    written = record(key, correct=False, messages=messages, calls=(call,), answer=text)
    line = render_record(written)
    assert line.count(b"\n") == 1
    assert teacher._record(line[:-1]) == written


# --- damage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["records.jsonl", "manifest.json"])
def test_every_flipped_byte_is_found(tmp_path, name):
    file = fill(tmp_path, A, B) / name
    sound = file.read_bytes()
    for i in range(len(sound)):
        file.write_bytes(sound[:i] + bytes([sound[i] ^ 1]) + sound[i + 1 :])
        with pytest.raises(UserError, match=r"python -m lite_mentor.teach .*--out"):
            open_cache(tmp_path)
    file.write_bytes(sound)
    assert len(open_cache(tmp_path)) == 1


@pytest.mark.parametrize("name", ["records.jsonl", "manifest.json"])
def test_every_truncation_is_found(tmp_path, name):
    file = fill(tmp_path, A, B) / name
    sound = file.read_bytes()
    for i in range(len(sound)):
        file.write_bytes(sound[:i])
        with pytest.raises(UserError):
            open_cache(tmp_path)


def test_damage_is_named_with_its_line_and_the_remedy(tmp_path):
    file = fill(tmp_path, A, B) / "records.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"example_key":"b"', b'"example_key":"x"'))
    with pytest.raises(UserError) as caught:
        open_cache(tmp_path)
    assert str(caught.value) == (
        f"{file} line 2 cannot be used (its sha256 does not match its content); delete that line, then fill it in "
        f"again with: {REFILL}{tmp_path}"
    )


def test_what_the_sentence_says_helps(tmp_path):
    file = fill(tmp_path, A, B) / "records.jsonl"
    file.write_bytes(render_record(A))
    with pytest.raises(UserError, match=r"is cut short after line 1: .* fill in what is missing with"):
        open_cache(tmp_path)
    assert open_cache(fill(tmp_path, B)).rejected == 1


def test_sound_lines_in_another_order_are_not_the_same_file(tmp_path):
    fill(tmp_path, A, B).joinpath("records.jsonl").write_bytes(render_record(B) + render_record(A))
    with pytest.raises(UserError, match=r"has sound lines, but not those that manifest.json counts"):
        open_cache(tmp_path)


@pytest.mark.parametrize("name", ["records.jsonl", "manifest.json"])
def test_a_missing_file(tmp_path, name):
    (fill(tmp_path, A) / name).unlink()
    with pytest.raises(UserError, match=f"{name}.* cannot be read.*python -m lite_mentor.teach"):
        open_cache(tmp_path)


def test_a_missing_folder(tmp_path):
    with pytest.raises(UserError, match=r"is not a teacher's cache, for its manifest.json cannot be read"):
        open_cache(tmp_path / "nowhere")


def sealed(row: dict) -> bytes:
    """A hostile line: whatever it says, its hash is right."""
    text = json.dumps(row, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({**row, "sha256": digest}, sort_keys=True, separators=(",", ":")).encode() + b"\n"


SOUND = {k: v for k, v in json.loads(render_record(A)).items() if k != "sha256"}
ONE_CALL = SOUND["calls"][0]
HOSTILE = [
    (b"\n", "Expecting value"),
    (b"\x80\x04\x95pickle\n", "codec can't decode"),
    (b"[" * 100_000 + b"\n", ""),
    (b"[]\n", "it is not a JSON object"),
    (b"{}\n", "messages is missing or not of type list"),
    (b'{"a": ' + b"9" * 5000 + b"}\n", "Exceeds the limit"),
    (sealed({**SOUND, "extra": 1}), "sha256 does not match"),
    (sealed({**SOUND, "correct": 1}), "correct is missing or not of type bool"),
    (sealed({**SOUND, "facts": 1}), "facts is missing or not of type dict"),
    (sealed({**SOUND, "facts": {}}), "sha256 does not match"),
    (sealed({**SOUND, "answer": None}), "answer is missing or not of type str"),
    (sealed({**SOUND, "example_key": ["a"]}), "example_key is missing or not of type str"),
    (sealed({**SOUND, "teacher": "other"}), "it is of the teacher 'other' and not of 'endpoint:m'"),
    (sealed({**SOUND, "messages": []}), "do not begin with the assistant"),
    (sealed({**SOUND, "messages": "hello"}), "messages is missing or not of type list"),
    (sealed({**SOUND, "messages": ["hello"]}), "a message is not a role and a text"),
    (sealed({**SOUND, "messages": [{"role": "assistant", "content": {}}]}), "a message is not a role and a text"),
    (sealed({**SOUND, "messages": [{"role": "system", "content": ""}]}), "neither the assistant's nor a tool's"),
    (sealed({**SOUND, "messages": [{"role": ["tool"], "content": ""}]}), "neither the assistant's nor a tool's"),
    (sealed({**SOUND, "messages": SOUND["messages"][1:]}), "do not begin with the assistant"),
    (sealed({**SOUND, "messages": SOUND["messages"][:2]}), "marked as correct and has no last word"),
    (sealed({**SOUND, "calls": []}), "its tool messages are not the results of its calls"),
    (sealed({**SOUND, "calls": [{**ONE_CALL, "status": "great"}]}), "a call has no status that is known"),
    (sealed({**SOUND, "calls": [{**ONE_CALL, "status": ["ok"]}]}), "a call has no status that is known"),
    (sealed({**SOUND, "calls": [{**ONE_CALL, "arguments": []}]}), "arguments is missing or not of type dict"),
    (sealed({**SOUND, "calls": [{**ONE_CALL, "result": 3}]}), "result is missing or not of type str"),
    (sealed({**SOUND, "calls": [3]}), "a call has no status that is known"),
    (render_record(A), "example 'a' has this record already"),
    (render_record(A).replace(b'"answer":', b'"answer": '), "sha256 does not match"),
]


@pytest.mark.parametrize(("line", "reason"), HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_line_is_refused_wherever_it_stands(tmp_path, line, reason):
    file = fill(tmp_path, A) / "records.jsonl"
    file.write_bytes(render_record(A) + line)  # beyond what the manifest counts
    with pytest.raises(UserError, match="line 2 cannot be used") as caught:
        open_cache(tmp_path)
    assert reason in str(caught.value)
    with pytest.raises(UserError, match="line 2 cannot be used"):
        fill(tmp_path)


def rewrite_manifest(path: Path, **changes) -> None:
    """A hostile manifest: whatever it says, its seal is right."""
    row = json.loads((path / "manifest.json").read_text()) | changes
    rest = {k: v for k, v in row.items() if k not in ("seal", "format")}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({**row, "seal": digest}, indent=1))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(format=3), "has format '3' and this version reads 2"),
        (dict(format=[]), "has format '[]' and this version reads 2"),
        (dict(bytes=True), "bytes is missing or not of type int"),
        (dict(records="1"), "records is missing or not of type int"),
        (dict(decoding=3), "decoding is missing or not of type dict"),
        (dict(command=["--suite", 3]), "its command is not a list of words"),
        (dict(more=1), "its seal does not match its content"),
        (dict(records=2), "not those that manifest.json counts"),
        (dict(correct=0), "not those that manifest.json counts"),
        (dict(bytes=0), "not those that manifest.json counts"),
        (dict(bytes=-1), "not those that manifest.json counts"),
        (dict(bytes=10**9), "is cut short after line 1"),
        (dict(sha256="0" * 64), "not those that manifest.json counts"),
        (dict(teacher="oracle"), "line 1 cannot be used"),
    ],
)
def test_a_hostile_manifest_is_refused(tmp_path, changes, reason):
    fill(tmp_path, A)
    rewrite_manifest(tmp_path)
    assert len(open_cache(tmp_path)) == 1
    rewrite_manifest(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        open_cache(tmp_path)
    assert reason in str(caught.value)


def test_a_flip_that_leaves_the_manifests_values_alone_is_found_too(tmp_path):
    fill(tmp_path, A)
    rewrite_manifest(tmp_path, suite="caf\xe9")
    file = tmp_path / "manifest.json"
    assert open_cache(tmp_path).manifest.suite == "caf\xe9"
    file.write_bytes(file.read_bytes().replace(rb"\u00e9", rb"\u00E9"))  # one bit, and the same letter
    with pytest.raises(UserError, match=r"manifest\.json is damaged \(it is not spelt as it was written\)"):
        open_cache(tmp_path)


@pytest.mark.parametrize("text", [b"", b"null", b"[1]", b"\xff", b"[" * 100_000, b'{"format": 1}'])
def test_a_manifest_of_garbage_is_refused(tmp_path, text):
    (fill(tmp_path, A) / "manifest.json").write_bytes(text)
    with pytest.raises(UserError, match=r"python -m lite_mentor.teach"):
        open_cache(tmp_path)


# --- looking up ------------------------------------------------------------------------------------------------


def test_a_missing_record_names_the_example_and_the_command(tmp_path):
    path = tmp_path / "my cache"
    cache = open_cache(fill(path, A))
    with pytest.raises(UserError) as caught:
        cache["d"]
    assert str(caught.value) == (
        f"The teacher's cache {path} has no record of example d; add it with: {REFILL}'{path}'"
    )


def test_a_wrong_record_is_not_returned_and_says_so(tmp_path):
    cache = open_cache(fill(tmp_path, A, B))
    with pytest.raises(UserError, match="answered example b wrongly, so it has no record to learn from"):
        cache["b"]


def test_it_is_a_mapping_of_the_correct_records(tmp_path):
    cache = open_cache(fill(tmp_path, A, B))
    assert "a" in cache
    assert "b" not in cache
    assert "d" not in cache
    assert cache.get("d") is None
    assert cache.get("b") is None
    assert list(cache.values()) == [A]


def test_covers_counts_what_is_missing_and_usable_keeps_what_is_correct(tmp_path):
    abc = [example("a"), example("b"), example("c")]
    facts = facts_of(abc)
    cache = open_cache(fill(tmp_path, *(with_facts(r, facts[r.example_key]) for r in (A, B, C))))
    cache.covers(abc)
    assert [e.key for e in cache.usable(abc)] == ["a", "c"]
    for method in (cache.covers, cache.usable):
        with pytest.raises(UserError, match="is not complete: 2 of 4 examples have no record, the first being x "):
            method([example("a"), example("x"), example("b"), example("y")])
    with pytest.raises(UserError, match=r"\(endpoint:m\) answered none of the 1 examples correctly"):
        cache.usable([example("b")])
    assert cache.usable([]) == []


# --- filling ---------------------------------------------------------------------------------------------------


def test_a_kill_at_any_byte_loses_one_line_and_readers_never_notice(tmp_path, caplog):
    file = fill(tmp_path, A) / "records.jsonl"
    before, after = file.read_bytes(), render_record(A) + render_record(B) + render_record(C)
    for cut in range(len(before), len(after)):
        file.write_bytes(after[:cut])
        assert dict(open_cache(tmp_path)) == {"a": A}
        caplog.clear()
        with append_to(tmp_path, MANIFEST) as cache:
            whole = after[:cut].count(b"\n")
            assert list(cache.done.items()) == [("a", A), ("b", B), ("c", C)][:whole]
            for r in [A, B, C][whole:]:
                cache.append(r)
        assert file.read_bytes() == after
        left = cut - len(b"".join(after.splitlines(keepends=True)[:whole]))
        expected = [f"{file}: dropped {left} bytes of an unfinished last line"] if left else []
        assert caplog.messages == expected
    assert dict(open_cache(fill(tmp_path))) == {"a": A, "c": C}


def test_a_kill_before_the_first_manifest(tmp_path):
    with append_to(tmp_path, MANIFEST) as cache:
        cache.append(A)
    assert not (tmp_path / "manifest.json").exists()
    assert dict(open_cache(fill(tmp_path, C))) == {"a": A, "c": C}


def test_records_are_on_the_disk_before_the_manifest_counts_them(tmp_path, monkeypatch):
    order = DiskOrder(monkeypatch)
    fill(tmp_path, A)
    assert order.seen(tmp_path)[:3] == ["records.jsonl", "manifest.json", "> manifest.json"]


def test_a_long_fill_publishes_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "PUBLISH_SECONDS", 0.0)
    with append_to(tmp_path, MANIFEST) as cache:
        cache.append(A)
        assert dict(open_cache(tmp_path)) == {"a": A}
        monkeypatch.setattr(teacher, "PUBLISH_SECONDS", math.inf)
        cache.append(C)
        assert dict(open_cache(tmp_path)) == {"a": A}
        cache.publish()
        assert dict(open_cache(tmp_path)) == {"a": A, "c": C}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "records.jsonl"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(teacher="oracle"), "was filled with teacher 'endpoint:m', not 'oracle'; choose another --out."),
        (dict(source="local"), "was filled with source 'endpoint', not 'local'; choose another --out."),
        (dict(suite="tiny"), "was filled with suite 'math', not 'tiny'; choose another --out."),
        (dict(decoding={}), "was filled with decoding {'temperature': 0.5}, not {}; choose another --out."),
    ],
)
def test_one_cache_has_one_teacher(tmp_path, changes, sentence):
    fill(tmp_path, A)
    with pytest.raises(UserError) as caught:
        fill(tmp_path, C, manifest=dataclasses.replace(MANIFEST, **changes))
    assert str(caught.value) == f"{tmp_path} {sentence}"
    assert dict(open_cache(tmp_path)) == {"a": A}


def test_another_teachers_lines_without_a_manifest_are_refused(tmp_path):
    (fill(tmp_path, A) / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"line 1 .*is of the teacher 'endpoint:m' and not of 'oracle'"):
        fill(tmp_path, manifest=dataclasses.replace(MANIFEST, teacher="oracle"))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/cache cannot be written .Not a directory.; choose another --out"):
        fill(tmp_path / "file" / "cache")


def interrupted(at: int, function, *args) -> bool:
    """Call it with a Ctrl-C before the `at`-th line that it runs of ours -> was there such a line?"""
    lines = itertools.count(1)

    def trace(frame, event, _):
        ours = frame.f_code.co_filename in (teacher.__file__, files.__file__)
        if ours and event == "line" and next(lines) == at:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function(*args)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_an_interrupt_at_any_line_of_an_append_leaves_a_sound_cache(tmp_path):
    kept = set()
    for at in itertools.count(1):
        path = fill(tmp_path / str(at), B)
        with append_to(path, MANIFEST) as cache:
            struck = interrupted(at, cache.append, A)
            cache.publish()
        kept.add(len(open_cache(path)))
        assert len(open_cache(fill(path))) == len((path / "records.jsonl").read_bytes().splitlines()) - 1
        if not struck:
            break
    assert at > 15
    assert kept == {0, 1}


def test_a_file_that_is_not_ours_is_left_alone(tmp_path):
    """One line without an end would else be cut off as a record's beginning."""
    for text in (b"my only copy", b'{"answers": 3', b"\x00"):
        (tmp_path / "records.jsonl").write_bytes(text)
        with pytest.raises(UserError, match=r"records.jsonl is no file of a teacher's records; choose another --out"):
            fill(tmp_path)
        assert (tmp_path / "records.jsonl").read_bytes() == text


@pytest.mark.skipif(os.name != "posix", reason="links and pipes of POSIX")
def test_a_strangers_links_and_pipes_are_refused(tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(b"theirs")
    cache, kept = fill(tmp_path / "cache", A), tmp_path / "kept"
    (cache / ".tmp-manifest.json").symlink_to(outside)
    assert len(open_cache(fill(cache))) == 1
    for name, make, uses, why in (
        ("records.jsonl", lambda path: path.symlink_to(outside), [fill], "it is a link"),
        ("records.jsonl", lambda path: path.symlink_to("nowhere"), [fill], "it is a link"),
        ("manifest.json", lambda path: path.symlink_to(outside), [fill, open_cache], "manifest.json is damaged"),
        ("records.jsonl", os.mkfifo, [fill, open_cache], "it is not a file"),
        ("manifest.json", os.mkfifo, [fill, open_cache], "it is not a file"),
    ):
        (cache / name).rename(kept)
        make(cache / name)
        for use in uses:
            with pytest.raises(UserError, match=why):
                use(cache)
        kept.replace(cache / name)
    assert outside.read_bytes() == b"theirs"
    assert len(open_cache(cache)) == 1


def test_words_that_cannot_all_be_shown_are_still_a_command(tmp_path):
    """Such as a space of Japanese in the name of a file, or a byte that is no text."""
    words = ("--suite", "問\u3000題\udcff.jsonl\x1b[2J")
    fill(tmp_path, A, manifest=dataclasses.replace(MANIFEST, command=words))
    assert open_cache(tmp_path).manifest.command == words


LOCKS = pytest.mark.skipif(teacher.fcntl is None, reason="no file locks on this system")


@pytest.fixture
def locked(tmp_path):
    """A cache whose records a stranger has locked, who can only read them."""
    fill(tmp_path, A)
    with open(tmp_path / "records.jsonl", "rb") as stranger:
        teacher.fcntl.flock(stranger, teacher.fcntl.LOCK_SH)
        yield tmp_path


@LOCKS
def test_a_lock_under_which_nothing_is_added_is_waited_for_in_words_and_not_for_ever(locked, monkeypatch, caplog):
    clock = iter(range(0, 10_000, 100))
    monkeypatch.setattr(teacher, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda _: None))
    with pytest.raises(UserError, match=r"records.jsonl is locked by a process that has added nothing .* then run the"):
        fill(locked, C)
    assert caplog.messages == [f"{locked / 'records.jsonl'}: waiting for another process that fills it"] * 18
    assert dict(open_cache(locked)) == {"a": A}


@LOCKS
def test_a_lock_under_which_something_is_added_is_waited_for(locked, monkeypatch):
    """Each look at the clock is ten minutes later, and every second time a record more is there."""
    clock, other = iter(range(0, 60_000, 600)), [C, B]

    def sleep(_):
        if next(looks) % 2 and other:
            with open(locked / "records.jsonl", "ab") as file:
                file.write(render_record(other.pop()))

    looks = itertools.count()
    monkeypatch.setattr(teacher, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=sleep))
    with pytest.raises(UserError, match="has added nothing to it for 30 minutes"):
        fill(locked)
    assert other == []
    assert next(clock) == 4200 + 600


@LOCKS
@pytest.mark.usefixtures("hears_interrupts")
def test_ctrl_c_ends_the_wait(locked, monkeypatch):
    said = lambda *_: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # noqa: E731
    monkeypatch.setattr(teacher._log, "warning", said)
    with pytest.raises(KeyboardInterrupt):
        fill(locked)


@LOCKS
def test_two_fills_of_one_folder_take_turns(tmp_path, monkeypatch):
    waits, seen = threading.Event(), {}
    monkeypatch.setattr(teacher._log, "warning", lambda *_: waits.set())

    def second():
        with append_to(tmp_path, MANIFEST) as cache:
            seen.update(cache.done)

    with append_to(tmp_path, MANIFEST) as cache:
        thread = threading.Thread(target=second)
        thread.start()
        while not waits.wait(0.05):
            assert thread.is_alive()
        cache.append(A)
    thread.join(60)
    assert seen == {"a": A}
