"""The whole program on the tiny student: what a run leaves behind, resuming it, and everything a user can get wrong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import train
from lite_mentor import checkpoint, paging, report
from lite_mentor import run as run_room
from lite_mentor.checkpoint import versions
from lite_mentor.config import PRESETS, parse
from lite_mentor.files import OWN
from lite_mentor.optim import apply_gradients, make_optimizer
from lite_mentor.rollout import Limits
from lite_mentor.student import Student
from lite_mentor.tasks import load_suite
from lite_mentor.teacher import TeacherCache
from lite_mentor.tiny import tiny_student
from lite_mentor.types import Scored
from tests.test_batch import rollout

ROOT = Path(__file__).parent.parent
SHORT = ["--preset", "tiny", "--sft-steps", "3", "--sft-batch", "8", "--prompts-per-step", "4", "--group-size", "4",
         "--eval-size", "6", "--train-size", "60", "--max-new-tokens", "60", "--lora-rank", "8"]  # fmt: skip
TIMES = ("time/", "memory/")


def run(out: Path, *flags: str) -> int:
    return train.main([*SHORT, "--out", str(out), *flags])


def rows(path: Path) -> list[dict]:
    """The lines of a JSONL file without what differs between equal runs."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in lines]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITE_MENTOR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def straight(tmp_path_factory, cache) -> Path:
    out = tmp_path_factory.mktemp("runs") / "straight"
    assert run(out, "--steps", "4", "--save-every", "2", "--temperature", "1.5") == 0
    return out


def test_a_run_leaves_everything_it_promises(straight):
    names = {p.name for p in straight.iterdir()}
    files = {"config.json", "metrics.jsonl", "rollouts.jsonl", "eval.jsonl", "report.html"}
    assert names >= files | {"checkpoints", "adapter"}
    assert not [name for name in names if not any(fnmatch(name, own) for own in OWN)]
    metrics = rows(straight / "metrics.jsonl")
    assert [(m["phase"], m["step"]) for m in metrics] == [("sft", i) for i in range(3)] + [("rl", i) for i in range(4)]
    wanted = {"reward/mean", "reward/std", "reward/correct", "reward/align", "reward/valid", "advantage/zero_variance",
              "loss", "entropy", "clip/low", "clip/high", "ratio/mean", "ratio/max", "logp_gap/mean", "logp_gap/max",
              "grad_norm", "lr", "tokens/sampled", "tokens/prompt", "calls/ok", "stop/answer"}  # fmt: skip
    learned = [m for m in metrics[3:] if m["advantage/zero_variance"] < 1]
    assert learned
    assert all(set(m) >= wanted for m in learned)
    assert all(m["ratio/max"] == 1.0 for m in learned)  # on-policy: the ratio is exactly 1
    assert all(m["logp_gap/max"] < 1e-3 for m in learned)
    evaluations = rows(straight / "eval.jsonl")
    expected = [(n, s) for n in ("cold_start", "final") for s in ("validation", "test", "tiny_ood")]
    assert [(e["name"], e["suite"]) for e in evaluations] == expected
    assert [e["n"] for e in evaluations] == [6, 3, 3, 6, 3, 3]
    assert json.loads((straight / "config.json").read_text())["temperature"] == 1.5


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU")
def test_a_run_through_interpreted_kernels_is_the_run_through_torch(tmp_path, monkeypatch):
    # But for the engine's attention, of which the interpreter makes minutes; test_exactness.py decodes through it.
    attend = paging.paged_attention
    monkeypatch.setattr(paging, "paged_attention", lambda *rows, backend, **how: attend(*rows, backend="torch", **how))
    for backend in ("torch", "triton"):
        out = tmp_path / backend
        # One RL step: Adam turns a last digit of a gradient near 0 into a whole step, and then other tokens are drawn.
        few = ["--steps", "1", "--eval-size", "2", "--prompts-per-step", "2", "--sft-batch", "4"]
        assert run(out, *few, "--temperature", "1.5", "--backend", backend) == 0
    found, expected = (rows(tmp_path / backend / "metrics.jsonl") for backend in ("triton", "torch"))
    assert [m["phase"] for m in found] == ["sft", "sft", "sft", "rl"]
    assert found[-1]["tokens/sampled"] == expected[-1]["tokens/sampled"]
    assert found[-1]["reward/mean"] == expected[-1]["reward/mean"]
    for a, b in zip(found, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_the_adapter_is_one_that_plain_peft_loads(straight, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_student(tmp_path / "base"), attn_implementation="eager")
    model = PeftModel.from_pretrained(base, straight / "adapter")
    found, _ = checkpoint.load(straight)
    ours = {n.replace(".default", ""): t for n, t in found.tensors["adapter"].items()}
    theirs = {n.replace(".default", ""): t for n, t in model.state_dict().items() if "lora_" in n}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert any(t.abs().sum() > 0 for n, t in ours.items() if "lora_B" in n)


def test_a_resumed_run_ends_as_if_it_had_never_stopped(straight, tmp_path, monkeypatch):
    out = tmp_path / "stopped"
    real, seen = train.train_step, []

    def interrupted(run, step):
        seen.append(step)
        metrics = real(run, step)
        if step == 1:
            signal.raise_signal(signal.SIGINT)
        return metrics

    monkeypatch.setattr(train, "train_step", interrupted)
    assert run(out, "--steps", "4", "--save-every", "50", "--temperature", "1.5") == 130
    assert seen == [0, 1]  # the step in progress was finished and saved
    assert (out / "checkpoints" / "step-000002").exists()
    monkeypatch.undo()
    assert train.main(["--resume", str(out)]) == 0  # under the settings of its own config.json
    for name in ("metrics.jsonl", "rollouts.jsonl", "eval.jsonl"):
        assert rows(straight / name) == rows(out / name), name
    same = [(d / "adapter" / "adapter_model.safetensors").read_bytes() for d in (straight, out)]
    assert same[0] == same[1]


def test_the_kl_is_to_the_student_after_its_cold_start_also_in_a_resumed_run(tmp_path, monkeypatch):
    flags = ("--steps", "3", "--save-every", "1", "--eval-suites", "validation", "--beta", "0.1", "--lr", "1e-3",
             "--warmup", "0", "--temperature", "1.5")  # fmt: skip
    straight, out = tmp_path / "straight", tmp_path / "stopped"
    assert run(straight, *flags) == 0
    kls = [m["kl"] for m in rows(straight / "metrics.jsonl") if m["phase"] == "rl"]
    assert kls[0] == 0
    assert kls[2] > 1e-3
    kept = load_file(straight / "checkpoints" / "step-000003" / "reference.safetensors")
    learned = load_file(straight / "cold_start" / "adapter_model.safetensors")
    assert kept
    assert all(torch.equal(tensor, learned[name.replace(".default.", ".")]) for name, tensor in kept.items())
    real = train.train_step

    def interrupted(run, step):
        metrics = real(run, step)
        signal.raise_signal(signal.SIGINT)
        return metrics

    monkeypatch.setattr(train, "train_step", interrupted)
    assert run(out, *flags) == 130
    monkeypatch.undo()
    shutil.rmtree(out / "cold_start")  # the checkpoint alone decides
    assert train.main(["--resume", str(out)]) == 0
    for name in ("metrics.jsonl", "rollouts.jsonl", "eval.jsonl"):
        assert rows(straight / name) == rows(out / name), name


@pytest.mark.parametrize("flags", [("--sft-steps", "0", "--beta", "0.1"), ("--sft-steps", "1")], ids=str)
def test_no_reference_is_kept_without_a_cold_start_or_without_a_kl(tmp_path, capsys, flags):
    out = tmp_path / "run"
    assert run(out, "--steps", "1", "--eval-suites", "validation", "--eval-size", "2", *flags) == 0
    assert "KL's reference" not in capsys.readouterr().out
    assert not list(out.glob("checkpoints/*/reference.safetensors"))


def test_a_run_that_stops_in_its_first_evaluation_keeps_the_cold_start(straight, tmp_path, monkeypatch):
    def stops(*_, **__):
        raise KeyboardInterrupt

    out = tmp_path / "stopped"
    monkeypatch.setattr(train, "evaluate", stops)
    assert run(out, "--steps", "4", "--save-every", "50", "--temperature", "1.5") == 130
    monkeypatch.undo()
    monkeypatch.setattr(train, "cold_start", stops)  # is not taken again
    assert train.main(["--resume", str(out)]) == 0
    for name in ("metrics.jsonl", "rollouts.jsonl", "eval.jsonl"):
        assert rows(straight / name) == rows(out / name), name


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--eval-suites", "validaton"), "There is no task suite 'validaton'"),
        (("--max-prompt-tokens", "30"), "tokens; the limit is 30. Raise --max-prompt-tokens"),
        (("--prompts-per-step", "999"), "there are only 60 training examples"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_step(capsys, tmp_path, flags, sentence):
    out = tmp_path / "r"
    assert sentence in complaint(capsys, *flags, "--out", str(out))
    # The command, put right, may name the same folder.
    assert "already holds a run" not in complaint(capsys, "--task", "nothing", "--out", str(out))


def test_evaluations_on_the_way_keep_the_best_adapter(tmp_path, monkeypatch):
    accuracies = iter([0.0, 0.5, 0.25, 0.25])  # after the cold start, steps 1 and 2, at the end
    real = train.evaluate

    def evaluate(*args, **how):
        result, rollouts = real(*args, **how)
        return {**result, "accuracy": next(accuracies)}, rollouts

    kept = []
    monkeypatch.setattr(train, "evaluate", evaluate)
    monkeypatch.setattr(Student, "save_adapter", lambda self, path: kept.append(path.name))
    assert run(tmp_path / "r", "--steps", "3", "--eval-every", "1", "--eval-suites", "validation") == 0
    assert kept == ["cold_start", "best", "adapter"]


def test_a_best_adapter_that_a_kill_kept_from_its_folder_is_written_by_the_resumption(tmp_path, monkeypatch):
    def dies(*_, **__):
        raise KeyboardInterrupt

    out, best = tmp_path / "run", tmp_path / "run" / "best"
    real = Student.save_adapter
    monkeypatch.setattr(Student, "save_adapter", lambda self, path: dies() if path == best else real(self, path))
    flags = ("--sft-steps", "1", "--steps", "2", "--eval-every", "1", "--eval-suites", "validation", "--eval-size", "2")
    assert run(out, *flags) == 130
    assert not best.exists()
    monkeypatch.undo()
    (out / ".tmp-report.html").touch()
    monkeypatch.setattr(train, "train_step", dies)
    assert train.main(["--resume", str(out)]) == 130
    assert not (out / ".tmp-report.html").exists()
    kept = load_file(best / "adapter_model.safetensors")
    then = load_file(out / "checkpoints" / "step-000001" / "adapter.safetensors")
    assert {name.replace(".default.", "."): tensor.tolist() for name, tensor in then.items()} == {
        name: tensor.tolist() for name, tensor in kept.items()
    }


def test_check_proves_that_the_fullest_row_fits_and_changes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_room, "why_cpu", lambda requested: f"the GPU is not seen ({requested})")
    assert run(tmp_path / "check", "--check") == 0
    text = capsys.readouterr().out
    assert "the GPU is not seen (auto)" in text
    assert "the fullest row" in text
    assert "CUDA graphs" in text  # whether decoding has them
    assert "fits" in text
    assert not (tmp_path / "check" / "metrics.jsonl").read_text()


def test_a_size_that_was_left_to_the_device_is_written_down(tmp_path):
    out = tmp_path / "run"
    assert run(out, "--micro-tokens", "0", "--steps", "1") == 0
    assert json.loads((out / "config.json").read_text())["micro_tokens"] == 1024
    assert train.main(["--resume", str(out)]) == 0


def test_several_updates_a_step_take_old_logprobs_before_the_first(tmp_path):
    out = tmp_path / "several"
    flags = ["--steps", "3", "--updates-per-step", "2", "--lr", "0.01", "--temperature", "1.5", "--warmup", "0"]
    assert run(out, *flags) == 0
    learned = [m for m in rows(out / "metrics.jsonl") if m["phase"] == "rl" and m["advantage/zero_variance"] < 0.5]
    assert learned
    assert any(m["ratio/max"] > 1.0 for m in learned)  # the second update meets a policy that has moved


def test_rewards_that_are_not_finite_stop_the_updates_and_three_in_a_row_the_run(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    real = train.score

    def broken(examples, rollouts, teacher, config):
        scored, groups = real(examples, rollouts, teacher, config)
        return [replace(scored[0], reward=float("inf")), *scored[1:]], groups

    monkeypatch.setattr(train, "score", broken)
    flags = ["--sft-steps", "1", "--eval-size", "2", "--steps", "4", "--save-every", "4"]
    assert run(out, *flags) == 2
    printed = capsys.readouterr()
    key = json.loads((out / "rollouts.jsonl").read_text().splitlines()[0])["example_key"]
    assert f"the update of step 0 was not applied: the reward is not finite (inf) of example {key} (gr" in printed.out
    assert "Three updates in a row were refused, the last at step 2" in printed.err
    assert sorted(p.name for p in out.glob("refused-*")) == [f"refused-step-{i}.safetensors" for i in range(3)]
    first, last = (load_file(out / "checkpoints" / f"step-00000{i}" / "adapter.safetensors") for i in (0, 2))
    assert all(torch.equal(first[name], last[name]) for name in first)
    monkeypatch.undo()
    assert train.main(["--resume", str(out)]) == 0
    assert [m["step"] for m in rows(out / "metrics.jsonl") if m["phase"] == "rl"] == [0, 1, 2, 3]


# --- what a user can get wrong: one clear sentence each -------------------------------------------------------------


def complaint(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert train.main([*SHORT, "--steps", "1", *argv]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert "\n" not in error
    return error


def test_unknown_preset(capsys, tmp_path):
    assert "no such preset" in complaint(capsys, "--preset", "nope", "--out", str(tmp_path / "r"))


def test_out_that_holds_a_run(capsys, straight):
    assert "already holds a run" in complaint(capsys, "--out", str(straight))


def test_what_the_sandbox_keeps_out_is_said_before_a_module_of_tools_is_imported(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(run_room, "training_examples", Mock(side_effect=KeyboardInterrupt))
    assert run(tmp_path / "run", "--sandbox", "off") == 130
    assert "TOOLS CAN READ AND CHANGE YOUR FILES" in capsys.readouterr().out


def test_resume_of_nothing(capsys, tmp_path):
    assert "holds no run to resume" in complaint(capsys, "--resume", str(tmp_path / "nothing"))
    assert not (tmp_path / "nothing").exists()


def test_resume_under_other_settings(capsys, straight):
    before = (straight / "config.json").read_bytes()
    error = complaint(capsys, "--resume", str(straight), "--lr", "0.5", "--steps", "4", "--lora-rank", "16")
    assert "other settings: lora_rank was 8 and is 16; lr was 5e-05 and is 0.5. Resume with" in error
    assert (straight / "config.json").read_bytes() == before


def test_resume_of_a_run_whose_files_are_damaged(capsys, straight, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(straight, out)
    resume = ["--resume", str(out), "--steps", "4"]
    (out / "rollouts.jsonl").unlink()
    lines = (out / "metrics.jsonl").read_bytes()
    (out / "metrics.jsonl").write_bytes(lines.replace(b"1", b"2", 1))
    error = complaint(capsys, *resume)
    assert f"{out / 'metrics.jsonl'} is not what was written before that (missing, cut or changed)" in error
    assert f"{out / 'rollouts.jsonl'} is not what was written before that" in error
    assert "--resume-anyway" in error
    assert (out / "metrics.jsonl").read_bytes() == lines.replace(b"1", b"2", 1)
    error = complaint(capsys, "--resume", str(out), "--steps", "5")
    assert "steps was 4 and is 5; " in error
    shutil.rmtree(out / "checkpoints")
    assert "has RL steps in metrics.jsonl but no checkpoint" in complaint(capsys, *resume)
    assert (out / "metrics.jsonl").read_bytes() == lines.replace(b"1", b"2", 1)


def test_resume_to_an_end_that_is_past(capsys, straight):
    error = complaint(capsys, "--resume", str(straight), "--steps", "3", "--resume-anyway")
    assert f"--steps 3: {straight / 'checkpoints' / 'step-000004'} is past that end; give --steps 4 or more" in error


def fewer_entries(state: dict, tensors: dict) -> None:
    del tensors["optimizer"]["0.exp_avg"]


def one_moment_for_all(state: dict, tensors: dict) -> None:
    tensors["optimizer"]["0.exp_avg"] = torch.zeros(1)


FORGED = {
    "a state of nothing": lambda state, tensors: state.clear(),
    "settings that are a number": lambda state, tensors: state.update(config=3),
    "identities in a list": lambda state, tensors: state.update(identity=[]),
    "a place that is text": lambda state, tensors: state["log"]["eval.jsonl"].update(bytes="5"),
    "a moment of no parameter": lambda state, tensors: state["optimizer"]["entries"].update({"999.exp_avg": {}}),
    "a moment that is not there": fewer_entries,
    "a moment of another shape": one_moment_for_all,
    "a learning rate that is text": lambda state, tensors: state["optimizer"]["groups"][0].update(lr="x"),
    "betas that are text": lambda state, tensors: state["optimizer"]["groups"][0].update(betas=["x", "y"]),
    "a generator without its words": lambda state, tensors: state["rng"].update(python=[3, [1, 2], None]),
    "a generator of another kind": lambda state, tensors: tensors["rng"].update(torch_cpu=torch.zeros(3)),
    "a count that is text": lambda state, tensors: state.update(refused_in_a_row="a"),
    "no adapter": lambda state, tensors: tensors.pop("adapter"),
}


def forged(run: Path, out: Path, change) -> Path:
    """The run with its newest checkpoint changed, and hashed again. Returns that checkpoint's folder."""
    shutil.copytree(run, out)
    found, _ = checkpoint.load(out)
    change(found.state, found.tensors)
    shutil.rmtree(found.path)
    return checkpoint.save(out, found.step, tensors=found.tensors, state=found.state, keep=2)


@pytest.mark.parametrize("name", FORGED)
def test_resume_from_what_another_hand_has_hashed(capsys, straight, tmp_path, name):
    path = forged(straight, tmp_path / "run", FORGED[name])
    lines = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    error = complaint(capsys, "--resume", str(tmp_path / "run"), "--steps", "4", "--resume-anyway")
    assert f"{path} is as it was written, but a run cannot go on from what it holds" in error
    assert "remove that folder, and the checkpoint before it is taken." in error
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == lines


def test_a_gpu_without_room_is_not_the_checkpoints_fault(straight, monkeypatch):
    monkeypatch.setattr(checkpoint, "unpack_optimizer", Mock(side_effect=torch.cuda.OutOfMemoryError("full")))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        train.main(["--resume", str(straight)])


@pytest.mark.parametrize(
    ("name", "line", "wrong"),
    [
        ("metrics.jsonl", b'{"step": 0, "pha', "not JSON"),
        ("metrics.jsonl", b'{"step": 0, "phase": "rl", "time/step": "x"}', "see time/step"),
        ("metrics.jsonl", b'{"step": 0, "phase": "none"}', "see phase"),
        ("eval.jsonl", b"[1]", "not an object"),
        ("eval.jsonl", b'{"step": 0, "name": "final", "suite": "validation", "accuracy": 0.5}', "see n, ci95"),
    ],
)
def test_resume_of_lines_that_another_hand_has_hashed(capsys, straight, tmp_path, name, line, wrong):
    content, out = line + b"\n", tmp_path / "run"
    place = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    forged(straight, out, lambda state, tensors: state["log"].update({name: place}))
    (out / name).write_bytes(content)
    error = complaint(capsys, "--resume", str(out), "--steps", "4", "--eval-every", "1")
    assert f"{out / name}, line 1 is damaged ({wrong}" in error


def test_resume_with_another_student_or_other_records(capsys, straight, tmp_path, monkeypatch):
    resume = ["--resume", str(straight), "--steps", "4"]
    monkeypatch.setattr(Student, "fingerprint", lambda self: "another")
    assert "other settings: the student's weights have changed. " in complaint(capsys, *resume)
    monkeypatch.undo()
    monkeypatch.setattr(TeacherCache, "usable", lambda self, examples: list(examples)[:-1])
    assert "other settings: the tasks or the teacher's records have changed. " in complaint(capsys, *resume)
    monkeypatch.undo()
    monkeypatch.setattr(checkpoint, "versions", lambda: {**versions(), "torch": "9.9"})
    assert "torch was 2." in complaint(capsys, *resume)
    monkeypatch.undo()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    error = complaint(capsys, *resume)
    assert "bit for bit: the number of torch's threads was 1 and is 7 (set OMP_NUM_THREADS=1). Put that right" in error
    monkeypatch.undo()
    assert "date was 20" in complaint(capsys, *resume, "--date", "2020-02-29")


def test_resume_with_other_tools_and_another_judge(capsys, straight, tmp_path, monkeypatch):
    out = tmp_path / "copy"
    shutil.copytree(straight, out)
    identity_of = run_room.identity_of
    other = dict.fromkeys(("the descriptions of the tools", "the code of the tools", "the checkers or the judge"), "x")
    monkeypatch.setattr(run_room, "identity_of", lambda *rooms: identity_of(*rooms) | other)
    error = complaint(capsys, "--resume", str(out), "--steps", "4")
    said = "; ".join(f"{what} changed" for what in other)
    assert f"cannot be continued bit for bit: {said}. Put that right, or accept it with --resume-anyway." in error
    assert train.main(["--resume", str(out), "--resume-anyway"]) == 0
    assert "going on although the code of the tools changed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("device", "found"),
    [
        (
            "cpu",
            [
                "the number of torch's threads was 4 and is 2 (set OMP_NUM_THREADS=4)",
                "the processor's instruction set was A and is B",
            ],
        ),
        ("cuda", ["the GPU was C and is D"]),
    ],
)
def test_only_what_computes_the_run_has_to_stay(monkeypatch, device, found):
    names = (checkpoint.THREADS, checkpoint.INSTRUCTIONS, checkpoint.GPU)
    monkeypatch.setattr(checkpoint, "versions", lambda: dict(zip(names, ("2", "B", "D"), strict=True)))
    then = SimpleNamespace(
        state={"config": {}, "identity": {}}, versions=dict(zip(names, ("4", "A", "C"), strict=True))
    )
    now = SimpleNamespace(config=SimpleNamespace(device=device, asdict=dict), identity={})
    assert run_room.differences(then, now) == ([], found)


def test_a_run_tells_its_template_the_day_on_which_it_was_begun(capsys, tmp_path, monkeypatch):
    student = tiny_student(tmp_path / "student")
    template = student / "chat_template.jinja"
    plain = template.read_text()
    template.write_text("{{ 'Today is ' + strftime_now('%d %B %Y') + '. ' }}" + plain)
    out = tmp_path / "run"
    flags = ["--student", str(student), "--steps", "2", "--save-every", "1", "--eval-suites", "validation"]
    assert run(out, *flags, "--date", "2026-12-01") == 0
    assert json.loads((out / "config.json").read_text())["date"] == "2026-12-01"
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    shutil.rmtree(copy / "checkpoints" / "step-000002")
    assert train.main(["--resume", str(copy)]) == 0
    for name in ("metrics.jsonl", "rollouts.jsonl", "eval.jsonl"):
        assert rows(out / name) == rows(copy / name), name
    template.write_text("{{ 'Be brief. ' }}" + plain)
    error = complaint(capsys, "--resume", str(copy), "--steps", "2")
    assert "cannot be continued bit for bit: the chat template or the tokenizer changed. " in error


def test_missing_student_folder(capsys, tmp_path):
    assert "--student" in complaint(capsys, "--student", str(tmp_path / "none"), "--out", str(tmp_path / "r"))


def test_corrupt_student_folder(capsys, tmp_path):
    folder = tiny_student(tmp_path / "student")
    (folder / "model.safetensors").write_bytes(b"garbage")
    assert "cannot be loaded" in complaint(capsys, "--student", str(folder), "--out", str(tmp_path / "r"))


def test_empty_task_file(capsys, tmp_path):
    (tmp_path / "tasks.jsonl").write_text("")
    assert "tasks.jsonl" in complaint(capsys, "--task", str(tmp_path / "tasks.jsonl"), "--out", str(tmp_path / "r"))


def test_task_file_with_bad_rows(capsys, tmp_path):
    (tmp_path / "tasks.jsonl").write_text('{"question": 1}\n{oops\n')
    error = complaint(capsys, "--task", str(tmp_path / "tasks.jsonl"), "--out", str(tmp_path / "r"))
    assert "quarantine.jsonl" in error
    assert len((tmp_path / "r" / "quarantine.jsonl").read_text().splitlines()) == 2


def test_teacher_cache_of_other_tasks_and_damaged(capsys, tmp_path):
    cache = tmp_path / "cache"
    command = [sys.executable, "-m", "lite_mentor.teach", "--suite", "math", "--size", "30", "--out", str(cache)]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": "kernels"}, capture_output=True)
    other = complaint(capsys, "--teacher", str(cache), "--out", str(tmp_path / "r1"))
    assert "other tasks" in other
    records = cache / "records.jsonl"
    content = bytearray(records.read_bytes())
    content[len(content) // 2] ^= 1
    records.write_bytes(content)
    assert "records.jsonl" in complaint(capsys, "--teacher", str(cache), "--out", str(tmp_path / "r2"))


def test_a_prompt_longer_than_allowed(capsys, tmp_path):
    assert "--max-prompt-tokens" in complaint(capsys, "--max-prompt-tokens", "50", "--out", str(tmp_path / "r"))


def test_no_room_on_the_disk(capsys, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    assert "No space left on device" in complaint(capsys, "--out", str(tmp_path / "r"))


@pytest.mark.skipif(os.name != "posix", reason="its limits")
@pytest.mark.parametrize("most", [0, 200], ids=["the lock", "config.json"])
def test_a_file_that_may_not_grow(capsys, tmp_path, most):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        error = complaint(capsys, "--out", str(tmp_path / "r"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"The run's folder {tmp_path / 'r'} cannot be written (File too large)" in error
    assert not list((tmp_path / "r").glob("**/.tmp-*"))


@pytest.mark.skipif(os.name != "posix", reason="its kinds of files")
@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "checkpoints", "report.html", "quarantine.jsonl"])
@pytest.mark.parametrize("kind", ["a symbolic link", "a pipe"])
def test_a_folder_from_elsewhere_cannot_make_a_run_write_outside_or_wait(capsys, straight, tmp_path, name, kind):
    out, theirs = tmp_path / "run", tmp_path / "theirs"
    shutil.copytree(straight, out)
    if (out / name).exists():
        (out / name).rename(theirs)
    else:
        theirs.write_text("precious")
    before = sorted((str(p), p.stat().st_mtime_ns) for p in (theirs, *theirs.rglob("*")))
    if kind == "a pipe":
        os.mkfifo(out / name)
    else:
        (out / name).symlink_to(theirs)
    for argv in (["--resume", str(out)], ["--out", str(out)]):
        assert f"{out / name} is {kind}" in complaint(capsys, *argv)
    with pytest.raises(SystemExit, match=f"{name} is {kind}"):
        report.main([str(out)])
    assert sorted((str(p), p.stat().st_mtime_ns) for p in (theirs, *theirs.rglob("*"))) == before


@pytest.mark.skipif(os.name != "posix", reason="its kinds of files")
def test_the_folder_itself_may_be_a_link(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    assert train.main(["--resume", str(tmp_path / "link")]) == 0
    report.main([str(tmp_path / "link")])


def test_a_second_process_on_the_same_folder(capsys, straight):
    with checkpoint.lock(straight):
        command = [sys.executable, "train.py", *SHORT, "--steps", "1", "--resume", str(straight)]
        environment = os.environ | {"PYTHONPATH": "kernels"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{os.getpid()}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_ctrl_c_in_a_real_process_says_how_to_go_on(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "train.py", *SHORT, "--steps", "5000", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": "kernels"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (out / "rollouts.jsonl").exists() or not (out / "rollouts.jsonl").stat().st_size:
        assert time.monotonic() < deadline, "the run did not reach RL"
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"--resume {out}" in error.decode()
    assert "Traceback" not in error.decode()
    assert list((out / "checkpoints").glob("step-*/MANIFEST.json"))


def test_without_a_cold_start_nothing_is_asked_before_it(monkeypatch):
    monkeypatch.setattr(train, "support_of", lambda run: pytest.fail("the gate costs episodes"))
    train.cold_start(SimpleNamespace(config=SimpleNamespace(sft_steps=0)))


def test_the_support_gate_asks_what_the_teacher_used_tools_for_at_the_runs_own_limits(monkeypatch):
    asked = []

    def roll_out(engine, chat, examples, *, limits, **how):
        asked.append([example.key for example in examples])
        assert limits == Limits(4, 640, 64)
        return [SimpleNamespace(calls=[SimpleNamespace(status="ok")])]

    def gate(calls: dict[str, tuple]) -> float:
        return train.support_of(SimpleNamespace(
            config=SimpleNamespace(seed=0), limits=Limits(4, 640, 64), refresh_rollouts=lambda: None, engine=None,
            chat=None, sampling=None, run_call=None, examples=[SimpleNamespace(key=key) for key in calls],
            teacher={key: SimpleNamespace(calls=made) for key, made in calls.items()},
        ))  # fmt: skip

    monkeypatch.setattr(train, "roll_out", roll_out)
    assert gate({"a": (), "b": (1,), "c": (), "d": (1, 2)}) == 1
    assert gate({"a": (), "b": ()}) == 1
    assert asked == [["b", "d"], ["a", "b"]]


# --- one step and one folder at a time ------------------------------------------------------------------------------


def taken(monkeypatch, reason: str = "") -> tuple[list, list]:
    """A step of two groups, of which the second has no variance -> what was refused, and the groups of the update."""
    scored = [SimpleNamespace(rollout=SimpleNamespace(group=group)) for group in (0, 0, 1, 1)]
    groups = SimpleNamespace(zero_variance_G=[False, True])
    refused, taught = [], []
    monkeypatch.setattr(train, "roll_out", lambda *_, **__: [])
    monkeypatch.setattr(train, "score", lambda *_: (scored, groups))
    monkeypatch.setattr(train, "unsound", lambda found: reason)
    monkeypatch.setattr(train, "summarise", lambda *_: {})
    monkeypatch.setattr(train, "update", lambda run, share, step: taught.append([s.rollout.group for s in share]) or {})
    room = SimpleNamespace(
        config=replace(PRESETS["tiny"], device="cpu"), engine=Mock(evictions=0), chat=Mock(), log=Mock(), run_call=None,
        refresh_rollouts=Mock(), take=Mock(), limits=None, sampling=None, by_key={}, teacher={},
        guard=Mock(refused=lambda *what: refused.append(what[2])),
    )  # fmt: skip
    train.train_step(room, 0)
    return refused, taught


def test_groups_without_variance_and_unsound_numbers_are_not_trained_on(monkeypatch):
    assert taken(monkeypatch) == ([], [[0, 0]])
    assert taken(monkeypatch, "the reward is not finite") == (["the reward is not finite"], [[]])


def updated(monkeypatch, loss_of, **changes) -> SimpleNamespace:
    """`updates_per_step` updates of one weight by two groups, each with this loss."""
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    found = SimpleNamespace(weight=weight, refused=[], old=[])

    def batch_loss(student, batch, config, old_logp_N=None):
        found.old.append(old_logp_N)
        return SimpleNamespace(loss=loss_of(weight), metrics={})

    monkeypatch.setattr(train, "batch_loss", batch_loss)
    monkeypatch.setattr(train, "old_logprobs", lambda *_: weight.item())
    config = replace(PRESETS["tiny"], device="cpu", warmup=0, **changes)
    room = SimpleNamespace(
        config=config, student=SimpleNamespace(trainable=lambda: [weight]), optimizer=make_optimizer([weight], config),
        guard=SimpleNamespace(passed=lambda: None, refused=lambda *what: found.refused.append(what[2])),
    )  # fmt: skip
    train.update(room, [Scored(rollout([1, 2], [(3, 1)], group=g), {}, 1.0, 1.0) for g in (0, 1)], 0)
    return found


def test_old_logprobs_are_taken_before_the_first_of_several_updates(monkeypatch):
    assert updated(monkeypatch, torch.sum, updates_per_step=2).old == [1.0, 1.0]
    assert updated(monkeypatch, torch.sum, updates_per_step=1).old == [None]


def test_a_loss_that_is_not_finite_is_refused_though_its_gradient_is(monkeypatch):
    found = updated(monkeypatch, lambda weight: weight.sum() + float("inf"))
    assert found.weight.item() == 1.0
    assert [why.split(";")[0] for why in found.refused] == ["not finite: loss"]
    assert updated(monkeypatch, torch.sum).weight.item() < 1.0


def test_new_weights_reach_the_sampler_and_what_older_ones_computed_is_forgotten():
    order = []
    run_room.Run.refresh_rollouts(SimpleNamespace(
        student=SimpleNamespace(refresh_rollout_weights=lambda: order.append("weights")),
        engine=SimpleNamespace(weights_changed=lambda: order.append("cache")),
    ))  # fmt: skip
    assert order == ["weights", "cache"]


def test_rl_goes_on_behind_the_examples_of_the_cold_start():
    config = SimpleNamespace(sft_steps=2, sft_batch=3, prompts_per_step=2)
    room = SimpleNamespace(config=config, examples=tuple(range(9)))
    assert [run_room.Run.take(room, step) for step in range(3)] == [[6, 7], [8, 0], [1, 2]]


def test_the_order_of_the_examples_is_the_seeds(tmp_path, monkeypatch):
    teacher = SimpleNamespace(usable=list)
    monkeypatch.setattr(run_room, "load_task", lambda *_, **__: range(60))
    monkeypatch.setattr(run_room, "open_teacher", lambda *_: teacher)
    first, again, other = (
        run_room.training_examples(replace(PRESETS["tiny"], seed=seed), tmp_path, None, print)[0] for seed in (1, 1, 2)
    )
    assert first == again != other
    assert sorted(first) == sorted(other) == list(range(60))


def test_a_run_knows_the_words_of_its_teachers_records():
    example = load_suite("tiny", split="train", size=1, seed=0)[0]

    def identity(said: str) -> dict[str, str]:
        record = SimpleNamespace(messages=[{"role": "assistant", "content": said}])
        rooms = SimpleNamespace(fingerprint=lambda: "")
        return run_room.identity_of([example], {example.key: record}, rooms, rooms)

    one, other = identity("5"), identity("6")
    assert {name for name in one if one[name] != other[name]} == {"the tasks or the teacher's records"}


def test_all_that_changes_in_a_run_comes_back(tmp_path):
    """From the state that `save` wrote, whatever happened to it since."""
    flags = ["--eval-suites", "validation", "--eval-size", "2", "--steps", "9", "--beta", "0.1"]
    with run_room.prepare(parse([*SHORT, "--out", str(tmp_path / "run"), *flags])) as run:
        run.restore()

        def learn() -> None:
            sum(p.sum() for p in run.student.trainable()).backward()
            apply_gradients(run.optimizer, lr=0.1, max_norm=1.0)
            torch.rand(1)
            run.guard.in_a_row += 1

        def state() -> list:
            tensors, described = checkpoint.pack_optimizer(run.optimizer)
            parts = [run.student.adapter_state(), run.student.reference_state(), tensors, checkpoint.rng_state()[0]]
            return [described, run.guard.in_a_row, *({n: t.tolist() for n, t in part.items()} for part in parts)]

        learn()
        run.student.keep_reference()
        learn()
        run.save(1)
        saved = state()
        learn()
        run.student.keep_reference()
        now = state()
        assert all(a != b for a, b in zip(saved[1:], now[1:], strict=True))
        assert run.restore() == 1
        assert state() == saved
