"""The rollout bench measures whole turns of the same length on both sides; it is never asked who was faster."""

from __future__ import annotations

import argparse
import json
import math

import pytest
import torch

from bench import agreement, random_student, rollout
from bench.__main__ import main as bench_main
from bench.rollout import PARTS, main, weight_bytes
from lite_mentor.engine import Engine, Sampling
from lite_mentor.load import load_student

TINY = "--student tiny --device cpu --prompts 2 --group 2 --turns 1 --prompt 32 --new 3 --result 2 --rounds 1"


def test_the_rollout_bench_prints_a_table_and_its_json(capsys):
    main(TINY.split())
    lines = capsys.readouterr().out.strip().splitlines()
    row = json.loads(lines[-1])
    assert row["sampled"] == 2 * 2 * 2 * 3
    # 40 tokens for each of 4 slots; a token has 3 layers, 4 KV heads of 32, float32 keys and values.
    assert row["cache_bytes"] == (4 * 40 + 16) * 3 * 4 * 32 * 4 * 2
    ours = row["engine"]
    assert all(ours[part] > 0 for part in (*PARTS, "rest"))
    assert math.fsum(ours[part] for part in (*PARTS, "rest")) == pytest.approx(ours["total"], rel=1e-9)
    # Each of two turns reads its prompt or result in one step and decodes two tokens. A row sees 33 and
    # 34 tokens in the first turn, 38 and 39 in the second, of which all rows share half of the prompt.
    assert ours["decode_steps"] == 4
    tokens = sum(16 + 4 * (n - 16) for n in (33, 34, 38, 39))
    assert ours["decode_kv_bytes"] == tokens * 3 * 4 * 32 * 4 * 2
    assert row["decode_bytes"] == ours["decode_kv_bytes"] + 4 * 3_125_760
    assert row["of_bandwidth"] == pytest.approx(row["decode_bytes"] / row["copy_rate"] / ours["decode"])
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["engine", "generate", "batching"]


def test_another_library_that_fails_leaves_the_engines_figures(capsys, monkeypatch):
    def fails(*_):
        raise AssertionError("no pages")

    monkeypatch.setattr(rollout, "by_batching", fails)
    main(TINY.split())
    out = capsys.readouterr().out
    assert "| batching | failed: AssertionError: no pages |" in out
    row = json.loads(out.strip().splitlines()[-1])
    assert row["failed"] == {"batching": "AssertionError: no pages"}
    assert row["engine"]["tokens_per_s"] > 0
    assert row["times_generate"] > 0


def test_all_three_ways_run_with_this_version_of_transformers(capsys):
    main(TINY.split())
    row = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert row["failed"] == {}
    assert row["times_batching"] > 0


@pytest.mark.parametrize("method", ["generate", "generate_batch"])
def test_a_peer_that_raises_leaves_the_engine_its_attention(monkeypatch, method):
    student = load_student("tiny", quant="none", dtype="fp32")
    model, options = student.rollout_model, rollout.parse(TINY.split())
    prompts, results = rollout.texts(options, student.head_weight_VH.shape[0])

    def fails(*_, **__):
        assert model.config._attn_implementation == "sdpa"
        raise AssertionError("out of pages")

    monkeypatch.setattr(model, method, fails, raising=False)
    way = rollout.by_generate if method == "generate" else rollout.by_batching
    with pytest.raises(AssertionError, match="out of pages"):
        way(model, prompts, results, options)
    assert model.config._attn_implementation == "lite_mentor"


def test_an_engine_that_raises_keeps_its_burst(monkeypatch):
    student = load_student("tiny", quant="none", dtype="fp32")
    options = rollout.parse(TINY.split())
    prompts, results = rollout.texts(options, student.head_weight_VH.shape[0])
    engine = Engine.of(student, slots=len(prompts), context=rollout.length(options))
    engine.eos_ids, engine.sampling, burst = frozenset(), Sampling(), engine.burst
    monkeypatch.setattr(engine, "resume", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rollout.by_engine(engine, prompts, results, options)
    assert engine.burst == burst


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_weight_is_read_once(dtype):
    """Not the embedding; and the head as it lies on a CPU, in float32."""
    student = load_student("tiny", quant="none", dtype=dtype)
    sizes = {name: p.numel() for name, p in student.rollout_model.named_parameters()}
    head = sizes.pop("lm_head.weight")
    assert sizes.pop("model.embed_tokens.weight") == head
    layers = sum(sizes.values())
    assert weight_bytes(student) == layers * (4 if dtype == "fp32" else 2) + head * 4
    assert (layers + head) * 4 == 3_125_760


def test_one_measurement_for_each_batch(capsys, monkeypatch):
    monkeypatch.setattr(rollout, "measure", lambda student, options, rate: vars(options))
    monkeypatch.setattr(rollout, "table", lambda found: "")
    main([*TINY.split(), "--batches", "1", "4", "7"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line]
    assert [(r["prompts"], r["group"]) for r in rows] == [(1, 1), (2, 2), (7, 1)]


def test_a_shape_is_a_student_with_random_weights(monkeypatch):
    monkeypatch.setitem(rollout.SHAPES, "small", dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2))
    monkeypatch.setitem(random_student.QWEN3, "vocab_size", 400)
    options = rollout.parse(["--student", "small", "--device", "cpu", "--dtype", "fp32", "--weights", "unmerged"])
    student = rollout.open_student(options)
    assert student.head_weight_VH.shape == (400, 64)
    assert student.config.model_type == "qwen3"
    assert student.rollout_model is student.base


def test_graphs_need_a_gpu(capsys):
    with pytest.raises(SystemExit):
        main([*TINY.split(), "--graphs", "on"])
    assert "--graphs on needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--batches", "0"], ["--new", "0"], ["--turns", "-1"], ["--rounds", "0"]])
def test_sizes_that_measure_nothing_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        main([*TINY.split(), *flags])
    assert "sizes and batches are at least 1, --turns at least 0" in capsys.readouterr().err


class Clock:
    """The bench's clock, moved by the parts of a scripted engine alone."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def takes(self, seconds: float, run):
        def slow(*inputs):
            self.now += seconds
            return run(*inputs)

        return slow


def test_the_split_is_of_the_whole(monkeypatch):
    """Two sequences, two turns of two tokens: the prefix, then two steps that read and two that decode."""
    clock = Clock()
    monkeypatch.setattr(rollout, "time", clock)
    engine = Engine(
        clock.takes(5.0, lambda ids_1T, positions_1T, plan: torch.zeros(ids_1T.shape[1], 10)),
        clock.takes(2.0, lambda hidden_RH: hidden_RH),
        layers=1, kv_heads=1, head_dim=2, eos_ids=[], slots=2, context=20,
    )  # fmt: skip
    engine.sampling = Sampling(0.0)
    engine.decoder.draw = clock.takes(1.0, engine.decoder.draw)
    engine.resume = clock.takes(0.5, engine.resume)
    engine.release = clock.takes(0.25, engine.release)
    options = argparse.Namespace(prompt=4, turns=1, new=2, result=3)
    own = vars(engine.decoder).copy()
    found = rollout.timed(
        lambda: rollout.by_engine(engine, [[1, 2, 3, 4], [1, 2, 5, 6]], [[7, 8, 9]], options), engine.device
    )
    assert {part: found[part] for part in PARTS} == {
        "prefill": 5.0 + 2 * (5.0 + 2.0), "decode": 2 * (5.0 + 2.0), "sampling": 4 * 1.0, "tools": 2 * 0.5,
    }  # fmt: skip
    assert found["total"] - sum(found[part] for part in PARTS) == 2 * 0.25
    # In float32, keys and values of 2: 16 bytes a token; the prefix of 2 once, then 3 and 8 tokens of each row.
    assert (found["decode_steps"], found["decode_kv_bytes"]) == (2, 16 * ((2 + 2 * 3) + (2 + 2 * 8)))
    assert {**vars(engine.decoder), "_block": None} == own


def test_the_middle_round_is_a_whole_round():
    rounds = [{"total": t, "decode": d} for t, d in ((4.0, 1.0), (1.0, 0.5), (3.0, 2.5), (9.0, 0.1))]
    assert rollout.middle_of(rounds, 6) == {"total": 3.0, "decode": 2.5, "tokens_per_s": 2.0}


def test_the_agreement_of_a_float32_student_and_of_one_that_samples_old_weights(capsys):
    assert bench_main(["agreement", "--student", "tiny", "--task", "tiny", "--dtype", "fp32", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    row = json.loads(lines[-1])
    assert (row["equal"], row["tokens before a difference"], row["tokens"]) == (16, 16 * 64, 16 * 64)
    assert row["greedy, equal to generate"] == 16
    assert row["logprob, together and alone, max"] < 1e-4
    assert 0 < row["logprob, sampler and trainer, mean"] < row["logprob, sampler and trainer, max"] < 1e-4
    student = load_student("tiny", quant="none", dtype="fp32")
    for parameter in student.trainable():
        parameter.data.add_(0.05)
    old = agreement.compare(student, agreement.Options(task="tiny", sequences=2, new=8, device="cpu"))
    assert old["equal"] == 2
    assert old["logprob, sampler and trainer, max"] > 0.01
