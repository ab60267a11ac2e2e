"""What is counted as a launch, and what a layer's adapters and norms cost."""

from __future__ import annotations

import json

import torch

from bench import launches
from bench.__main__ import main as bench_main


def test_views_and_allocations_are_no_launches():
    x = torch.ones(4, 6, dtype=torch.bfloat16)
    with launches.Counter() as counter:
        y = x.t()[:, None].view(6, 4).expand(6, 4)
        torch.empty_like(y)
        y.split(2)[0].detach()
    assert (counter.launches, counter.bytes) == (0, 0)
    with launches.Counter() as counter:
        x @ y  # reads twice 24 numbers and writes 16
        x.add_(1)  # reads and writes 24
        x[:1].expand(4, 6).float()  # reads 6 and writes 24 in float32
    assert (counter.launches, counter.bytes) == (3, 2 * 64 + 2 * 48 + 2 * 6 + 4 * 24)


def test_what_is_one_kernel_elsewhere_counts_as_one():
    counter, x = launches.Counter(), torch.ones(3, 5)
    with counter:
        out = counter.as_one(lambda x: x.exp().log().exp())(x)
    assert torch.equal(out, x.exp().log().exp())
    assert (counter.launches, counter.bytes) == (1, 2 * 60)


def test_the_adapters_of_a_layer_take_eleven_launches(monkeypatch, capsys):
    """One for each input and one for each of seven layers; the width changes the bytes alone."""
    monkeypatch.setattr(launches, "SHAPES", {"qwen3-0.6b": dict(hidden_size=64, intermediate_size=96)})
    assert bench_main(["launches"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert "counted, not timed" in lines[0]
    found = json.loads(lines[-1])
    count = {name: found[name]["launches"] for name in launches.WAYS}
    assert count["forward with adapters"] - count["forward without"] == 4 + 7
    assert count["a decoding step, merged weights"] <= count["forward without"] < 30
    assert count["forward, recomputation and backward"] < 4 * count["forward with adapters"]
    assert all(found[name]["bytes"] > 0 for name in launches.WAYS)
