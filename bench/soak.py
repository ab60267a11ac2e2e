"""What a run survives: `python -m bench soak --kills 50 --faults 9999 --flips 1000 --steps 2000 --out DIR` (any of it).

    kills    a tiny run, killed by SIGKILL at random moments and resumed until it ends, is the run that nobody killed
    faults   so does one whose disk fails or fills up, or that is killed, at any write, fsync, rename or deletion
    flips    a checkpoint, a run's lines and a teacher's cache are refused with one bit flipped, one file cut or gone
    steps    so many RL steps do not make memory, open files, processes, threads or pages in use grow

Everything that was counted lands in DIR/soak.json, the tables in DIR/soak.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from bench import faults, flips, growth, kills
from bench.measure import dirty, machine
from lite_mentor.errors import UserError


@dataclass(frozen=True)
class Options:
    """Attack runs, files and patience, and count what held."""

    out: Path
    """Folder for the results; must not hold any yet."""
    kills: int = 0
    """How often a trainer is killed."""
    faults: int = 0
    """How many faults are tried at most, of all that can come at the calls by which a tiny run changes its folder."""
    flips: int = 0
    """How often each of the three is flipped and cut."""
    steps: int = 0
    """RL steps of the long run."""
    rl_steps: int = 6
    """RL steps of the run that is killed, or whose files are flipped."""
    save_every: int = 2
    """Steps between its checkpoints; an evaluation stands between them too."""
    seed: int = 0
    """Of everything random here."""


def main(argv: list[str]) -> None:
    """Run what was asked for, print the tables, and fail when anything did not hold."""
    options = tyro.cli(Options, args=argv, prog="python -m bench soak")
    if options.out.exists() and any(options.out.iterdir()):
        raise UserError(f"--out {options.out} already holds files; name a new folder.")
    if not (options.kills or options.faults or options.flips or options.steps):
        raise UserError("There is nothing to do: give --kills, --faults, --flips or --steps.")
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict = {"command": " ".join(["python -m bench soak", *argv]), **machine("cpu"), "dirty": dirty()}
    tables, broken = [], []
    flags = ["--steps", str(options.rl_steps), "--save-every", str(options.save_every)]
    flags += ["--eval-every", str(options.save_every + 1)]
    if options.kills:
        found["kills"] = kills.soak(options.out, kills=options.kills, seed=options.seed, flags=flags)
        tables.append(kills_table(found["kills"]))
        broken += [f"{name} differs in {', '.join(what)}" for name, what in found["kills"]["differences"].items()]
        broken += ["a killed run left workers behind"] if found["kills"]["orphans"] else []
    if options.faults:
        found["faults"] = faults.soak(options.out, most=options.faults)
        tables.append(faults.table(found["faults"]))
        failed = sum(bool(outcome["wrong"]) for outcome in found["faults"]["outcomes"])
        broken += [f"{failed} faults did not end well"] if failed else []
        broken += found["faults"]["differences_without_a_fault"]
    if options.flips:
        found["flips"] = flips.soak(options.out, tries=options.flips, seed=options.seed, flags=flags)
        tables.append(flips_table(found["flips"]))
        broken += [f"{r['what']} {r['damage']}: {r['missed'][0]}" for r in found["flips"] if r["missed"]]
    if options.steps:
        found["growth"] = growth.soak(options.out / "long", steps=options.steps)
        tables.append(growth_table(found["growth"]))
        broken += [] if found["growth"]["held"] else ["something grew"]
    (options.out / "soak.json").write_text(json.dumps(found, indent=1))
    (options.out / "soak.md").write_text("\n\n".join(tables) + "\n")
    print("\n\n".join(tables))
    if broken:
        raise UserError(f"{'; '.join(broken)}; see {options.out}.")


def kills_table(found: dict) -> str:
    """Kills by where they fell, and how the killed runs ended."""
    run = found["uninterrupted"]
    lines = ["| kills by SIGKILL | |", "|---|---|"]
    lines += [f"| {place} | {count} |" for place, count in sorted(found["kills_by_place"].items())]
    lines += [f"| together | {found['kills']} |"]
    lines += [f"| runs that they fell into | {found['runs_killed']} |"]
    lines += [f"| of these ended exactly as the one that nobody killed | {found['ends_exact']} |"]
    lines += [f"| workers that outlived their trainer | {found['orphans']} |"]
    learned = f"{run['rl_steps_that_learned']} of {run['rl_steps']} RL steps had something to learn from"
    return (
        "\n".join(lines)
        + f"\n\nThe run: {run['supervised_steps']} supervised steps, then RL; {learned}; "
        + (f"{run['seconds']} s when nobody kills it.")
    )


def flips_table(rows: list[dict]) -> str:
    """Each kind of damage to each kind of folder."""
    lines = ["| damaged | how | files | tried | found | file named |", "|---|---|---|---|---|---|"]
    for r in rows:
        lines.append(f"| {r['what']} | {r['damage']} | {r['files']} | {r['tried']} | {r['found']} | {r['named']} |")
    return "\n".join(lines)


def growth_table(found: dict) -> str:
    """Each quantity after the warm-up and at the end."""
    first, last = found["early"]["step"] + 1, found["late"]["step"] + 1
    lines = [f"| | after {first} steps | after {last} steps | growth (of medians) | allowed |", "|---|---|---|---|---|"]
    for name, most in found["allowed"].items():
        figures = [found["early"][name], found["late"][name], found["growth"][name], most]
        if name == "resident_bytes":
            figures = [f"{figure / 2**20:.1f} MiB" for figure in figures]
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(map(str, figures)) + " |")
    return "\n".join(lines) + f"\n\n{found['steps']} RL steps in {found['seconds']} s."
