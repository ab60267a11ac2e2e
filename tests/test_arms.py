"""Arms side by side: what a folder holds, what is not run twice, and what it refuses."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from bench import arms
from bench.__main__ import main as bench_main
from tests.test_train import SHORT

FLAGS = [*SHORT, "--steps", "2", "--save-every", "1", "--temperature", "1.5"]


def test_arms_share_a_cold_start_and_are_run_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LITE_MENTOR_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "arms"
    command = ["arms", *FLAGS, "--out", str(out), "--arms", "base", "sft", "sparse", "--seeds", "0"]
    assert bench_main(command) == 0
    found = json.loads((out / "arms.json").read_text())["arms"]
    assert [r["arm"] for r in found] == ["base", "cold", "sft", "sparse"]
    assert [set(r["suites"]) for r in found] == [{"validation", "test"}] * 4
    assert len({tuple(r["suites"]["validation"]["keys"]) for r in found}) == 1
    assert found[0]["tokens_trained"] == 0
    assert all(r["tokens_trained"] > 0 for r in found[1:3])
    configs = {a: json.loads((out / f"seed-0/{a}/config.json").read_text()) for a in ("cold", "sft", "sparse")}
    assert configs["sparse"]["reward"] == "sparse"
    text = (out / "table.md").read_text()
    assert all(f"| {arm} | 1 |" in text for arm in ("base", "cold", "sft", "sparse"))
    assert "<svg" in (out / "curves.html").read_text()
    drawn = ElementTree.fromstring((out / "figure.svg").read_text())
    assert len(drawn.findall(".//{*}circle")) == sum(len(r["suites"]) for r in found)

    before = {p: p.stat().st_mtime_ns for p in out.glob("seed-0/*/arm.json")}
    # An arm that was interrupted after its first step goes on from there, and ends as it would have.
    (out / "seed-0/sparse/arm.json").unlink()
    capsys.readouterr()
    assert bench_main(command) == 0
    assert "== sparse, seed 0 ==" in capsys.readouterr().out
    again = json.loads((out / "arms.json").read_text())["arms"]
    assert [r["suites"] for r in again] == [r["suites"] for r in found]
    assert again[3]["tokens_trained"] == found[3]["tokens_trained"]
    assert all(p.stat().st_mtime_ns == t for p, t in before.items() if p.parent.name != "sparse")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--steps", "3"], "holds arms with steps = 2, not 3: they could not be compared"),
        (["--sft-steps", "4"], "holds arms with sft_steps = 3, not 4"),
        (["--arms", "ppo"], "--arms ppo: there is no such arm; choose from base sft sparse"),
        (["--seeds", "one"], "--seeds one: give whole numbers"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, capsys, flags, sentence):
    arms.claim(tmp_path / "arms", arms.parse(FLAGS))
    assert bench_main(["arms", *FLAGS, "--out", str(tmp_path / "arms"), *flags]) == 2
    assert sentence in capsys.readouterr().err


def test_folders_of_something_else_are_refused(tmp_path, capsys):
    config = arms.parse(FLAGS)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    for content, sentence in (
        (None, "holds other files; name a new folder"),
        ('{"format": 9, "config": {}}', "was written in format 9, not 1"),
        ("{", "cannot be read"),
    ):
        if content:
            (tmp_path / "other" / "shared.json").write_text(content)
        with pytest.raises(arms.UserError, match=sentence):
            arms.claim(tmp_path / "other", config)
    assert bench_main(["arms", *FLAGS]) == 2
    assert "--out is missing" in capsys.readouterr().err
