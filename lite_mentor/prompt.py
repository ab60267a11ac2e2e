"""The border between text and tokens: messages -> ids, tool results -> suffix ids, sampled text -> calls and answer.

Tokens in, tokens out: what the student sampled is never encoded again. A prompt is encoded once; a tool's result is
encoded once, as the suffix that the chat template would put after the turn, and appended.

Text that is not ours (questions, tools, their results) can never become a special token, nor open or close a turn, a
call or a result. The template is rendered around placeholders, and only its own words are encoded with special tokens
switched on. Where outside text spells such a mark it is encoded in two parts: it reads the same, in other tokens.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lite_mentor.errors import UserError
from lite_mentor.tools import MAX_CALL_CHARS, signature
from lite_mentor.types import Example, ToolSpec

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
RESULT_OPEN, RESULT_CLOSE = "<tool_response>", "</tool_response>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

# Private-use characters: no tokenizer's template treats them specially, and in outside text they are broken.
_SLOT = "\ue000{}\ue001"
_SLOT_PATTERN = re.compile("\ue000([0-9]+)\ue001")
_BREAK = "\udead"
"""Text is encoded in parts between these: half a character, so that outside text cannot hold it (see _inert)."""

_SYSTEM = (
    "You solve problems by calling tools. To call one, write "
    f'{CALL_OPEN}{{"name": ..., "arguments": {{...}}}}{CALL_CLOSE} and stop; its result comes back. '
    "Give the final answer as \\boxed{answer}.\nTools:\n"
)
ASK_FOR_BOX = "\n\nUse the tools, then put the final answer in \\boxed{}."


@dataclass(frozen=True)
class Turn:
    """What one assistant turn says. Its thoughts, all that stands before the last `</think>`, say nothing."""

    calls: tuple[str, ...]
    """The text after each opening call tag, up to the next tag that is not inside its JSON, or to the end."""
    speech: str
    """All that is said; a thought that never closes is not."""


class Chat:
    """Encodes the conversation of one tokenizer's chat template, append-only."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: str = ""):
        """`date`, as 2026-12-01, is what a template is told that asks for the day; "" is today."""
        if not tokenizer.chat_template:
            raise UserError(
                f"The tokenizer of {tokenizer.name_or_path} has no chat template; use an instruct model, "
                "or add a chat_template to its tokenizer_config.json."
            )
        self.tokenizer = tokenizer
        self.date = date or str(datetime.date.today())
        self._special = frozenset(tokenizer.all_special_ids) | {
            i for i, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        marks = self._marks()
        self._breaks = _breaks_of(marks | {CALL_OPEN, CALL_CLOSE})
        self._breaks_of_turns = _breaks_of(marks - {CALL_OPEN, CALL_CLOSE})
        probe = [{"role": "user", "content": "x"}]
        schema = json_schema(ToolSpec("probe_tool", "probes", {"type": "object", "properties": {}}))
        with_tools = self._render(probe, tools=[schema], generate=True)
        self.native_tools = "probe_tool" in with_tools
        """Does the template itself describe tools? Else our system prompt does."""
        self.end_id = self._after_turn(["x"])[0]
        """The token by which the template closes an assistant turn; the tokenizer's `eos_token` may be another."""

    def prompt_ids(self, example: Example) -> list[int]:
        """The conversation up to the point where the student speaks."""
        if self.native_tools:
            tools = [self._guarded(json_schema(tool)) for tool in example.tools]
            messages, slots = [_slot("user", 0)], [self._guard(example.question) + ASK_FOR_BOX]
        else:
            tools = None
            system = _SYSTEM + self._guard("\n".join(signature(tool) for tool in example.tools))
            messages, slots = [_slot("system", 0), _slot("user", 1)], [system, self._guard(example.question)]
        return self._encode(self._render(messages, tools=tools, generate=True), slots)

    def result_ids(self, results: Sequence[str]) -> list[int]:
        """What follows an assistant turn that `end_id` closed: the results, and the opening of the next turn."""
        return self._after_turn(results)[1:]

    def _after_turn(self, results: Sequence[str]) -> list[int]:
        """What the template writes after an assistant turn's text: first the token that closes it."""
        messages = [_slot("user", 0), _slot("assistant", 1)]
        results = [self._guard(result) for result in results]
        if self.native_tools:
            messages += [_slot("tool", 2 + i) for i in range(len(results))]
            slots = results
        else:
            messages.append(_slot("user", 2))
            slots = ["\n".join(f"{RESULT_OPEN}{result}{RESULT_CLOSE}" for result in results)]
        rendered = self._render(messages, tools=None, generate=True)
        suffix = rendered.split(_SLOT.format(1), 1)[1]
        ids = self._encode(suffix, ["", "", *slots])
        if not ids or ids[0] not in self._special:
            raise UserError(
                f"The chat template of {self.tokenizer.name_or_path} does not close an assistant turn with a special "
                "token, so turns cannot be appended; use another student."
            )
        return ids

    def clipped(self, result: str, tokens: int) -> str:
        """A tool's result, or its first `tokens` tokens and how many more there were."""
        ids = self._plain(self._guard(result))
        if len(ids) <= tokens:
            return result
        kept = self.decode(ids[:tokens]).rstrip("\ufffd")  # a character may be cut in the middle
        return f"{kept}... [{len(ids) - tokens} more tokens]"

    def turn_ids(self, text: str) -> list[int]:
        """A teacher's assistant turn as tokens, closed as the template closes it."""
        return [*self._plain(self._breaks_of_turns.sub(_broken, _inert(text))), self.end_id]

    def fingerprint(self) -> str:
        """Hash of the tokens that template, tokenizer and date make of a small conversation."""
        schema = {"type": "object", "properties": {"x": {"type": "number", "description": "how much"}}}
        tools = (ToolSpec("probe", "Probes 3 things.", schema), ToolSpec("other", "Does more.", schema))
        example = Example("", "What is 12 times 3.5?", ("42",), tools, "math", "")
        turns = [self.prompt_ids(example), self.turn_ids("Let me see."), self.result_ids(["42"]), self.result_ids("ab")]
        return hashlib.sha256(repr(turns).encode()).hexdigest()[:16]

    def decode(self, ids: Sequence[int]) -> str:
        """Tokens as text, special tokens shown."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def _render(self, messages: list[dict[str, str]], *, tools, generate: bool) -> str:
        template = _on(self.date, self.tokenizer.get_chat_template(tools=tools))
        return self.tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=template, add_generation_prompt=generate, tokenize=False
        )

    def _encode(self, rendered: str, slots: Sequence[str]) -> list[int]:
        """Encode template text with special tokens, and each slot's content without."""
        ids: list[int] = []
        for i, piece in enumerate(_SLOT_PATTERN.split(rendered)):
            if i % 2:
                ids += self._plain(slots[int(piece)].strip())
            else:  # with breaks in it where a template wrote tools into its own text
                for part in filter(None, piece.split(_BREAK)):
                    ids += self.tokenizer.encode(part, add_special_tokens=False)
        return ids

    def _plain(self, guarded: str) -> list[int]:
        parts = [part for part in guarded.split(_BREAK) if part]
        ids = [i for p in parts for i in self.tokenizer.encode(p, add_special_tokens=False, split_special_tokens=True)]
        assert not self._special.intersection(ids), "outside text was encoded as a special token"
        return ids

    def _guard(self, text: str) -> str:
        """Outside text with a break in every mark that it spells; nearly always the text itself."""
        return self._breaks.sub(_broken, _inert(text))

    def _guarded(self, schema: Any) -> Any:
        """A tool's description, every text in it guarded: the template, which knows tools, writes them itself."""
        if isinstance(schema, dict):
            return {self._guarded(key): self._guarded(value) for key, value in schema.items()}
        if isinstance(schema, (list, tuple)):
            return [self._guarded(value) for value in schema]
        return self._guard(schema) if isinstance(schema, str) else schema

    def _marks(self) -> set[str]:
        """What outside text must not say in one token: special tokens, our tags, and what the template's turns add."""
        added = self.tokenizer.added_tokens_decoder
        messages = [_slot("user", 0), _slot("assistant", 1), _slot("user", 2)]
        frame = _SLOT_PATTERN.sub(_BREAK, self._render(messages, tools=None, generate=True)).split(_BREAK)
        used = {i for part in frame for i in self.tokenizer.encode(part, add_special_tokens=False)}
        names = {added[i].content for i in used & set(added)} | {t.content for t in added.values() if t.special}
        return names | {*self.tokenizer.all_special_tokens, RESULT_OPEN, RESULT_CLOSE}


def parse_turn(text: str) -> Turn:
    """Find the tool calls in one sampled turn. Linear in the text, total on any text."""
    calls: list[str] = []
    start, at, end = 0, 0, len(text)
    while tag := _TAG.search(text, at):
        at = tag.end()
        if tag[0] == THINK_CLOSE:
            calls, start = [], at
        elif tag[0] == THINK_OPEN:
            at = text.find(THINK_CLOSE, at)
            if at < 0:
                end = tag.start()
                break
        elif tag[0] == CALL_OPEN:
            following = _TAG.search(text, _end_of_json(text, at))
            stop = following.start() if following else len(text)
            calls.append(text[at:stop])
            at = stop
    return Turn(tuple(calls), text[start:end])


_TAG = re.compile("|".join((CALL_OPEN, CALL_CLOSE, THINK_OPEN, THINK_CLOSE)))
_BRACE = re.compile(r"\s*\{")
_JSON = json.JSONDecoder()


def _end_of_json(text: str, start: int) -> int:
    """Where the JSON object that begins here ends, for a string in it may hold a tag; `start` where there is none."""
    brace = _BRACE.match(text, start)
    if not brace:
        return start
    first = brace.end() - 1
    try:
        return first + _JSON.raw_decode(text[first : first + MAX_CALL_CHARS])[1]
    except (ValueError, RecursionError):
        return start


def _on(date: str, template: str) -> str:
    """The template, its clock stopped at the beginning of this day: a template is handed no functions, so by a macro.

    The line break after the macro belongs to it, and what the template itself begins with stays as it is.
    """
    if "strftime_now" not in template:
        return template
    day = datetime.datetime.fromisoformat(date)
    told = {f"%{letter}": day.strftime(f"%{letter}") for letter in "aAbBcdfGHIjmMpSuUVwWxXyYzZ"}
    told |= {"%-d": f"{day.day}", "%e": f"{day.day:2}", "%-m": f"{day.month}", "%F": date}
    told |= {"%D": day.strftime("%m/%d/%y"), "%T": "00:00:00", "%R": "00:00", "%%": "%"}
    steps = "".join(f"|replace('{directive}', '{text}')" for directive, text in told.items())
    return f"{{% macro strftime_now(format) %}}{{{{ format{steps} }}}}{{% endmacro %}}\n{template}"


def _slot(role: str, index: int) -> dict[str, str]:
    return {"role": role, "content": _SLOT.format(index)}


def _breaks_of(marks: Iterable[str]) -> re.Pattern[str]:
    """The first character of each of these marks, and of a slot."""
    firsts = [f"{re.escape(mark[0])}(?={re.escape(mark[1:])})" for mark in sorted(marks) if len(mark) > 1]
    return re.compile("|".join([*firsts, _SLOT[0]]))


def _broken(first: re.Match[str]) -> str:
    return first[0] + _BREAK


def _inert(text: str) -> str:
    """Outside text without lone surrogates (which no tokenizer can encode)."""
    return text.encode("utf-8", "replace").decode("utf-8")


def json_schema(tool: ToolSpec) -> dict:
    """A tool as chat templates and chat-completions servers expect it."""
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}
