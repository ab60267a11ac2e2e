"""The tool loop under a scripted student: masks as literal lists, every stop reason, every status fed back as text."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lite_mentor.engine import Engine, Sampling
from lite_mentor.errors import UserError
from lite_mentor.prompt import Chat
from lite_mentor.rollout import Limits, messages_of, noise, roll_out
from lite_mentor.sft import teacher_rollout
from lite_mentor.tasks import load_suite
from lite_mentor.tiny import tiny_tokenizer
from lite_mentor.tools import caller, run_call
from lite_mentor.types import TeacherRecord

CHAT = Chat(tiny_tokenizer())
EXAMPLE = load_suite("tiny", split="train", size=1, seed=0)[0]
PROMPT = CHAT.prompt_ids(EXAMPLE)
END = 257
ADD = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'


def play(
    turns: list[str], results: list[str], *, chat: Chat = CHAT, closed: bool = True, group_size: int = 1,
    eos: int = END, ends_in: int = END, **limits,
):  # fmt: skip
    """Roll out a student who says exactly `turns`; between them the loop injects `results`.

    `eos` is what the model's files call its end, `ends_in` what the student says after a turn with a call.
    """
    prompt = chat.prompt_ids(EXAMPLE)
    script = list(prompt)
    for i, turn in enumerate(turns):
        last = i == len(turns) - 1
        script += chat.turn_ids(turn)[: None if closed or not last else -1]
        if i < len(results):
            script[-1:] = [ends_in] if ends_in == END else [ends_in, END]
            script += chat.result_ids([results[i]])
    script += [ord("~")] * 400  # a student cut off or badly predicted babbles on

    def forward(ids_1T, positions_1T, plan):
        return F.one_hot(torch.tensor([script[p + 1] for p in positions_1T[0].tolist()]), 512).float()

    engine = Engine(
        forward, lambda h: h * 100, layers=1, kv_heads=1, head_dim=1, eos_ids=[eos], slots=4, context=len(prompt) + 200
    )
    defaults = dict(max_turns=3, max_new_tokens=150, max_prompt_tokens=300)
    rollouts = roll_out(
        engine, chat, [EXAMPLE], group_size=group_size, limits=Limits(**defaults | limits), seed=0, step=0,
        sampling=Sampling(temperature=0), run_call=caller(),
    )  # fmt: skip
    engine.weights_changed()
    assert len(engine.pool.free) == len(engine.pool.holders)
    return rollouts


def test_a_call_its_result_and_the_answer():
    (r,) = play([ADD, "It is \\boxed{5}"], ["5"])
    call, result, answer = CHAT.turn_ids(ADD), CHAT.result_ids(["5"]), CHAT.turn_ids("It is \\boxed{5}")
    assert r.ids.tolist() == PROMPT + call + result + answer
    mask = [False] * len(PROMPT) + [True] * len(call) + [False] * len(result) + [True] * len(answer)
    assert r.sampled.tolist() == mask
    assert (r.stop, r.answer, r.turns, r.prompt_length) == ("answer", "5", 2, len(PROMPT))
    assert [(c.name, dict(c.arguments), c.status, c.result) for c in r.calls] == [("add", {"a": 2, "b": 3}, "ok", "5")]
    assert r.finished


@pytest.mark.parametrize("ends_in", [END, 256])
def test_a_turn_ends_where_the_template_closes_it_or_where_the_model_names_its_end(ends_in):
    """Where eos_token is not what closes a turn (Gemma 3, Phi), a turn that ended in it is closed all the same."""
    (r,) = play([ADD, "It is \\boxed{5}"], ["5"], eos=256, ends_in=ends_in)
    call, result, answer = CHAT.turn_ids(ADD)[:-1], CHAT.result_ids(["5"]), CHAT.turn_ids("It is \\boxed{5}")
    end, follows = [ends_in], [] if ends_in == END else [END]
    assert r.ids.tolist() == PROMPT + call + end + follows + result + answer
    lengths = (False, PROMPT), (True, call + end), (False, follows + result), (True, answer)
    assert r.sampled.tolist() == [mark for mark, ids in lengths for _ in ids]
    assert (r.stop, r.answer) == ("answer", "5")


@pytest.mark.parametrize("opening", ["", "<think>\n"])
def test_what_the_cold_start_learns_is_what_is_sampled(opening):
    """A thought that the template opens is closed in prompts and after results alike, and never the student's own."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n", "assistant\n" + opening)
    chat = Chat(tokenizer)
    (r,) = play([ADD, "It is \\boxed{5}"], ["5"], chat=chat)
    messages = [*messages_of(chat, r)]
    assert [m["content"] for m in messages] == [ADD, "5", "It is \\boxed{5}"]
    record = TeacherRecord(EXAMPLE.key, "t", tuple(messages), r.calls, r.answer, True, "")
    learned = teacher_rollout(chat, EXAMPLE, record)
    assert learned.ids.tolist() == r.ids.tolist()
    assert learned.sampled.tolist() == r.sampled.tolist()
    text = chat.decode(r.ids.tolist())
    assert text.count("<|im_start|>assistant\n" + ("<think>\n\n</think>\n\n" if opening else "")) == 2
    assert "think" not in chat.decode(r.ids[r.sampled].tolist())


def test_several_calls_in_one_turn_come_back_together():
    (r,) = play([ADD + ADD, "\\boxed{5}"], [])
    assert [c.result for c in r.calls] == ["5", "5"]
    injected = r.ids[~r.sampled].tolist()[len(PROMPT) :]
    assert injected == CHAT.result_ids(["5", "5"])


@pytest.mark.parametrize(
    ("call", "status"),
    [
        ("<tool_call>{oops</tool_call>", "bad_json"),
        ('<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}', "ok"),  # unclosed, but all there
        ('<tool_call>{"name": "sqrt", "arguments": {"number": 4}}</tool_call>', "unknown_tool"),
        ('<tool_call>{"name": "add", "arguments": {"a": "two"}}</tool_call>', "bad_arguments"),
    ],
)
def test_what_is_wrong_with_a_call_comes_back_as_text(call, status):
    (r,) = play([call], [])
    assert r.calls[0].status == status
    injected = CHAT.decode(r.ids[~r.sampled].tolist()[len(PROMPT) :])
    assert r.calls[0].result in injected


def test_ending_without_answer_or_call():
    (r,) = play(["I do not know"], [])
    assert (r.stop, r.answer, r.finished, r.calls) == ("eos", None, True, ())


def test_an_empty_box_is_an_answer_that_is_empty():
    (r,) = play(["\\boxed{}"], [])
    assert (r.stop, r.answer) == ("answer", "")


def test_a_box_in_a_thought_is_not_the_answer():
    assert [play([f"<think>\\boxed{{4}}</think>{said}"], [])[0].answer for said in ("five", "\\boxed{5}")] == [
        None,
        "5",
    ]
    (r,) = play(["\\boxed{5} <think>or \\boxed{4}"], [])
    assert (r.stop, r.answer) == ("answer", "5")


def test_a_box_beside_a_call_is_not_the_answer_yet():
    (r,) = play(["\\boxed{4} " + ADD, "\\boxed{5}"], ["5"])
    assert (r.answer, r.turns) == ("5", 2)


def test_still_calling_at_the_turn_cap():
    (r,) = play([ADD, ADD], ["5"], max_turns=2)
    assert (r.stop, r.turns, r.finished, len(r.calls)) == ("max_turns", 2, False, 2)
    assert bool(r.sampled[-1])  # the last call's result is not appended: nobody would read it


def test_cut_off_in_the_middle_of_a_turn():
    (r,) = play(["abc"], [], closed=False, max_new_tokens=10)
    assert (r.stop, r.finished, len(r.ids) - len(PROMPT)) == ("max_tokens", False, 10)


def test_cut_off_in_the_middle_of_a_call_does_not_run_it():
    (r,) = play([ADD], [], max_new_tokens=5)
    assert (r.stop, r.calls) == ("max_tokens", ())


def test_a_long_result_is_cut_by_tokens_where_the_student_sees_it():
    (r,) = play([ADD, "It is \\boxed{5}"], ["5"], max_result_tokens=1)
    assert [c.result for c in r.calls] == ["5"]
    refused = CHAT.turn_ids('<tool_call>{"name": "sum", "arguments": {}}</tool_call>')
    text = "Error:... [34 more tokens]"  # of "Error: there is no tool 'sum'. The tools are add."
    (r,) = play([CHAT.decode(refused[:-1]), "no"], [text], max_result_tokens=6)
    assert [c.result for c in r.calls] == [text]
    assert CHAT.decode(r.ids.tolist()).count(f"<tool_response>{text}</tool_response>") == 1


def test_a_result_that_does_not_fit_ends_the_episode():
    spoken = len(CHAT.turn_ids(ADD))
    (r,) = play([ADD], [], max_new_tokens=spoken + 3)
    assert (r.stop, len(r.calls), len(r.ids)) == ("context_full", 1, len(PROMPT) + spoken)


def test_a_group_keeps_its_order():
    rollouts = play(["\\boxed{1}"], [], group_size=3)
    assert [(r.group, r.index, r.example_key) for r in rollouts] == [(0, i, EXAMPLE.key) for i in range(3)]


def test_each_rollout_draws_the_noise_of_its_seed_step_example_and_index(monkeypatch):
    drawn = []
    submit = Engine.submit
    monkeypatch.setattr(
        Engine, "submit", lambda self, ids, uniforms: drawn.append(uniforms) or submit(self, ids, uniforms)
    )
    play(["\\boxed{1}"], [], group_size=2)
    assert drawn == [noise(0, 0, EXAMPLE.key, index, 150) for index in range(2)]
    changed = [
        noise(*key, 3) for key in ((0, 0, "a", 0), (1, 0, "a", 0), (0, 1, "a", 0), (0, 0, "b", 0), (0, 0, "a", 1))
    ]
    assert len({tuple(uniforms) for uniforms in changed}) == 5
    assert noise(0, 1, "a", 2, 3) == noise(0, 1, "a", 2, 5)[:3]


def test_a_prompt_over_the_limit_is_one_sentence():
    with pytest.raises(UserError, match=r"has \d+ tokens; the limit is 10. Raise --max-prompt-tokens"):
        play([""], [], max_prompt_tokens=10)


def side_by_side(run_call_of):
    """Two episodes of one group, each of which calls once and then answers; `run_call_of(engine)` runs the calls."""
    script = [*PROMPT, *CHAT.turn_ids(ADD), *CHAT.result_ids(["5"]), *CHAT.turn_ids("\\boxed{5}")]
    script += [ord("~")] * 400

    def forward(ids_1T, positions_1T, plan):
        return F.one_hot(torch.tensor([script[p + 1] for p in positions_1T[0].tolist()]), 512).float()

    elsewhere = replace(EXAMPLE, tools=tuple(replace(t, function=None, path=f"far:{t.name}") for t in EXAMPLE.tools))
    engine = Engine(
        forward, lambda h: h * 100, layers=1, kv_heads=1, head_dim=1, eos_ids=[END], slots=2, context=len(PROMPT) + 200
    )
    try:
        return roll_out(
            engine, CHAT, [elsewhere], group_size=2, limits=Limits(3, 150, 300), seed=0, step=0,
            sampling=Sampling(temperature=0), run_call=run_call_of(engine),
        )  # fmt: skip
    finally:
        engine.weights_changed()
        assert len(engine.pool.free) == len(engine.pool.holders)


def test_a_slow_tool_delays_only_its_own_sequence():
    """The first call to come ends only after the other episode has: if calls held up decoding, it never would."""
    others_end, lock, order = threading.Event(), threading.Lock(), []

    def run_call_of(engine):
        release = engine.release

        def released(sequence):
            release(sequence)
            others_end.set()

        engine.release = released

        def run(raw, example, earlier):
            with lock:
                order.append(None)
                slow = len(order) == 1
            assert not slow or others_end.wait(60)
            return run_call(raw, example.tools, run_path=lambda path, arguments: ("ok", "5"))

        return run

    rollouts = side_by_side(run_call_of)
    assert [(r.index, r.stop, r.answer, r.turns, len(r.calls)) for r in rollouts] == [
        (0, "answer", "5", 2, 1),
        (1, "answer", "5", 2, 1),
    ]
    assert rollouts[0].ids.tolist() == rollouts[1].ids.tolist()


def test_what_a_call_raises_ends_the_rollout_and_gives_the_pages_back():
    def run_call_of(engine):
        def run(raw, example, earlier):
            raise UserError("The tool cannot be loaded.")

        return run

    with pytest.raises(UserError, match="cannot be loaded"):
        side_by_side(run_call_of)
