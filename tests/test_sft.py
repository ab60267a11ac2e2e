"""A teacher's record as tokens, by hand; and a cold start that learns, and that may be continued anywhere."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from lite_mentor import sft
from lite_mentor.batch import pack
from lite_mentor.config import PRESETS
from lite_mentor.load import load_student
from lite_mentor.loss import supervised_loss
from lite_mentor.optim import Diverged, Guard, make_optimizer
from lite_mentor.prompt import Chat
from lite_mentor.tasks import load_suite
from lite_mentor.types import TeacherRecord, ToolCall

CONFIG = dataclasses.replace(PRESETS["tiny"], sft_steps=4, sft_batch=4, lora_rank=8)
RAW = '{"name": "add", "arguments": {"a": 1, "b": 2}}'
CALL = f"<tool_call>{RAW}</tool_call>"
RAN = ToolCall("add", {"a": 1, "b": 2}, RAW, "ok", "3")


def record(example) -> TeacherRecord:
    messages = (
        {"role": "assistant", "content": CALL},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "\\boxed{3}"},
    )
    return TeacherRecord(example.key, "t", messages, (RAN,), "3", True, "")


@pytest.fixture(scope="module")
def examples():
    return load_suite("tiny", split="train", size=16, seed=0)


def fresh():
    student = load_student("tiny", quant="none", dtype="fp32", lora_rank=8, lora_alpha=8)
    return student, Chat(student.tokenizer)


def test_a_record_is_the_conversation_with_the_assistants_tokens_marked(examples):
    _, chat = fresh()
    rollout = sft.teacher_rollout(chat, examples[0], record(examples[0]))
    prompt, call = chat.prompt_ids(examples[0]), chat.turn_ids(CALL)
    result, answer = chat.result_ids(["3"]), chat.turn_ids("\\boxed{3}")
    assert rollout.ids.tolist() == prompt + call + result + answer
    mask = [False] * len(prompt) + [True] * len(call) + [False] * len(result) + [True] * len(answer)
    assert rollout.sampled.tolist() == mask
    assert (rollout.prompt_length, rollout.turns) == (len(prompt), 2)


def test_a_turn_with_a_call_that_could_not_be_read_is_seen_and_not_learned(examples):
    """Of two calls in one turn the second is broken; the teacher then does it right."""
    _, chat = fresh()
    broken = '<tool_call>{"name": "add", "arguments": {"a": 1, </tool_call>'
    said = [f"{CALL}\n{broken}", CALL, "\\boxed{3}"]
    error = "Error: bad call, it is not valid JSON."
    turns = [{"role": "assistant", "content": text} for text in said]
    results = [{"role": "tool", "content": text} for text in ("3", error, "3")]
    calls = (RAN, ToolCall("", {}, broken, "bad_json", error), RAN)
    found = TeacherRecord("k", "t", (turns[0], *results[:2], turns[1], results[2], turns[2]), calls, "3", True, "")
    rollout = sft.teacher_rollout(chat, examples[0], found)
    assert chat.decode(rollout.ids[rollout.sampled].tolist()) == f"{CALL}<|im_end|>\\boxed{{3}}<|im_end|>"
    assert broken in chat.decode(rollout.ids.tolist())
    failed = ToolCall("add", {"a": "x"}, "", "bad_arguments", error)  # readable, so it is learned
    rollout = sft.teacher_rollout(chat, examples[0], dataclasses.replace(found, calls=(RAN, failed, RAN)))
    assert broken in chat.decode(rollout.ids[rollout.sampled].tolist())


def test_the_loss_is_the_mean_over_all_rows_however_they_are_packed(examples):
    student, chat = fresh()
    rollouts = [sft.teacher_rollout(chat, e, record(e)) for e in examples[:4]]
    one = sum(supervised_loss(student, b).item() for b in pack(rollouts, [0.0] * 4, 2000))
    four = sum(supervised_loss(student, b).item() for b in pack(rollouts, [0.0] * 4, 200))
    assert one == pytest.approx(four, rel=1e-5)
    assert one > 1


def test_it_learns_and_the_same_again(examples):
    def run() -> tuple[list[float], torch.Tensor]:
        student, chat = fresh()
        rollouts = [sft.teacher_rollout(chat, e, record(e)) for e in examples]
        optimizer = make_optimizer(student.trainable(), CONFIG)
        steps = sft.cold_start(student, optimizer, rollouts, CONFIG, Guard(Path("unused"), print))
        return [metrics["loss"] for metrics in steps], torch.cat([p.detach().flatten() for p in student.trainable()])

    (losses, weights), (again, same) = run(), run()
    assert losses == again
    assert torch.equal(weights, same)
    assert losses[-1] < losses[0]


def test_a_record_that_breaks_the_loss_is_named_and_three_in_a_row_end_it(examples, tmp_path, monkeypatch):
    student, chat = fresh()
    rollouts = [sft.teacher_rollout(chat, e, record(e)) for e in examples[:4]]
    rollouts[1].ids[rollouts[1].prompt_length + 1] = bell = 7  # a byte that no other record has
    before = torch.cat([p.detach().flatten().clone() for p in student.trainable()])

    def broken(student, batch, *how):
        return supervised_loss(student, batch, *how) * (float("inf") if bell in batch.ids_T.tolist() else 1)

    monkeypatch.setattr(sft, "supervised_loss", broken)
    said, optimizer = [], make_optimizer(student.trainable(), CONFIG)
    with pytest.raises(Diverged, match="Three updates in a row were refused, the last at cold start step 2"):
        list(sft.cold_start(student, optimizer, rollouts, CONFIG, Guard(tmp_path, said.append)))
    assert len(said) == 3
    assert all(f"example {examples[1].key} (group 0, rollout 0)" in sentence for sentence in said)
    assert torch.equal(before, torch.cat([p.detach().flatten() for p in student.trainable()]))
    assert len(list(tmp_path.glob("refused-cold-start-step-*.safetensors"))) == 3


def test_support_counts_episodes_in_which_a_call_worked(examples):
    _, chat = fresh()
    silent = dataclasses.replace(sft.teacher_rollout(chat, examples[0], record(examples[0])), calls=())
    ok = dataclasses.replace(silent, calls=(type("Call", (), {"status": "ok"}),))
    failed = dataclasses.replace(silent, calls=(type("Call", (), {"status": "error"}),))
    assert sft.support([silent, failed, ok, ok]) == 0.5
