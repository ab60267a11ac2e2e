"""Soft labels: written, damaged, found again by their tokens; and a cold start that follows them."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sample_tools import no_module

from lite_mentor import label, sft, soft
from lite_mentor.batch import pack
from lite_mentor.config import PRESETS, parse
from lite_mentor.errors import UserError
from lite_mentor.load import load_student
from lite_mentor.loss import supervised_loss
from lite_mentor.optim import Guard, make_optimizer
from lite_mentor.prompt import Chat
from lite_mentor.run import first_day, training_examples

FLAGS = [
    "--preset",
    "tiny",
    "--sft-steps",
    "3",
    "--sft-batch",
    "4",
    "--train-size",
    "24",
    "--lora-rank",
    "8",
    "--prompts-per-step",
    "8",
]


@pytest.fixture(scope="module")
def labels_file(tmp_path_factory) -> Path:
    """Labels by a twin of the student whose adapters are not the student's."""
    folder = tmp_path_factory.mktemp("soft")
    teacher = load_student("tiny", quant="none", dtype="fp32", lora_rank=8, lora_alpha=64)
    with torch.no_grad():
        for p in teacher.trainable():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    teacher.save_adapter(folder / "adapter")
    command = [
        "--model",
        "tiny",
        "--adapter",
        str(folder / "adapter"),
        "--labels",
        "5",
        "--soft-labels",
        str(folder / "l.st"),
    ]
    assert label.main([*command, *FLAGS]) == 0
    return folder / "l.st"


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """(student, the cold start's rollouts) of FLAGS."""
    config = parse(FLAGS)
    examples, teacher = training_examples(config, tmp_path_factory.mktemp("out"), no_module, print)
    student = load_student("tiny", quant="none", dtype="fp32", lora_rank=8, lora_alpha=64)
    rollouts = sft.teacher_rollouts(Chat(student.tokenizer), examples[:12], teacher, config)
    return student, rollouts


def test_labels_are_the_teachers_likeliest_tokens(labels_file, records):
    _, rollouts = records
    labels = soft.read(labels_file)
    assert labels.teacher == "tiny"
    assert set(labels.first) == {soft.key_of(r) for r in rollouts}
    teacher = load_student("tiny", quant="none", dtype="fp32", lora_rank=8, lora_alpha=64)
    teacher.load_adapter(labels_file.parent / "adapter")
    teacher.base.set_attn_implementation("eager")  # transformers' own forward
    for rollout in (rollouts[0], rollouts[7]):
        ids, logp = labels.of([rollout])
        with torch.no_grad():
            theirs = torch.log_softmax(teacher.model(rollout.ids[None]).logits[0].float(), -1)
        want = theirs[rollout.sampled.nonzero()[:, 0] - 1].topk(5)
        assert torch.equal(ids, want.indices)
        torch.testing.assert_close(logp, want.values, rtol=1e-4, atol=1e-5)


def test_several_rollouts_keep_their_order(labels_file, records):
    _, rollouts = records
    labels = soft.read(labels_file)
    both = labels.of([rollouts[5], rollouts[2]])
    for found, a, b in zip(both, labels.of([rollouts[5]]), labels.of([rollouts[2]]), strict=True):
        assert torch.equal(found, torch.cat([a, b]))


def test_no_labels_for_other_tokens(labels_file, records):
    _, rollouts = records
    ids = rollouts[0].ids.clone()
    ids[0] += 1
    other = dataclasses.replace(rollouts[0], ids=ids)
    with pytest.raises(UserError, match=f"have none for the record of example {other.example_key}; make them again"):
        soft.read(labels_file).of([other])


def test_the_loss_by_hand(records):
    """Against log_softmax over the whole vocabulary, in micro-batches that cut between records."""
    student, rollouts = records
    chosen = rollouts[:4]
    batches = pack(chosen, [0.0] * 4, 180)
    assert len(batches) > 1
    make = torch.Generator().manual_seed(0)
    found, hard, gap = 0.0, [], []
    for batch in batches:
        N = len(batch.targets_N)
        ids = torch.randint(0, len(student.head_weight_VH), (N, 3), generator=make)
        logq = torch.log_softmax(torch.randn(N, 4, generator=make), -1)[:, :3]
        found += supervised_loss(student, batch, soft=(ids, logq), soft_weight=0.25).item()
        with torch.no_grad():
            hidden = label.sampled_hidden(student, batch)
            log_p = torch.log_softmax(hidden.double() @ student.head_weight_VH.double().T, -1)
        hard.append(-log_p.gather(1, batch.targets_N[:, None])[:, 0])
        gap.append((logq.exp() * (logq - log_p.gather(1, ids))).sum(1))
    want = 0.75 * torch.cat(hard).mean() + 0.25 * torch.cat(gap).mean()
    assert found == pytest.approx(want.item(), rel=1e-5)


def test_a_cold_start_on_soft_labels_alone_comes_closer_to_its_teacher(labels_file, records):
    _, rollouts = records
    labels = soft.read(labels_file)

    def distance(student) -> float:
        with torch.no_grad():
            batches = pack(rollouts, [0.0] * 12, 2000)
            parts = [
                supervised_loss(student, b, None, labels.of([rollouts[i] for i in b.sequence_N.unique().tolist()]), 1.0)
                for b in batches
            ]
        return sum(part.item() for part in parts)

    def trained(weight: float, file: str) -> float:
        config = dataclasses.replace(
            PRESETS["tiny"], sft_steps=30, sft_batch=4, lora_rank=8, lora_alpha=64, soft_labels=file, soft_weight=weight
        )
        student = load_student("tiny", quant="none", dtype="fp32", lora_rank=8, lora_alpha=64)
        before = distance(student)
        guard = Guard(Path("unused"), print)
        for metrics in sft.cold_start(student, make_optimizer(student.trainable(), config), rollouts, config, guard):
            assert math.isfinite(metrics["loss"])
        return distance(student) / before

    assert trained(1.0, str(labels_file)) < 0.5
    assert trained(0.5, "") > 1  # the records' own tokens are something else


def test_a_run_learns_from_them_and_says_so(labels_file, tmp_path, capsys):
    from train import main

    flags = ["--soft-labels", str(labels_file), "--steps", "1", "--prompts-per-step", "2", "--group-size", "2",
             "--eval-size", "2", "--max-new-tokens", "16", "--out", str(tmp_path / "run")]  # fmt: skip
    assert main([*FLAGS, *flags]) == 0
    assert "and a larger model's soft labels of them" in capsys.readouterr().out


# --- what can go wrong ------------------------------------------------------------------------------------------------


def test_a_damaged_file_is_named(labels_file, tmp_path):
    content = bytearray(labels_file.read_bytes())
    for at in range(0, len(content), len(content) // 40):
        damaged = tmp_path / "damaged.st"
        flipped = content.copy()
        flipped[at] ^= 4
        damaged.write_bytes(flipped)
        with pytest.raises(UserError, match=r"damaged\.st cannot be read"):
            soft.read(damaged)
    damaged.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        soft.read(damaged)
    with pytest.raises(UserError, match="cannot be read"):
        soft.read(tmp_path / "nothing")
    save_file({"ids": torch.zeros(2, 2)}, damaged)
    with pytest.raises(UserError, match="cannot be read"):
        soft.read(damaged)


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ([], "--soft-labels must name the file to write"),
        (["--soft-labels", "x", "--sft-steps", "0"], "--sft-steps must not be 0"),
        (["--soft-labels", "x", "--labels", "0"], "--labels is 0; keep 1 token or more"),
        (["--soft-labels", "x", "--adapter", "nowhere"], "cannot be read as an adapter"),
    ],
)
def test_bad_commands_end_with_one_sentence(command, sentence, capsys):
    assert label.main(["--model", "tiny", *FLAGS, *command]) == 2
    found = capsys.readouterr().err.strip().splitlines()
    assert sentence in found[-1]


@pytest.mark.parametrize(
    ("path", "reason"),
    [("/proc/x", "cannot be written"), (".", "is a folder"), ("/", "is a folder"), ("x" * 5000, "cannot be written")],
)
def test_where_labels_cannot_go_is_said_first(path, reason, capsys, monkeypatch):
    monkeypatch.setattr(label, "student_records", None)
    assert label.main(["--model", "tiny", "--soft-labels", path, *FLAGS]) == 2
    assert reason in capsys.readouterr().err
    with pytest.raises(UserError, match=reason):
        soft.write(Path(path), soft.SoftLabels("t", torch.zeros(1, 1), torch.zeros(1, 1), {}))


@pytest.mark.skipif(os.name != "posix", reason="its pipes")
def test_nobody_is_waited_for_at_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "l.st")
    with pytest.raises(UserError, match=r"l\.st cannot be read \(.*it is not a file"):
        soft.read(tmp_path / "l.st")


def test_a_runs_folder_does_not_say_which_file_is_written(tmp_path, capsys):
    theirs = tmp_path / "precious"
    config = dataclasses.replace(parse(FLAGS), soft_labels=str(theirs), sandbox="off")
    (tmp_path / "config.json").write_text(json.dumps(config.asdict()))
    assert label.main(["--model", "tiny", "--resume", str(tmp_path)]) == 2
    assert "--soft-labels must name the file to write" in capsys.readouterr().err
    assert not theirs.exists()


def test_a_run_is_told_the_day_of_its_soft_labels(labels_file, tmp_path):
    labels = soft.read(labels_file)
    assert labels.date == str(datetime.date.today())
    soft.write(tmp_path / "l.st", dataclasses.replace(labels, date="2026-12-01"))
    assert first_day(parse([*FLAGS, "--soft-labels", str(tmp_path / "l.st")])) == "2026-12-01"
    assert first_day(parse(FLAGS)) == str(datetime.date.today())


def test_a_weight_is_a_share(capsys):
    with pytest.raises(UserError, match=r"--soft-weight is 1\.5; it is a share, from 0 to 1"):
        parse(["--soft-weight", "1.5"])
