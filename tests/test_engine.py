"""The engine's bookkeeping under a scripted model, and its sampling; a real model comes in test_exactness."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lite_mentor.decode import without_graphs
from lite_mentor.engine import Engine, Sampling, common_prefix
from lite_mentor.errors import UserError
from lite_mentor.load import load_student

EOS, V = 9, 10


class Scripted:
    """A model whose next token depends on the position alone; it records what it was asked to compute."""

    def __init__(self, next_token: dict[int, int]):
        self.next_token, self.computed = next_token, []

    def forward(self, ids_1T, positions_1T, plan):
        self.computed.append(ids_1T[0].tolist())
        return F.one_hot(torch.tensor([self.next_token.get(p, 0) for p in positions_1T[0].tolist()]), V).float()

    def head(self, hidden):
        return hidden * 100


def engine(model: Scripted, **kwargs) -> Engine:
    shape = dict(layers=1, kv_heads=1, head_dim=2, eos_ids=[EOS], slots=4, context=20) | kwargs
    out = Engine(model.forward, model.head, **shape)
    out.sampling = Sampling(temperature=0)
    return out


def run(e: Engine) -> list:
    done = []
    while e.busy:
        done += e.step()
    return done


def test_a_turn_ends_at_its_end_token_and_the_mask_is_written_as_it_goes():
    e = engine(Scripted({1: 5, 2: 6, 3: EOS}))
    s = e.submit([1, 2], [0.5] * 8)
    assert run(e) == [s]
    assert s.ids == [1, 2, 5, 6, EOS]
    assert s.sampled == [False, False, True, True, True]
    assert s.ended
    assert s.logp == pytest.approx([0, 0, 0, 0, 0], abs=1e-5)


def test_a_resumed_turn_computes_only_its_new_tokens():
    model = Scripted({1: 5, 2: EOS, 3: 0, 4: 0, 5: 6, 6: EOS})
    e = engine(model)
    s = e.submit([1, 2], [0.5] * 10)
    run(e)
    model.computed.clear()
    e.resume(s, [7, 7])
    run(e)
    assert s.ids == [1, 2, 5, EOS, 7, 7, 6, EOS]
    assert s.sampled == [False, False, True, True, False, False, True, True]
    assert model.computed == [[EOS, 7, 7], [6]]
    assert s.turn_start == 6


def test_a_group_shares_one_prefill_and_prompts_share_their_prefix():
    model = Scripted(dict.fromkeys(range(20), EOS))
    e = engine(model)
    for prompt in ([1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 5]):
        e.submit(prompt, [0.5])
    run(e)
    # The shared prefix once, then each distinct remainder once.
    assert model.computed == [[1, 2], [3, 4, 5]]


def test_the_prefix_is_kept_until_the_weights_change():
    model = Scripted(dict.fromkeys(range(20), EOS))
    e = engine(model)

    def ask(prompts):
        model.computed.clear()
        for prompt in prompts:
            e.submit(prompt, [0.5])
        for s in run(e):
            e.release(s)
        return model.computed

    assert ask([[1, 2, 3], [1, 2, 4]]) == [[1, 2], [3, 4]]
    assert ask([[1, 2, 6]]) == [[6]]
    e.weights_changed()
    assert ask([[1, 2, 7], [1, 2, 8]]) == [[1, 2], [7, 8]]
    assert ask([[4, 2]]) == [[4], [2]]


def test_the_length_limit_pauses_a_sequence_without_its_end():
    e = engine(Scripted(dict.fromkeys(range(20), 5)))
    s = e.submit([1], [0.5] * 3)
    assert run(e) == [s]
    assert s.ids == [1, 5, 5, 5]
    assert not s.ended
    assert s.room == 0


def test_more_sequences_than_slots_wait_and_all_finish():
    e = engine(Scripted(dict.fromkeys(range(20), EOS)), slots=2)
    sequences = [e.submit([1, i], [0.5] * 2) for i in range(5)]
    done = []
    while e.busy:
        for s in e.step():
            e.release(s)
            done.append(s)
    assert set(map(id, done)) == set(map(id, sequences))
    assert all(s.ids == [1, i, EOS] for i, s in enumerate(sequences))
    e.weights_changed()
    assert len(e.pool.free) == len(e.pool.holders)


def test_a_small_chunk_only_delays():
    e = engine(Scripted(dict.fromkeys(range(20), EOS)), chunk=3)
    sequences = [e.submit([i, i, i], [0.5]) for i in range(4)]
    run(e)
    assert [s.ids for s in sequences] == [[i, i, i, EOS] for i in range(4)]


def test_misuse_is_refused():
    e = engine(Scripted(dict.fromkeys(range(20), 5)))
    with pytest.raises(ValueError, match="do not fit in 20"):
        e.submit([1] * 15, [0.5] * 6)
    with pytest.raises(ValueError, match="do not fit"):
        e.submit([], [0.5])
    s = e.submit([1], [0.5] * 3)
    with pytest.raises(RuntimeError, match="weights changed while"):
        e.weights_changed()
    run(e)
    with pytest.raises(ValueError, match="leave no room"):
        e.resume(s, [1])


def test_common_prefix():
    assert common_prefix([[1, 2, 3], [1, 2], [1, 2, 4]]) == [1, 2]
    assert common_prefix([[1], [2]]) == []
    assert common_prefix([[], [1]]) == []
    assert common_prefix([[3, 4]]) == [3, 4]


# --- pages -------------------------------------------------------------------------------------------------------


def test_a_group_holds_its_prompt_once():
    e = engine(Scripted(dict.fromkeys(range(40), 5)), page=4, context=40)
    group = [e.submit([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [0.5] * 8) for _ in range(3)]
    e.submit([7], [0.5] * 8)
    e.step()
    first, *others = group
    # Ten tokens: two full pages, shared; the third, with two tokens on it, is each one's own.
    assert all(s.pages[:2] == first.pages[:2] for s in others)
    assert len({s.pages[2] for s in group}) == 3
    assert [e.pool.holders[p] for p in first.pages] == [3, 3, 1]


def test_a_latecomer_joins_the_pages_of_its_group():
    model = Scripted(dict.fromkeys(range(40), 5) | {12: EOS})
    e = engine(model, page=4, context=40, slots=2)
    prompts = [[0, 1, 2, 3, 4, 5, 6, 7, 8]] * 3
    sequences = [e.submit(p, [0.5] * n) for p, n in zip(prompts, (1, 8, 8), strict=True)]
    while not sequences[0].ids[9:]:
        done = e.step()
    assert done == [sequences[0]]
    e.release(sequences[0])
    model.computed.clear()
    e.step()
    # The common prefix of three equal prompts is all but their last token; it alone is computed again.
    assert model.computed == [[5, 8]]
    run(e)
    assert sequences[2].ids == sequences[1].ids


def test_a_latecomer_copies_only_its_last_page():
    model = Scripted(dict.fromkeys(range(40), 5))
    e = engine(model, page=4, context=40, slots=2)
    other = e.submit([9], [0.5])
    first, late = (e.submit([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [0.5] * 8) for _ in range(2))
    e.release(*e.step())
    assert other.ids == [9, 5]
    model.computed.clear()
    e.pool.keys[:, first.pages[2]] = 3
    e.pool.values[:, first.pages[2]] = 4
    e.step()
    assert model.computed == [[5, 9]]
    assert late.pages[:2] == first.pages[:2]
    assert late.pages[2] != first.pages[2]
    assert (e.pool.keys[:, late.pages[2]] == 3).all()
    assert (e.pool.values[:, late.pages[2]] == 4).all()


def test_what_one_of_a_group_reads_is_copied_to_the_others():
    e = engine(Scripted(dict.fromkeys(range(40), 5)), page=4, context=40)
    group = [e.submit([0, 1, 2, 3, 4, 5], [0.5] * 8) for _ in range(3)]
    forward = e.decoder.forward

    def writing(*arguments):
        if group[0].pages:
            e.pool.keys[:, group[0].pages[-1]] = 3
        return forward(*arguments)

    e.decoder.forward = writing
    e.step()
    assert len({s.pages[-1] for s in group}) == 3
    assert all((e.pool.keys[:, s.pages[-1]] == 3).all() for s in group)


def test_a_prompt_larger_than_the_pool_is_one_sentence():
    e = engine(Scripted({}), context=100, tokens=16, page=8)
    with pytest.raises(UserError, match="A prompt of 12 tokens with up to 6 new ones does not fit in the cache of 16"):
        e.submit([1] * 12, [0.5] * 6)
    e.submit([1] * 12, [0.5] * 5)
    run(e)


def test_a_sequence_that_needs_the_whole_pool_pushes_the_prefix_out():
    e = engine(Scripted(dict.fromkeys(range(100), 5)), context=100, tokens=16, page=8)
    for prompt in ([1, 2, 3], [1, 2, 4]):
        e.submit(prompt, [0.5])
    for _ in range(2):  # there is no room for both at once
        e.release(*e.step())
    assert e.prefix_ids == [1, 2]
    s = e.submit([1, 2, 5, *[6] * 9], [0.5] * 5)
    run(e)
    assert (s.ids[12:], e.prefix_ids) == ([5] * 5, [])


def test_a_paused_sequence_gives_its_pages_back_and_is_read_again():
    model = Scripted(dict.fromkeys(range(40), 5) | {3: EOS})
    e = engine(model, page=2, context=12, tokens=12)
    old = e.submit([1, 7, 7, 7, 7], [0.5] * 7)
    young = e.submit([1, 8, 8, 8], [0.5] * 6)
    assert e.step() == [young]
    for _ in range(3):
        assert not e.step()
    assert (young.pages, e.evictions, young in e.alive) == ([], 1, False)
    e.resume(young, [6, 6])  # there is no room for it yet
    assert [e.step() for _ in range(3)] == [[], [], [old]]
    e.release(old)
    model.computed.clear()
    e.step()
    assert model.computed == [[8, 8, 8, EOS, 6, 6]]  # its prefix [1] is still there
    assert young.ids[4:] == [EOS, 6, 6, 5]


def test_a_prefix_longer_than_the_prompt_leaves_siblings_nothing_to_share():
    """Two sequences of one prompt that were put back after they had said the same."""
    model = Scripted(dict.fromkeys(range(20), 5))
    e = engine(model, page=1)
    pair = [e.submit([1, 2, 3], [0.5] * 8) for _ in range(2)]
    e.submit([9], [0.5])  # so that nothing is common at first
    e.release(*e.step())
    e.step()
    for s in pair:
        e.release(s)
        e.speaking.remove(s)
        e.waiting.append(s)
    model.computed.clear()
    e.step()
    assert e.prefix_ids == [1, 2, 3, 5]
    assert model.computed == [[1, 2, 3, 5], [5, 5]]
    assert not set(pair[0].pages) & set(pair[1].pages)
    run(e)
    assert [s.ids for s in pair] == [[1, 2, 3] + [5] * 8] * 2


@pytest.mark.parametrize(
    ("device", "backend", "mode", "why"),
    [
        ("cpu", None, "auto", "they need a GPU"),
        ("cpu", None, "off", "--cuda-graphs off"),
        ("cuda:1", "torch", "auto", "they record Triton's attention, not torch's"),
        ("cuda", None, "off", "--cuda-graphs off"),
        ("cuda", None, "auto", ""),
        ("cuda:1", "triton", "on", ""),
    ],
)
def test_where_decoding_has_graphs(device, backend, mode, why):
    assert without_graphs(mode, torch.device(device), backend) == why


def test_a_decoder_says_whether_it_has_graphs():
    assert engine(Scripted({})).decoder.describe() == "decoding without CUDA graphs: they need a GPU"
    with pytest.raises(UserError, match="--cuda-graphs on: they need a GPU; leave it out"):
        engine(Scripted({}), graphs="on")


class Rationed(list):
    """Uniforms of which nobody may copy more at once than a burst needs."""

    def __getitem__(self, at):
        got = super().__getitem__(at)
        assert not isinstance(at, slice) or len(got) <= 2
        return got


def test_a_burst_copies_no_more_noise_than_it_needs():
    e = engine(Scripted(dict.fromkeys(range(20), 5)), burst=2)
    s = e.submit([1], Rationed([0.5] * 12))
    run(e)
    assert s.ids == [1] + [5] * 12


def test_on_a_gpu_the_cache_leaves_what_graphs_keep(monkeypatch):
    student = load_student("tiny", quant="none", dtype="fp32")
    config, most = student.config, 8 * 338 * 4 * 4 + 2**28
    token_bytes = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((2**28 + 2**20) * 10 / 9, 0))
    monkeypatch.setattr(student, "device", torch.device("cuda"))
    monkeypatch.setattr("lite_mentor.engine.memory_left", lambda device: "A Card has 7.1 GiB.")
    monkeypatch.setattr("lite_mentor.engine.Engine.__init__", lambda self, *_, **how: vars(self).update(how))
    assert Engine.of(student, slots=4, context=30, graphs="off").tokens == 120
    left = 2**28 + 2**20 - most
    assert Engine.of(student, slots=4, context=30).tokens == min(120, left // token_bytes - 16)
    with pytest.raises(UserError, match=r"raise --cache-gib.*A Card has 7.1 GiB"):
        Engine.of(student, slots=400, context=300)


def test_the_cache_has_the_size_that_was_asked_for(tmp_path):
    student = load_student("tiny", quant="none", dtype="fp32")
    config = student.config
    token_bytes = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    roomy = Engine.of(student, slots=3, context=100)
    assert len(roomy.pool.holders) * roomy.pool.page == 304  # 3 x 100, in pages of 16
    small = Engine.of(student, slots=3, context=100, gib=160 * token_bytes / 2**30)
    assert small.pool.keys.nbytes + small.pool.values.nbytes == 160 * token_bytes  # one page of them is the spare one
    assert small.describe().endswith("up to 3 rollouts at once, 1 of them at full length")
    with pytest.raises(UserError, match="room for 99 tokens, but one rollout may need 100; raise --cache-gib"):
        Engine.of(student, slots=3, context=100, gib=115.5 * token_bytes / 2**30)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_logits_without_a_distribution_are_one_sentence(temperature, broken):
    model = Scripted({})
    model.head = lambda hidden_RH: hidden_RH * broken
    e = engine(model)
    e.sampling = Sampling(temperature)
    e.submit([1], [0.5])
    with pytest.raises(UserError, match="The student's logits hold NaN or infinity, so no token can be drawn"):
        e.step()


def test_nothing_to_say_is_refused():
    with pytest.raises(ValueError, match=r"1 prompt \+ 0 new"):
        engine(Scripted({})).submit([1], [])


def test_the_pool_guards_its_pages():
    pool = engine(Scripted({}), tokens=32, page=16).pool
    with pytest.raises(RuntimeError, match="3 pages wanted, 2 free"):
        pool.take(3)
    pages = pool.take(2)
    assert pages == [0, 1]
    pool.drop(pages)
    with pytest.raises(RuntimeError, match="page 0 was dropped by one who did not hold it"):
        pool.drop(pages)


def random_schedule(seed: int) -> None:
    """Submit, step, pause, resume and release at random on a small pool; then every page must be free again."""
    choose = random.Random(seed)
    slots, page, context = choose.randint(1, 5), choose.randint(1, 7), 24
    tokens = choose.randint(context, slots * context + page)
    model = Scripted({p: choose.choice([0, 0, 5, EOS]) for p in range(context)})
    how = dict(chunk=choose.choice([3, 8, 2048]), burst=choose.choice([1, 1, 2, 5]))
    e = engine(model, slots=slots, page=page, context=context, tokens=tokens, **how)
    prompts = [[choose.choice((1, 2)) for _ in range(choose.randint(1, 14))] for _ in range(3)]
    prompts.append(prompts[0] + [3] * 2)
    coming = [(choose.choice(prompts), choose.randint(1, 8)) for _ in range(choose.randint(1, 10))]
    paused, finished, total = [], 0, len(coming)
    while coming or paused or e.busy:
        while coming and choose.random() < 0.5:
            prompt, limit = coming.pop()
            e.submit(prompt, [choose.random() for _ in range(limit)])
        if e.busy and (e.speaking or not paused):
            paused += e.step()
        while paused and choose.random() < 0.5:
            s = paused.pop(choose.randrange(len(paused)))
            injected = [4] * choose.randint(1, 4)
            if s.room > len(injected) and choose.random() < 0.7:
                e.resume(s, injected)
            else:
                e.release(s)
                finished += 1
        check_pages(e)
        if choose.random() < 0.002:
            e.abandon()
            coming, paused, finished = [], [], total
    e.weights_changed()
    assert finished == total
    assert sorted(e.pool.free) == list(range(len(e.pool.holders)))
    assert not any(e.pool.holders)


def check_pages(e: Engine) -> None:
    """Every page has as many holders as block tables name it, and only prompts are shared."""
    held = Counter(page for s in e.alive for page in s.pages)
    held.update(e.prefix_pages)
    assert e.pool.holders == [held[page] for page in range(len(e.pool.holders))]
    for s in e.alive:
        lent = max(0, s.prompt_length - 1 - s.shared) // e.pool.page
        assert all(held[page] == 1 for page in s.pages[lent:])


@settings(max_examples=200)
@given(st.integers(0, 2**32 - 1))
def test_no_schedule_loses_a_page_or_gets_stuck(seed):
    random_schedule(seed)


def test_a_thousand_schedules_lose_no_page():
    for seed in range(1_000):
        random_schedule(seed)


def test_a_step_with_nobody_to_speak_does_nothing():
    e = engine(Scripted(dict.fromkeys(range(20), EOS)), slots=1)
    first, second = (e.submit([i], [0.5]) for i in range(2))
    assert e.step() == [first]
    assert e.step() == []
    e.release(first)
    assert e.step() == [second]
