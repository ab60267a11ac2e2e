"""One flat configuration: every field with a sentence, the presets, the command line, and the checks.

The object that `parse` returns is the object the run uses and the object that `config.json` records.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lite_mentor.errors import UserError, deceives
from lite_mentor.files import check_folder

NEUTRAL = frozenset(
    {
        "out",
        "resume",
        "resume_anyway",
        "track",
        "check",
        "save_every",
        "eval_every",
        "eval_suites",
        "eval_size",
        "sandbox",
    }
)
"""Fields that decide nothing of what is learned."""
ROUNDING = frozenset(
    {
        "steps",
        "backend",
        "gradient_checkpointing",
        "deterministic",
        "rollout_weights",
        "cuda_graphs",
        "micro_tokens",
        "cache_gib",
    }
)
"""Fields that change where a run ends or how its numbers are rounded, but not what it computes."""

Preset = Literal["quick", "tiny", "paper", "modern", "8gb", "12gb", "16gb", "24gb"]


@dataclass(frozen=True)
class Config:
    """Train a small language model to use tools, guided by a cached teacher."""

    preset: Preset = "quick"
    """Where every other default comes from; flags override single fields."""
    out: str = ""
    """Folder of the run; empty: runs/<preset>-<time>."""
    resume: str = ""
    """Continue the run in this folder from its newest sound checkpoint."""
    resume_anyway: bool = False
    """Continue it although it will not go on as it would have: other library versions, threads or GPU, --steps, tools,
    judge or chat template, or lines that are lost."""
    check: bool = False
    """Only prove that the longest sample fits: one update at full length, then stop."""
    seed: int = 0
    """Every random choice of the run follows from it."""
    device: str = "auto"
    """auto, cpu or cuda."""
    backend: Literal["auto", "triton", "torch"] = "auto"
    """Kernels: auto is triton on CUDA and torch on the CPU."""

    student: str = "smollm2-135m"
    """A local folder, a hub id, `smollm2-135m`, or `tiny` (random weights)."""
    date: str = ""
    """The day that a chat template is told which asks for it, such as 2026-12-01; empty: the one on which the run is
    begun, or its soft labels were made."""
    quant: Literal["nf4", "none"] = "none"
    """Base weights in 4-bit NF4 (the GPU presets), or unquantised in the compute dtype."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute dtype; auto takes bf16 where the processor has instructions for products in it."""
    lora_rank: int = 16
    """Rank of the adapters on every linear layer but the head."""
    lora_alpha: int = 32
    """Adapter scale is lora_alpha / lora_rank."""
    rollout_weights: Literal["auto", "merged", "unmerged"] = "auto"
    """Sample from a dense copy with the adapters merged in, or from base and adapters: slower, without the copy's
    memory. auto is merged where the copy takes under two fifths of the GPU's free memory."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Play the decoding steps from CUDA graphs, one launch a step: auto does where Triton's kernels run on a GPU, and
    without where a step cannot be recorded; on makes that an error. Not yet run on a GPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward: less memory, about a third more time."""
    deterministic: bool = True
    """Gradients repeat bit for bit on CUDA too, as they do on a CPU in any case; attention's backward is slower for it.
    Not yet timed on a GPU."""

    task: str = "math"
    """Training tasks: a built-in suite (math, math_varied, gsm_symbolic, bfcl_turns), or a .jsonl or .parquet file."""
    levels: tuple[int, ...] = (1,)
    """Difficulty of the built-in tasks, as the number of calls a solution needs (math_varied has some that need 0)."""
    train_size: int = 2000
    """How many training examples are generated or read."""
    teacher: str = ""
    """Folder of the teacher's cache; empty: the built-in tasks' own solutions, cached at the first run."""
    eval_suites: tuple[str, ...] = ("validation", "test", "ood_tools", "ood_lookup")
    """Held-out suites: `validation` and `test` are splits of the task, the others are named suites."""
    eval_size: int = 100
    """Examples of `validation`; every other suite uses half as many."""

    sft_steps: int = 24
    """Cold start: supervised steps on the teacher's records before RL; 0: none. They are left out when half of the
    untrained student's episodes hold a call that works."""
    sft_batch: int = 16
    """Teacher records in a supervised step."""
    sft_lr: float = 1e-3
    """Peak learning rate of the cold start."""
    soft_labels: str = ""
    """File of `lite_mentor.label`, with a larger model's opinion of the records' tokens: learn from that as well."""
    soft_weight: float = 0.5
    """With soft labels: how much of the cold start's loss they are; the rest is the records' own tokens."""

    steps: int = 18
    """RL steps."""
    prompts_per_step: int = 8
    """Examples in a step."""
    group_size: int = 8
    """Rollouts of each example."""
    temperature: float = 1.0
    """Of training rollouts; evaluation is greedy."""
    top_k: int = 0
    """Sample from the k most likely tokens only; 0 is off. The update's logprobs are over all tokens, and nothing in it
    makes up for those that could not be drawn."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this much probability; 1 is off. The rest as for top_k."""
    max_turns: int = 4
    """Assistant turns in an episode; a call in the last one leaves it unfinished."""
    max_new_tokens: int = 128
    """Tokens after the prompt, over all turns, tool results included."""
    max_result_tokens: int = 256
    """Of a tool's result; the student reads the beginning of a longer one, and how much was cut."""
    max_prompt_tokens: int = 384
    """A longer prompt is an error, not a silent cut."""

    reward: Literal["mentor", "mentor_f1", "mentor_overlap", "no_align", "sparse", "strict", "flex"] = "flex"
    """How an episode is judged against the answer and the teacher's calls."""
    advantage: Literal["grpo", "dr_grpo", "batch", "gdpo"] = "gdpo"
    """How rewards are compared within a group."""
    loss: Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"] = "dapo"
    """The policy-gradient objective and its reduction."""
    clip: tuple[float, float] = (0.2, 0.28)
    """The ratio is clipped to [1 - low, 1 + high]."""
    beta: float = 0.0
    """Weight of the KL to the reference, which is the student as RL begins: after the cold start, or without one with
    its adapters off; 0 skips its forward."""
    kl: Literal["k1", "k2", "k3", "exact"] = "k3"
    """That KL, estimated from the sampled token, or exact: over the whole vocabulary, for one GEMM of the head more.
    k1, k2 and k3 differ in the value that is logged; the gradient is the KL's own for all of them."""
    entropy: float = 0.0
    """Weight of the entropy bonus."""
    tis_cap: float = 2.0
    """Cap of the correction for sampler and trainer computing other logprobs of one token (truncated importance
    sampling); 0 is off."""
    drop_mass: float = 0.0
    """Probability of each token that the head's gradient may leave out, to skip the tiles of the vocabulary that hold
    it; 0 is exact. Triton's kernels only; not yet timed on a GPU."""

    lr: float = 1e-4
    """Peak learning rate of RL."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up."""
    warmup: int = 2
    """RL steps over which the learning rate rises."""
    weight_decay: float = 0.0
    """AdamW's."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm."""
    updates_per_step: int = 1
    """Optimizer steps on one step's rollouts; each takes its share of the groups. Old logprobs are the trainer's own,
    so that the first ratio is exactly 1."""
    cache_gib: float = 0.0
    """Memory for the rollouts' keys and values; 0: for all at full length, or what a GPU has free beside the update."""
    micro_tokens: int = 0
    """Most tokens in one packed row: this decides the memory of an update, and of its result only the rounding. 0: on a
    GPU as many as half of its free memory takes, up to 16,384; on a CPU 1,024; and always one whole rollout."""

    sandbox: Literal["on", "off"] = "on"
    """Tools of yours run without network, your files and your processes where this machine can; off: only limited, and
    to be said again with every --resume."""
    save_every: int = 9
    """Steps between checkpoints."""
    eval_every: int = 0
    """Steps between evaluations during RL, with a checkpoint each; the best on `validation` is kept, and its adapter in
    the folder `best`. 0: no such."""
    track: Literal["none", "tensorboard"] = "none"
    """Also write every number of metrics.jsonl to TensorBoard files in the run's folder (extra `track`)."""

    @property
    def rollouts_per_step(self) -> int:
        """prompts_per_step * group_size."""
        return self.prompts_per_step * self.group_size

    @property
    def longest_rollout(self) -> int:
        """Tokens of a prompt and its rollout at their longest."""
        return self.max_prompt_tokens + self.max_new_tokens

    @property
    def kernel_backend(self) -> str | None:
        """What the kernels call it when they are to choose for themselves: None."""
        return None if self.backend == "auto" else self.backend

    def asdict(self) -> dict:
        """Every field, as JSON can hold it."""
        return dataclasses.asdict(self)


_PAPER = dict(
    student="Qwen/Qwen3-1.7B",
    quant="nf4",
    lora_rank=32,
    lora_alpha=64,
    gradient_checkpointing=True,
    levels=(1, 2, 3, 4, 5, 6),
    sft_steps=0,
    prompts_per_step=32,
    updates_per_step=4,
    group_size=10,
    max_turns=5,
    max_new_tokens=8192,
    max_prompt_tokens=1536,
    temperature=0.6,
    top_k=20,
    top_p=0.99,
    reward="mentor",
    advantage="grpo",
    loss="dapo",
    clip=(0.2, 0.2),
    beta=0.001,
    kl="k3",  # theirs differentiates k3 as it stands, which is the gradient of KL(reference || student); ours does not
    entropy=0.001,
    lr=2e-5,
    warmup=0,
    weight_decay=0.01,
    steps=125,
    save_every=10,
    eval_every=10,
)
_MODERN = dict(
    task="math_varied",
    student="Qwen/Qwen3-1.7B",
    quant="nf4",
    lora_rank=32,
    lora_alpha=64,
    gradient_checkpointing=True,
    levels=(1, 2, 3, 4, 5, 6),
    sft_steps=20,
    sft_lr=2e-4,
    prompts_per_step=16,
    group_size=8,
    max_turns=8,
    max_new_tokens=2048,
    max_prompt_tokens=1536,
    reward="flex",
    advantage="gdpo",
    loss="dapo",
    beta=0.0,
    lr=5e-5,
    warmup=5,
    steps=200,
    save_every=20,
    eval_every=50,
)

PRESETS: dict[str, Config] = {
    "quick": Config(),
    "tiny": Config(
        preset="tiny", student="tiny", quant="none", dtype="fp32", task="tiny", levels=(1,), lora_rank=64,
        lora_alpha=64, eval_suites=("validation", "test", "tiny_ood"), sft_steps=75, sft_batch=32, sft_lr=5e-3,
        steps=28, prompts_per_step=32, max_turns=3, max_new_tokens=96, max_prompt_tokens=256, lr=5e-5,
        micro_tokens=8192, save_every=14,
    ),
    "paper": Config(preset="paper", **_PAPER),
    "modern": Config(preset="modern", **_MODERN),
    "8gb": Config(preset="8gb", **_MODERN | dict(student="Qwen/Qwen3-0.6B", max_new_tokens=1024)),
    "12gb": Config(preset="12gb", **_MODERN | dict(max_new_tokens=1024)),
    "16gb": Config(preset="16gb", **_MODERN),
    "24gb": Config(preset="24gb", **_MODERN | dict(student="Qwen/Qwen3-4B")),
}  # fmt: skip


def parse(argv: Sequence[str] | None = None) -> Config:
    """The command line -> a checked Config. Unknown flags end the program with the nearest flag's name."""
    argv = list(sys.argv[1:] if argv is None else argv)
    resume, name = _value(argv, "--resume"), _value(argv, "--preset") or "quick"
    if name not in PRESETS:
        raise UserError(f"--preset {name!r}: there is no such preset; choose one of {', '.join(PRESETS)}.")
    # A resumed run goes on under the settings that it wrote down, so that none has to be typed again.
    default = PRESETS[name]
    if resume:
        check_folder(resume)
        default = load(os.path.join(resume, "config.json"))
        # Of one command, not of the run. And a folder may come from a stranger, whose word that tools need no sandbox
        # counts for nothing.
        default = dataclasses.replace(default, check=False, resume_anyway=False, sandbox="on")
        if _value(argv, "--out"):
            raise UserError("--resume goes on in the run's own folder; leave --out away.")
    import tyro  # here, so that what only reads settings, as the tests of the engine, does without it

    config = tyro.cli(Config, args=argv, default=default, prog="train.py")
    check(config)
    return config


def _value(argv: Sequence[str], flag: str) -> str:
    """What follows the flag on the command line, where it stands last; "" when it does not."""
    value = ""
    for word, following in zip(argv, [*argv, ""][1:], strict=True):
        if word == flag or word.startswith(flag + "="):
            value = following if word == flag else word.split("=", 1)[1]
    return value


def load(path: str) -> Config:
    """Read back a run's config.json. Raises UserError when it does not hold exactly Config's fields."""
    if not os.path.exists(path):
        raise UserError(f"{os.path.dirname(path)} holds no run to resume: there is no {os.path.basename(path)} in it.")
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
        kinds = get_type_hints(Config)
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
        for name in {**kinds, **values}:
            if name not in kinds:
                raise ValueError(f"there is no setting {name[:40]!r}")
            if name not in values or not _fits(values[name], kinds[name]):
                raise ValueError(f"{name} is {repr(data[name])[:40] if name in data else 'missing'}")
        return Config(**values)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not the configuration of a run of this version: {error}.") from error


def is_config(path: str | os.PathLike[str]) -> bool:
    """Is this file the config.json of a run, of whatever version?"""
    try:
        with open(path, encoding="utf-8") as file:
            return {"preset", "student", "task", "teacher"} <= set(json.load(file))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def _fits(value: Any, kind: Any) -> bool:
    """Is it a value that a field of this type may have?"""
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return value in inner
    if get_origin(kind) is tuple:
        kinds = inner[:1] * len(value) if isinstance(value, tuple) and inner[-1] is ... else inner
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if kind is str:  # --help shows the settings of the run that is resumed
        return type(value) is str and not deceives(value)
    return type(value) is kind or (kind is float and type(value) is int)


def check(config: Config) -> None:
    """Raise UserError for the first setting that cannot work, naming it and what to change."""
    positive = ("steps", "prompts_per_step", "group_size", "max_turns", "max_new_tokens",
                "lora_rank", "lora_alpha", "train_size", "eval_size", "sft_batch", "updates_per_step",
                "max_prompt_tokens", "max_result_tokens", "save_every", "temperature", "lr", "sft_lr",
                "max_grad_norm")  # fmt: skip
    for name in positive:
        if not getattr(config, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(config, name)}; it must be greater than 0.")
    for name in (
        "seed",
        "sft_steps",
        "warmup",
        "weight_decay",
        "beta",
        "tis_cap",
        "eval_every",
        "micro_tokens",
        "clip",
    ):
        values = getattr(config, name) if name == "clip" else (getattr(config, name),)
        if not all(value >= 0 for value in values):
            raise UserError(f"--{name.replace('_', '-')} is {values[0]}; it must not be negative.")
    for name, value in config.asdict().items():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, float) and not math.isfinite(part):
                raise UserError(f"--{name.replace('_', '-')} is {part}; it must be finite.")
    if config.seed >= 2**63:
        raise UserError(f"--seed is {config.seed}; it must be below 2 ** 63.")
    if config.group_size < 2:
        raise UserError("--group-size is 1, so no rollout has another to be compared with; use 2 or more.")
    if config.clip[0] > 1:
        raise UserError(f"--clip {config.clip[0]} {config.clip[1]}: a ratio cannot fall below 0, so low is 1 at most.")
    if config.loss == "gspo" and config.clip[1] > 0.01:
        raise UserError(
            f"--loss gspo clips the mean ratio of a sequence, which --clip {config.clip[0]} {config.clip[1]} never "
            "reaches; give --clip 0.0003 0.0004."
        )
    if not 0 <= config.soft_weight <= 1:
        raise UserError(f"--soft-weight is {config.soft_weight}; it is a share, from 0 to 1.")
    if not 0 <= config.drop_mass < 1:
        raise UserError(f"--drop-mass is {config.drop_mass}; it is a probability, from 0 to below 1: try 0.001.")
    if config.drop_mass and config.kl == "exact":
        raise UserError("--drop-mass bounds no error with --kl exact; use k1, k2 or k3, or leave it out.")
    if config.cache_gib < 0:
        raise UserError(f"--cache-gib is {config.cache_gib}; give the GiB that the cache may take, or 0.")
    if not 0 < config.top_p <= 1 or config.top_k < 0:
        raise UserError(f"--top-p {config.top_p} --top-k {config.top_k}: top-p lies in (0, 1], top-k is 0 or more.")
    if config.prompts_per_step % config.updates_per_step:
        raise UserError(
            f"--updates-per-step {config.updates_per_step} does not divide "
            f"--prompts-per-step {config.prompts_per_step}; make it a divisor."
        )
    if 0 < config.micro_tokens < config.longest_rollout:
        raise UserError(
            f"--micro-tokens {config.micro_tokens} cannot hold one rollout of up to {config.longest_rollout} tokens "
            f"(--max-prompt-tokens + --max-new-tokens); raise it to {config.longest_rollout}, leave it out, or shorten "
            "the rollouts."
        )
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", config.device):
        raise UserError(f"--device {config.device!r}: use auto, cpu or cuda.")
    if config.date and not is_date(config.date):
        raise UserError(f"--date {config.date!r}: write a day as 2026-12-01.")
    for name, value in config.asdict().items():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, str) and deceives(part):
                raise UserError(f"--{name.replace('_', '-')} {part} holds a character that cannot be shown; rename it.")
    if not config.levels:
        raise UserError("--levels is empty; name at least one level, such as --levels 1 2.")


def is_date(text: object) -> bool:
    """Is it a day, as 2026-12-01?"""
    if not isinstance(text, str):
        return False
    try:
        return str(datetime.date.fromisoformat(text)) == text
    except ValueError:
        return False
