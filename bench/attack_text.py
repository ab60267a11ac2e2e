"""Attacks with text: on the parser, the judge, the prompts, the masks of whole episodes, and BFCL's checker."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, get_args

import torch
import torch.nn.functional as F
from mentor_kernels.group_advantage import Reward
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bench import hostile
from bench.hostile import Target
from lite_mentor import prompt
from lite_mentor.assets import cache_folder
from lite_mentor.config import PRESETS
from lite_mentor.engine import Engine, Sampling, Sequence
from lite_mentor.judge import boxed, is_correct
from lite_mentor.prompt import Chat, parse_turn
from lite_mentor.reward import score
from lite_mentor.rollout import Limits, messages_of, roll_out
from lite_mentor.tasks import bfcl, make_example
from lite_mentor.tasks.ood_lookup import generate as lookups
from lite_mentor.tasks.ood_tools import unseen_tools
from lite_mentor.template import CALL_CLOSE, CALL_OPEN
from lite_mentor.tiny import tiny_tokenizer
from lite_mentor.tools import MAX_RESULT_CHARS, calculator_tools, caller, run_call
from lite_mentor.types import CALL_STATUSES, STOP_REASONS, Example, Rollout, TeacherRecord, ToolSpec

NATIVE = (  # describes tools itself, some of their text outside of JSON
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t.function.name }}: {{ t.function.description }} "
    "{{ t | tojson }}\n{% endfor %}<tool_call>{'arguments': ...}</tool_call><|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ORDINARY_ROLES = (  # turns open with tokens that are added but not special
    "{% for m in messages %}{{ {'system': '', 'user': '<｜User｜>', 'assistant': '<｜Assistant｜>'}[m.role] }}"
    "{{ m.content }}{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)


# --- calls -----------------------------------------------------------------------------------------------------


@functools.cache
def all_tools() -> tuple[ToolSpec, ...]:
    """Every built-in tool."""
    lookup = lookups("test", size=1, seed=0, levels=(1,))[0].tools
    return tuple({tool.name: tool for tool in (*calculator_tools(), *unseen_tools(), *lookup)}.values())


def turn_text(rng: Random) -> str:
    """What a student might say in one turn."""
    parts = [hostile.text(rng, 6)]
    for _ in range(rng.randrange(4)):
        tags = rng.choice(((CALL_OPEN, CALL_CLOSE),) * 4 + ((CALL_OPEN, ""), ("", CALL_CLOSE), (CALL_OPEN * 2,) * 2))
        parts += [tags[0], hostile.call(rng, all_tools()), tags[1], hostile.text(rng, 3)]
    return "".join(parts)


def check_calls(text: str, folder: Path) -> None:
    """Any turn parses into pieces of itself; any call gets an answer."""
    turn, at = parse_turn(text), 0
    assert "<think>" in turn.speech or bool(turn.calls) == (CALL_OPEN in turn.speech)
    for raw in turn.calls:
        at = text.index(CALL_OPEN + raw, at) + len(CALL_OPEN) + len(raw)
    box = boxed(turn.speech)
    assert box is None or f"\\boxed{{{box}}}" in text
    for raw in turn.calls[:8]:
        call = run_call(raw, all_tools())
        assert call.raw == raw
        assert call.status in CALL_STATUSES
        assert 0 < len(call.result) <= MAX_RESULT_CHARS + 40
        assert len(call.result.encode()) == len(call.result.encode("utf-8", "replace"))
        json.dumps(call.arguments, allow_nan=False)


# --- answers ---------------------------------------------------------------------------------------------------


def answers(rng: Random) -> dict[str, Any]:
    """An answer, what is accepted, and how they are compared."""
    gold = [rng.choice((str(rng.randrange(1000)), _formula(rng))) for _ in range(rng.randrange(1, 3))]
    answer = rng.choice((_formula, lambda rng: hostile.changed(rng, gold[0]), hostile.text))(rng)
    return {"answer": answer, "gold": gold, "checker": rng.choice(("math", "text"))}


def _formula(rng: Random) -> str:
    pieces = (*hostile.MATHS, *hostile.CHARACTERS[-20:], "1", "2", "3")
    parts = [rng.choice(pieces) for _ in range(rng.randrange(1, 6))]
    if rng.random() < 0.04:
        parts.insert(0, rng.choice(("1", parts[0])) + parts[0] * rng.choice((20, 500, 5000)))
    return "".join(parts)


def check_answers(case: dict[str, Any], folder: Path) -> None:
    """There is always a verdict, and what has a digit in it equals itself."""
    assert is_correct(case["answer"], tuple(case["gold"]), case["checker"]) in (True, False)
    for text in (case["answer"], *case["gold"]):
        if len(text) <= 200 and any("0" <= c <= "9" for c in text):
            assert is_correct(text, (text,), case["checker"])


# --- prompts ---------------------------------------------------------------------------------------------------


@functools.cache
def chats() -> dict[str, Chat]:
    """A chat for each kind of template, and the default student's where it is on this disk."""
    made: dict[str, PreTrainedTokenizerBase] = {name: tiny_tokenizer() for name in ("tiny", "native", "ordinary")}
    made["native"].chat_template = NATIVE
    made["native"].add_tokens([AddedToken(tag, special=False) for tag in ("<think>", "</think>")])
    made["ordinary"].add_tokens([AddedToken(f"<｜{role}｜>", special=False) for role in ("User", "Assistant")])
    made["ordinary"].chat_template = ORDINARY_ROLES
    for real in (cache_folder() / "students").glob("smollm2-135m*/tokenizer.json"):
        made["smollm2-135m"] = AutoTokenizer.from_pretrained(real.parent, trust_remote_code=False)
    return {name: Chat(tokenizer) for name, tokenizer in made.items()}


def prompts(rng: Random) -> dict[str, Any]:
    """A question, its tools and a round of results, all written by somebody else."""
    names = [hostile.text(rng, 1) if rng.random() < 0.3 else f"tool_{i}" for i in range(rng.randrange(1, 3))]
    tools = [[name, hostile.text(rng, 4), hostile.text(rng, 2), hostile.text(rng, 2)] for name in names]
    results = [hostile.text(rng) for _ in range(rng.randrange(1, 4))]
    return {"chat": rng.choice(list(chats())), "question": hostile.text(rng), "tools": tools, "results": results}


def check_prompts(case: dict[str, Any], folder: Path) -> None:
    """Nothing is lost, nothing opens or closes a turn, nothing passes for our own tags."""
    chat = chats()[case["chat"]]
    plain = _example("x", [["x", "x", "x", "x"]] * len(case["tools"]))
    example = _example(case["question"], case["tools"])
    ids = chat.prompt_ids(example)
    assert _frame(chat, ids) == _frame(chat, chat.prompt_ids(plain))
    assert _spelled(chat, example.question) in chat.decode(ids)
    assert chat.template.way == "native" or all(
        _spelled(chat, tool.description) in chat.decode(ids) for tool in example.tools
    )
    ids = chat.result_ids(case["results"])
    assert _frame(chat, ids) == _frame(chat, chat.result_ids(["x"] * len(case["results"])))
    assert all(_spelled(chat, result) in chat.decode(ids) for result in case["results"])


def _spelled(chat: Chat, text: str) -> str:
    """Text as the tokenizer can write it: some have no token for some control characters."""
    ids = chat.tokenizer.encode(prompt._inert(text).strip(), add_special_tokens=False, split_special_tokens=True)
    return chat.decode(ids)


def _example(question: str, tools: list[list[str]]) -> Example:
    specs = [
        ToolSpec(name, about, {"type": "object", "properties": {key: {"type": "string", "description": note}}})
        for name, about, key, note in tools
    ]
    return make_example(question, ["1"], specs, suite="fuzz")


def _frame(chat: Chat, ids: list[int]) -> list[int]:
    """The tokens that mark turns, calls and results."""
    added = chat.tokenizer.added_tokens_decoder
    marks = {CALL_OPEN, CALL_CLOSE, prompt.RESULT_OPEN, prompt.RESULT_CLOSE, prompt.THINK_OPEN, prompt.THINK_CLOSE,
             "<｜User｜>", "<｜Assistant｜>"}  # fmt: skip
    return [i for i in ids if i in added and (added[i].special or added[i].content in marks)]


# --- episodes --------------------------------------------------------------------------------------------------

BATCH = 16
END = 257


def episodes(rng: Random) -> list[list[int]]:
    """What a student samples in each of some episodes, until it is cut off."""
    return [_stream(rng) for _ in range(BATCH)]


def _stream(rng: Random) -> list[int]:
    ids: list[int] = []
    for _ in range(rng.randrange(1, 6)):
        how = rng.random()
        if how < 0.15:
            ids += [rng.randrange(400) for _ in range(rng.randrange(8))]
        elif how < 0.6:
            raw = hostile.call(rng, calculator_tools())
            ids += chats()["tiny"].turn_ids(f"{CALL_OPEN}{raw[:90]}{CALL_CLOSE}")
        else:
            ids += chats()["tiny"].turn_ids(f"{hostile.text(rng, 2)[:30]} \\boxed{{{rng.choice(hostile.MATHS)}}}")
        if rng.random() < 0.2:
            ids.insert(rng.randrange(len(ids) + 1), rng.choice((END, END - 1)))
    return ids[:120]


def check_episodes(streams: list[list[int]], folder: Path) -> None:
    """The mask is True exactly where a token was drawn, and every reward is in its range."""
    chat = chats()["tiny"]
    examples = [make_example(f"What is {i}?", ["5"], calculator_tools(), suite="fuzz") for i in range(len(streams))]
    script = {tuple(chat.prompt_ids(e)): [*s, *[END] * 200] for e, s in zip(examples, streams, strict=True)}
    drawn: dict[tuple[int, ...], list[int]] = {key: [] for key in script}
    rollouts = _play(chat, examples, script, drawn)
    for example, rollout in zip(examples, rollouts, strict=True):
        _check_masks(chat, rollout, drawn[tuple(chat.prompt_ids(example))])
    _check_rewards(examples, rollouts)


def _play(chat: Chat, examples: list[Example], script, drawn) -> list[Rollout]:
    def key(s: Sequence) -> tuple[int, ...]:
        return tuple(s.ids[: s.prompt_length])

    def head(hidden_RH: torch.Tensor) -> torch.Tensor:
        said = [(drawn[key(s)], script[key(s)]) for s in engine.speaking]  # all prompts differ: a row for each
        for so_far, ids in said:
            so_far.append(ids[len(so_far)])
        return F.one_hot(torch.tensor([so_far[-1] for so_far, _ in said]), 400).float()

    engine = Engine(
        lambda ids_1T, positions_1T, plan: torch.zeros(ids_1T.shape[1], 1), head, layers=1, kv_heads=1, head_dim=1,
        eos_ids=[END], slots=len(examples), context=1000, chunk=10**6,
    )  # fmt: skip
    return roll_out(
        engine, chat, examples, group_size=1, limits=Limits(3, 150, 800, 30), sampling=Sampling(temperature=0), seed=0,
        step=0, run_call=caller(),
    )  # fmt: skip


def _check_masks(chat: Chat, rollout: Rollout, drawn: list[int]) -> None:
    ids, sampled = rollout.ids.tolist(), rollout.sampled.tolist()
    assert [i for i, s in zip(ids, sampled, strict=True) if s] == drawn
    assert not any(sampled[: rollout.prompt_length])
    assert len(rollout.behaviour_logp) == len(ids)
    assert rollout.stop in STOP_REASONS
    results = [call.result for call in rollout.calls]
    expected, turn = ids[: rollout.prompt_length], []
    for token in drawn:
        turn.append(token)
        expected.append(token)
        if token == END and len(expected) < len(ids):
            asked = len(parse_turn(chat.decode(turn[:-1])).calls)
            expected += chat.result_ids([results.pop(0) for _ in range(asked)])
            turn = []
    assert ids == expected
    messages = messages_of(chat, rollout)
    assert sum(m["role"] == "assistant" for m in messages) == rollout.turns


def _check_rewards(examples: list[Example], rollouts: list[Rollout]) -> None:
    calls = tuple(run_call('{"name": "add", "arguments": {"a": 2, "b": 3}}', calculator_tools()) for _ in range(2))
    records = {e.key: TeacherRecord(e.key, "t", (), calls[: i % 3], "5", True, "") for i, e in enumerate(examples)}
    rollouts = [replace(r, group=i // 4, index=i % 4) for i, r in enumerate(rollouts)]
    for reward in get_args(Reward):
        low, high = (-3, 4) if reward == "strict" else (0, 1.1)
        config = replace(PRESETS["tiny"], reward=reward, device="cpu", backend="torch")
        scored, _ = score({e.key: e for e in examples}, rollouts, records, config)
        assert all(low <= s.reward <= high + 1e-6 and math.isfinite(s.advantage) for s in scored), reward


# --- BFCL ------------------------------------------------------------------------------------------------------


@functools.cache
def _entries() -> tuple[Example, ...]:
    return tuple(e for suite in bfcl.SUITES for e in bfcl.generate(suite, split="test", size=60, seed=0))


def benchmark(rng: Random) -> dict[str, Any]:
    """An entry, and calls that are right for it, nearly right, or anything."""
    number = rng.randrange(len(_entries()))
    example = _entries()[number]
    rows = [{"name": step["tool"], "arguments": step["arguments"]} for step in example.meta["steps"]]
    rows = hostile.changed_json(rng, rows) if rng.random() < 0.6 else rows
    raws = [json.dumps(row) for row in rows] if isinstance(rows, list) else [json.dumps(rows)]
    if rng.random() < 0.3:
        raws.append(hostile.call(rng, example.tools))
    return {"entry": number, "calls": raws}


def check_benchmark(case: dict[str, Any], folder: Path) -> None:
    """There is always a verdict."""
    example = _entries()[case["entry"]]
    calls = [run_call(raw, example.tools) for raw in case["calls"]]
    assert bfcl.passes(example, calls) in (True, False)


TARGETS = {
    "calls": Target(turn_text, check_calls, share=40),
    "answers": Target(answers, check_answers, share=6),
    "prompts": Target(prompts, check_prompts, share=8),
    "episodes": Target(episodes, check_episodes, holds=BATCH, share=16),
}
if importlib.util.find_spec("bfcl_eval"):
    TARGETS["bfcl"] = Target(benchmark, check_benchmark, share=8)
