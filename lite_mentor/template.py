"""What a chat template writes: a conversation up to its first turn, and what follows a turn with calls.

A template is the student's own, and no two agree on tools. Three ways are tried at the start; the first is taken in
which a prompt, a turn and its results, put end to end, are what the template writes of the whole conversation:

    native   the template describes the tools, asks for calls in our form, and has a role for results
    system   our system prompt describes the tools, and results are a user's turn
    user     the same for templates without a system role: our text stands before the question

Some templates open a thought for the student, in which it could neither call nor answer. It is closed at once, empty,
in words that are not the student's own: so it is trained on what it reads when it is sampled.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

from transformers import PreTrainedTokenizerBase

from lite_mentor.errors import UserError
from lite_mentor.types import ToolSpec

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
RESULT_OPEN, RESULT_CLOSE = "<tool_response>", "</tool_response>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

_SYSTEM = (
    "You solve problems by calling tools. To call one, write "
    f'{CALL_OPEN}{{"name": ..., "arguments": {{...}}}}{CALL_CLOSE} and stop; its result comes back. '
    "Give the final answer as \\boxed{answer}.\nTools:\n"
)
ASK_FOR_BOX = "\n\nUse the tools, then put the final answer in \\boxed{}."

# Private-use characters: no tokenizer's template treats them specially, and in outside text they are broken.
SLOT = "\ue000{}\ue001"
"""Where outside text belongs. A template is rendered around it, so that no text can steer the template."""
_SLOT_PATTERN = re.compile("\ue000([0-9]+)\ue001")

_OUR_FORM = re.compile(CALL_OPEN + r"\s*\{[^{}]*\barguments\b")
_OPENED = re.compile(THINK_OPEN + r"\s*\Z")
_EMPTY = re.compile(rf"\s*{THINK_OPEN}\s*{THINK_CLOSE}\s*")


def json_schema(tool: ToolSpec) -> dict:
    """A tool as chat templates and chat-completions servers expect it."""
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


def fill(text: str, slots: Sequence[str]) -> str:
    """Rendered text with these contents in its slots."""
    return _SLOT_PATTERN.sub(lambda found: slots[int(found[1])], text)


def split(text: str) -> list[str]:
    """Rendered text and the numbers of its slots, in turn."""
    return _SLOT_PATTERN.split(text)


# A conversation to try a template on: with quotes and a line break, which a template may write as JSON or as HTML.
_TOOLS = (json_schema(ToolSpec("probe_tool", "probes", {"type": "object", "properties": {}})),)
_PROMPT = ('What is "2 & 3"?', "probe_tool(): probes")
_CALL = f'{CALL_OPEN}\n{{"name": "probe_tool", "arguments": {{}}}}\n{CALL_CLOSE}'
_TURNS = ('It is "5".', _CALL)
_RESULTS = ('He said "<5>".', "it's\n6")


class Template:
    """A tokenizer's chat template, rendered around slots. Raises UserError where no way fits, or it cannot render.

    `way` is the one that was taken, `thought` the closed one that stands where the template opens one, and `lead` the
    space that the template writes before a turn's own text, which is the student's to sample.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: str):
        """`date`, as 2026-12-01, is what a template is told that asks for the day."""
        if not tokenizer.chat_template:
            raise UserError(
                f"The tokenizer of {tokenizer.name_or_path} has no chat template; use an instruct model, "
                "or add a chat_template to its tokenizer_config.json."
            )
        self._tokenizer, self._date = tokenizer, date
        self.thought = self.lead = ""
        self._knows_tools = False
        for self.way in ("native", "system", "user"):
            try:
                self._try_out()
            except UserError as error:
                unfit = error
            else:
                return
        raise unfit

    def notes(self) -> list[str]:
        """What a user should hear of it."""
        notes = []
        if self._knows_tools and self.way != "native":
            notes.append("the student's chat template has another form for tools; our system prompt describes them")
        if self.thought:
            notes.append("the student's chat template opens a thought in every turn; it is closed at once, empty")
        return notes

    def prompt(self, tools: Sequence[dict]) -> str:
        """The conversation up to the first turn. Slot 0 is the question, slot 1, where it is ours to say, the tools."""
        return self._render(self._asked(SLOT.format(0), SLOT.format(1)), tools)

    def results(self, count: int) -> str:
        """What follows a turn's text: its end, `count` results in as many slots, and the opening of the next turn."""
        turn = SLOT.format(count)
        messages = [*self._asked("x", "x"), _message("assistant", turn), *self._told(map(SLOT.format, range(count)))]
        return self._render(messages).partition(turn)[2]

    def turns(self) -> str:
        """Two speakers' turns, for the marks that open and close them; what they say is left to slots."""
        roles = ("user", "assistant", "user")
        return self._render([_message(role, SLOT.format(i)) for i, role in enumerate(roles)], None)

    def _asked(self, question: str, described: str) -> list[dict[str, Any]]:
        if self.way == "native":
            return [_message("user", question + ASK_FOR_BOX)]
        if self.way == "system":
            return [_message("system", _SYSTEM + described), _message("user", question)]
        return [_message("user", f"{_SYSTEM}{described}\n\n{question}")]

    def _told(self, results: Iterable[str]) -> list[dict[str, Any]]:
        if self.way == "native":
            return [_message("tool", result) for result in results]
        return [_message("user", "\n".join(f"{RESULT_OPEN}{result}{RESULT_CLOSE}" for result in results))]

    def _render(self, messages: list[dict[str, Any]], tools: Sequence[dict] | None = _TOOLS) -> str:
        """The messages, and the opening of the next turn, in which no thought is open."""
        return _OPENED.sub(lambda _: self.thought, self._rendered(messages, tools))

    def _rendered(self, messages, tools=_TOOLS, *, generate: bool = True, **settings) -> str:
        tools = list(tools) if tools is not None and self.way == "native" else None
        try:
            return self._tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=generate, tokenize=False, **settings,
                chat_template=_on(self._date, self._tokenizer.get_chat_template(tools=tools)),
            )  # fmt: skip
        except Exception as error:  # a template is a stranger's program, and may fail in any way
            raise _unfit(f"does not render a conversation ({type(error).__name__}: {error})") from error

    def _try_out(self) -> None:
        """Raises UserError where a prompt, a turn and its results are not what the template writes of the whole."""
        asked, told = self._asked(*_PROMPT), self._told(_RESULTS)
        self.thought = self._empty_thought(asked)
        prompt = fill(self.prompt(_TOOLS), _PROMPT)
        if self.way == "native":
            self._knows_tools = "probe_tool" in prompt
            if not (self._knows_tools and _OUR_FORM.search(prompt)):
                raise _unfit("does not ask for calls in our form")
        results = fill(self.results(len(_RESULTS)), _RESULTS)
        for message in (*asked, *told):
            if message["content"] not in prompt + results:
                raise _unfit(f"leaves out what a message of the role {message['role']} says")
        wholes = [self._render([*asked, _message("assistant", turn), *told]) for turn in _TURNS]
        before = wholes[0].partition(_TURNS[0])[0]
        # A template may leave out the thoughts of earlier turns; ours are empty, and stay.
        start = prompt if before.startswith(prompt) else prompt.removesuffix(self.thought)
        lead = before.removeprefix(start)
        self.lead = "" if lead.strip() else lead
        for turn, whole in zip(_TURNS, wholes, strict=True):
            _compare(whole, start + self.lead + turn + results)
        if self.way == "native":  # calls that are given apart from the text, as it was trained on them, end alike
            calls = [{"type": "function", "function": {"name": "probe_tool", "arguments": {}}}] * len(_RESULTS)
            whole = self._render([*asked, _message("assistant", "", tool_calls=calls), *told])
            if whole.count(CALL_CLOSE) > prompt.count(CALL_CLOSE):
                _compare(whole.rpartition(CALL_CLOSE)[2].lstrip(), results)

    def _empty_thought(self, asked: list[dict[str, Any]]) -> str:
        """What stands for a thought that the template opens: its own empty one, where it is known to write one."""
        opened = self._rendered(asked)
        start = _OPENED.sub("", opened)
        if start == opened:
            return ""
        without = self._rendered(asked, enable_thinking=False, thinking=False)
        last = self._rendered([*asked, _message("assistant", _TURNS[0])], generate=False).partition(_TURNS[0])[0]
        found = (text.removeprefix(start) for text in (without, last))
        return next(filter(_EMPTY.fullmatch, found), f"{THINK_OPEN}\n\n{THINK_CLOSE}\n\n")


def _compare(whole: str, ours: str) -> None:
    if whole != ours:
        same = next(i for i, (a, b) in enumerate(zip_longest(whole, ours)) if a != b)
        raise _unfit(
            "does not write a conversation as its prompt, turns and results end to end: after "
            f"{ours[max(0, same - 30) : same]!r} it has {whole[same : same + 30]!r}, and they have "
            f"{ours[same : same + 30]!r}"
        )


def _unfit(why: str) -> UserError:
    return UserError(f"The student's chat template {why}; mend it, or use another student.")


def _message(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


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
