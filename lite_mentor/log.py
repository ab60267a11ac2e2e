"""What a run writes while it runs, and how it is read back: its settings, and lines of JSON.

    config.json      the settings that were used, every field
    metrics.jsonl    one object a step
    rollouts.jsonl   the best and the worst rollout of each group, as text, with every term
    eval.jsonl       one object for each evaluation and suite

A line is written whole or not at all, and a number that is not finite is written as null.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lite_mentor.config import is_config
from lite_mentor.display import Display
from lite_mentor.errors import UserError
from lite_mentor.files import append, open_file, read_file, replace_file
from lite_mentor.types import Example, Rollout, Scored

LINES = ("metrics.jsonl", "rollouts.jsonl", "eval.jsonl")


class RunLog:
    """The files and the display of one run; a context manager.

    Raises UserError when `out` holds another run (unless `resume`), or when a line cannot be written.
    """

    def __init__(
        self, out: Path, config: Mapping[str, Any], total_steps: int, quiet: bool = False, *, resume: bool = False
    ) -> None:
        self.out = Path(out)
        with self._writing():
            self.out.mkdir(parents=True, exist_ok=True)
            taken = [name for name in LINES if (self.out / name).exists() and (self.out / name).stat().st_size]
            taken += ["checkpoints"] * (self.out / "checkpoints").exists()
            if (self.out / "config.json").exists() and not is_config(self.out / "config.json"):
                taken.append("config.json")  # somebody else's; one of ours alone is of a start that failed
            if taken and not resume:
                raise UserError(
                    f"{self.out} already holds a run ({taken[0]}); choose another --out, "
                    f"or continue that run with --resume {self.out}."
                )
            self._config = _line(config, indent=1)
            if not resume:
                self._write_config()
            self._files = {name: self._open(name) for name in LINES}
            self._tracker = _tensorboard(self.out) if config.get("track") == "tensorboard" else None
        self._sha256 = {name: hashlib.sha256() for name in LINES}
        """Of what is in the files, once `rewind` has read them."""
        self._display = Display(config, total_steps, quiet)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def decided(self, config: Mapping[str, Any]) -> None:
        """Take the settings again, once one that was left to the device is decided; `rewind` writes them down."""
        self._config = _line(config, indent=1)

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Write and show one step. `metrics` has at least step (from 0) and phase ("sft" or "rl")."""
        self._append("metrics.jsonl", metrics)
        with self._writing():
            for name, value in metrics.items() if self._tracker else ():
                if isinstance(value, (int, float)):
                    self._tracker.add_scalar(f"{metrics['phase']}/{name}", value, metrics["step"])
        self._display.step(metrics)

    def rollouts(
        self,
        step: int,
        scored: Sequence[Scored],
        examples: Mapping[str, Example],
        decode: Callable[[list[int]], str],
    ) -> None:
        """Write the best and the worst rollout of each group; one line for a group in which all rewards are equal."""
        by_group = itertools.groupby(sorted(scored, key=lambda s: s.rollout.group), key=lambda s: s.rollout.group)
        for _, members in by_group:
            ranked = sorted(
                (s for s in members if s.reward is not None and math.isfinite(s.reward)), key=lambda s: -s.reward
            )
            ends = ranked[:1] + [s for s in ranked[-1:] if s.reward < ranked[0].reward]
            for chosen in ends:
                example, rollout = examples[chosen.rollout.example_key], chosen.rollout
                row = {
                    "step": step, "group": rollout.group, "index": rollout.index, "example_key": example.key,
                    "question": example.question, "answer": list(example.answer), "stop": rollout.stop,
                    "reward": chosen.reward, "advantage": chosen.advantage, "terms": dict(chosen.terms),
                    "segments": segments(rollout, decode),
                }  # fmt: skip
                self._append("rollouts.jsonl", row)

    def evaluation(self, step: int, name: str, suite: str, result: Mapping[str, Any]) -> None:
        """Write and show the evaluation `name` (base, cold_start, final, ...) of one suite after `step` steps."""
        self._append("eval.jsonl", {"step": step, "name": name, "suite": suite, **result})
        self._display.evaluation(name, suite, result)

    def earlier_evaluation(self, name: str, suite: str) -> dict[str, Any] | None:
        """The latest row of eval.jsonl with this name and suite, from this process or one before it; None if none."""
        rows = [row for row in self._evaluations() if (row["name"], row["suite"]) == (name, suite)]
        return rows[-1] if rows else None

    def best_step(self, suite: str) -> int | None:
        """After how many steps the suite was answered best so far; of equals the latest; None without evaluations."""
        rows = [row for row in self._evaluations() if row["suite"] == suite]
        return max((row["accuracy"], row["step"]) for row in rows)[1] if rows else None

    def note(self, text: str) -> None:
        """Show a sentence about what the run is doing."""
        self._display.note(text)

    def position(self) -> dict[str, dict[str, Any]]:
        """How far each file of lines has been written, durably: to be kept in a checkpoint, for `rewind`."""
        with self._writing():
            for file in self._files.values():
                os.fsync(file.fileno())
            sizes = {name: os.fstat(file.fileno()).st_size for name, file in self._files.items()}
        return {name: {"bytes": sizes[name], "sha256": self._sha256[name].hexdigest()} for name in LINES}

    def damaged(self, position: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """The files whose bytes up to `position` are not those that were written."""
        with self._writing():
            contents = {name: read_file(self.out / name, follow=False)[: position[name]["bytes"]] for name in LINES}
        return [name for name in LINES if hashlib.sha256(contents[name]).hexdigest() != position[name]["sha256"]]

    def holds_rl_steps(self) -> bool:
        """Has this run taken RL steps, as far as metrics.jsonl says? Then it has saved at least once."""
        with self._writing():
            return b'"phase": "rl"' in read_file(self.out / "metrics.jsonl", follow=False)

    def set_aside(self, name: str) -> Path:
        """Go on with a file of no lines; the one that is there is kept beside it, under the name that is returned."""
        path = self.out / f"{name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}"
        with self._writing():
            self._files[name].close()
            (self.out / name).rename(path)
            self._files[name] = self._open(name)
        return path

    def rewind(self, position: Mapping[str, Mapping[str, Any]]) -> None:
        """Drop what was written after `position` (of the checkpoint that is resumed; {}: everything).

        Steps that will be taken again are then not doubled, and neither is a line that a kill cut short. Only now, when
        the run does go on, are its settings written down: one that is refused leaves the folder as it was.
        """
        with self._writing():
            contents = {
                name: read_file(self.out / name, follow=False)[: position[name]["bytes"] if position else 0]
                for name in LINES
            }
        self._display.history = _rows(self.out / "metrics.jsonl", contents["metrics.jsonl"], _METRICS)
        with self._writing():
            self._write_config()
            for name, file in self._files.items():
                self._sha256[name] = hashlib.sha256(contents[name])
                file.truncate(len(contents[name]))

    def close(self) -> None:
        """Leave the last state of the display standing, and close the files."""
        self._display.close()
        with self._writing():
            if self._tracker:
                self._tracker.close()
            for file in self._files.values():
                file.close()

    def _open(self, name: str) -> BinaryIO:
        return open_file(self.out / name, "ab", follow=False)

    def _evaluations(self) -> list[dict[str, Any]]:
        path = self.out / "eval.jsonl"
        with self._writing():
            content = read_file(path, follow=False)
        return _rows(path, content, _EVALUATION)

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        file, line = self._files[name], _line(row)
        with self._writing():
            append(file, line)
        self._sha256[name].update(line)

    def _write_config(self) -> None:
        replace_file(self.out / "config.json", self._config)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"The run's folder {self.out} cannot be written ({error.strerror or error}); "
                "make room or rights there, or choose another --out."
            ) from error


def _tensorboard(out: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--track tensorboard needs its package: pip install 'lite-mentor[track]'.") from error
    return SummaryWriter(str(out / "tensorboard"))


def segments(rollout: Rollout, decode: Callable[[list[int]], str]) -> list[dict]:
    """The text after the prompt, cut where the student's own tokens and injected ones meet."""
    ids, sampled = rollout.ids[rollout.prompt_length :].tolist(), rollout.sampled[rollout.prompt_length :].tolist()
    runs = itertools.groupby(zip(ids, sampled, strict=True), key=lambda pair: pair[1])
    return [{"sampled": own, "text": decode([token for token, _ in run])} for own, run in runs]


def _finite(value: Any) -> Any:
    """The same value with None for each number that JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def _line(row: Mapping[str, Any], indent: int | None = None) -> bytes:
    # Half a surrogate pair, which a student can sample, has no UTF-8; backslashreplace turns it into JSON's own escape.
    text = json.dumps(_finite(row), ensure_ascii=False, allow_nan=False, indent=indent)
    return text.encode("utf-8", "backslashreplace") + b"\n"


@dataclass(frozen=True)
class RunFiles:
    """A run's files, read and checked."""

    config: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    rollouts: Sequence[Mapping[str, Any]]
    date: str
    """When the last metrics were written, in local time."""


def read_run(run: Path) -> RunFiles:
    """Read what `RunLog` wrote. A last line that a kill cut short is left out; any other damage is a UserError."""
    return RunFiles(
        config=_parse(run / "config.json", _content(run / "config.json"), {}),
        metrics=_rows(run / "metrics.jsonl", _content(run / "metrics.jsonl"), _METRICS),
        evaluations=_rows(run / "eval.jsonl", _content(run / "eval.jsonl"), _EVALUATION),
        rollouts=_rows(run / "rollouts.jsonl", _content(run / "rollouts.jsonl"), _ROLLOUT),
        date=time.strftime("%Y-%m-%d %H:%M", time.localtime((run / "metrics.jsonl").stat().st_mtime)),
    )


def _rows(path: Path, content: bytes, fields: Fields) -> list[dict]:
    """The whole lines of a file of that content."""
    lines = content.split(b"\n")[:-1]
    return [_parse(f"{path}, line {i}", line, fields) for i, line in enumerate(lines, 1)]


def _content(path: Path) -> bytes:
    try:
        return read_file(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); give the folder of a run, which holds config.json, "
            "metrics.jsonl, eval.jsonl and rollouts.jsonl."
        ) from error


def _parse(where: Path | str, text: bytes, fields: Fields) -> dict:
    try:
        row = json.loads(text.decode("utf-8", "replace"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is damaged (not JSON: {error}); restore it, or delete the line.") from error
    if not isinstance(row, dict):
        raise UserError(f"{where} is damaged (not an object); restore it, or delete the line.")
    wrong = unsound(row, fields)
    if wrong:
        raise UserError(f"{where} is damaged (see {', '.join(wrong)[:80]}); restore it, or delete the line.")
    return row


def unsound(row: Mapping[str, Any], fields: Fields) -> list[str]:
    """The names of the fields that a reader cannot take. Of an evaluation, each example has one count."""
    rest = fields.get(None, lambda value: True)
    wrong = [name for name in {**fields, **row} if name is not None and not fields.get(name, rest)(row.get(name))]
    if not wrong and "correct" in fields and len(row["correct"]) != len(row["keys"]):
        return ["correct", "keys"]
    return wrong


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_number(value: Any) -> bool:
    """Is this a finite number? (An integer of JSON may exceed what a float can hold.)"""
    return isinstance(value, (int, float)) and abs(value) < 1e300


def _is_list(of: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and length in (None, len(value)) and all(map(of, value))


def _is_measured(value: Any) -> bool:
    return value is None or is_number(value)


def _is_terms(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_measured, value.values()))


def _is_segment(value: Any) -> bool:
    return isinstance(value, dict) and _is_text(value.get("text")) and isinstance(value.get("sampled"), bool)


Fields = Mapping[str | None, Callable[[Any], bool]]
"""What a reader needs of a line, and how to know that it is sound; at None, of every other field that it has."""
_METRICS: Fields = {"step": is_number, "phase": lambda value: value in ("sft", "rl"), None: _is_measured}
RESULT: Fields = {
    "name": _is_text, "suite": _is_text, "n": is_number, "accuracy": is_number, "ci95": _is_list(is_number, 2),
    "correct": _is_list(is_number), "keys": _is_list(_is_text),
}  # fmt: skip
_EVALUATION: Fields = {"step": is_number, **RESULT}
_ROLLOUT: Fields = {
    "step": is_number, "reward": is_number, "terms": _is_terms, "question": _is_text, "answer": _is_list(_is_text),
    "stop": _is_text, "segments": _is_list(_is_segment),
}  # fmt: skip


class Stopwatch:
    """Seconds by stage. Stages may nest (tools within rollout); on CUDA a stage ends when its kernels have."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to the stage `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            with self._lock:  # tools run in threads
                self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with its calls timed as the stage `name`; of calls side by side, the sum."""

        def call(*args, **kwargs):
            with self.stage(name):
                return function(*args, **kwargs)

        return call

    def lap(self) -> dict[str, float]:
        """`time/<stage>` and `time/step` since the last lap, in seconds; starts the next one."""
        now = time.perf_counter()
        out = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        out["time/step"] = now - self._start
        self._seconds, self._start = {}, now
        return out


def peak_memory_bytes(device: torch.device | str) -> int | None:
    """The most memory so far: allocated by torch on CUDA, else resident in the process; None where unmeasurable."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reserved_memory_bytes(device: torch.device | str) -> int | None:
    """The most of a GPU's memory in use so far, which is what its size must hold; None on a CPU.

    That is what torch reserved at its peak, and all that is in use beside it now: the CUDA context, loaded kernels, and
    other processes where there are any.
    """
    if torch.device(device).type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device) + torch.cuda.max_memory_reserved(device)
