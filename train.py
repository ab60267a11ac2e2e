"""Teach a small language model to use tools, guided by a cached teacher, on one machine.

    python train.py                     the default student, minutes on a laptop's CPU
    python train.py --preset 12gb       Qwen3-1.7B in 4 bits on one consumer GPU
    python train.py --resume runs/...   go on where a run stopped

This file is the algorithm: MENTOR (arXiv 2510.18383, whose own settings are --preset paper). One step, by default:

    episodes   for each question a group of them, sampled from the student with its tools: tokens, calls, results
    terms      correct, align, valid, each in [0, 1]: an episode beside the answer and beside the teacher's record
    A          of an episode: 0.7, 0.2 and 0.1 times those terms, each less its group's mean and over its group's std;
               then normalised in the same way over the step
    rho        pi / pi_old of a token, with pi_old the student before the step's first update; 1 in that update
    b          pi_old / pi_rollout of the token, where the sampler's arithmetic differs from the trainer's; both over
               the whole vocabulary, so a --top-k or --top-p, which is not corrected, is not mistaken for it
    loss       -1/N sum of min(b, 2) min(rho A, clip(rho, 0.8, 1.28) A), over the N tokens that the student sampled in
               groups that are kept; for A < 0 the inner minimum is at least 3 A (dual clip)

It is GRPO, with these differences from the textbook:

 1. The student learns in turns: it calls tools, reads their results, and answers. Only tokens that it sampled itself
    carry a loss; the mask is written when a token is sampled or injected, and never inferred.
 2. The reward is dense: right answer, tools aligned with the teacher's, valid calls. An episode that was cut off earns
    nothing, and a wrong answer keeps a fifth of its alignment. The teacher is a cache of finished trajectories; no
    teacher model is in memory.
 3. Each reward term is normalised within its group before they are added (GDPO), so that a rare term is still heard.
    Groups in which nothing varies teach nothing: they are counted and dropped before the student's forward.
 4. The loss is averaged over all sampled tokens of the kept groups (DAPO), with a higher upper clip and no KL by
    default. With --beta it is the KL to the student as RL begins, after its cold start.
 5. Rollouts come from a merged copy of the weights. What the trainer's own forward disagrees with is corrected by
    truncated importance sampling, and logged on every step.
 6. A group's prompt, and the text that describes the tools, are computed once, in sampling and in training alike.
 7. A student that never manages a call would see no process reward, so a short supervised cold start comes first.
"""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Callable, Sequence

from torch import Tensor

from lite_mentor import sft
from lite_mentor.batch import pack
from lite_mentor.config import parse
from lite_mentor.errors import UserError, guard_terminal, say
from lite_mentor.evaluate import evaluate
from lite_mentor.log import Stopwatch, peak_memory_bytes, reserved_memory_bytes
from lite_mentor.loss import StepMetrics, backward, batch_loss, old_logprobs
from lite_mentor.optim import Diverged, apply_gradients, blame, learning_rate, make_optimizer, unsound
from lite_mentor.report import write_report
from lite_mentor.reward import score, summarise
from lite_mentor.rollout import roll_out
from lite_mentor.run import Run, prepare
from lite_mentor.statistics import compare
from lite_mentor.types import Scored


def train(run: Run) -> None:
    """The whole run: cold start, RL, and the evaluations around them."""
    c = run.config
    start = run.restore()
    if start is None:
        cold_start(run)
        run.student.save_adapter(run.out / "cold_start")
        run.save(0)
        start = 0
    if start == 0:
        evaluate_suites(run, 0, "cold_start")
    with StopRequest(run) as stop:
        for step in range(start, c.steps):
            try:
                run.log.step(train_step(run, step))
            except Diverged:
                run.guard.passed()  # so that a resumed run has three tries again
                run.save(step)
                raise
            done = step + 1
            evaluated = c.eval_every and done % c.eval_every == 0 and done < c.steps
            if evaluated:
                evaluate_suites(run, done, "step")
            if evaluated or done % c.save_every == 0 or done == c.steps or stop.requested:
                run.save(done)
            if evaluated:
                run.keep_best(done)
            if stop.requested:
                raise KeyboardInterrupt
    run.student.save_adapter(run.out / "adapter")
    evaluate_suites(run, c.steps, "final")
    run.log.note(f"report: {write_report(run.out)}")


def cold_start(run: Run) -> None:
    """Supervised steps on the teacher's records, when the student cannot yet do what RL would reinforce."""
    c = run.config
    if not c.sft_steps:
        return
    seen = support_of(run)
    run.log.note(f"support gate: {seen:.0%} of the untrained student's episodes hold a call that works")
    if seen >= sft.ENOUGH_SUPPORT:
        return
    labels = " and a larger model's soft labels of them" if c.soft_labels else ""
    run.log.note(f"cold start: {c.sft_steps} supervised steps on {c.sft_steps * c.sft_batch} teacher records{labels}")
    chosen = run.examples[: c.sft_steps * c.sft_batch]
    rollouts = sft.teacher_rollouts(run.chat, chosen, run.teacher, c)
    optimizer = make_optimizer(run.student.trainable(), c)
    for metrics in sft.cold_start(run.student, optimizer, rollouts, c, run.guard):
        run.log.step(metrics)
    if c.beta:  # what it has just learned is not to be pulled back
        run.student.keep_reference()
        run.log.note("the KL's reference is the student as this cold start leaves it")


def support_of(run: Run) -> float:
    """The support gate: episodes on a few examples, as RL would sample them; a shorter limit would cut off thoughts."""
    run.refresh_rollouts()
    calling = [example for example in run.examples if run.teacher[example.key].calls]
    rollouts = roll_out(
        run.engine, run.chat, (calling or run.examples)[: sft.GATE_EXAMPLES], group_size=2, limits=run.limits,
        sampling=run.sampling, seed=run.config.seed, step=-1, run_call=run.run_call,
    )  # fmt: skip
    return sft.support(rollouts)


def train_step(run: Run, step: int) -> dict[str, float | None]:
    """One RL step: sample, score against the cached teacher, update. Returns the step's metrics."""
    c, watch = run.config, Stopwatch(run.config.device)
    with watch.stage("rollout"):
        run.refresh_rollouts()
        evictions = run.engine.evictions
        rollouts = roll_out(
            run.engine, run.chat, run.take(step), group_size=c.group_size, limits=run.limits,
            sampling=run.sampling, seed=c.seed, step=step, run_call=watch.timed("tools", run.run_call),
        )  # fmt: skip
    with watch.stage("score"):
        scored, groups = score(run.by_key, rollouts, run.teacher, c)
    with watch.stage("update"):
        reason = unsound(scored)
        if reason:
            run.guard.refused(f"step {step}", scored, reason)
        taught = [] if reason else [s for s in scored if not groups.zero_variance_G[s.rollout.group]]
        learned = update(run, taught, step)
    run.log.rollouts(step, scored, run.by_key, run.chat.decode)
    memory = {
        "memory/peak": peak_memory_bytes(c.device),
        "memory/reserved": reserved_memory_bytes(c.device),
        "memory/cache_evictions": run.engine.evictions - evictions,
    }
    return {"step": step, "phase": "rl", **summarise(scored, groups), **learned, **watch.lap(), **memory}


def update(run: Run, scored: Sequence[Scored], step: int) -> dict[str, float | None]:
    """`updates_per_step` optimizer steps, each on its share of the groups. Without variance anywhere, none."""
    c = run.config
    lr = learning_rate(step, c.steps, peak=c.lr, warmup=c.warmup, schedule=c.schedule)
    parts = by_group(scored, c.updates_per_step)
    shares = [pack([s.rollout for s in part], [s.advantage for s in part], c.micro_tokens) for part in parts]
    # Any update but the first meets a policy that has moved on, so all old logprobs are taken before the first.
    many = len(shares) > 1
    old = [[old_logprobs(run.student, batch, c) if many else None for batch in share] for share in shares]
    metrics = StepMetrics(len(shares))
    norms = []
    for part, share, old_logps in zip(parts, shares, old, strict=True):
        for batch, old_logp_N in zip(share, old_logps, strict=True):
            out = batch_loss(run.student, batch, c, old_logp_N)
            backward(out.loss, c)
            metrics.add(out, batch)
        wrong = metrics.not_finite()
        changed = apply_gradients(run.optimizer, lr=lr, max_norm=c.max_grad_norm, allowed=not wrong)
        norms.append(changed.grad_norm)
        if changed.applied:
            run.guard.passed()
            continue
        if not math.isfinite(changed.grad_norm):
            wrong.append("gradient")
        what = ", ".join(sorted(set(wrong)))
        where = f"step {step} update {len(norms) - 1}" if many else f"step {step}"
        found = blame(part, alone(run), run.student.trainable(), c)
        run.guard.refused(where, part, f"not finite: {what}; {found}")
    return {**metrics.result(), "grad_norm": max(norms, default=None), "lr": lr}


def alone(run: Run) -> Callable[[Scored], Tensor]:
    """The loss of one rollout by itself."""
    c = run.config
    return lambda s: batch_loss(run.student, pack([s.rollout], [s.advantage], c.micro_tokens)[0], c).loss


def by_group(scored: Sequence[Scored], shares: int) -> list[list[Scored]]:
    """Split a step's rollouts into at most `shares` parts of whole groups."""
    groups = sorted({s.rollout.group for s in scored})
    size = -(-len(groups) // shares) or 1
    parts = [set(groups[i : i + size]) for i in range(0, len(groups), size)]
    return [[s for s in scored if s.rollout.group in part] for part in parts]


def evaluate_suites(run: Run, step: int, name: str) -> None:
    """Evaluate every held-out suite, log it, and say what changed since the cold start."""
    run.refresh_rollouts()
    for suite, examples in run.held_out.items():
        result, _ = evaluate(run.engine, run.chat, examples, limits=run.limits, run_call=run.run_call)
        run.log.evaluation(step, name, suite, result)
        before = run.log.earlier_evaluation("cold_start", suite) if name == "final" else None
        difference = compare(before, result) if before else None
        if difference:
            change, low, high = difference
            run.log.note(f"{suite}: {change:+.1%} since the cold start, 95 % interval {low:+.1%} to {high:+.1%}")


class StopRequest:
    """The first Ctrl-C lets the step finish and saves; the second stops at once (the last checkpoint stands)."""

    def __init__(self, run: Run):
        self.run, self.requested = run, False

    def __enter__(self) -> StopRequest:
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, *_: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self.run.log.note("stopping after this step; press Ctrl-C again to stop at once")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 something to put right (said in one sentence), 130 interrupted."""
    folder = None
    guard_terminal()
    try:
        with prepare(parse(argv)) as run:
            folder = run.out
            if not run.config.check:
                train(run)
    except UserError as error:
        say(f"error: {error}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        where = f"; go on with: python train.py --resume {folder}" if folder else ""
        say(f"interrupted{where}", sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
