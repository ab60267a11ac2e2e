"""The report of a synthetic run: what it says is computed by hand, and hostile text stays text."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch

from lite_mentor import charts, report
from lite_mentor.errors import UserError
from lite_mentor.log import RunLog
from lite_mentor.page import escape
from lite_mentor.report import write_report
from lite_mentor.statistics import wilson
from lite_mentor.types import Example, Rollout, Scored

CONFIG = {"preset": "quick", "student": "smollm2-135m", "steps": 40, "sft_steps": 12, "levels": [1, 2], "out": "<out>"}
HOSTILE = '</pre><script>alert(1)</script><img src=x onerror="a()">&amp;\u202e\ud800\x00'

ROLLOUT = {"step": 0, "reward": 1.0, "terms": {}, "question": "", "answer": [], "stop": "eos", "segments": []}


def evaluation(right: int, n: int, first: int = 0, **more) -> dict:
    """`right` of n correct, from example `first` on."""
    correct = [int(first <= i < first + right) for i in range(n)]
    stats = {"calls/per_episode": right / n * 1.5, "calls/ok": 0.9, "calls/error": None, "tool/add": 0.75,
             "tool/<b>": 0.25, "answered": 0.97, "tools/teacher_similarity": 0.8}  # fmt: skip
    row = {"n": n, "keys": [f"k{i}" for i in range(n)], "correct": correct, "accuracy": right / n}
    return {**row, "ci95": list(wilson(right, n)), **stats, **more}


def episode(group: int, reward: float, *parts: str) -> tuple[Scored, list[str]]:
    """A rollout whose tokens are the indices of `parts`: the student's text and a tool's in turn."""
    sampled = torch.tensor([False, *(i % 2 == 0 for i in range(len(parts)))])
    rollout = Rollout(
        example_key="k", group=group, index=0, ids=torch.arange(-1, len(parts)), sampled=sampled,
        behaviour_logp=torch.zeros(len(sampled)), prompt_length=1, calls=(), turns=1, answer="3", stop="answer",
    )  # fmt: skip
    return Scored(rollout, {"correct": float(reward > 0.5), "align": None}, reward, 0.0), list(parts)


def row(step: int, steps: int) -> dict:
    """A step of a run that goes well."""
    noise, p = random.Random(step).uniform(-0.08, 0.08), step / max(1, steps)
    return {
        "step": step, "phase": "rl", "reward/mean": 0.2 + 0.6 * p + noise, "reward/std": 0.2,
        "reward/correct": 0.1 + 0.6 * p + noise, "reward/align": 0.4 + 0.4 * p - noise,
        "reward/valid": min(1.0, 0.6 + 0.5 * p), "advantage/zero_variance": 0.5 - 0.25 * p, "loss": 0.01 * noise,
        "kl": 0.002 * step, "entropy": 0.6 * math.exp(-p), "logp_gap/mean": 0.01, "logp_gap/max": 0.1 + noise,
        "grad_norm": 0.5 + noise if step != 5 else float("nan"), "tokens/sampled": 3000, "calls/per_rollout": 1 + p,
        "calls/ok": 20 + 20 * p, "calls/bad_json": 6 - 6 * p, "calls/error": 3, "stop/answer": 20 + 10 * p,
        "stop/max_tokens": 12 - 10 * p, "stop/eos": 0, "time/rollout": 8.0, "time/tools": 0.5, "time/score": 0.1,
        "time/update": 5.0 + noise, "time/step": 13.5,
    }  # fmt: skip


def write_run(path, steps: int = 40, evaluated: bool = True):
    """A run as RunLog writes it."""
    with RunLog(path, CONFIG, total_steps=40, quiet=True) as log:
        if evaluated:
            log.evaluation(0, "base", "validation", evaluation(20, 200))
            log.evaluation(0, "base", "ood_tools", evaluation(30, 100, 10))
            for step in range(12):
                loss = 2.0 / (1 + step)
                log.step({"step": step, "phase": "sft", "loss": loss, "tokens/sampled": 900, "time/step": 3.0})
            log.evaluation(0, "cold_start", "validation", evaluation(40, 200))
        for step in range(steps):
            log.step(row(step, steps))
            call = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call><|im_end|>'
            result = "\n<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
            answer = f"The sum is \\boxed{{3}}. step {step}<|im_end|>"
            for scored, parts in (episode(0, 1.1, call, result, answer), episode(1, 0.1, HOSTILE, HOSTILE, "no idea")):
                example = Example("k", f"What is 1 + 2? {HOSTILE}", ("3", "three"), (), "math", "math")
                log.rollouts(step, [scored], {"k": example}, lambda ids, parts=parts: "".join(parts[i] for i in ids))
        if evaluated:
            log.evaluation(40, "final", "validation", evaluation(80, 200))
            log.evaluation(40, "final", "ood_tools", evaluation(30, 100, 12))
    return path


class Page(HTMLParser):
    """The page as a browser would see it: its tags, and the text of its visible parts."""

    def __init__(self, path) -> None:
        super().__init__()
        self.tags, self.pieces, self.stack = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        self.text = " ".join("".join(self.pieces).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br"):
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if "style" not in self.stack:
            self.pieces.append(data)

    def figures(self) -> list[str]:
        return [a["aria-label"] for tag, a in self.tags if tag == "svg" and "aria-label" in a]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    return Page(write_report(write_run(tmp_path_factory.mktemp("run") / "a")))


def test_the_findings_are_stated_first(page):
    assert "quick · smollm2-135m" in page.text
    lead = "40 of 40 steps of reinforcement learning after 12 supervised steps on the teacher's records, in 10 min."
    assert page.text.index(lead) < page.text.index("Accuracy"), "40 x 13.5 s + 12 x 3 s = 576 s"
    assert "validation: up from 10.0 % (6.6 to 14.9) to 40.0 % (33.5 to 46.9): +30.0 points on the" in page.text
    # 2 of 100 lost and 2 won.
    assert "ood_tools: no clear change, from 30.0 % (21.9 to 39.6) to 30.0 % (21.9 to 39.6): +0.0 points" in page.text


def test_the_tables(page):
    assert "suite n base cold start final change, paired".replace(" ", "") in page.text.replace(" ", "")
    assert "calls per episode0.15 → 0.600.45 → 0.45" in page.text
    assert "calls: ok90 % → 90 %90 % → 90 %" in page.text
    assert "calls: error" not in page.text, "never measured"
    assert "add 75 %<b> 25 %" in page.text


def test_every_curve_is_drawn(page):
    assert page.figures() == [
        "Reward and its terms", "How episodes ended", "How calls ended", "Calls per rollout", "Groups without variance",
        "Entropy", "KL to the reference", "Sampler and trainer disagree by", "Gradient norm", "Seconds a step",
        "Cold start: loss",
    ]  # fmt: skip
    # The stack of seconds shows what the tools left of the rollout; shares are of what was counted.
    assert "step 1 rollout 7.5 s tools 0.5 s score 0.1 s update 5" in page.text
    assert "step 1 answer 0.625 max tokens 0.375" in page.text
    assert "step 6step 7" in page.text, "a gradient that was not finite is a gap"


def test_hostile_text_stays_text(page):
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "iframe", "object", "b1"}
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.pieces.count('</pre><script>alert(1)</script><img src=x onerror="a()">&amp;\\x202e?\\x00') >= 2
    assert page.stack == []


def test_the_page_needs_no_network(page):
    for _, attributes in page.tags:
        assert not {"src", "href"} & set(attributes)
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_transcripts_tell_the_student_from_the_tools(page):
    assert page.text.index("Step 40, best") < page.text.index("Step 40, worst") < page.text.index("Step 1, best")
    assert "reward 1.10" in page.text
    assert "correct 1.00align -ended by answer" in page.text
    assert "Right answer: 3 or three" in page.text
    kinds = [a["class"] for t, a in page.tags if t == "span" and a.get("class") in ("own", "injected")]
    assert kinds == ["own", "injected"] + ["own", "injected", "own"] * 4


@pytest.mark.parametrize(
    ("steps", "evaluated"), [(0, False), (0, True), (1, False), (1, True), (2, False), (450, False)]
)
def test_unfinished_runs(tmp_path, steps, evaluated):
    shown = Page(write_report(write_run(tmp_path / "run", steps, evaluated)))
    assert f"{steps} of 40 steps" in shown.text
    assert ("No evaluation is finished yet." in shown.text) != evaluated
    assert ("Reward and its terms" in shown.figures()) == (steps > 0)
    assert ("Step 1, best" in shown.text) == (steps > 0)


def test_only_the_first_evaluation(tmp_path):
    run = write_run(tmp_path / "run", 1, evaluated=False)
    (run / "eval.jsonl").write_text(
        json.dumps({"step": 0, "name": "base", "suite": "test", **evaluation(5, 10)}) + "\n"
    )
    shown = Page(write_report(run)).text
    assert "test: 50.0 % (23.7 to 76.3) right at base, of 10 examples." in shown


def test_evaluations_on_different_examples_are_not_paired(tmp_path):
    run = write_run(tmp_path / "run", 1, evaluated=False)
    results = [evaluation(5, 10), evaluation(8, 10, keys=["other"] * 10)]
    lines = [json.dumps({"step": i, "name": "step", "suite": "test", **r}) for i, r in enumerate(results)]
    (run / "eval.jsonl").write_text("\n".join(lines) + "\n")
    assert "on different examples, so the two cannot be paired" in Page(write_report(run)).text


def test_accuracy_is_drawn_when_it_was_measured_on_the_way(tmp_path):
    run = write_run(tmp_path / "run", 1, evaluated=False)
    results = [(0, "base", 2), (20, "step", 5), (40, "final", 1)]
    lines = [json.dumps({"step": s, "name": n, "suite": "test", **evaluation(r, 10)}) for s, n, r in results]
    (run / "eval.jsonl").write_text("\n".join(lines) + "\n")
    shown = Page(write_report(run))
    assert "Accuracy" in shown.figures()
    assert "step 20 test 0.5" in shown.text


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    run = write_run(tmp_path / "run", 2)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        with open(run / name, "a") as file:
            file.write('{"step": 2, "pha')
    assert "2 of 40 steps" in Page(write_report(run)).text


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "eval.jsonl", "rollouts.jsonl"])
def test_a_missing_file_is_one_sentence(tmp_path, name):
    run = write_run(tmp_path / "run", 1)
    (run / name).unlink()
    with pytest.raises(UserError, match=f"{name} cannot be read .*give the folder of a run"):
        write_report(run)


@pytest.mark.parametrize(
    ("name", "line", "reason"),
    [
        ("metrics.jsonl", "{", "not JSON"),
        ("metrics.jsonl", "", "not JSON"),
        ("metrics.jsonl", "[" * 100_000, "not JSON"),
        ("metrics.jsonl", "[1]", "not an object"),
        ("metrics.jsonl", '"step"', "not an object"),
        ("metrics.jsonl", "{}", "see step, phase"),
        ("metrics.jsonl", '{"step": "1", "phase": "rl"}', "step"),
        ("metrics.jsonl", '{"step": 0, "phase": "rl", "entropy": "high", "kl": NaN, "a": 1e999}', "entropy, kl, a"),
        ("metrics.jsonl", '{"step": 0, "phase": [], "loss": null}', "phase"),
        ("eval.jsonl", json.dumps({"step": 0, "name": "a", "suite": "b", **evaluation(1, 2), "ci95": [1]}), "ci95"),
        ("eval.jsonl", json.dumps({"step": 0, "name": "a", "suite": "b", **evaluation(1, 2), "n": None}), "n"),
        (
            "eval.jsonl",
            json.dumps({"step": 0, "name": "a", "suite": "b", **evaluation(1, 2), "correct": [1]}),
            "correct",
        ),
        ("rollouts.jsonl", '{"step": 0, "segments": 3}', "reward, terms, question, answer, stop, segments"),
        ("rollouts.jsonl", json.dumps({**ROLLOUT, "segments": [{"sampled": 1, "text": ""}]}), "see segments"),
        ("rollouts.jsonl", json.dumps({**ROLLOUT, "reward": float("nan")}), "see reward"),
        ("rollouts.jsonl", json.dumps({**ROLLOUT, "step": 10**400}), "see step"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, name, line, reason):
    run = write_run(tmp_path / "run", 1)
    count = (run / name).read_bytes().count(b"\n")
    with open(run / name, "a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=rf"{name}, line {count + 1} is damaged \(.*{reason}.*"):
        write_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.skipif(os.name != "posix", reason="its kinds of files")
@pytest.mark.usefixtures("soon")
def test_a_folder_from_elsewhere_is_looked_at_before_it_is_read(tmp_path):
    for name in ("config.json", "metrics.jsonl", "report.html"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match=f"{name} is a pipe"):
            write_report(tmp_path)
        (tmp_path / name).unlink()


def test_the_command(tmp_path, capsys):
    run = write_run(tmp_path / "run", 1)
    report.main([str(run)])
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    for arguments in ([], ["a", "b"], ["--help"]):
        with pytest.raises(SystemExit, match=r"usage: python -m lite_mentor.report RUN"):
            report.main(arguments)
    with pytest.raises(SystemExit, match=r"config\.json cannot be read"):
        report.main([str(tmp_path)])


def test_the_module_runs(tmp_path):
    done = subprocess.run([sys.executable, "-m", "lite_mentor.report", str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert "config.json cannot be read" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("<b>&\"'", "&lt;b&gt;&amp;&quot;&#x27;"),
        ("a\tb\nc", "a\tb\nc"),
        ("\x00\x1b[31m\r", "\\x00\\x1b[31m\\x0d"),
        ("\u202eabc\u200b", "\\x202eabc\\x200b"),
        ("\ud800é漢🙂", "?é漢🙂"),
    ],
)
def test_escape(text, safe):
    assert escape(text) == safe


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (0, 0.9, [0, 0.25, 0.5, 0.75, 1]),
        (-1, 3, [-1, 0, 1, 2, 3]),
        (0, 13.5, [0, 5, 10, 15]),
        (0, 3e-7, [0, 1e-7, 2e-7, 3e-7]),
        (0, 42e9, [0, 2e10, 4e10, 6e10]),
    ],
)
def test_ticks_are_round_and_span_the_values(low, high, ticks):
    assert charts._ticks(low, high) == pytest.approx(ticks)


def test_chart_geometry():
    frame = charts._Frame([1, 2, 3, 4], 0.0, 1.0)
    # 404 units of width in 4 places, 186 of height
    assert [frame.x(i) for i in range(4)] == [96.5, 197.5, 298.5, 399.5]
    assert (frame.y(0.0), frame.y(1.0)) == (196.0, 10.0)
    assert frame.path([0.0, 1.0, None, 1.0]) == "M96.5 196.0h0L197.5 10.0M399.5 10.0h0"


@pytest.mark.parametrize(
    ("steps", "labels"),
    [
        ([7], ["7"]),
        ([0, 20, 40], ["0", "20", "40"]),
        (list(range(1, 41)), ["10", "20", "30", "40"]),
        (list(range(1, 401, 2)), ["100", "200", "300"]),
    ],
)
def test_step_labels_are_round(steps, labels):
    axes = charts._Frame(steps, 0.0, 1.0).axes()
    assert re.findall(r'"middle">(\d+)<', axes) == labels


def test_the_moving_average_keeps_both_ends_and_gaps():
    assert charts._moving_average([0.0, 3.0, 6.0, 0.0, 9.0], 1) == [0.0, 3.0, 3.0, 5.0, 9.0]
    assert charts._moving_average([4.0, 1.0, None, 3.0, 8.0, 6.0], 2) == [4.0, 2.5, None, 4.5, 17 / 3, 6.0]


def test_long_runs_are_averaged():
    steps, series = charts._thin(list(range(401)), {"a": [float(i) for i in range(401)], "b": [None] * 401})
    assert len(steps) == 134
    assert steps[:2] == [0, 3]
    assert series["a"][:2] == [1.0, 4.0]
    assert series["a"][-1] == 399.5
    assert set(series["b"]) == {None}


@pytest.mark.parametrize("values", [[None], [], [None, None]])
def test_nothing_known_draws_nothing(values):
    steps = list(range(len(values)))
    assert charts.line_chart("x", steps, {"a": values}) == charts.stacked_chart("x", steps, {"a": values}) == ""


@pytest.mark.parametrize("value", [0.0, -2.5, 1e-12, 1e12])
def test_a_single_or_constant_value_is_drawn(value):
    for count in (1, 12):
        assert "<path" in charts.line_chart("x", list(range(count)), {"a": [value] * count})
