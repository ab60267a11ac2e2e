"""The border between text and tokens: messages -> ids, tool results -> suffix ids, sampled text -> calls and answer.

Tokens in, tokens out: what the student sampled is never encoded again. A prompt is encoded once; a tool's result is
encoded once, as the suffix that the chat template would put after the turn, and appended.

Text that is not ours (questions, tools, their results) can never become a special token, nor open or close a turn, a
call, a result or a thought. Where it spells such a mark it is encoded in two parts: it reads the same, in other tokens.
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
from lite_mentor.template import (
    CALL_CLOSE,
    CALL_OPEN,
    RESULT_CLOSE,
    RESULT_OPEN,
    SLOT,
    THINK_CLOSE,
    THINK_OPEN,
    Template,
    fill,
    json_schema,
    split,
)
from lite_mentor.tools import MAX_CALL_CHARS, signature
from lite_mentor.types import Example, ToolSpec

_BREAK = "\udead"
"""Text is encoded in parts between these: half a character, so that outside text cannot hold it (see _inert)."""


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
        self.tokenizer = tokenizer
        self.date = date or str(datetime.date.today())
        self.template = Template(tokenizer, self.date)
        added = tokenizer.added_tokens_decoder
        self._special = frozenset(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
        marks = self._marks()
        self._mark_ids = self._special | {i for i, token in added.items() if token.content in marks}
        self._breaks = _breaks_of(marks)
        self._breaks_of_turns = _breaks_of(marks - {CALL_OPEN, CALL_CLOSE, THINK_OPEN, THINK_CLOSE})
        self.end_id = self._after_turn(["x"])[0]
        """The token by which the template closes an assistant turn; the tokenizer's `eos_token` may be another."""

    def prompt_ids(self, example: Example) -> list[int]:
        """The conversation up to the point where the student speaks."""
        tools = [self._guarded(json_schema(tool)) for tool in example.tools]
        described = "\n".join(signature(tool) for tool in example.tools)
        rendered = self.template.prompt(tools).replace(repr(_BREAK)[1:-1], _BREAK)  # of templates that print a dict
        return self._encode(rendered, [example.question, described])

    def result_ids(self, results: Sequence[str]) -> list[int]:
        """What follows an assistant turn that `end_id` closed: the results, and the opening of the next turn."""
        return self._after_turn(results)[1:]

    def _after_turn(self, results: Sequence[str]) -> list[int]:
        """What the template writes after an assistant turn's text: first the token that closes it."""
        ids = self._encode(self.template.results(len(results)), results)
        if not ids or ids[0] not in self._special:
            raise UserError(
                "The student's chat template does not close an assistant turn with a special token, so turns cannot be "
                "appended; use another student."
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
        """A teacher's assistant turn as tokens, led in and closed as the template does it."""
        lead = "" if text.startswith(self.template.lead) else self.template.lead
        return [*self._plain(self._breaks_of_turns.sub(_broken, _inert(lead + text))), self.end_id]

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

    def _encode(self, rendered: str, texts: Sequence[str]) -> list[int]:
        """Encode a rendered template with these outside texts in its slots.

        It is read as one text, for its tokens may reach over the borders of a slot as they do in the template's own
        rendering. Should a mark come of that which the template has not written, slots are encoded by themselves.
        """
        slots = [self._guard(text).strip() for text in texts]
        marks = self._marks_in(self._tokens(fill(rendered, ["x"] * len(slots))))
        ids = self._tokens(fill(rendered, slots))
        if self._marks_in(ids) == marks:
            return ids
        parts = enumerate(split(rendered))
        return [i for n, part in parts for i in (self._plain(slots[int(part)]) if n % 2 else self._tokens(part))]

    def _marks_in(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if i in self._mark_ids]

    def _tokens(self, text: str, *, plain: bool = False) -> list[int]:
        """The text's tokens, each part between breaks by itself; if plain, none of them is a special token."""
        parts = [part for part in text.split(_BREAK) if part]
        ids = [self.tokenizer.encode(p, add_special_tokens=False, split_special_tokens=plain) for p in parts]
        return [i for part in ids for i in part]

    def _plain(self, guarded: str) -> list[int]:
        ids = self._tokens(guarded, plain=True)
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
        frame = split(self.template.turns() + self.template.results(1))[::2]
        used = {i for part in frame for i in self._tokens(part)}
        names = {added[i].content for i in used & set(added) if added[i].content.strip()}
        names |= {token.content for token in added.values() if token.special}
        tags = {CALL_OPEN, CALL_CLOSE, RESULT_OPEN, RESULT_CLOSE, THINK_OPEN, THINK_CLOSE}
        return names | tags | {*self.tokenizer.all_special_tokens}


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


def _breaks_of(marks: Iterable[str]) -> re.Pattern[str]:
    """The first character of each of these marks, and of a slot."""
    firsts = [f"{re.escape(mark[0])}(?={re.escape(mark[1:])})" for mark in sorted(marks) if len(mark) > 1]
    return re.compile("|".join([*firsts, SLOT[0]]))


def _broken(first: re.Match[str]) -> str:
    return first[0] + _BREAK


def _inert(text: str) -> str:
    """Outside text without lone surrogates (which no tokenizer can encode)."""
    return text.encode("utf-8", "replace").decode("utf-8")
