"""The step bench runs the real trainer and reports what it measured; it is never asked how fast it was."""

from __future__ import annotations

import json

from bench.__main__ import main as bench_main
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


def test_an_unknown_bench_says_how_to_use_it(capsys):
    assert bench_main(["nope"]) == 2
    assert "usage: python -m bench {step}" in capsys.readouterr().err
