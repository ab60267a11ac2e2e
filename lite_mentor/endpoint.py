"""A teacher behind a chat-completions server: it reads many forms, and keeps what a student can follow."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from typing import Any

from lite_mentor.errors import UserError, say
from lite_mentor.judge import boxed
from lite_mentor.prompt import parse_turn
from lite_mentor.teach_options import Options, teacher_name
from lite_mentor.template import ASK_FOR_BOX, json_schema
from lite_mentor.tools import RunCall
from lite_mentor.transcript import Request, calls_in, flaw, record_of, request, with_calls
from lite_mentor.types import Example, TeacherRecord, ToolCall

NO_KEY = "none"
"""What most local servers want."""
RETRIES = 8
REFUSALS = (400, 413, 422)
"""Statuses that are about one conversation: it outgrew the context, met a filter, or has a form that is not taken."""
FAILED, FEW, MANY = 3, 5, 20
"""So many conversations that failed one after the other, that were broken off, or in which no tool was called, are not
the teacher's doing."""
MAX_CALLS = 100
"""In one turn; with more of them, it only repeats itself."""


class BrokenOff(Exception):
    """The server broke a conversation off, or failed at it each time; its record is wrong and says how far it came."""

    def __init__(self, why: str, record: TeacherRecord, *, failed: bool = False):
        super().__init__(why)
        self.record, self.failed = record, failed


class _Refused(Exception):
    """The server will not go on with this conversation."""

    failed = False


class _Failed(_Refused):
    """It could not, or does not permit it: this conversation's doing where it answers others, and else its own."""

    failed = True


class _NoReply(Exception):
    """What came is no chat completion."""


@dataclass(frozen=True)
class Reply:
    """One assistant message, read."""

    content: str
    requests: Sequence[tuple[str, Request]]
    """The calls that the server read, each with its id."""
    thoughts: Mapping[str, Any]
    """What the server says beside the content; some refuse the next turn without it."""
    complete: bool
    """Was it completed, and not cut off at the token limit?"""


class Endpoint:
    """Asks the teacher. Retries and backoff are the client's own."""

    def __init__(self, options: Options, run: RunCall):
        try:
            import openai
        except ImportError as error:
            raise UserError("--source endpoint needs the openai client: pip install 'lite-mentor[teach]'") from error
        if not options.base_url or not options.model:
            raise UserError("--source endpoint needs --base-url and --model.")
        self._key = os.environ.get("OPENAI_API_KEY") or NO_KEY
        if not re.fullmatch(r"[!-~]+", self._key):
            raise UserError(
                "OPENAI_API_KEY holds a space, a line break or another character that no key has; set it again."
            )
        self.client = openai.OpenAI(
            base_url=options.base_url,
            api_key=self._key,
            max_retries=RETRIES,
            timeout=600,
            http_client=openai.DefaultHttpxClient(event_hooks={"response": [_fail_where_it_failed]}),
        )
        self.openai, self.options, self.run = openai, options, run
        self._lock, self._next = threading.Lock(), 0.0
        self._notes: Counter[str] = Counter()

    def ask_all(
        self, examples: Sequence[Example], done: Iterable[TeacherRecord] = ()
    ) -> Generator[TeacherRecord, None, None]:
        """Records as they are finished, `concurrency` at a time; those that are `done` speak for the server.

        After a failure nothing more is asked; what was under way is still delivered, and then the failure is raised.
        An interrupt waits for no answer: these threads die with the process.
        """
        failures: list[UserError] = []
        held = _Held(self.options.base_url, proven=any(_calls_a_tool(record) for record in done))

        def attempt(example: Example) -> TeacherRecord | BrokenOff | None:
            if failures:
                return None
            try:
                return self.ask(example)
            except BrokenOff as end:
                return end
            except UserError as error:
                failures.append(error)
                return None

        with ThreadPool(self.options.concurrency) as pool:
            outcomes = pool.imap_unordered(attempt, examples)
            for done in range(1, len(examples) + 1):
                outcome = _next(outcomes)
                if outcome is not None:
                    yield from held.take(outcome)
                fault = held.fault(under_way=min(self.options.concurrency, len(examples) - done))
                failures += [fault] if fault else []
        for note, count in sorted(self._notes.items()):
            say(f"{note}: {count}", sys.stderr)
        yield from held.rest()
        if failures:
            raise failures[0]
        if held.failed:
            raise UserError(
                f"{len(held.failed)} examples have no record, for the endpoint {self.options.base_url} failed at them "
                f"and then answered no other; the last: {held.last}. Run the same command again; take a row out of the "
                "file at which it fails each time."
            )

    def ask(self, example: Example) -> TeacherRecord:
        """One conversation, until the teacher answers without a call. Raises UserError, and BrokenOff."""
        asked: list[dict[str, Any]] = [{"role": "user", "content": example.question + ASK_FOR_BOX}]
        messages: list[dict[str, str]] = []
        calls: list[ToolCall] = []
        answer = None
        teacher = teacher_name(self.options)
        for _ in range(self.options.max_turns):
            try:
                reply = self._reply(asked, example)
            except _Refused as refusal:
                record = record_of(example, teacher, messages or [_assistant("")], calls, None)
                why = f"example {example.key} ends early, {refusal}"
                raise BrokenOff(why, record, failed=refusal.failed) from refusal
            text, wanted = self._calls_of(reply, example)
            messages.append(_assistant(with_calls(text, [call.raw for _, call in wanted])))
            if not reply.complete:
                self._note("conversations that ended at the token limit of a turn (--max-new-tokens)")
                break
            if len(wanted) > MAX_CALLS:
                self._note(f"conversations that ended at a turn with more than {MAX_CALLS} calls")
                break
            if not wanted:
                answer = boxed(parse_turn(text).speech)
                break
            sent, results = [], []
            for i, (given, call) in enumerate(wanted, len(calls)):
                ran = self.run(call.raw, example, calls)
                calls.append(ran)
                messages.append({"role": "tool", "content": ran.result})
                name = given or f"call{i:05d}"  # of nine letters, which is what the strictest servers ask for
                # Servers parse what comes back, and fail on broken arguments; the result says what was wrong with them.
                arguments = "{}" if ran.status == "bad_json" else json.dumps(call.arguments)
                sent.append({"id": name, "type": "function", "function": {"name": call.name, "arguments": arguments}})
                results.append({"role": "tool", "tool_call_id": name, "content": ran.result})
            if not all(call.name for _, call in wanted):  # broken text, which no server could take back as a call
                break
            # Calls that were left in the text go back as calls too: a tool's result must follow one.
            asked += [{"role": "assistant", "content": text or None, "tool_calls": sent, **reply.thoughts}, *results]
        record = record_of(example, teacher, messages, calls, answer)
        if answer is not None and (why := flaw(example, messages, calls)):
            self._note(f"records that are marked as wrong, for {why}")
        return record

    def _calls_of(self, reply: Reply, example: Example) -> tuple[str, list[tuple[str, Request]]]:
        """What a reply says beside its calls, and its calls with their ids ("" for none); each call is taken once."""
        text, left = calls_in(reply.content, example.tools)
        if reply.requests:
            # Beside calls that the server read stand copies of them, or the remains of its reading.
            read = [(call.name, call.arguments) for _, call in reply.requests[:MAX_CALLS]]
            own = [call for call in left if call.arguments is not None and (call.name, call.arguments) not in read]
            if own != left:
                self._note("turns whose text repeated calls or held remains of some, which were left out")
            left = own
        if left:
            self._note("turns with calls that the server left in the text, which were run")
        found = [*reply.requests, *(("", call) for call in left)]
        return text.strip() if found else text, found

    def _reply(self, asked: list[dict[str, Any]], example: Example) -> Reply:
        """The next turn. Raises UserError and _Refused. What is no chat completion is asked for once more."""
        with contextlib.suppress(_NoReply):
            return self._asked_once(asked, example)
        try:
            return self._asked_once(asked, example)
        except _NoReply as error:
            raise _Failed(
                f"the server answers, but not as a chat-completions server ({error}); check --base-url, which mostly "
                "ends in /v1"
            ) from error

    def _asked_once(self, asked: list[dict[str, Any]], example: Example) -> Reply:
        limit = {"max_tokens": self.options.max_new_tokens} if self.options.max_new_tokens else {}
        self._wait()
        try:
            response = self.client.chat.completions.with_raw_response.create(
                model=self.options.model,
                messages=asked,
                tools=[json_schema(tool) for tool in example.tools],
                temperature=self.options.temperature,
                **limit,
            )
            return read_reply(response.http_response.content)
        except self.openai.OpenAIError as error:
            if getattr(error, "status_code", None) in REFUSALS:
                raise _Refused(f"the server refused its next turn: {self._words_of(error)}") from error
            if isinstance(error, self.openai.PermissionDeniedError):  # of a filter, where others are answered
                raise _Failed(f"the server does not permit it: {self._words_of(error)}") from error
            if isinstance(error, self.openai.InternalServerError):
                raise _Failed(f"the server failed in all {RETRIES + 1} tries: {self._words_of(error)}") from error
            raise UserError(
                f"The endpoint {self.options.base_url} failed ({self._words_of(error)}); "
                "what it answered is kept: put it right and run the same command again."
            ) from error
        except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise _NoReply(f"{type(error).__name__}: {error}") from error

    def _words_of(self, error: Any) -> str:
        """The client's error with the server's words, which the client leaves out where it does not look for them.

        Some servers repeat the key that they refuse, and some send a page.
        """
        body = getattr(error, "body", None)
        words = f"{type(error).__name__}: {error}"
        words += f" - {body!r}" if isinstance(body, dict) and "message" not in body else ""
        return words.replace(self._key, "OPENAI_API_KEY" if self._key != NO_KEY else NO_KEY)[:1000]

    def _note(self, text: str) -> None:
        with self._lock:
            self._notes[text] += 1

    def _wait(self) -> None:
        """Space requests evenly over the minute. Retries are the client's, and are spaced by it."""
        if not self.options.requests_per_minute:
            return
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + 60 / self.options.requests_per_minute
        time.sleep(start - now)


class _Held:
    """Keeps records back while the server may be at fault for them, for what has a record is never asked again."""

    def __init__(self, url: str, *, proven: bool):
        self.url, self.last, self.proven = url, "", proven
        self.passed = self.broken = self.called = self.silent = 0
        self._records: list[TeacherRecord] = []
        self.failed: list[TeacherRecord] = []
        """Of conversations that it failed at since it last answered one: until it does, it may be down."""

    def take(self, outcome: TeacherRecord | BrokenOff) -> list[TeacherRecord]:
        """One conversation's end -> the records that may be kept from now on."""
        broke = isinstance(outcome, BrokenOff)
        record = outcome.record if broke else outcome
        called = _calls_a_tool(record)
        self.broken += broke
        self.passed += not broke
        self.called += called
        self.silent += not broke and not called
        if broke:
            self.last = str(outcome)
            say(self.last, sys.stderr)
            if outcome.failed:
                self.failed.append(record)
                return []
        else:
            self._records += self.failed
            self.failed = []
        if called and not broke:
            return [record, *self._trusted()]
        self._records.append(record)
        return self._trusted()

    def _trusted(self) -> list[TeacherRecord]:
        return self.rest() if (self.called or self.proven) and self.broken <= self.passed else []

    def rest(self) -> list[TeacherRecord]:
        """What was kept back."""
        records, self._records = self._records, []
        return records

    def fault(self, under_way: int) -> UserError | None:
        """What is wrong with the server, where more is than those `under_way` could outweigh by ending well."""
        others = self.passed + under_way
        few = self.broken < FEW and (others or self.proven)
        if len(self.failed) >= FAILED or (self.broken > others and not few):
            why = f"broke off {self.broken} of {self.broken + self.passed} conversations; the last: {self.last}. "
        elif not self.called and not self.proven and self.silent >= MANY + under_way:
            why = (
                f"answered {self.silent} conversations, and no tool was called in them: a student would learn to call "
                "none. Start the server with tool calls switched on, or ask another model; where the first tasks need "
                "no tool, put some that do before them. "
            )
        else:
            return None
        self._records = []
        return UserError(
            f"The endpoint {self.url} {why}What was held back for that has no record: put it right, then run the same "
            "command again."
        )


def _calls_a_tool(record: TeacherRecord) -> bool:
    return any(call.status != "bad_json" for call in record.calls)


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _next(outcomes: Any) -> Any:
    """The next of a pool's results. It wakes now and then: an interrupt at the very start of a wait does not end it."""
    while True:
        with contextlib.suppress(multiprocessing.TimeoutError):
            return outcomes.next(timeout=0.5)


def _fail_where_it_failed(response: Any) -> None:
    """Gateways report a provider's failure under status 200. As a 502 the client tries it again, and quotes it."""
    if response.status_code != 200:
        return
    try:
        body = json.loads(response.read())
    except (ValueError, RecursionError):
        return  # read_reply says what is wrong with it
    if not isinstance(body, dict):
        return
    choices = body.get("choices", ...)
    failed = isinstance(choices, list) and any(isinstance(choice, dict) and choice.get("error") for choice in choices)
    if body.get("error") or choices in (None, []) or failed:
        response.status_code = 502


def read_reply(body: bytes) -> Reply:
    """Read a chat completion. Raises AttributeError, LookupError, TypeError or ValueError for what is none."""
    whole = json.dumps(json.loads(body), ensure_ascii=False)
    choice = json.loads(whole.encode("utf-8", "replace"))["choices"][0]  # half a character cannot be sent back
    message = choice["message"]
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = "".join(part["text"] for part in content if part["type"] == "text")
    requests = []
    for call in message.get("tool_calls") or ():
        name, given = call["function"]["name"], call.get("id")
        if not isinstance(name, str):
            raise TypeError(f"a call's name is {name!r:.80}")
        requests.append((given if isinstance(given, str) else "", request(name, call["function"].get("arguments"))))
    thoughts = {name: message[name] for name in ("reasoning_content", "reasoning") if message.get(name)}
    return Reply(content, requests, thoughts, choice.get("finish_reason") != "length")
