"""Hostile text, JSON and bytes, drawn from a seeded generator.

Built from what our parsers look for and not from noise: whole and broken tags, calls that are nearly right, the special
tokens of many templates, numbers and characters that surprise; and small changes to things that are sound.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from lite_mentor.types import ToolSpec

SPECIAL = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<pad>", "<|eot_id|>", "<|start_header_id|>",
    "<|end|>", "<|user|>", "<|assistant|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<eos>", "<bos>",
    "<｜User｜>", "<｜Assistant｜>", "<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>user\n", "<file_sep>",
)  # fmt: skip
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>", "<tools>")
CHARACTERS = (
    "\ud800", "\udfff", "\ud83d", "\u0000", "\u001b[2J", "\u0007", "\b", "\u202e", "\u2066", "\u200b", "\u200d",
    "\ufeff", "\ufffe", "\ufffd", "\u2028", "\u0085", "\u00a0", "\ue000", "\ue001", "\ue0000\ue001", "\ue0001\ue001",
    "\ue00099999\ue001", "\udead", "e\u0301", "\ufb01", "\u212b", "\uff1c|im_end|\uff1e", "ſ", "İ", "ß", "\u0663",
    "\u2155", "½", "²", "\U0001f469\u200d\U0001f680", "\U0010ffff", "\r", "\r\n", "\t", "\v", " ", "\n", "",
)  # fmt: skip
MATHS = (
    "\\boxed{", "\\boxed{}", "\\boxed{7}", "\\boxed{{7}", "\\boxed{7}}", "\\frac{1}{2}", "\\frac12", "\\frac{", "}",
    "{", "{{", "}}", "\\sqrt{2}", "\\sqrt[3]{x", "9^{9^{9^9}}", "10^{10^{10}}", "2^{99999999}", "100000!", "x^2",
    "\\pi", "\\infty", "50\\%", "%", "$", "\\$", "1,000", "1,00,0", "1{,}000", "-", "−", "+", "1e999", "1e-999",
    "1e308", "nan", "inf", "3/4", "1/0", "0/0", " 1 2/3", "\\text{ km}", "\\text{", "km", "million", "half",
    "(1,2)", "[1,2)", "\\{1,2\\}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\int_0^1 x\\,dx", "\\sum_{k=1}^{99}k",
    "x=5", "=", "\\binom{99}{50}", "\\left(", "\\right)", "\\cdot", "\\times", "^", "_", "\\", ".", "..", ",", "°",
)  # fmt: skip
WORDS = ("5", "-5", "0", "12.50", "007", "the", "add", "Paris", "answer", "name", "arguments", "a", "b", "x", "Error:")
NUMBERS = (
    0, 1, -1, 2, 3.5, -0.0, 1e308, -1e308, 5e-324, 2**31, 2**63, -(2**63) - 1, 2**64, 10**40, 10**400, 16, 1.0, 0.1,
    float("nan"), float("inf"), float("-inf"),
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """What is attacked: how a case is drawn, and what must hold for it."""

    make: Callable[[Random], Any]
    """A case is something that JSON can hold, so that one that fails can be kept."""
    check: Callable[[Any, Path], None]
    """Raises for a case that breaks something. The folder is its to write in."""
    holds: int = 1
    """Transcripts in a case."""
    share: float = 1.0
    """Its part of the cases that are asked for of all targets: less where each takes long."""


def text(rng: Random, most: int = 12) -> str:
    """Up to `most` fragments side by side; now and then one of them thousands of times."""
    parts = [_fragment(rng) for _ in range(rng.randrange(most + 1))]
    if rng.random() < 0.01:
        parts.append((_fragment(rng) * rng.choice((100, 1000, 5000)))[:50_000])
    rng.shuffle(parts)
    return "".join(parts)


def _fragment(rng: Random) -> str:
    source = rng.choice((SPECIAL, TAGS, TAGS, CHARACTERS, MATHS, WORDS, WORDS, None))
    if source is None:
        return json_text(rng)
    piece = rng.choice(source)
    change = rng.random()
    if change < 0.08:
        return piece[: rng.randrange(len(piece) + 1)]
    if change < 0.12:
        return piece[rng.randrange(len(piece) + 1) :]
    if change < 0.16:
        return piece.swapcase()
    if change < 0.20:
        return rng.choice(CHARACTERS).join(piece)
    return piece


def value(rng: Random, depth: int = 3) -> Any:
    """Anything that JSON can say, and some that it cannot (nan, inf)."""
    kind = rng.randrange(8 if depth else 6)
    if kind < 2:
        return rng.choice(NUMBERS)
    if kind < 4:
        return text(rng, 2)
    if kind < 6:
        return rng.choice((None, True, False, "", [], {}, "5", 5))
    if kind == 6:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {rng.choice((*WORDS, text(rng, 1))): value(rng, depth - 1) for _ in range(rng.randrange(4))}


def json_text(rng: Random) -> str:
    """JSON, or something close to it."""
    how = rng.random()
    if how < 0.02:
        depth = rng.choice((10, 100, 1000, 20_000))
        return rng.choice(("[", '{"a":', "[{}," if rng.random() < 0.5 else "[[]")) * depth
    if how < 0.04:
        return rng.choice(("9", "-9", "0.", "1e")) + "9" * rng.choice((20, 400, 5000))
    if how < 0.08:
        return '{"name": "add", "name": "add", "arguments": {"a": 1, "a": 2}}'
    written = json.dumps(value(rng), ensure_ascii=rng.random() < 0.5)
    return changed(rng, written) if rng.random() < 0.3 else written


def call(rng: Random, tools: Sequence[ToolSpec]) -> str:
    """The text of a call: right for one of the tools, nearly so, or not at all."""
    tool = rng.choice(tools)
    arguments = {name: _argument(rng, schema) for name, schema in tool.parameters.get("properties", {}).items()}
    data: Any = {"name": tool.name, "arguments": arguments}
    if rng.random() < 0.3:
        data = changed_json(rng, data)
    written = json.dumps(data, ensure_ascii=rng.random() < 0.5)
    how = rng.random()
    return changed(rng, written) if how < 0.2 else text(rng) if how < 0.3 else written


def _argument(rng: Random, schema: Any) -> Any:
    how, kind = rng.random(), schema.get("type") if isinstance(schema, dict) else None
    if how < 0.1:
        return value(rng)
    if kind == "array":
        return [_argument(rng, schema.get("items", {})) for _ in range(rng.randrange(4))]
    if kind in ("number", "integer"):
        return rng.randrange(-99, 100) if how < 0.6 else rng.choice(NUMBERS)
    return rng.choice(("m", "km", "kg", "2024-02-29", "2023-02-29", text(rng, 2), True, value(rng, 1)))


def changed(rng: Random, sound: str) -> str:
    """One to three small edits: cut out, doubled, swapped, replaced, cut off, or foreign text in between."""
    for _ in range(rng.randrange(1, 4)):
        i, j = sorted(rng.randrange(len(sound) + 1) for _ in range(2))
        j = min(j, i + rng.choice((1, 1, 3, 20, 10**9)))
        edits = (
            lambda i=i, j=j, s=sound: s[:i] + s[j:],
            lambda i=i, j=j, s=sound: s[:j] + s[i:j] + s[j:],
            lambda i=i, j=j, s=sound: s[j:] + s[i:j] + s[:i],
            lambda i=i, j=j, s=sound: s[:i] + chr(rng.randrange(256)) + s[i + 1 :],
            lambda i=i, s=sound: s[:i],
            lambda i=i, s=sound: s[:i] + _fragment(rng) + s[i:],
        )
        sound = rng.choice(edits)()
    return sound


def changed_bytes(rng: Random, sound: bytes) -> bytes:
    """`changed`, byte by byte."""
    return changed(rng, sound.decode("latin-1")).encode("utf-8", "surrogatepass")


def changed_json(rng: Random, sound: Any) -> Any:
    """A copy with one to two of its nodes replaced, removed, renamed or wrapped."""
    for _ in range(rng.randrange(1, 3)):
        sound = _changed_node(rng, sound)
    return sound


def _changed_node(rng: Random, node: Any) -> Any:
    if isinstance(node, (dict, list)) and node and rng.random() < 0.8:
        copy = dict(node) if isinstance(node, dict) else list(node)
        key = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
        how = rng.random()
        if how < 0.15:
            del copy[key]
        elif how < 0.25 and isinstance(copy, dict):
            copy[text(rng, 1)] = copy.pop(key)
        elif how < 0.3 and isinstance(copy, list):
            copy.insert(key, copy[key])
        else:
            copy[key] = _changed_node(rng, copy[key])
        return copy
    if isinstance(node, str) and rng.random() < 0.4:
        return changed(rng, node)
    if isinstance(node, (int, float)) and rng.random() < 0.3:
        return rng.choice(NUMBERS)
    return rng.choice((value(rng), [node], {"a": node}, str(node), list(node) if isinstance(node, dict) else None))
