"""Fills the teacher's cache: shows every example to a teacher once, and keeps its finished trajectory.

    python -m lite_mentor.teach --suite math --size 2000 --source oracle --out cache/math
    python -m lite_mentor.teach --suite tasks.jsonl --source endpoint --base-url http://localhost:8000/v1 --model M --out ...

Appends, skips what is there, and may be killed and started again at any time. train.py never imports this: it reads
the cache. Every trajectory's calls are executed here and its answer is judged here, whoever the teacher is.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.progress import Progress

from lite_mentor.errors import UserError
from lite_mentor.judge import boxed, is_correct
from lite_mentor.prompt import ASK_FOR_BOX, CALL_CLOSE, CALL_OPEN, json_schema
from lite_mentor.sandbox import Sandbox
from lite_mentor.tasks import load_suite, resolve_arguments
from lite_mentor.tasks.jsonl import read_tasks
from lite_mentor.teacher import FORMAT, parse_record, read_manifest, render_record, seal
from lite_mentor.tools import render_call, run_call
from lite_mentor.types import Example, TeacherRecord, ToolCall

RunCall = Callable[[str, Example], ToolCall]
Ask = Callable[[Example], TeacherRecord]


@dataclass(frozen=True)
class Options:
    """Fill a teacher's cache."""

    out: Path
    """Folder of the cache."""
    suite: str = "math"
    """A built-in suite, or a path to a .jsonl or .parquet file."""
    source: Literal["oracle", "endpoint", "local"] = "oracle"
    """oracle: the built-in tasks' own solutions. endpoint: an OpenAI-compatible server. local: a model on this machine."""
    split: Literal["train", "validation", "test"] = "train"
    """Of a built-in suite."""
    size: int = 2000
    """Examples of a built-in suite."""
    levels: tuple[int, ...] = ()
    """Difficulties of a built-in suite; none given: all."""
    seed: int = 0
    """Of a built-in suite."""
    model: str = ""
    """endpoint: the model's name there. local: a folder or hub id."""
    base_url: str = ""
    """endpoint: where the server answers; its key is read from OPENAI_API_KEY."""
    temperature: float = 0.6
    """endpoint: of the teacher's sampling."""
    max_turns: int = 8
    """endpoint and local: assistant turns in a trajectory."""
    max_new_tokens: int = 2048
    """endpoint: tokens of a turn. local: of all turns."""
    concurrency: int = 8
    """endpoint: examples in flight."""
    requests_per_minute: float = 0
    """endpoint: no faster than this; 0 is no limit."""


def fill(options: Options, examples: Sequence[Example], ask: Callable[[Sequence[Example]], Iterable[TeacherRecord]]):
    """Append a record for every example that has none yet; then, and only then, the manifest is made to match.

    Raises UserError when the folder holds another teacher's records.
    """
    teacher = teacher_name(options)
    options.out.mkdir(parents=True, exist_ok=True)
    if (options.out / "manifest.json").exists():
        manifest = read_manifest(options.out)
        if (manifest["teacher"], manifest["suite"]) != (teacher, options.suite):
            raise UserError(
                f"{options.out} holds records of {manifest['teacher']} on {manifest['suite']}, not of {teacher} on "
                f"{options.suite}; choose another --out."
            )
    path = options.out / "records.jsonl"
    done = {record.example_key: record.correct for record in repair(path)}
    todo = [example for example in examples if example.key not in done]
    with open(path, "ab") as file, Progress(disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task(f"{teacher} on {options.suite}", total=len(todo))
        for record in ask(todo):
            file.write(render_record(record) + b"\n")
            file.flush()
            done[record.example_key] = record.correct
            progress.advance(task)
        os.fsync(file.fileno())
    write_manifest(options, done)
    print(f"{options.out}: {len(done)} records, {sum(done.values())} correct ({len(todo)} new)")


def repair(path: Path) -> list[TeacherRecord]:
    """The records so far. A last line that a kill cut short is dropped, and said so."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        print(f"{path}: dropped an unfinished last line of {len(content) - len(whole)} bytes", file=sys.stderr)
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    return [parse_record(line, f"{path} line {n}") for n, line in enumerate(whole.splitlines(), 1)]


def write_manifest(options: Options, done: dict[str, bool]) -> None:
    """Describe records.jsonl as it is now, in one rename."""
    manifest = {
        "format": FORMAT,
        "teacher": teacher_name(options),
        "source": options.source,
        "suite": options.suite,
        "decoding": {"temperature": options.temperature, "max_turns": options.max_turns},
        "records": len(done),
        "correct": sum(done.values()),
        "sha256": hashlib.sha256((options.out / "records.jsonl").read_bytes()).hexdigest(),
    }
    temporary = options.out / "manifest.json.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(options.out / "manifest.json")


def teacher_name(options: Options) -> str:
    """Who the manifest says the teacher is."""
    return "oracle" if options.source == "oracle" else f"{options.source}:{options.model}"


def record_of(example: Example, teacher: str, messages: list[dict[str, str]], calls: list[ToolCall]) -> TeacherRecord:
    """Judge a finished trajectory: right only if its last turn boxes an accepted answer."""
    last = messages[-1] if messages else {"role": "", "content": ""}
    answer = boxed(last["content"]) if last["role"] == "assistant" else None
    return seal(
        example_key=example.key,
        teacher=teacher,
        messages=tuple(messages),
        calls=tuple(calls),
        answer=answer or "",
        correct=is_correct(answer, example.answer, example.checker),
    )


# --- oracle ---------------------------------------------------------------------------------------------------------


def oracle(example: Example, run: RunCall) -> TeacherRecord:
    """The generator's own solution as a conversation: a thought, a call, its result, and so on to the boxed answer."""
    if "steps" not in example.meta:
        raise UserError(
            f"Example {example.key} of {example.suite} comes without a solution, so the oracle cannot teach it; "
            "use --source endpoint or --source local."
        )
    messages, calls = [], []
    for step in example.meta["steps"]:
        arguments = resolve_arguments(step["arguments"], [call.result for call in calls])
        raw = render_call(step["tool"], arguments)
        call = run(raw, example)
        thought = step["thought"] + "\n" if step["thought"] else ""
        messages.append({"role": "assistant", "content": f"{thought}{CALL_OPEN}{raw}{CALL_CLOSE}"})
        messages.append({"role": "tool", "content": call.result})
        calls.append(call)
    closing = example.meta.get("final", "{answer}").replace("{answer}", f"\\boxed{{{example.answer[0]}}}")
    messages.append({"role": "assistant", "content": closing})
    return record_of(example, "oracle", messages, calls)


# --- an OpenAI-compatible endpoint ----------------------------------------------------------------------------------


class Endpoint:
    """A teacher behind a chat-completions server. Retries and backoff are the client's own."""

    def __init__(self, options: Options, run: RunCall):
        try:
            from openai import OpenAI
        except ImportError as error:
            raise UserError("--source endpoint needs the openai client: pip install 'lite-mentor[teach]'.") from error
        if not options.base_url or not options.model:
            raise UserError("--source endpoint needs --base-url and --model.")
        key = os.environ.get("OPENAI_API_KEY", "none")
        self.client = OpenAI(base_url=options.base_url, api_key=key, max_retries=8, timeout=600)
        self.options, self.run = options, run
        self._turnstile, self._next = threading.Lock(), 0.0

    def ask_all(self, examples: Sequence[Example]) -> Iterator[TeacherRecord]:
        """Records in the examples' order, `concurrency` at a time."""
        from openai import OpenAIError

        with ThreadPoolExecutor(self.options.concurrency) as pool:
            try:
                yield from pool.map(self.ask, examples)
            except OpenAIError as error:
                pool.shutdown(wait=False, cancel_futures=True)
                raise UserError(
                    f"The endpoint {self.options.base_url} failed ({type(error).__name__}: {error}); what was answered "
                    "before is kept: run the same command again."
                ) from error

    def ask(self, example: Example) -> TeacherRecord:
        """One conversation, until the teacher answers without a call or runs out of turns."""
        asked: list[Any] = [{"role": "user", "content": example.question + ASK_FOR_BOX}]
        messages: list[dict[str, str]] = []
        calls: list[ToolCall] = []
        for _ in range(self.options.max_turns):
            self._wait()
            reply = self.client.chat.completions.create(
                model=self.options.model,
                messages=asked,
                tools=[json_schema(tool) for tool in example.tools],
                temperature=self.options.temperature,
                max_tokens=self.options.max_new_tokens,
            )
            message = reply.choices[0].message
            wanted = message.tool_calls or []
            raws = [f'{{"name": {json.dumps(c.function.name)}, "arguments": {c.function.arguments}}}' for c in wanted]
            parts = [message.content or "", *(f"{CALL_OPEN}{raw}{CALL_CLOSE}" for raw in raws)]
            messages.append({"role": "assistant", "content": "\n".join(part for part in parts if part)})
            if not wanted:
                break
            asked.append(message.model_dump(exclude_none=True))
            for want, raw in zip(wanted, raws, strict=True):
                call = self.run(raw, example)
                calls.append(call)
                messages.append({"role": "tool", "content": call.result})
                asked.append({"role": "tool", "tool_call_id": want.id, "content": call.result})
        return record_of(example, teacher_name(self.options), messages, calls)

    def _wait(self) -> None:
        """Space requests evenly over the minute."""
        if not self.options.requests_per_minute:
            return
        with self._turnstile:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + 60 / self.options.requests_per_minute
        time.sleep(start - now)


# --- a model on this machine ----------------------------------------------------------------------------------------


def local(options: Options, examples: Sequence[Example], run: RunCall) -> Iterator[TeacherRecord]:
    """Greedy episodes of a Hugging Face model, by the engine that students use."""
    import torch

    from lite_mentor.engine import Engine, Sampling
    from lite_mentor.prompt import Chat
    from lite_mentor.rollout import Limits, messages_of, roll_out
    from lite_mentor.student import load_student

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_student(options.model, quant="none", lora_rank=1, device=device)
    chat, batch = Chat(model.tokenizer), 32
    limits = Limits(options.max_turns, options.max_new_tokens, max_prompt_tokens=2048)
    engine = Engine.of(model, slots=batch, context=limits.max_prompt_tokens + limits.max_new_tokens)
    for start in range(0, len(examples), batch):
        part = examples[start : start + batch]
        rollouts = roll_out(
            engine, chat, part, group_size=1, limits=limits, sampling=Sampling(0.0), seed=0, step=0, run_call=run
        )
        for example, rollout in zip(part, rollouts, strict=True):
            yield record_of(example, teacher_name(options), messages_of(chat, rollout), list(rollout.calls))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 and one sentence."""
    options = tyro.cli(Options, args=argv, prog="python -m lite_mentor.teach")
    try:
        if options.suite.endswith((".jsonl", ".parquet")):
            options.out.mkdir(parents=True, exist_ok=True)
            examples = read_tasks(Path(options.suite), quarantine=options.out / "quarantine.jsonl")
        else:
            levels = options.levels or None
            examples = load_suite(
                options.suite, split=options.split, size=options.size, seed=options.seed, levels=levels
            )
        with Sandbox() as sandbox:

            def run(raw: str, example: Example) -> ToolCall:
                return run_call(raw, example.tools, run_path=sandbox.call)

            if options.source == "oracle":
                fill(options, examples, lambda todo: (oracle(example, run) for example in todo))
            elif options.source == "endpoint":
                fill(options, examples, Endpoint(options, run).ask_all)
            else:
                fill(options, examples, lambda todo: local(options, todo, run))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
