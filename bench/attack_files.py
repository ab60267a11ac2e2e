"""Attacks with files and flags: the teacher's cache, task files, the configuration, checkpoints.

Some changes come with hashes that are right again, as one who wants to do harm would leave them: those may be
accepted, if what they hold is sound.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import io
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from random import Random
from typing import Any

import torch

from bench import hostile
from bench.hostile import Target
from lite_mentor import checkpoint, teacher
from lite_mentor.config import PRESETS, Config, check, load, parse
from lite_mentor.errors import UserError, printable
from lite_mentor.prompt import Chat
from lite_mentor.reward import strict_reward
from lite_mentor.sandbox import Sandbox
from lite_mentor.sft import teacher_rollout
from lite_mentor.tasks import make_example
from lite_mentor.tasks.jsonl import read_tasks
from lite_mentor.tiny import tiny_tokenizer
from lite_mentor.tools import calculator_tools, render_call, run_call
from lite_mentor.types import CALL_STATUSES


@contextlib.contextmanager
def _refusal() -> Iterator[None]:
    """What is refused is refused in one line, with no control characters for a terminal in it."""
    said = "nothing"
    try:
        yield
    except UserError as error:
        said = str(error)
    assert said.strip()
    assert printable(said) == said


# --- the teacher's cache ---------------------------------------------------------------------------------------

MANIFEST = teacher.Manifest("oracle", "oracle", {"temperature": 0.0}, "tiny", ("--suite", "tiny"))


@functools.cache
def _rows() -> tuple[dict[str, Any], ...]:
    raw = render_call("add", {"a": 1, "b": 2})
    call = run_call(raw, calculator_tools())
    said = ({"role": "assistant", "content": f"<tool_call>{raw}</tool_call>"}, {"role": "tool", "content": call.result})
    last = {"role": "assistant", "content": "\\boxed{3}"}
    records = [
        teacher.seal(
            example_key=key, teacher="oracle", messages=(*said, last), calls=(call,), answer="3", correct=right
        )
        for key, right in (("a", True), ("b", False), ("c", True))
    ]
    return tuple(json.loads(teacher.render_record(record)) for record in records)


def _line(row: Any, reseal: bool) -> bytes:
    if reseal and isinstance(row, dict):
        row = {key: value for key, value in row.items() if key != "sha256"}
        row["sha256"] = hashlib.sha256(_canonical(row)).hexdigest()
    return _canonical(row) + b"\n"


def _canonical(row: Any) -> bytes:
    return json.dumps(row, sort_keys=True, separators=(",", ":")).encode()


def _manifest(content: bytes) -> dict[str, Any]:
    correct = content.count(b'"correct":true')
    counted = dict(records=content.count(b"\n"), correct=correct, bytes=len(content))
    row = {**asdict(MANIFEST), **counted, "sha256": hashlib.sha256(content).hexdigest()}
    row["command"] = list(row["command"])
    return _sealed(row)


def _sealed(row: Any) -> Any:
    if not isinstance(row, dict):
        return row
    row = {key: value for key, value in row.items() if key not in ("seal", "format")}
    return {"format": 1, **row, "seal": hashlib.sha256(_canonical(row)).hexdigest()}


def records(rng: Random) -> dict[str, str]:
    """The two files of a cache, as latin-1, one of them changed; with hashes made right again, or not."""
    sound = b"".join(_line(row, False) for row in _rows())
    manifest = _manifest(sound)
    how = rng.randrange(6)
    content = sound
    if how == 0:
        content = hostile.changed_bytes(rng, sound)
    elif how == 1:
        text = hostile.changed(rng, json.dumps(manifest))
        return {"records": sound.decode("latin-1"), "manifest": text.encode("utf-8", "replace").decode("latin-1")}
    elif how == 2:
        manifest = hostile.changed_json(rng, manifest)
        manifest = _sealed(manifest) if rng.random() < 0.8 else manifest
    else:
        rows = hostile.changed_json(rng, list(_rows()))
        rows = rows if isinstance(rows, list) else [rows]
        content = b"".join(_line(row, how > 3) for row in rows)
        manifest = _manifest(content) if how == 5 else manifest
    return {"records": content.decode("latin-1"), "manifest": json.dumps(manifest)}


def check_records(case: dict[str, str], folder: Path) -> None:
    """A cache is refused, or every byte that counts is the one that was hashed and every record can be learned from."""
    content, manifest = (case[name].encode("latin-1") for name in ("records", "manifest"))
    (folder / "records.jsonl").write_bytes(content)
    (folder / "manifest.json").write_bytes(manifest)
    with _refusal(), teacher.append_to(folder, MANIFEST):
        pass
    (folder / "records.jsonl").write_bytes(content)  # without the unfinished line that a writer drops
    with _refusal():
        cache = teacher.open_cache(folder)
        counted = json.loads(manifest)
        assert hashlib.sha256(content[: counted["bytes"]]).hexdigest() == counted["sha256"]
        lines = {row["example_key"]: row for row in map(json.loads, content.split(b"\n")[: counted["records"]])}
        assert set(cache) == {key for key, row in lines.items() if row["correct"] is True}
        for key, record in cache.items():
            bare = {name: value for name, value in lines[key].items() if name != "sha256"}
            assert record.sha256 == hashlib.sha256(_canonical(bare)).hexdigest()
            assert all(call.status in CALL_STATUSES for call in record.calls)
            assert -3 <= strict_reward(record.calls, record.calls, boxed=True) <= 4
            rollout = teacher_rollout(_chat(), make_example("x", ["3"], calculator_tools(), suite="x"), record)
            assert len(rollout.ids) == len(rollout.sampled) > rollout.prompt_length


@functools.cache
def _chat() -> Chat:
    return Chat(tiny_tokenizer())


# --- task files ------------------------------------------------------------------------------------------------

_OURS = {"question": "What is 1 + 2?", "answer": ["3", 3.0], "tools": ["add"], "checker": "math", "suite": "sums"}
_PUBLISHED = {
    "question": "What is the root of 16?",
    "reward_model": {"ground_truth": ["4", "4.0"]},
    "extra_info": {"func_schemas": '[{"type": "function", "function": {"name": "sqrt", "parameters": {}}}]'},
    "tool_calls_used": ["sqrt"],
    "data_source": "math",
}
_PATHS = (
    "json:dumps", "json:no", "no.such.module:f", ".relative:f", "..:f", ":f", "no_such:", ":", "math:sqrt", "math:pi",
    "builtins:exit", "builtins:print", "decimal:Decimal", "functools:partial", "typing:Any", "os.path:join",
    "tests.sample_tools:add", "tests.sample_tools:not_a_function", "json:dumps:x", "json.:dumps", "textwrap:dedent",
)  # fmt: skip


def tasks(rng: Random) -> list[str]:
    """The lines of a task file, as latin-1: a changed one, sometimes among many that are sound."""
    row = rng.choice((_OURS, _PUBLISHED))
    if rng.random() < 0.2:
        row = {**_OURS, "tools": [rng.choice(_PATHS) for _ in range(rng.randrange(1, 3))]}
    line = json.dumps(hostile.changed_json(rng, row)).encode()
    line = hostile.changed_bytes(rng, line) if rng.random() < 0.3 else line
    others = [json.dumps({**_OURS, "answer": n}).encode() for n in range(24 if rng.random() < 0.1 else 1)]
    return [other.decode("latin-1") for other in (*others, line)]


def check_tasks(lines: list[str], folder: Path) -> None:
    """Every line becomes an example or is set aside with its reason, or the file is refused."""
    content = "\n".join(lines).encode("latin-1")
    (folder / "tasks.jsonl").write_bytes(content)
    aside = folder / "quarantine.jsonl"
    aside.unlink(missing_ok=True)
    with _refusal():
        examples = read_tasks(folder / "tasks.jsonl", quarantine=aside, describe=_workers().describe)
        rejected = [json.loads(line) for line in aside.read_text().splitlines()] if aside.exists() else []
        assert len(examples) + len(rejected) == sum(bool(line.strip()) for line in content.split(b"\n"))
        assert all(row["reason"] for row in rejected)
        assert len({example.key for example in examples}) == len(examples)
        for example in examples:
            assert example.question.strip()
            assert all(answer.strip() for answer in example.answer)
            assert example.tools
            " ".join((example.question, *example.answer, example.suite)).encode()


@functools.cache
def _workers() -> Sandbox:
    workers = Sandbox(1, way="limits only")
    atexit.register(workers.close)
    return workers


# --- configuration ---------------------------------------------------------------------------------------------

_VALUES = (
    "0", "1", "-1", "2", "3.5", "1e999", "nan", "inf", "-inf", "", " ", "[/red]", "[bold]", "--steps", "-", "--",
    "None", "True", "1" * 5000, "0x10", "1_000", "٣", "\x00", "\ud800", "\u202e", "tiny", "quick", "cuda:99", "cudax",
    "cuda:", "math", "../..", "a\nb", "{}", "[]", "'", '"', "$(x)", "%s", "{0}", "grpo", "cpu", "exact", "1e-5",
)  # fmt: skip


def config(rng: Random) -> dict[str, Any]:
    """A command line, or the config.json of a run to resume."""
    if rng.random() < 0.4:
        argv = []
        for _ in range(rng.randrange(1, 4)):
            flag = "--" + rng.choice(fields(Config)).name.replace("_", rng.choice("-_"))
            flag = hostile.changed(rng, flag) if rng.random() < 0.1 else flag
            values = [rng.choice((*_VALUES, hostile.text(rng, 1))) for _ in range(rng.choice((0, 1, 1, 1, 1, 2, 3)))]
            argv += [f"{flag}={values[0]}"] if values and rng.random() < 0.2 else [flag, *values]
        return {"argv": argv}
    sound = PRESETS[rng.choice(list(PRESETS))].asdict()
    if rng.random() < 0.3:
        return {"json": hostile.changed(rng, json.dumps(sound))}
    return {"json": json.dumps(hostile.changed_json(rng, sound))}


def check_config(case: dict[str, Any], folder: Path) -> None:
    """A Config of the right types that passes its own checks, or one sentence, or tyro's message."""
    argv = case.get("argv", ["--resume", str(folder)])
    if "json" in case:
        (folder / "config.json").write_text(case["json"], encoding="utf-8", errors="replace")
    out, err = io.StringIO(), io.StringIO()
    end = None
    try:
        with _refusal(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            found = parse(argv)
            check(found)
            for field in fields(Config):
                kept, usual = getattr(found, field.name), getattr(PRESETS["quick"], field.name)
                assert type(kept) is type(usual) or (type(kept), type(usual)) == (int, float), field.name
                assert not isinstance(kept, float) or math.isfinite(kept), field.name
            copy = folder / "copy.json"
            copy.write_text(json.dumps(found.asdict()))
            assert load(str(copy)) == found
    except SystemExit as stop:
        end = stop.code
    assert end is None or (err if end else out).getvalue().strip()


# --- checkpoints -----------------------------------------------------------------------------------------------


@functools.cache
def _files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        tensors = {"adapter": {"w": torch.arange(6.0).view(2, 3), "b": torch.zeros(3, dtype=torch.bfloat16)}}
        state = {"cursor": 3, "rng": [1, [2, 3], None], "text": "ü"}
        path = checkpoint.save(Path(folder), 1, tensors=tensors, state=state, keep=1)
        return {file.name: file.read_bytes() for file in path.iterdir()}


def checkpoints(rng: Random) -> dict[str, str]:
    """The files of a checkpoint, as latin-1, one of them changed; with hashes made right again, or not."""
    files = dict(_files())
    name = rng.choice(list(files))
    if name.endswith(".json") and rng.random() < 0.6:
        changed = hostile.changed_json(rng, json.loads(files[name]))
        files[name] = json.dumps(changed, sort_keys=True, indent=1).encode() + b"\n"
    else:
        files[name] = hostile.changed_bytes(rng, files[name])
        if name.endswith(".safetensors") and rng.random() < 0.5:  # its header, its length right again
            header = hostile.changed_bytes(rng, _files()[name][8:].split(b"}}", 1)[0] + b"}}")
            files[name] = len(header).to_bytes(8, "little") + header + _files()[name][-30:]
    if rng.random() < 0.6:
        with contextlib.suppress(ValueError, TypeError, AttributeError, KeyError, RecursionError):
            manifest = json.loads(files["MANIFEST.json"])
            for other in set(files) - {"MANIFEST.json"} if rng.random() < 0.8 else ():
                digest = hashlib.sha256(files[other]).hexdigest()
                manifest["files"][other] = {"size": len(files[other]), "sha256": digest}
            manifest["sha256"] = checkpoint._digest(manifest)
            files["MANIFEST.json"] = checkpoint._canonical(manifest)
    return {name: content.decode("latin-1") for name, content in files.items()}


def check_checkpoints(case: dict[str, str], folder: Path) -> None:
    """A checkpoint is refused, or every file of it is the one that its sound manifest names."""
    path = folder / "checkpoints" / "step-000001"
    path.mkdir(parents=True, exist_ok=True)
    for name, content in case.items():
        (path / name).write_bytes(content.encode("latin-1"))
    with _refusal():
        found, refused = checkpoint.load(folder)
        assert (found.step, refused) == (1, [])
        assert isinstance(found.state, dict)
        manifest = json.loads(case["MANIFEST.json"].encode("latin-1"))
        assert manifest["sha256"] == checkpoint._digest(manifest)
        for name, entry in manifest["files"].items():
            assert hashlib.sha256(case[name].encode("latin-1")).hexdigest() == entry["sha256"]


TARGETS = {
    "records": Target(records, check_records, share=6),
    "tasks": Target(tasks, check_tasks, share=8),
    "config": Target(config, check_config, share=4),
    "checkpoints": Target(checkpoints, check_checkpoints, share=4),
}
