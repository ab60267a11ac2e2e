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
import re
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path

import tyro
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from lite_mentor.endpoint import Endpoint
from lite_mentor.errors import UserError, guard_terminal, printable, say
from lite_mentor.facts import Facts, facts_of
from lite_mentor.prompt import Chat
from lite_mentor.sandbox import open_sandbox
from lite_mentor.tasks import Describe, load_suite, resolve_arguments
from lite_mentor.tasks.jsonl import read_tasks
from lite_mentor.teach_options import Options, check, command, teacher_name
from lite_mentor.teacher import Manifest, append_to, changed, read_manifest, with_facts
from lite_mentor.tools import RunCall, caller, render_call
from lite_mentor.transcript import record_of, with_calls
from lite_mentor.types import Example, TeacherRecord, ToolCall

MAX_PROMPT_TOKENS = 2048

Ask = Callable[[Sequence[Example], Sequence[TeacherRecord]], Generator[TeacherRecord, None, None]]
"""Asks the teacher -> a record of each example, in any order; the records that are there speak for the teacher."""


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
    with append_to(options.out, manifest) as cache, _progress() as progress:
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
            say(f"{options.out}: {len(old)} records were made with {what}; {again} no longer hold and are asked again")
        calls: list[int] = []
        task = progress.add_task(printable(f"{manifest.teacher} on {options.suite}"), total=len(todo))
        try:
            with contextlib.closing(ask(list(todo.values()), list(cache.done.values()))) as records:
                for record in records:
                    cache.append(with_facts(record, facts[record.example_key]))
                    calls += [len(record.calls)] if record.correct else []
                    progress.advance(task)
        finally:
            cache.publish()
    if calls and not any(calls) and options.source != "oracle":
        say(f"none of the {len(calls)} correct records calls a tool: a student learns to call none", sys.stderr)
    total, correct = len(cache.done), sum(record.correct for record in cache.done.values())
    say(f"{options.out}: {total} records, {len(todo)} of them new; {correct} correct, {total - correct} rejected")


def _progress() -> Progress:
    """A bar in a terminal. The names beside it are text, in which [bold] means nothing."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), "{task.completed}/{task.total}")
    return Progress(*columns, TimeRemainingColumn(), disable=not sys.stdout.isatty())


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
        if not all(map(_same_call, record.calls, calls)):
            return None
    answer = record.answer or None
    return with_facts(record_of(example, record.teacher, record.messages, record.calls, answer), now)


def _same_call(then: ToolCall, now: ToolCall) -> bool:
    """A time limit that was met says nothing of a tool; a local teacher's long results were cut."""
    clipped = re.fullmatch(r"(.*)\.\.\. \[[0-9]+ more tokens\]", then.result, re.DOTALL)
    same_result = then.result == now.result or (clipped is not None and now.result.startswith(clipped[1]))
    return "timeout" in (then.status, now.status) or (same_result and replace(then, result=now.result) == now)


def decoding(options: Options) -> dict[str, float | str]:
    """The settings that change what the teacher says."""
    if options.source == "oracle":
        return {}
    limits = {"max_turns": options.max_turns, "max_new_tokens": options.max_new_tokens}
    if options.source == "endpoint":
        return {"temperature": options.temperature, **limits}
    chat = chat_of(options)
    return {"temperature": 0.0, **limits, "date": chat.date, "prompt": chat.fingerprint()}


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


def load_examples(options: Options, describe: Describe) -> list[Example]:
    """The examples of a built-in suite, or of the user's own file."""
    if options.suite.endswith((".jsonl", ".parquet")):
        return read_tasks(Path(options.suite), quarantine=options.out / "quarantine.jsonl", describe=describe)
    levels = options.levels or None
    return load_suite(options.suite, split=options.split, size=options.size, seed=options.seed, levels=levels)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 2 after one sentence; 130 when interrupted."""
    guard_terminal()
    options = tyro.cli(Options, args=argv, prog="python -m lite_mentor.teach")
    try:
        check(options)
        with open_sandbox(options.sandbox) as sandbox:
            examples = load_examples(options, sandbox.describe)
            if sandbox.way == "limits only":
                say(sandbox.note, sys.stderr)
            run = caller(sandbox.call)
            if options.source == "oracle":
                fill(options, examples, lambda todo, _: (oracle(example, run) for example in todo), run)
            elif options.source == "endpoint":
                fill(options, examples, Endpoint(options, run).ask_all, run)
            else:
                fill(options, examples, lambda todo, _: local(options, todo, run), run)
    except UserError as error:
        say(f"error: {error}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("stopped; finished records are kept: run the same command again to go on", sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
