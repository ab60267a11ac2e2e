"""The border between text and tokens: messages -> ids, tool results -> suffix ids, sampled text -> calls and answer.

Tokens in, tokens out: what the student sampled is never encoded again. A prompt is encoded once; a tool's result is
encoded once, as the suffix that the chat template would put after the turn, and appended.

Text that is not ours (questions, tool results) can never become a special token: the template is rendered around
placeholders, and only the template's own words are encoded with special tokens switched on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lite_mentor.errors import UserError
from lite_mentor.tools import signature
from lite_mentor.types import Example, ToolSpec

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
RESULT_OPEN, RESULT_CLOSE = "<tool_response>", "</tool_response>"

# Private-use characters: no tokenizer's template treats them specially, and _inert removes them from outside text.
_SLOT = "\ue000{}\ue001"
_SLOT_PATTERN = re.compile("\ue000([0-9]+)\ue001")

_SYSTEM = (
    "You solve problems by calling tools. To call one, write "
    f'{CALL_OPEN}{{"name": ..., "arguments": {{...}}}}{CALL_CLOSE} and stop; its result comes back. '
    "Give the final answer as \\boxed{answer}.\nTools:\n"
)
ASK_FOR_BOX = "\n\nUse the tools, then put the final answer in \\boxed{}."


@dataclass(frozen=True)
class Turn:
    """What one assistant turn says."""

    calls: tuple[str, ...]
    """The text between each pair of call tags; an unclosed last call runs to the end of the turn."""
    text: str


class Chat:
    """Encodes the conversation of one tokenizer's chat template, append-only."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if not tokenizer.chat_template:
            raise UserError(
                f"The tokenizer of {tokenizer.name_or_path} has no chat template; use an instruct model, "
                "or add a chat_template to its tokenizer_config.json."
            )
        self.tokenizer = tokenizer
        probe = [{"role": "user", "content": "x"}]
        schema = json_schema(ToolSpec("probe_tool", "probes", {"type": "object", "properties": {}}))
        with_tools = self._render(probe, tools=[schema], generate=True)
        self.native_tools = "probe_tool" in with_tools
        """Does the template itself describe tools? Else our system prompt does."""

    def prompt_ids(self, example: Example) -> list[int]:
        """The conversation up to the point where the student speaks."""
        if self.native_tools:
            tools = [json_schema(tool) for tool in example.tools]
            messages, slots = [_slot("user", 0)], [example.question + ASK_FOR_BOX]
        else:
            tools = None
            system = _SYSTEM + "\n".join(signature(tool) for tool in example.tools)
            messages, slots = [_slot("system", 0), _slot("user", 1)], [system, example.question]
        return self._encode(self._render(messages, tools=tools, generate=True), slots)

    def result_ids(self, results: Sequence[str]) -> list[int]:
        """What follows an assistant turn that closed itself: the results, and the opening of the next turn."""
        messages = [_slot("user", 0), _slot("assistant", 1)]
        if self.native_tools:
            messages += [_slot("tool", 2 + i) for i in range(len(results))]
            slots = list(results)
        else:
            messages.append(_slot("user", 2))
            slots = ["\n".join(f"{RESULT_OPEN}{result}{RESULT_CLOSE}" for result in results)]
        rendered = self._render(messages, tools=None, generate=True)
        suffix = rendered.split(_SLOT.format(1), 1)[1]
        ids = self._encode(suffix, ["", "", *slots])
        if not ids or ids[0] not in self.tokenizer.all_special_ids:
            raise UserError(
                f"The chat template of {self.tokenizer.name_or_path} does not close an assistant turn with a special "
                "token, so turns cannot be appended; use another student."
            )
        return ids[1:]  # the end-of-turn token was sampled by the student itself

    def turn_ids(self, text: str, end_id: int) -> list[int]:
        """A teacher's assistant turn as tokens, closed by `end_id` as the student would close it."""
        return [*self._plain(text), end_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Tokens as text, special tokens shown."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def _render(self, messages: list[dict[str, str]], *, tools, generate: bool) -> str:
        return self.tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=generate, tokenize=False)

    def _encode(self, rendered: str, slots: Sequence[str]) -> list[int]:
        """Encode template text with special tokens, and each slot's content without."""
        ids: list[int] = []
        for i, piece in enumerate(_SLOT_PATTERN.split(rendered)):
            if i % 2:
                ids += self._plain(slots[int(piece)].strip())
            elif piece:
                ids += self.tokenizer.encode(piece, add_special_tokens=False)
        return ids

    def _plain(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(_inert(text), add_special_tokens=False, split_special_tokens=True)
        special = set(self.tokenizer.all_special_ids)
        assert not special.intersection(ids), "outside text was encoded as a special token"
        return ids


def parse_turn(text: str) -> Turn:
    """Find the tool calls in one sampled turn. Linear in the text, total on any text."""
    calls = []
    start = text.find(CALL_OPEN)
    while start >= 0:
        start += len(CALL_OPEN)
        end = text.find(CALL_CLOSE, start)
        calls.append(text[start:] if end < 0 else text[start:end])
        start = -1 if end < 0 else text.find(CALL_OPEN, end)
    return Turn(tuple(calls), text)


def _slot(role: str, index: int) -> dict[str, str]:
    return {"role": role, "content": _SLOT.format(index)}


def _inert(text: str) -> str:
    """Outside text without lone surrogates (which no tokenizer can encode)."""
    return text.encode("utf-8", "replace").decode("utf-8")


def json_schema(tool: ToolSpec) -> dict:
    """A tool as chat templates and chat-completions servers expect it."""
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}
