"""Arms side by side: what a folder holds, what is not run twice, and what it refuses."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from bench import arms, arms_report
from bench.__main__ import main as bench_main
from tests.test_train import SHORT

FLAGS = [*SHORT, "--steps", "2", "--save-every", "1", "--temperature", "1.5"]


def test_arms_share_a_cold_start_and_are_run_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LITE_MENTOR_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "arms"
    command = ["arms", *FLAGS, "--out", str(out), "--arms", "base", "sft", "sparse", "--seeds", "0"]
    command += ["--beta", "0.01"]
    assert bench_main(command) == 0
    found = json.loads((out / "arms.json").read_text())["arms"]
    assert [r["arm"] for r in found] == ["base", "cold", "sft", "sparse"]
    assert [set(r["suites"]) for r in found] == [{"validation", "test", "tiny_ood"}] * 4
    assert len({tuple(r["suites"]["validation"]["keys"]) for r in found}) == 1
    assert found[0]["tokens_trained"] == 0
    assert all(r["tokens_trained"] > 0 for r in found[1:3])
    configs = {a: json.loads((out / f"seed-0/{a}/config.json").read_text()) for a in ("cold", "sft", "sparse")}
    assert configs["sparse"]["reward"] == "sparse"
    steps = [json.loads(line) for line in (out / "seed-0/sparse/metrics.jsonl").read_text().splitlines()]
    assert [row["kl"] for row in steps[:1]] == [pytest.approx(0, abs=1e-5)]  # to the student that the arms begin with
    for row in found:
        steps = [json.loads(line) for line in (out / f"seed-0/{row['arm']}/metrics.jsonl").read_text().splitlines()]
        assert row["seconds"] == sum(step["time/step"] for step in steps)
    text = (out / "table.md").read_text()
    assert all(f"| {arm} | 1 |" in text for arm in ("base", "cold", "sft", "sparse"))
    page = (out / "report.html").read_text()
    assert "Not finished" not in page
    shown = 2 * arms.TRANSCRIPTS  # of test and of tiny_ood
    assert [page.count(f"<summary><b>{arm}</b>") for arm in ("base", "cold", "sft", "sparse")] == [shown] * 4
    assert page.count("<figcaption>") == 2
    drawn = ElementTree.fromstring((out / "figure.svg").read_text())
    assert len(drawn.findall(".//{*}circle")) == sum(len(r["suites"]) for r in found)

    before = {p: p.stat().st_mtime_ns for p in out.glob("seed-0/*/arm.json")}
    # An arm that was interrupted after its first step goes on from there, and ends as it would have.
    (out / "seed-0/sparse/arm.json").unlink()
    arms.write_results(out, arms.parse(FLAGS), {"command": "c", "date": "d", "commit": "e", "preset": "tiny"})
    assert "Not finished, so not shown: seed-0/sparse; the same command goes on." in (out / "report.html").read_text()
    capsys.readouterr()
    assert bench_main(command) == 0
    assert "== sparse, seed 0 ==" in capsys.readouterr().out
    again = json.loads((out / "arms.json").read_text())["arms"]
    assert [r["suites"] for r in again] == [r["suites"] for r in found]
    # No step was left to take, and still the seconds of those that were taken stand there.
    assert [r["seconds"] for r in again] == [r["seconds"] for r in found]
    assert again[3]["tokens_trained"] == found[3]["tokens_trained"]
    assert all(p.stat().st_mtime_ns == t for p, t in before.items() if p.parent.name != "sparse")


def result(arm, correct, seed=0, keys=None):
    keys = keys or [f"{i:x}" for i in range(len(correct))]
    row = {"n": len(correct), "keys": keys, "correct": correct, "accuracy": sum(correct) / len(correct),
           "ci95": [0.2, 0.6], "calls/ok": 0.5}  # fmt: skip
    return {"arm": arm, "seed": seed, "tokens_trained": 1200, "seconds": 30.4, "suites": {"validation": row},
            "transcripts": [], "cold_start": None if arm == "base" else f"cold start of seed {seed}"}  # fmt: skip


def test_an_arm_is_compared_with_its_own_cold_start_question_by_question():
    cold, flex = [1, 0, 0, 0, 1, 0, 0, 0], [1, 1, 1, 0, 1, 0, 0, 0]
    text = arms_report.table([result("base", [0] * 8), result("cold", cold), result("flex", flex)])
    assert "| base | 1 | 0.0% (20.0 to 60.0) |" in text
    assert "| cold | 1 | 25.0% (20.0 to 60.0) |" in text
    # Two of eight pairs improve: the resampled sum is binomial(8, 1/4), whose quantiles are 0 and 5 of 8.
    assert "| flex | 1 | 50.0% (+25.0: +0.0 to +62.5) |  | 0.50 |  |  |  | 1,200 | 30 |" in text
    # No question of this one changed, so nothing varies.
    assert "25.0% (+0.0: +0.0 to +0.0)" in arms_report.table([result("cold", cold), result("sparse", cold)])


def test_pairs_are_pooled_over_seeds_each_with_its_own_cold_start():
    results = [result("cold", [1, 0]), result("cold", [0, 0], 1), result("flex", [1, 1]), result("flex", [0, 1], 1)]
    # 75 % against 25 %: one pair of two improves in each seed, and the mean of four pairs is 1/2.
    assert arms_report.change_since_cold(results, "flex", "validation") == (0.5, 0.0, 1.0)
    assert "| flex | 2 | 75.0% (+50.0: +0.0 to +100.0) |" in arms_report.table(results)
    assert "| cold | 2 | 25.0% (0.0 to 50.0) |" in arms_report.table(results)


def test_answers_to_different_questions_are_not_compared():
    results = [result("cold", [1, 0]), result("flex", [1, 0], keys=["a", "b"])]
    with pytest.raises(arms.UserError, match="seed-0/flex and seed-0/cold answered different questions of validation"):
        arms_report.table(results)


HOSTILE = "</pre><script>alert(1)</script>\u202e\x1b[31m\ud800<img src=x onerror=alert(2)>"


def folder_of(out, *results):
    """A folder of arms as `run_arm` leaves it."""
    claimed = arms.claim(out, arms.parse(FLAGS))
    config = {k: v for k, v in claimed.asdict().items() if k not in arms_report.OWN}
    for r in results:
        folder = out / f"seed-{r['seed']}" / r["arm"]
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({**config, "device": "cpu", "dtype": "fp32"}))
        (folder / "arm.json").write_text(json.dumps(r))
        step = {"step": 0, "phase": "rl", "reward/mean": 0.3, "reward/correct": None}
        (folder / "metrics.jsonl").write_text(json.dumps(step) + "\n" if r["arm"] == "flex" else "")
    return out


def report_of(out):
    about = {"command": f"arms {HOSTILE[:5]}", "date": "2026-11-23", "commit": "abc", "preset": "tiny"}
    arms_report.write_results(out, arms.parse(FLAGS), about)
    return (out / "report.html").read_text(encoding="utf-8")


def test_what_a_student_wrote_stays_text_in_the_report(tmp_path):
    cold, flex = result("cold", [1, 0]), result("flex", [1, 1])
    for r in (cold, flex):
        r["suites"]["test"] = r["suites"]["validation"]
        episode = {"question": HOSTILE, "answer": [HOSTILE], "correct": True, "stop": "eos",
                   "segments": [{"sampled": own, "text": HOSTILE} for own in (True, False)]}  # fmt: skip
        r["transcripts"] = [{"suite": "validation", **episode}, {"suite": "test", **episode}]
    page = report_of(folder_of(tmp_path / "arms", cold, flex))
    assert not re.search(r"<(script|img|link|iframe)|https?://(?!www\.w3\.org/2000/svg)", page)
    assert (
        page.count("&lt;/pre&gt;&lt;script&gt;alert(1)") == 1 + 2 * 4
    )  # the question; of each arm question, answer, 2
    assert not any(c in page for c in "\u202e\x1b\ud800")
    assert page.count("<details>") == 2 + 1  # validation shows none; the settings fold as well
    Balanced().feed(page)
    assert "<td>100.0% (+50.0: +0.0 to +100.0)</td>" in page
    assert "<code>arms &lt;/pre</code>" in page


class Balanced(HTMLParser):
    """Fails at a closing tag that does not close the last one opened."""

    def __init__(self):
        super().__init__()
        self.stack = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br"):
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def test_arms_that_do_not_belong_together_are_refused(tmp_path):
    cold, flex = result("cold", [1, 0]), result("flex", [1, 1])
    cases = {
        "other-start": ({"cold_start": "another"}, {}, "flex did not start from .*cold, so its change cannot"),
        "no-start": ({"cold_start": None}, {}, "flex did not start from"),
        "other-budget": ({}, {"steps": 3}, "flex ran with steps = 3 and this folder's arms with 2"),
    }
    for name, (fields, settings, sentence) in cases.items():
        out = folder_of(tmp_path / name, cold, {**flex, **fields})
        path = out / "seed-0/flex/config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
        with pytest.raises(arms.UserError, match=sentence):
            arms_report.collect(out)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", r"flex/arm.json cannot be read \(Expecting"),
        ('{"arm": "flex"}', "flex/arm.json has no seed, so another version wrote it"),
        ("7", "flex/arm.json cannot be read"),
    ],
)
def test_a_damaged_arm_is_one_sentence(tmp_path, content, sentence):
    out = folder_of(tmp_path / "arms", result("cold", [1, 0]), result("flex", [1, 1]))
    (out / "seed-0/flex/arm.json").write_text(content)
    with pytest.raises(arms.UserError, match=sentence):
        arms_report.collect(out)


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


@pytest.mark.parametrize(
    ("suite", "package", "sentence"),
    [
        ("gsm_symbolic", "reasoning_gym", "needs reasoning-gym: install lite-mentor with its extra `eval`."),
        ("bfcl_multiple", "bfcl_eval", "pip install --no-deps bfcl-eval"),
        ("ood_tool", None, "There is no task suite 'ood_tool'"),
    ],
)
def test_a_suite_that_cannot_be_had_is_named_before_anything_runs(
    tmp_path, capsys, monkeypatch, suite, package, sentence
):
    if package == "bfcl_eval":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    elif package:
        monkeypatch.setitem(sys.modules, package, None)
    flags = [*FLAGS, "--eval-suites", "validation", suite, "--out", str(tmp_path / "arms")]
    assert bench_main(["arms", *flags]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not (tmp_path / "arms").exists()


def test_folders_of_something_else_are_refused(tmp_path, capsys):
    config = arms.parse(FLAGS)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    for content, sentence in (
        (None, "holds other files; name a new folder"),
        ('{"format": 9, "config": {}}', "was written in format 9, not 3"),
        ("{", "cannot be read"),
    ):
        if content:
            (tmp_path / "other" / "shared.json").write_text(content)
        with pytest.raises(arms.UserError, match=sentence):
            arms.claim(tmp_path / "other", config)
    assert bench_main(["arms", *FLAGS]) == 2
    assert "--out is missing" in capsys.readouterr().err
