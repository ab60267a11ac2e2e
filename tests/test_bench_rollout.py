"""The rollout bench measures whole turns of the same length on both sides; it is never asked who was faster."""

from __future__ import annotations

import json

from bench.rollout import main


def test_the_rollout_bench_prints_a_table_and_its_json(capsys):
    flags = "--student tiny --device cpu --prompts 2 --group 2 --turns 1 --prompt 8 --new 3 --result 2 --rounds 1"
    main(flags.split())
    lines = capsys.readouterr().out.strip().splitlines()
    row = json.loads(lines[-1])
    assert row["sampled"] == 2 * 2 * 2 * 3
    # 16 tokens are one page of 3 layers, 4 KV heads of 32, float32 keys and values, for 4 slots.
    assert row["cache_bytes"] == 4 * 16 * 3 * 4 * 32 * 4 * 2
    parts = row["engine"]
    assert 0 < parts["prefill"] + parts["decode"] + parts["sampling"] <= parts["total"]
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["engine", "generate", "batching"]
