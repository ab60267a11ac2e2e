"""Lines that are whole and finite, a resume that doubles none of them, and a display that says what matters."""

from __future__ import annotations

import errno
import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from lite_mentor import display, log
from lite_mentor.display import step_line, warnings_for
from lite_mentor.errors import UserError
from lite_mentor.log import RunLog, Stopwatch, peak_memory_bytes, segments
from lite_mentor.types import Example, Rollout, Scored
from tests.disk_order import DiskOrder

CONFIG = {"preset": "quick", "student": "smollm2-135m", "sft_steps": 3, "clip": (0.2, 0.28)}
RESULT = {"n": 4, "keys": ["a", "b", "c", "d"], "correct": [1, 0, 1, 0], "accuracy": 0.5, "ci95": [0.15, 0.85]}
FULL = {
    "step": 11, "phase": "rl", "reward/mean": 0.63, "reward/std": 0.2, "reward/correct": 0.55, "reward/align": 0.81,
    "reward/valid": 0.9, "loss": -0.01, "kl": 0.0021, "entropy": 0.414, "tokens/sampled": 11530.4, "time/rollout": 8.1,
    "time/update": 5.7, "time/score": 0.01, "time/step": 14.2, "memory/peak": int(3.1 * 2**30),
}  # fmt: skip


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def metrics(step: int, phase: str = "rl", **more) -> dict:
    return {"step": step, "phase": phase, **more}


def example(key: str = "k") -> Example:
    return Example(key, "What is 1 + 2?", ("3", "three"), (), "math", "math")


def scored(group: int, index: int, reward: float | None, sampled=(False, True, True, False, True)) -> Scored:
    mask = torch.tensor(sampled)
    ids = torch.arange(len(mask)) + 100 * group + 10 * index
    rollout = Rollout(
        example_key="k", group=group, index=index, ids=ids, sampled=mask, behaviour_logp=torch.zeros(len(mask)),
        prompt_length=1, calls=(), turns=1, answer="3", stop="answer",
    )  # fmt: skip
    return Scored(rollout, {"correct": 1.0, "align": None}, reward, 0.5)


@pytest.fixture
def run(tmp_path):
    with RunLog(tmp_path / "run", CONFIG, total_steps=40, quiet=True) as opened:
        yield opened


def test_config_is_written_first(run):
    assert json.loads((run.out / "config.json").read_text()) == CONFIG | {"clip": [0.2, 0.28]}
    assert sorted(p.name for p in run.out.iterdir()) == ["config.json", "eval.jsonl", "metrics.jsonl", "rollouts.jsonl"]


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "checkpoints"])
def test_another_run_is_not_overwritten(tmp_path, name):
    (tmp_path / name).mkdir() if name == "checkpoints" else (tmp_path / name).write_text("theirs")
    with pytest.raises(UserError, match=rf"already holds a run \({name}\).*--resume {tmp_path}"):
        RunLog(tmp_path, CONFIG, total_steps=1)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_folder_with_other_files_is_fine(tmp_path):
    (tmp_path / ".lock").write_text("17")
    (tmp_path / "notes.txt").write_text("mine")
    RunLog(tmp_path, CONFIG, total_steps=1, quiet=True).close()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "config.json").exists()


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(UserError, match=r"cannot be written .*--out"):
        RunLog(tmp_path / "run", CONFIG, total_steps=1)


def test_what_is_not_finite_becomes_null(run):
    run.step(metrics(0, loss=float("nan"), nested={"a": [float("inf"), 1.5]}, kl=float("-inf"), none=None))
    text = (run.out / "metrics.jsonl").read_text()
    assert text == (
        '{"step": 0, "phase": "rl", "loss": null, "nested": {"a": [null, 1.5]}, "kl": null, "none": null}\n'
    )


def test_text_of_any_kind_survives(run):
    text = "é\u2028\u0000 \ud800 <b> \n\r 漢"
    run.evaluation(0, "base", "validation", RESULT | {"note": text})
    line = (run.out / "eval.jsonl").read_bytes()
    assert line.count(b"\n") == 1
    assert json.loads(line)["note"] == text
    assert "é" in line.decode("utf-8")


def test_a_value_that_json_does_not_know_is_an_error(run):
    with pytest.raises(TypeError, match="Tensor"):
        run.step(metrics(0, loss=torch.tensor(1.0)))
    assert (run.out / "metrics.jsonl").read_bytes() == b""


def test_best_and_worst_of_each_group(run):
    group = [scored(0, 0, 0.2), scored(0, 1, 1.0), scored(0, 2, None), scored(0, 3, 0.0), scored(0, 4, 1.0)]
    flat = [scored(1, 0, 0.1), scored(1, 1, 0.1)]
    unjudged = [scored(2, 0, None)]
    run.rollouts(7, [*flat, *group, *unjudged], {"k": example()}, lambda ids: " ".join(map(str, ids)))
    written = rows(run.out / "rollouts.jsonl")
    assert [(r["group"], r["index"], r["reward"]) for r in written] == [(0, 1, 1.0), (0, 3, 0.0), (1, 0, 0.1)]
    assert written[0] == {
        "step": 7, "group": 0, "index": 1, "example_key": "k", "question": "What is 1 + 2?", "answer": ["3", "three"],
        "stop": "answer", "reward": 1.0, "advantage": 0.5, "terms": {"correct": 1.0, "align": None},
        "segments": [{"sampled": True, "text": "11 12"}, {"sampled": False, "text": "13"},
                     {"sampled": True, "text": "14"}],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("sampled", "expected"),
    [
        ([False], []),
        ([False, True], [(True, "1")]),
        ([False, False, True], [(False, "1"), (True, "2")]),
    ],
)
def test_segments_leave_out_the_prompt(sampled, expected):
    cut = segments(scored(0, 0, 1.0, sampled).rollout, lambda ids: ",".join(map(str, ids)))
    assert [(s["sampled"], s["text"]) for s in cut] == expected


def test_rewind_drops_what_will_be_done_again(tmp_path):
    with RunLog(tmp_path, CONFIG, total_steps=4, quiet=True) as run:
        run.evaluation(0, "base", "validation", RESULT)
        run.step(metrics(0, "sft"))
        run.step(metrics(0))
        position = run.position()
        run.step(metrics(1))
        run.evaluation(2, "step", "validation", RESULT)
        run.rollouts(1, [scored(0, 0, 1.0)], {"k": example()}, str)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "pha')  # cut short by a kill
    before = {name: (tmp_path / name).read_bytes()[: position[name]["bytes"]] for name in log.LINES}
    with RunLog(tmp_path, CONFIG | {"sft_steps": 9}, total_steps=4, quiet=True, resume=True) as run:
        run.rewind(json.loads(json.dumps(position)))
        assert {name: (tmp_path / name).read_bytes() for name in log.LINES} == before
        run.step(metrics(1))
    assert [(r["phase"], r["step"]) for r in rows(tmp_path / "metrics.jsonl")] == [("sft", 0), ("rl", 0), ("rl", 1)]
    assert len(rows(tmp_path / "eval.jsonl")) == 1
    assert rows(tmp_path / "rollouts.jsonl") == []
    assert json.loads((tmp_path / "config.json").read_text())["sft_steps"] == 9
    with RunLog(tmp_path, CONFIG, total_steps=4, quiet=True, resume=True) as run:
        run.rewind({})
    assert [(tmp_path / name).read_bytes() for name in log.LINES] == [b"", b"", b""]


def test_a_position_is_that_of_lines_on_the_disk(run, monkeypatch):
    order = DiskOrder(monkeypatch)
    run.step(metrics(0))
    assert order.seen(run.out) == []
    run.position()
    assert sorted(order.seen(run.out)) == sorted(log.LINES)


def test_lines_that_are_not_as_written_are_found_and_can_be_set_aside(tmp_path):
    with RunLog(tmp_path, CONFIG, total_steps=4, quiet=True) as run:
        run.step(metrics(0))
        run.evaluation(0, "base", "validation", RESULT)
        position = run.position()
        run.step(metrics(1))
    assert position["rollouts.jsonl"]["bytes"] == 0

    def damaged() -> list[str]:
        with RunLog(tmp_path, CONFIG | {"sft_steps": 9}, total_steps=4, quiet=True, resume=True) as run:
            return run.damaged(position)

    whole = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(whole[:-4])  # after the position: that step will be taken again
    assert damaged() == []
    (tmp_path / "eval.jsonl").unlink()
    (tmp_path / "metrics.jsonl").write_bytes(whole.replace(b'"rl"', b'"rm"', 1))
    assert damaged() == ["metrics.jsonl", "eval.jsonl"]
    assert json.loads((tmp_path / "config.json").read_text())["sft_steps"] == 3  # nothing was decided yet
    with RunLog(tmp_path, CONFIG, total_steps=4, quiet=True, resume=True) as run:
        kept = run.set_aside("metrics.jsonl")
        run.rewind(position)
        run.step(metrics(1))
        later = run.position()
    assert kept.read_bytes().startswith(b'{"step": 0, "phase": "rm"')
    assert [r["step"] for r in rows(tmp_path / "metrics.jsonl")] == [1]
    with RunLog(tmp_path, CONFIG, total_steps=4, quiet=True, resume=True) as run:
        assert run.damaged(later) == []


class Full:
    """A file on a disk with room for a few more bytes."""

    def __init__(self, file, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken, self.room = data[: self.room], max(0, self.room - len(data))
        return self.file.write(taken)

    def __getattr__(self, name: str):
        return getattr(self.file, name)


def test_a_full_disk_is_one_sentence_and_no_half_line(run):
    run.step(metrics(0))
    whole = (run.out / "metrics.jsonl").read_bytes()
    run._files["metrics.jsonl"] = Full(run._files["metrics.jsonl"], room=10)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        run.step(metrics(1))
    assert (run.out / "metrics.jsonl").read_bytes() == whole


@pytest.mark.parametrize("fails", ["__init__", "add_scalar", "close"])
def test_a_tracker_without_room_is_one_sentence(tmp_path, monkeypatch, fails):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = type("SummaryWriter", (), dict.fromkeys(("__init__", "add_scalar", "close"), lambda *_: None))
    setattr(writer, fails, full)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=writer))

    def tracked() -> None:
        with RunLog(tmp_path, CONFIG | {"track": "tensorboard"}, total_steps=1, quiet=True) as run:
            run.step(metrics(0, loss=1.0))

    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        tracked()


def test_lines_that_cannot_be_read_are_one_sentence(run, monkeypatch):
    def broken(path, *, follow=True):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(log, "read_file", broken)
    for act in (run.holds_rl_steps, lambda: run.best_step("test"), lambda: run.damaged(run.position())):
        with pytest.raises(UserError, match="Input/output error"):
            act()
    with pytest.raises(UserError, match="Input/output error"):
        run.rewind({})


def test_a_write_in_two_parts_is_still_one_line(run):
    class Short(Full):
        def write(self, data: bytes) -> int:
            return self.file.write(data[:7])

    run._files["metrics.jsonl"] = Short(run._files["metrics.jsonl"], room=0)
    run.step(metrics(5))
    assert rows(run.out / "metrics.jsonl") == [{"step": 5, "phase": "rl"}]


def test_the_plain_line():
    assert step_line(FULL, 40, 400.4) == (
        "step 12/40  reward 0.63 (correct 0.55 align 0.81 valid 0.90)  entropy 0.41  kl 0.002  "
        "812 tok/s  14.2 s (rollout 8.1 update 5.7)  3.1 GiB  ETA 6m40s"
    )
    assert step_line(metrics(0, "sft", loss=1.234, kl=None), 3, None) == "cold start 1/3  loss 1.23"
    assert step_line(metrics(0, **{"reward/mean": None, "time/step": 0.0}), 3, 59.6) == "step 1/3  ETA 1m00s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (60, "1m00s"), (3599.6, "1h00m"), (3661, "1h01m"), (90000, "25h00m")],
)
def test_durations(seconds, text):
    assert display._duration(seconds) == text


def test_plain_output(tmp_path, capsys):
    with RunLog(tmp_path, CONFIG, total_steps=3) as run:
        run.note("the student has [bold]a name[/bold]")
        run.evaluation(0, "base", "validation", RESULT)
        for step in range(3):
            run.step(metrics(step, **{"advantage/zero_variance": float(step > 0), "time/step": 2.0}))
    assert capsys.readouterr().out.splitlines() == [
        "the student has [bold]a name[/bold]",
        "base  validation: 50.0 % right (95 %: 15.0 to 85.0, n = 4)",
        "step 1/3  2.0 s  ETA 4s",
        "step 2/3  2.0 s  ETA 2s",
        "  warning: every group has zero variance: nothing to learn from in this step; raise --group-size or "
        "--temperature, or choose --levels that are sometimes solved.",
        "step 3/3  2.0 s  ETA 0s",
    ]


def test_quiet_prints_nothing(run, capsys):
    run.note("a")
    run.step(FULL)
    run.evaluation(0, "base", "validation", RESULT)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_live_display(tmp_path, monkeypatch, encoding):
    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    screen = Terminal(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with RunLog(tmp_path, CONFIG, total_steps=40) as run:
        run.note("loading [red]x[/red]")
        run.evaluation(0, "base", "validation", RESULT)
        run.step(FULL | {"step": 10, "reward/mean": 0.1})
        run.step(FULL | {"advantage/zero_variance": 1.0})
    screen.flush()
    shown = screen.buffer.getvalue().decode(encoding)
    for part in (
        "loading [red]x[/red]", "quick  smollm2-135m  step 12/40", "ETA 6m38s", "0.63 (correct 0.55 align 0.81 valid",
        "812 tok/s", "3.1 GiB", "base 50.0 %", "every group has zero variance",
    ):  # fmt: skip
        assert part in shown
    assert ("▁█" in shown) == (encoding == "utf-8")


def steady(**values) -> dict:
    return metrics(0, **({"entropy": 0.5, "advantage/zero_variance": 0.2, "ratio/max": 1.0, "loss": 0.1} | values))


def test_a_healthy_run_has_no_warnings():
    assert warnings_for(steady(), [steady()] * 20) == []
    assert warnings_for(metrics(0, "sft", loss=1.0), []) == []
    assert warnings_for(metrics(0, entropy=None, loss=None, grad_norm=None), [metrics(0, entropy=None)] * 9) == []


@pytest.mark.parametrize(
    ("row", "history", "expected"),
    [
        (steady(loss=float("nan")), [], "not finite"),
        (steady(grad_norm=float("inf")), [], "not finite"),
        (steady(**{"advantage/zero_variance": 1.0}), [], "every group has zero variance"),
        (steady(**{"advantage/zero_variance": 0.9}), [steady(**{"advantage/zero_variance": 0.9})] * 4, "over 80 %"),
        (steady(entropy=0.05), [steady()] * 7 + [steady(entropy=0.05)] * 2, "from 0.500 to 0.050"),
        (steady(**{"ratio/max": 12.4}), [], "12 times as likely"),
        (steady(**{"logp_gap/mean": 0.25}), [], "disagree by 0.25 nats"),
        (steady(loss=-2.0), [steady(loss=0.1)] * 8, "the loss jumped to -2, where 0.1 is usual"),
        (steady(grad_norm=5.5), [steady(grad_norm=0.5)] * 8, "the gradient's norm jumped to 5.5, where 0.5 is usual"),
        (
            metrics(9, "sft", loss=2.0),
            [metrics(i, "sft", loss=0.3) for i in range(9)],
            "the loss jumped to 2, where 0.3",
        ),
        (
            steady(**{"reward/mean": 0.1}),
            [steady(**{"reward/mean": 0.5})] * 10 + [steady(**{"reward/mean": 0.2})] * 4,
            "the reward fell from 0.50 to 0.18 (means of 5 steps)",
        ),
    ],
)
def test_each_warning(row, history, expected):
    found = warnings_for(row, history)
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    ("row", "history"),
    [
        (steady(loss=-1.2), [steady(loss=0.1)] * 8),
        (steady(loss=9.0), [steady(loss=0.1)] * 7),  # too few to know what is usual
        (steady(loss=1.1), [metrics(i, "sft", loss=0.01) for i in range(20)]),
        (steady(grad_norm=4.9), [steady(grad_norm=0.5)] * 8),
        (steady(grad_norm=0.5), [steady(grad_norm=None)] * 8),
        (steady(**{"reward/mean": 0.3}), [steady(**{"reward/mean": 0.5})] * 13),
        (steady(**{"reward/mean": -0.3}), [steady(**{"reward/mean": -0.1})] * 14),
    ],
)
def test_what_warns_of_nothing(row, history):
    assert warnings_for(row, history) == []


def test_the_cold_start_is_no_history_for_the_entropy_of_rl():
    assert warnings_for(steady(entropy=0.05), [metrics(0, "sft", entropy=5.0)] * 9) == []


def test_the_best_step_is_the_latest_of_equals(run):
    assert run.best_step("validation") is None
    for step, suite, accuracy in [(0, "validation", 0.2), (2, "validation", 0.6), (4, "validation", 0.6),
                                  (4, "test", 0.9), (6, "validation", 0.5)]:  # fmt: skip
        run.evaluation(step, "step", suite, RESULT | {"accuracy": accuracy})
    assert run.best_step("validation") == 4


def test_stopwatch_adds_stages_and_starts_again(monkeypatch):
    ticks = iter([0.0, 1.0, 3.0, 10.0, 14.0, 20.0, 21.0])
    monkeypatch.setattr(log.time, "perf_counter", lambda: next(ticks))
    watch = Stopwatch()
    with watch.stage("rollout"):
        pass
    with pytest.raises(KeyError), watch.stage("rollout"):
        raise KeyError
    assert watch.lap() == {"time/rollout": 6.0, "time/step": 20.0}
    assert watch.lap() == {"time/step": 1.0}


def test_peak_memory_is_that_of_a_process_with_torch_in_it():
    assert 2**26 < peak_memory_bytes("cpu") < 2**40
