"""A run, assembled: every room opened once, in the order of the data, and closed again.

train.py is the algorithm; this is what it stands on. Nothing here decides what is learned.
"""

from __future__ import annotations

import datetime
import json
import operator
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lite_mentor import checkpoint, soft
from lite_mentor.assets import cache_folder
from lite_mentor.config import NEUTRAL, ROUNDING, Config
from lite_mentor.device import compute_device, compute_dtype, too_small, why_cpu
from lite_mentor.engine import Engine, Sampling
from lite_mentor.errors import UserError, printable
from lite_mentor.evaluate import suites
from lite_mentor.facts import digest, facts_of
from lite_mentor.fit import prove_fit, row_tokens
from lite_mentor.load import load_student
from lite_mentor.log import RunLog
from lite_mentor.loss import check_backend
from lite_mentor.optim import Guard, make_optimizer
from lite_mentor.prompt import Chat
from lite_mentor.rollout import Limits, limits_of, prompt_of
from lite_mentor.sandbox import open_sandbox
from lite_mentor.student import Student
from lite_mentor.tasks import Describe, load_task
from lite_mentor.teacher import TeacherCache, open_cache, read_manifest
from lite_mentor.tools import RunCall, caller
from lite_mentor.types import Example


@dataclass(frozen=True)
class Run:
    """Everything a run holds. The objects have state (weights, cache, files); the choice of them is fixed."""

    config: Config
    out: Path
    log: RunLog
    identity: Mapping[str, str]
    """See `identity_of`."""
    student: Student
    chat: Chat
    engine: Engine
    optimizer: torch.optim.Optimizer
    examples: tuple[Example, ...]
    """The training examples in the order of this run's seed."""
    by_key: Mapping[str, Example]
    held_out: Mapping[str, Sequence[Example]]
    """The examples of each suite that is evaluated."""
    teacher: TeacherCache
    run_call: RunCall
    limits: Limits
    sampling: Sampling
    guard: Guard

    def take(self, step: int) -> list[Example]:
        """The examples of an RL step: those after the cold start's, round and round."""
        c = self.config
        first = c.sft_steps * c.sft_batch + step * c.prompts_per_step
        return [self.examples[(first + i) % len(self.examples)] for i in range(c.prompts_per_step)]

    def refresh_rollouts(self) -> None:
        """Bring the rollout weights up to date with the adapters."""
        self.student.refresh_rollout_weights()
        self.engine.weights_changed()

    def save(self, step: int) -> None:
        """Write a checkpoint from which `step` is the next to be taken."""
        optimizer, optimizer_state = checkpoint.pack_optimizer(self.optimizer)
        rng, rng_state = checkpoint.rng_state()
        state = {"optimizer": optimizer_state, "rng": rng_state, "log": self.log.position()}
        tensors = {"adapter": self.student.adapter_state(), "optimizer": optimizer, "rng": rng}
        reference = self.student.reference_state()
        checkpoint.save(
            self.out,
            step,
            tensors=tensors | ({"reference": reference} if reference else {}),
            state=state
            | {
                "refused_in_a_row": self.guard.in_a_row,
                "config": self.config.asdict(),
                "identity": dict(self.identity),
            },
            **self._kept(),
        )

    def _kept(self) -> dict[str, int | None]:
        return {"keep": 2, "spare": self.log.best_step("validation") if self.config.eval_every else None}

    def keep_best(self, step: int) -> None:
        """Write `best/` if the evaluation on the way after `step` steps is the best so far; after its save."""
        if step and self.log.best_step("validation") == step:
            self.student.save_adapter(self.out / "best")

    def restore(self) -> int | None:
        """Load the newest sound checkpoint and return its step; None when the run has none yet.

        Raises UserError when it is of another run than this one would be, or when lines before it are not as written.
        """
        found, refused = checkpoint.load(self.out)
        for reason in refused:
            self.log.note(reason)
        if found is None:
            if self.log.holds_rl_steps():
                raise UserError(
                    f"{self.out} has RL steps in metrics.jsonl but no checkpoint; put its folder checkpoints back, or "
                    "start a new run with another --out."
                )
            self.log.rewind({})
            return None
        if found.step > self.config.steps:
            raise UserError(
                f"--steps {self.config.steps}: {found.path} is past that end; give --steps {found.step} or more, or "
                "start a new run with another --out."
            )
        try:
            self._go_on_from(found)
        except torch.cuda.OutOfMemoryError:  # for which the checkpoint is not to blame
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"{found.path} is as it was written, but a run cannot go on from what it holds "
                f"({type(error).__name__}: {error}); remove that folder, and the checkpoint before it is taken."
            ) from error
        # A kill may have come between that save and these.
        checkpoint.tidy(self.out, found.step, **self._kept())
        self.keep_best(found.step)
        self.log.note(f"resuming at step {found.step} of {self.config.steps}, from {found.path}")
        return found.step

    def _go_on_from(self, found: checkpoint.Checkpoint) -> None:
        """Put back all that `save` wrote. Whoever hashed it may have written anything: the lines are cut last."""
        self._check_that_it_is_ours(found)
        self.student.load_adapter_state(found.tensors["adapter"])
        if "reference" in found.tensors:
            self.student.keep_reference(found.tensors["reference"])
        checkpoint.unpack_optimizer(self.optimizer, found.tensors["optimizer"], found.state["optimizer"])
        checkpoint.restore_rng(found.tensors["rng"], found.state["rng"])
        self.guard.in_a_row = operator.index(found.state["refused_in_a_row"])
        self.log.rewind(found.state["log"])

    def _check_that_it_is_ours(self, found: checkpoint.Checkpoint) -> None:
        """Raise UserError unless `found` goes on bit for bit here; what is merely inexact, --resume-anyway accepts.

        For CUDA see `checkpoint.versions`.
        """
        other, inexact = differences(found, self)
        if other:
            raise UserError(
                f"{found.path} was written under other settings: {'; '.join(other)}. Resume with those of its run, or "
                "start a new run with another --out."
            )
        damaged = self.log.damaged(found.state["log"])
        inexact += [
            f"{self.out / name} is not what was written before that (missing, cut or changed)" for name in damaged
        ]
        if inexact and not self.config.resume_anyway:
            raise UserError(
                f"{found.path} cannot be continued bit for bit: {'; '.join(inexact)}. Put that right, or accept it "
                "with --resume-anyway."
            )
        for sentence in inexact:
            self.log.note(f"going on although {sentence}")
        for name in damaged:
            self.log.note(f"{name} starts anew; what was there is now {self.log.set_aside(name)}")


LEARNED_FROM = ("the student's weights", "the tasks or the teacher's records")
"""Of a run's identity, what it cannot go on without."""


def identity_of(examples: Sequence[Example], teacher: TeacherCache, student: Student, chat: Chat) -> dict[str, str]:
    """Hashes of what the configuration only names."""
    facts = facts_of(examples).values()
    said = [[example.key, list(teacher[example.key].messages)] for example in examples]
    return {
        "the student's weights": student.fingerprint(),
        "the tasks or the teacher's records": digest(said),
        "the descriptions of the tools": digest([f["tools"] for f in facts]),
        "the code of the tools": digest([f["code"] for f in facts]),
        "the checkers or the judge": digest([f["judge"] for f in facts]),
        "the chat template or the tokenizer": chat.fingerprint(),
    }


def differences(found: checkpoint.Checkpoint, run: Run) -> tuple[list[str], list[str]]:
    """How a checkpoint differs from what `run` would write: in what may not, and in what --resume-anyway accepts."""
    other, inexact = [], []
    now = json.loads(json.dumps(run.config.asdict()))
    then = found.state["config"]
    for name in sorted({*now, *then} - NEUTRAL):
        if now.get(name) != then.get(name):
            sentence = printable(f"{name} was {then.get(name)} and is {now.get(name)}")
            (inexact if name in ROUNDING else other).append(sentence)
    before = found.state["identity"]
    gone = [what for what, value in run.identity.items() if before.get(what) != value]
    other += [f"{what} have changed" for what in gone if what in LEARNED_FROM]
    inexact += [f"{what} changed" for what in gone if what not in LEARNED_FROM]
    here = checkpoint.versions()
    on_cpu = run.config.device == "cpu"
    elsewhere = {checkpoint.GPU} if on_cpu else {checkpoint.THREADS, checkpoint.INSTRUCTIONS}
    for what, version in found.versions.items():
        if what not in elsewhere and here.get(what) != version:
            cure = f" (set OMP_NUM_THREADS={version})" if what == checkpoint.THREADS else ""
            inexact.append(printable(f"{what} was {version} and is {here.get(what)}{cure}"))
    return other, inexact


@contextmanager
def prepare(config: Config) -> Iterator[Run]:
    """Open every room of a run; on leaving, close what has processes or files."""
    device, requested = compute_device(config.device), config.device
    out = Path(config.resume or config.out or f"runs/{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}")
    # What `auto` means is decided once and written down: a resumed run must not decide otherwise.
    dtype = "bf16" if compute_dtype(device, config.dtype) is torch.bfloat16 else "fp32"
    config = replace(config, device=device, dtype=dtype, out=str(out), date=config.date or first_day(config))
    check_backend(config)
    with ExitStack() as stack:
        stack.enter_context(checkpoint.lock(out))
        log = stack.enter_context(RunLog(out, config.asdict(), total_steps=config.steps, resume=bool(config.resume)))
        for sentence in filter(None, (why_cpu(requested), too_small(config.preset, device))):
            log.note(sentence)
        sandbox = stack.enter_context(open_sandbox(config.sandbox))
        log.note(sandbox.note)  # before any module of tools is imported there
        examples, teacher = training_examples(config, out, sandbox.describe, log.note)
        held_out = suites(config, sandbox.describe, log.note)
        student = load_student(
            config.student,
            quant=config.quant,
            lora_rank=config.lora_rank,
            lora_alpha=config.lora_alpha,
            device=device,
            dtype=config.dtype,
            seed=config.seed,
            gradient_checkpointing=config.gradient_checkpointing,
            rollout_weights=config.rollout_weights,
            context=config.longest_rollout,
        )
        log.note(student.describe())
        chat, limits = Chat(student.tokenizer, config.date), limits_of(config)
        for sentence in chat.template.notes():
            log.note(sentence)
        seen = config.sft_steps * config.sft_batch + config.steps * config.prompts_per_step
        for example in (*examples[:seen], *(e for suite in held_out.values() for e in suite)):
            prompt_of(chat, example, limits)  # none may be too long, and better now than in the middle of the night
        if not config.micro_tokens:
            config = replace(config, micro_tokens=row_tokens(student, config))
            log.decided(config.asdict())
        if device != "cpu" or config.check:  # before the cache takes what the update leaves
            log.note(prove_fit(student, config))
        context = config.longest_rollout
        engine = Engine.of(
            student, slots=slots(config), context=context, gib=config.cache_gib, backend=config.kernel_backend,
            graphs=config.cuda_graphs, note=log.note,
        )  # fmt: skip
        log.note(engine.describe())
        log.note(engine.decoder.describe())
        yield Run(
            config=config,
            out=out,
            log=log,
            identity=identity_of(examples, teacher, student, chat),
            student=student,
            chat=chat,
            engine=engine,
            optimizer=make_optimizer(student.trainable(), config),
            examples=tuple(examples),
            by_key={example.key: example for example in examples},
            held_out=held_out,
            teacher=teacher,
            run_call=caller(sandbox.call),
            limits=limits,
            sampling=Sampling(config.temperature, config.top_k, config.top_p),
            guard=Guard(out, log.note),
        )


def first_day(config: Config) -> str:
    """What a new run's template is told as the date: that of the soft labels, for they are of the same tokens."""
    labelled = soft.read(Path(config.soft_labels)).date if config.soft_labels else ""
    return labelled or str(datetime.date.today())


def slots(config: Config) -> int:
    """Sequences that decode together: a step's rollouts, and enough to keep an evaluation busy."""
    return max(32, min(config.rollouts_per_step, 128))


def training_examples(
    config: Config, out: Path, describe: Describe, note: Callable[[str], None]
) -> tuple[list[Example], TeacherCache]:
    """The examples of which the teacher has usable records, in the order of this run's seed; and the cache."""
    examples = load_task(
        config.task, split="train", size=config.train_size, seed=0, levels=config.levels,
        quarantine=out / "quarantine.jsonl", describe=describe, note=note,
    )  # fmt: skip
    teacher = open_teacher(config, examples, note)
    examples = teacher.usable(examples)
    if len(examples) < config.prompts_per_step:
        raise UserError(
            f"--prompts-per-step {config.prompts_per_step}: there are only {len(examples)} training examples with a "
            "right record; lower it, or fill the teacher's cache with more."
        )
    random.Random(config.seed).shuffle(examples)
    return examples, teacher


def open_teacher(config: Config, examples: Sequence[Example], note: Callable[[str], None]) -> TeacherCache:
    """The cache that --teacher names; or the built-in tasks' own solutions, which `lite_mentor.teach` writes once.

    Its folder is named by what the tasks are made of, so that a version which makes other ones does not find these.
    """
    if config.teacher:
        return open_cache(Path(config.teacher))
    if config.task.endswith((".jsonl", ".parquet")):
        raise UserError(
            f"--task {config.task} needs --teacher: fill a cache with python -m lite_mentor.teach --suite "
            f"{config.task} --source endpoint --out DIR (or --source local), and name it."
        )
    content = digest(facts_of(examples))
    folder = cache_folder() / "teachers" / f"{config.task}-{len(examples)}-{content[:12]}"
    wanted = len({example.key for example in examples})
    if not (folder / "manifest.json").exists() or read_manifest(folder).records < wanted:  # a fill may be interrupted
        command = [sys.executable, "-m", "lite_mentor.teach", "--suite", config.task, "--source", "oracle"]
        command += ["--size", str(config.train_size), "--levels", *map(str, config.levels), "--out", str(folder)]
        command += ["--sandbox", config.sandbox]
        note("filling the teacher's cache: python " + " ".join(command[1:]))
        if subprocess.run(command, check=False).returncode:
            raise UserError(f"The teacher's cache {folder} could not be filled; what was wrong stands above.")
    return open_cache(folder)
