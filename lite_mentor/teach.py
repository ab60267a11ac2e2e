r"""Fills the teacher's cache: shows every example to a teacher once, and keeps its finished trajectory.

    python -m lite_mentor.teach --suite math --size 2000 --source oracle --out cache/math
    python -m lite_mentor.teach --suite tasks.jsonl --source endpoint --base-url http://localhost:8000/v1 \
        --model MODEL --out cache/tasks

Appends, skips what is there, and may be killed and started again at any time. Where a checker, the judge or a tool's
code has changed, records are judged and their calls run again; the teacher is asked again only where that gives other
results, or where it read other descriptions of the tools. train.py never imports this: it reads the cache. Every
trajectory's calls are executed here and its answer is judged here, whoever the teacher is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.progress import Progress

from lite_mentor.errors import UserError
from lite_mentor.facts import Facts, facts_of
from lite_mentor.judge import boxed, is_right
from lite_mentor.prompt import Chat, parse_turn
from lite_mentor.sandbox import open_sandbox
from lite_mentor.tasks import load_suite, resolve_arguments
from lite_mentor.tasks.jsonl import read_tasks
from lite_mentor.teacher import Manifest, append_to, changed, read_manifest, seal, with_facts
from lite_mentor.template import ASK_FOR_BOX, CALL_CLOSE, CALL_OPEN, json_schema
from lite_mentor.tools import RunCall, caller, render_call
from lite_mentor.types import Example, TeacherRecord, ToolCall

RETRIES = 8
MAX_PROMPT_TOKENS = 2048

Ask = Callable[[Sequence[Example]], Generator[TeacherRecord, None, None]]
"""Asks the teacher -> a record of each example, in any order."""


@dataclass(frozen=True)
class Options:
    """Fill a teacher's cache."""

    out: Path
    """Folder of the cache."""
    suite: str = "math"
    """A built-in suite, or a path to a .jsonl or .parquet file."""
    source: Literal["oracle", "endpoint", "local"] = "oracle"
    """oracle: the built-in tasks' own solutions. endpoint: an OpenAI-compatible server. local: a model run here."""
    split: Literal["train", "validation", "test"] = "train"
    """Of a built-in suite."""
    size: int = 2000
    """Examples of a built-in suite."""
    levels: tuple[int, ...] = ()
    """Difficulties of a built-in suite; none given: all."""
    seed: int = 0
    """Of a built-in suite."""
    student: str = ""
    """local: the model, a folder or a hub id. It answers greedily."""
    base_url: str = ""
    """endpoint: where the server answers; its key is read from OPENAI_API_KEY."""
    model: str = ""
    """endpoint: the model's name there."""
    temperature: float = 0.6
    """endpoint: of the teacher's sampling."""
    max_turns: int = 8
    """endpoint and local: assistant turns in a trajectory."""
    max_new_tokens: int = 2048
    """endpoint: tokens of a turn, 0 to let the server decide. local: tokens of all turns and results together."""
    concurrency: int = 8
    """endpoint and local: examples under way at the same time."""
    requests_per_minute: float = 0.0
    """endpoint: no faster than this; 0 is no limit."""
    sandbox: Literal["on", "off"] = "on"
    """off: tools of yours can read and change your files and use the network."""


def fill(options: Options, examples: Sequence[Example], ask: Ask, run: RunCall) -> None:
    """Append a record of every example that has none yet, or none that still holds (see `renewed`).

    Raises UserError when the folder is another teacher's.
    """
    manifest = Manifest(
        teacher=teacher_name(options),
        source=options.source,
        decoding=decoding(options),
        suite=options.suite,
        command=tuple(command(options)),
    )
    with append_to(options.out, manifest) as cache, Progress(disable=not sys.stdout.isatty()) as progress:
        facts = facts_of(examples)
        todo = {e.key: e for e in examples if e.key not in cache.done or cache.done[e.key].facts != facts[e.key]}
        old = [cache.done[key] for key in todo if key in cache.done]
        for record in old:
            kept = renewed(record, todo[record.example_key], facts[record.example_key], run)
            if kept:
                cache.append(kept)
                del todo[record.example_key]
        if old:
            again = sum(key in cache.done for key in todo)
            what = ", ".join(sorted({word for r in old for word in changed(r.facts, facts[r.example_key])}))
            print(
                f"{options.out}: {len(old)} records were made with {what}; {again} no longer hold and are asked again"
            )
        task = progress.add_task(f"{manifest.teacher} on {options.suite}", total=len(todo))
        try:
            with contextlib.closing(ask(list(todo.values()))) as records:
                for record in records:
                    cache.append(with_facts(record, facts[record.example_key]))
                    progress.advance(task)
        finally:
            cache.publish()
    total, correct = len(cache.done), sum(record.correct for record in cache.done.values())
    print(f"{options.out}: {total} records, {len(todo)} of them new; {correct} correct, {total - correct} rejected")


def renewed(record: TeacherRecord, example: Example, now: Facts, run: RunCall) -> TeacherRecord | None:
    """The record under the facts of now, judged again; None when the teacher must be asked again.

    That is so when it was told of other tools, or when its calls, run again by other code, have other results.
    """
    then = record.facts
    if then.get("tools", now["tools"]) != now["tools"]:
        return None
    if then.get("code") != now["code"]:
        calls: list[ToolCall] = []
        for call in record.calls:
            calls.append(run(call.raw, example, calls))
        if tuple(calls) != record.calls:
            return None
    answer = record.answer or None
    return with_facts(record_of(example, record.teacher, record.messages, record.calls, answer), now)


def teacher_name(options: Options) -> str:
    """Who the records say the teacher is."""
    name = {"oracle": "", "endpoint": options.model, "local": options.student}[options.source]
    return f"{options.source}:{name}" if name else options.source


def decoding(options: Options) -> dict[str, float | str]:
    """The settings that change what the teacher says."""
    if options.source == "oracle":
        return {}
    limits = {"max_turns": options.max_turns, "max_new_tokens": options.max_new_tokens}
    if options.source == "endpoint":
        return {"temperature": options.temperature, **limits}
    chat = chat_of(options)
    return {"temperature": 0.0, **limits, "date": chat.date, "prompt": chat.fingerprint()}


def command(options: Options) -> list[str]:
    """The flags that ask for these options again, but for the folder."""
    words = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name in ("suite", "source") or (field.name != "out" and value != field.default):
            values = value if isinstance(value, tuple) else (value,)
            words += ["--" + field.name.replace("_", "-"), *map(str, values)]
    return words


def record_of(
    example: Example, teacher: str, messages: Sequence[Mapping[str, str]], calls: Sequence[ToolCall], answer: str | None
) -> TeacherRecord:
    """Judge a trajectory that ended with `answer`; None when it ended without one."""
    return seal(
        example_key=example.key,
        teacher=teacher,
        messages=tuple(messages),
        calls=tuple(calls),
        answer=answer or "",
        correct=answer is not None and is_right(example, answer, calls),
    )


# --- oracle ----------------------------------------------------------------------------------------------------


def oracle(example: Example, run: RunCall) -> TeacherRecord:
    """The generator's own solution as a conversation: a thought, a call, its result, and so on to the boxed answer."""
    if "steps" not in example.meta:
        raise UserError(
            f"The oracle needs built-in tasks: example {example.key} of {example.suite} comes without a solution; "
            "use --source endpoint or --source local."
        )
    messages, calls = [], []
    for step in example.meta["steps"]:
        arguments = resolve_arguments(step["arguments"], [call.result for call in calls])
        raw = render_call(step["tool"], arguments)
        call = run(raw, example, calls)
        if call.status != "ok":
            raise ValueError(f"the solution of example {example.key} does not run: {raw} gave {call.result!r}")
        calls.append(call)
        messages.append({"role": "assistant", "content": with_calls(step["thought"], [raw])})
        messages.append({"role": "tool", "content": call.result})
    answer = example.answer[0]
    messages.append({"role": "assistant", "content": example.meta["final"].replace("{answer}", f"\\boxed{{{answer}}}")})
    return record_of(example, "oracle", messages, calls, answer)


def with_calls(text: str, raws: Sequence[str]) -> str:
    """An assistant's turn: what it says, then each call in its tags."""
    return "\n".join([*([text] if text else []), *(f"{CALL_OPEN}{raw}{CALL_CLOSE}" for raw in raws)])


# --- an OpenAI-compatible endpoint -----------------------------------------------------------------------------


class Endpoint:
    """A teacher behind a chat-completions server. Retries and backoff are the client's own."""

    def __init__(self, options: Options, run: RunCall):
        try:
            import openai
        except ImportError as error:
            raise UserError("--source endpoint needs the openai client: pip install 'lite-mentor[teach]'") from error
        if not options.base_url or not options.model:
            raise UserError("--source endpoint needs --base-url and --model.")
        key = os.environ.get("OPENAI_API_KEY") or "none"  # most local servers want none
        self.client = openai.OpenAI(base_url=options.base_url, api_key=key, max_retries=RETRIES, timeout=600)
        self.openai, self.options, self.run = openai, options, run
        self._turnstile, self._next = threading.Lock(), 0.0
        self._answered = False

    def ask_all(self, examples: Sequence[Example]) -> Generator[TeacherRecord, None, None]:
        """Records as they are finished, `concurrency` at a time.

        After a failure nothing more is asked; what was under way is still delivered, and then the failure is raised.
        """
        failures: list[UserError] = []

        def attempt(example: Example) -> TeacherRecord | None:
            if failures:
                return None
            try:
                return self.ask(example)
            except UserError as error:
                failures.append(error)
                return None

        pool = ThreadPoolExecutor(self.options.concurrency)
        try:
            for future in as_completed([pool.submit(attempt, example) for example in examples]):
                record = future.result()
                if record is not None:
                    yield record
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if failures:
            raise failures[0]

    def ask(self, example: Example) -> TeacherRecord:
        """One conversation, until the teacher answers without a call, or may not go on. Raises UserError."""
        asked: list[dict[str, Any]] = [{"role": "user", "content": example.question + ASK_FOR_BOX}]
        messages: list[dict[str, str]] = []
        calls: list[ToolCall] = []
        answer = None
        for _ in range(self.options.max_turns):
            said, complete = self._turn(asked, example)
            if said is None:
                break
            wanted = said.get("tool_calls", ())
            raws = [call_text(call["function"]["name"], call["function"]["arguments"]) for call in wanted]
            messages.append({"role": "assistant", "content": with_calls(said["content"], raws)})
            if not wanted:
                answer = boxed(parse_turn(said["content"]).speech) if complete else None
                break
            asked.append(said)
            for call, raw in zip(wanted, raws, strict=True):
                ran = self.run(raw, example, calls)
                calls.append(ran)
                messages.append({"role": "tool", "content": ran.result})
                asked.append({"role": "tool", "tool_call_id": call["id"], "content": ran.result})
        said_something = messages or [{"role": "assistant", "content": ""}]  # refused at once: a wrong record
        return record_of(example, teacher_name(self.options), said_something, calls, answer)

    def _turn(self, asked: list[dict[str, Any]], example: Example) -> tuple[dict[str, Any] | None, bool]:
        """What `read_turn` says of the next turn; (None, False) when the server will not go on with what it began."""
        limit = {"max_tokens": self.options.max_new_tokens} if self.options.max_new_tokens else {}
        self._wait()
        try:
            completion = self.client.chat.completions.create(
                model=self.options.model,
                messages=asked,
                tools=[json_schema(tool) for tool in example.tools],
                temperature=self.options.temperature,
                **limit,
            )
            turn = read_turn(completion)
            self._answered = True
            return turn
        except self.openai.OpenAIError as error:
            # It outgrew the server's context, or a filter; a server that never answered is not asked rightly.
            if isinstance(error, self.openai.BadRequestError) and (len(asked) > 1 or self._answered):
                print(f"example {example.key} ends early, the server refused its next turn: {error}", file=sys.stderr)
                return None, False
            raise UserError(
                f"The endpoint {self.options.base_url} failed ({type(error).__name__}: {error}); "
                "what it answered is kept: put it right and run the same command again."
            ) from error
        except (AttributeError, IndexError, TypeError, ValueError, RecursionError) as error:
            # The client checks nothing of what it is sent.
            raise UserError(
                f"The endpoint {self.options.base_url} answers, but not as a chat-completions server ({error}); "
                "check --base-url, which mostly ends in /v1."
            ) from error

    def _wait(self) -> None:
        """Space requests evenly over the minute. Retries are the client's, and are spaced by it."""
        if not self.options.requests_per_minute:
            return
        with self._turnstile:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + 60 / self.options.requests_per_minute
        time.sleep(start - now)


def read_turn(completion: Any) -> tuple[dict[str, Any], bool]:
    """The assistant's message as a server takes it back, and whether it was completed instead of being cut off.

    Raises AttributeError, IndexError or TypeError for what is not a chat completion.
    """
    choice = completion.choices[0]
    said: dict[str, Any] = {"role": "assistant", "content": _clean(choice.message.content or "")}
    calls = [
        {
            "id": _clean(call.id),
            "type": "function",
            "function": {"name": _clean(call.function.name), "arguments": _clean(call.function.arguments)},
        }
        for call in choice.message.tool_calls or ()
    ]
    return said | ({"tool_calls": calls} if calls else {}), choice.finish_reason != "length"


def _clean(text: Any) -> str:
    """Text without lone surrogates, which cannot be sent back."""
    if type(text) is not str:
        raise TypeError(f"{text!r:.80} is not text")
    return text.encode("utf-8", "replace").decode("utf-8")


def call_text(name: str, arguments: str) -> str:
    """A call as between call tags, as a teacher writes it; as it came where the arguments are not a JSON object."""
    try:
        parsed = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        parsed = None
    if isinstance(parsed, dict):
        return render_call(name, parsed)
    return f'{{"name": {json.dumps(name)}, "arguments": {arguments}}}'


# --- a model on this machine ------------------------------------------------------------------------------------


def chat_of(options: Options) -> Chat:
    """The local teacher's template; it tells the day on which the cache was begun, also when that goes on later."""
    from lite_mentor.load import load_tokenizer

    if not options.student:
        raise UserError("--source local needs --student: a folder, a hub id, or smollm2-135m.")
    begun = read_manifest(options.out).decoding.get("date", "") if (options.out / "manifest.json").exists() else ""
    return Chat(load_tokenizer(options.student), str(begun))


def local(options: Options, examples: Sequence[Example], run: RunCall) -> Generator[TeacherRecord, None, None]:
    """Greedy episodes of a Hugging Face model, by the engine that students use."""
    from lite_mentor.device import compute_device
    from lite_mentor.engine import Engine, Sampling
    from lite_mentor.load import load_student
    from lite_mentor.rollout import Limits, messages_of, roll_out

    if not examples:
        return
    context = MAX_PROMPT_TOKENS + options.max_new_tokens
    model = load_student(options.student, quant="none", lora_rank=1, device=compute_device(), context=context)
    chat = chat_of(options)
    limits = Limits(options.max_turns, options.max_new_tokens, MAX_PROMPT_TOKENS)
    engine = Engine.of(model, slots=options.concurrency, context=context)
    for start in range(0, len(examples), options.concurrency):
        part = examples[start : start + options.concurrency]
        rollouts = roll_out(
            engine, chat, part, group_size=1, limits=limits, sampling=Sampling(0.0), seed=0, step=0, run_call=run
        )
        for example, rollout in zip(part, rollouts, strict=True):
            yield record_of(example, teacher_name(options), messages_of(chat, rollout), rollout.calls, rollout.answer)


# --- the command line -------------------------------------------------------------------------------------------


def load_examples(options: Options) -> list[Example]:
    """The examples of a built-in suite, or of the user's own file."""
    if options.suite.endswith((".jsonl", ".parquet")):
        return read_tasks(Path(options.suite), quarantine=options.out / "quarantine.jsonl")
    levels = options.levels or None
    return load_suite(options.suite, split=options.split, size=options.size, seed=options.seed, levels=levels)


def check(options: Options) -> None:
    """Raises UserError for a number that makes no sense."""
    least = dict(size=1, max_turns=1, concurrency=1, requests_per_minute=0, temperature=0)
    least["max_new_tokens"] = 1 if options.source == "local" else 0
    for name, limit in least.items():
        if getattr(options, name) < limit:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least {limit}.")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 2 after one sentence; 130 when interrupted."""
    options = tyro.cli(Options, args=argv, prog="python -m lite_mentor.teach")
    try:
        check(options)
        examples = load_examples(options)
        with open_sandbox(options.sandbox) as sandbox:
            if sandbox.way == "limits only":
                print(sandbox.note, file=sys.stderr)
            run = caller(sandbox.call)
            if options.source == "oracle":
                fill(options, examples, lambda todo: (oracle(example, run) for example in todo), run)
            elif options.source == "endpoint":
                fill(options, examples, Endpoint(options, run).ask_all, run)
            else:
                fill(options, examples, lambda todo: local(options, todo, run), run)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what was answered is kept: run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
