"""The step bench runs the real trainer and reports what it measured; it is never asked how fast it was."""

from __future__ import annotations

import json
from types import SimpleNamespace

import torch

from bench.__main__ import main as bench_main
from bench.keep_rate import keep_rate
from tests.test_train import SHORT


def test_the_step_bench_prints_a_table_and_its_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LITE_MENTOR_CACHE", str(tmp_path))
    assert bench_main(["step", *SHORT, "--steps", "2", "--temperature", "1.5"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    row = json.loads(lines[-1])
    assert row["command"].startswith("python -m bench step --preset tiny")
    assert row["time/step"] >= row["time/rollout"] > row["time/tools"] > 0
    assert row["tokens/sampled"] > 0
    assert row["memory/peak"] > 0
    header = lines.index("| stage | s | share | tokens/s |")
    assert [line.split("|")[1].strip() for line in lines[header + 2 : header + 7]] == [
        "rollout", "tools", "score", "update", "step",
    ]  # fmt: skip


def test_the_keep_rate_of_a_filter_that_drops_nothing_and_of_one_that_drops_much(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LITE_MENTOR_CACHE", str(tmp_path))
    assert bench_main(["keep-rate", *SHORT]) == 0
    row = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    kept = [r["kept"] for r in row["rows"]]
    assert kept == sorted(kept)
    assert 0 < kept[0] <= 1
    assert all(r["dropped_max"] <= r["threshold"] * 3 for r in row["rows"])  # the tiny head has three tiles
    hidden = torch.eye(4) * 200
    head = SimpleNamespace(head_weight_VH=torch.eye(300)[:, :4], logit_scale=1.0, softcap=None)
    assert keep_rate(hidden, head, 1.0, 1e-3) == {
        "threshold": 1e-3, "kept": 1 / 3, "dropped_max": 0.0, "dropped_mean": 0.0
    }  # fmt: skip


def test_an_unknown_bench_says_how_to_use_it(capsys):
    assert bench_main(["nope"]) == 2
    assert "usage: python -m bench {kernels,step," in capsys.readouterr().err
