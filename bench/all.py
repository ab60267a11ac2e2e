"""Everything that says how this machine does, by one command that keeps to its time: `python -m bench all --out DIR`.

Three groups of stages, in order of worth; each is a part that can be run by itself, as `--parts works --seconds 170`:

    works     does it work: the tests that need a GPU, facts of the machine, small real runs of every kind   (170 s)
    fast      how fast: the head and its peers, sampling, attention, a layer, a decoding step                (150 s)
    learns    does it learn, and fit: rollouts, the default preset to its end, each preset on its card       (340 s)

Within `works` lanes of stages run side by side; where time is measured nothing runs beside it. bench/stages.py has how
results are written. What a stage needs and the machine lacks costs that stage alone. Without a GPU, what a CPU can run
stands in the same groups; with --small all of it is tiny, and shows only that it runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from bench.stages import Programme, Stage
from lite_mentor.errors import UserError

GROUPS = ("works", "fast", "learns")
ROOT = Path(__file__).resolve().parent.parent
TRAINS = ("tyro", "jsonschema", "bm25s")
"""Packages without which train.py does not start."""
CARDS = ("8gb", "12gb", "16gb", "24gb")
"""Presets that are named after a card."""
FIRST_TESTS = (
    "no_sync", "exactness", "varlen", "gather_rows", "linear_kernels", "tile_statistics", "active_tiles",
    "head_backends", "linear_kl", "linear_topk", "teachers_loss", "paged_attention", "sample", "policy_loss",
    "group_advantage", "loss",
)  # fmt: skip
"""Test files that are run before the others: what everything stands on."""

Lanes = dict[str, list[list[Stage]]]
"""By group."""


def bench(name: str, *flags: str) -> tuple[str, ...]:
    """The command of a bench."""
    return (sys.executable, "-m", "bench", name, *flags)


def train(*flags: str) -> tuple[str, ...]:
    """The command of a run."""
    return (sys.executable, str(ROOT / "train.py"), *flags)


def gpu_tests(work: Path) -> tuple[str, ...]:
    """pytest on the files that have GPU tests, in order of worth; several processes and a limit for each test where the
    plugins for it are installed."""
    files = [p for p in sorted((ROOT / "tests").glob("test_*.py")) if _has_gpu_tests(p.read_text(encoding="utf-8"))]
    rank = {f"test_{name}.py": i for i, name in enumerate(FIRST_TESTS)}
    files.sort(key=lambda path: rank.get(path.name, len(rank)))
    # -v: one that is stopped says how far it came. A file whose packages are missing does not stop the others.
    flags = ["-v", "-m", "gpu", "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    flags += ["-o", "addopts=--strict-markers", f"--junitxml={work / 'gpu-tests.xml'}"]
    if importlib.util.find_spec("xdist"):
        flags += ["-n", str(max(1, min(10, (os.cpu_count() or 2) - 4))), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout"):
        flags += ["--timeout", "60"]
    return (sys.executable, "-m", "pytest", *flags, *map(str, files))


def _has_gpu_tests(source: str) -> bool:
    return "kernel_device" in source or "mark.gpu" in source


def on_a_gpu(work: Path) -> Lanes:
    """The plan for a GPU. Limits are what a stage may cost at worst; the groups' seconds above are what they need."""

    def tiny(name: str, *flags: str, limit: float = 45) -> Stage:
        sizes = ("--steps", "3", "--sft-steps", "30", "--eval-size", "8", "--eval-suites", "validation")
        command = train("--preset", "tiny", *sizes, *flags, "--out", str(work / name))
        return Stage(name, command, limit, TRAINS, show=3)

    def qwen(name: str, *flags: str) -> Stage:
        sizes = ("--student", str(work / "student"), "--task", "tiny", "--levels", "1", "--sft-steps", "2", "--steps")
        sizes += ("2", "--prompts-per-step", "8", "--max-prompt-tokens", "256", "--max-new-tokens", "96")
        sizes += ("--micro-tokens", "4096", "--eval-size", "8", "--eval-suites", "validation", "--cache-gib", "2")
        command = train("--preset", "8gb", *sizes, *flags, "--out", str(work / name))
        return Stage(name, command, 45, (*TRAINS, *(("bitsandbytes",) if "nf4" in flags else ())), show=3)

    def head(name: str, limit: float, *flags: str) -> Stage:
        command = bench("kernels", *flags, "--repeats", "5", "--out", str(work / name))
        return Stage(name, command, limit, ("tyro",), show=24)

    few = ("--prompts", "2", "--group", "2", "--new", "8", "--rounds", "1")
    large = ("--student", "qwen3-0.6b", "--dtype", "bf16", "--rounds", "1", "--batches", "64", "8")
    choose = ("--choose", "--shapes", "qwen3-0.6b", "smollm2", "qwen3-1.7b", "--rows", "8192")
    peers, half = ("--operators", "head", "--modes", "train", "score"), ("--rows", "8192", "1024")
    caps = [Stage(f"caps-{p}", bench("caps", "--preset", p), 75, (*TRAINS, "bitsandbytes"), show=1) for p in CARDS]
    works = [
        [Stage("gpu-tests", gpu_tests(work), 160, ("pytest",), show=20)],
        [
            Stage("facts", bench("facts"), 60, show=9),
            tiny("tiny"),
            tiny("tiny-bf16", "--dtype", "bf16"),
            Stage(
                "student",
                bench("random-student", "--shape", "qwen3-0.6b", "--layers", "4", "--out", str(work / "student")),
                30,
            ),
            qwen("qwen", "--quant", "none"),
            qwen("qwen-nf4", "--quant", "nf4"),
            qwen("qwen-nf4-unmerged", "--quant", "nf4", "--rollout-weights", "unmerged"),
            tiny("exact-kl", "--kl", "exact", "--beta", "0.1", "--entropy", "0.01", "--updates-per-step", "2"),
            tiny("gspo", "--loss", "gspo", "--clip", "0.0003", "0.0004", "--drop-mass", "0.001", "--top-k", "20"),
            tiny("eager", "--cuda-graphs", "off"),
        ],
        [
            Stage("rollout-tiny", bench("rollout", "--student", "tiny", *few), 45, show=6),
            Stage("rollout-tiny-bf16", bench("rollout", "--student", "tiny", *few, "--dtype", "bf16"), 45, show=6),
            Stage(
                "kernels-tiny", bench("kernels", "--shapes", "tiny", "--rows", "64", "--repeats", "2"), 60, ("tyro",)
            ),
        ],
    ]
    fast = [
        head("head-choose", 60, *choose),
        Stage("micro", bench("micro"), 75, show=24),
        head("head-peers", 60, *peers, "--shapes", "qwen3-0.6b", *half),
        head("head-peers-smollm2", 30, *peers, "--shapes", "smollm2", "--rows", "2048"),
        head("head-peers-1.7b", 30, *peers, "--shapes", "qwen3-1.7b", "--rows", "8192"),
        head("small-kernels", 20, "--operators", "policy", "advantage"),
    ]
    learns = [
        Stage("rollout", bench("rollout", *large), 60, show=12),
        Stage("quick", train("--out", str(work / "quick")), 150, TRAINS, show=24),
        *caps,
        Stage("rollout-eager", bench("rollout", *large, "--graphs", "off"), 60, show=12),
        Stage(
            "varied",
            train("--task", "math_varied", "--levels", "0", "1", "--sft-steps", "60", "--out", str(work / "varied")),
            150, TRAINS, show=24,
        ),
    ]  # fmt: skip
    return {"works": works, "fast": [fast], "learns": [learns]}


def on_a_cpu(work: Path, *, small: bool) -> Lanes:
    """What a CPU can run of it."""
    facts, sizes, parts = (), ("--shapes", "smollm2", "--rows", "512", "2048"), ()
    step, rollout = ("--preset", "tiny", "--steps", "3"), ()
    if small:
        facts, parts = ("--only", "versions", "division", "attention"), ("--only", "sample", "paged")
        sizes = ("--operators", "head", "--shapes", "tiny", "--rows", "64", "--repeats", "2")
        step = ("--preset", "tiny", "--steps", "1", "--sft-steps", "1", "--prompts-per-step", "2", "--group-size", "2")
        step += ("--train-size", "120")
        rollout = ("--student", "tiny", "--prompts", "1", "--group", "2", "--turns", "1", "--prompt", "32")
        rollout += ("--new", "4", "--rounds", "1")
    kernels = bench("kernels", *sizes, "--out", str(work / "kernels"))
    return {
        "works": [[Stage("facts", bench("facts", *facts), 90, show=9)]],
        "fast": [
            [Stage("kernels", kernels, 130, ("tyro",), show=9), Stage("micro", bench("micro", *parts), 60, show=9)]
        ],
        "learns": [
            [
                Stage("step", bench("step", *step), 60, TRAINS, show=8),
                Stage("rollout", bench("rollout", *rollout), 90, show=9),
            ]
        ],
    }


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(prog="python -m bench all")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results; must not hold any yet")
    parser.add_argument("--seconds", type=float, default=660, help="the most that all of it may take")
    parser.add_argument("--parts", nargs="+", default=list(GROUPS), help=f"{', '.join(GROUPS)}, or names of stages")
    parser.add_argument("--small", action="store_true", help="tiny sizes on the CPU: to see that everything runs")
    return parser.parse_args(argv)


def chosen(lanes: Lanes, parts: list[str]) -> Lanes:
    """The groups and the single stages that are named; UserError for a name that stands for nothing."""
    stages = {stage.name for group in lanes.values() for lane in group for stage in lane}
    unknown = [part for part in parts if part not in lanes and part not in stages]
    if unknown:
        raise UserError(f"--parts {' '.join(unknown)}: here are {' '.join(GROUPS)}, and {' '.join(sorted(stages))}.")
    return {
        name: [[s for s in lane if name in parts or s.name in parts] for lane in group] for name, group in lanes.items()
    }


def main(argv: list[str]) -> None:
    """Run the groups one after another; UserError names the stages that did not end well."""
    begin = time.monotonic()
    options = parse(argv)
    if options.out.exists() and any(options.out.iterdir()):
        raise UserError(f"--out {options.out} already holds files; name a new folder.")
    import torch  # here, since its seconds count as well

    from bench.measure import machine

    cuda = torch.cuda.is_available() and not options.small
    with tempfile.TemporaryDirectory(prefix="lite-mentor-bench-") as folder:
        work = Path(folder)
        lanes = chosen(on_a_gpu(work) if cuda else on_a_cpu(work, small=options.small), options.parts)
        about = {"command": " ".join(["python -m bench all", *argv]), **machine("cuda" if cuda else "cpu")}
        programme = Programme(options.out, work, about, begin + options.seconds)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that no stage outlives this process
        for group in lanes.values():
            programme.run(group)
    failed = [outcome.stage for outcome in programme.outcomes if outcome.failed]
    if failed:
        raise UserError(f"{', '.join(failed)} did not end well; see {options.out}.")
