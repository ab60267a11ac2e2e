"""Checkpoints that are whole or absent: hashed, and written by one rename.

    <run>/checkpoints/step-000123/
        <group>.safetensors   one file for each group of tensors: adapter, optimizer, rng, ...
        state.json            everything that is not a tensor
        MANIFEST.json         size and sha256 of each file, and of itself; written last

Nothing is pickled: a checkpoint is bytes to be checked, never code to be run.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import random
import re
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lite_mentor.errors import UserError
from lite_mentor.files import check_folder, open_file, remove, replace_folder

FORMAT = 3
THREADS, INSTRUCTIONS, GPU = "the number of torch's threads", "the processor's instruction set", "the GPU"
"""What of `versions` bears on a run on one kind of device only."""
_STEP = re.compile(r"step-(\d{6,})")
_FILE = re.compile(r"[a-z0-9_]+\.(safetensors|json)")


@dataclass(frozen=True)
class Checkpoint:
    """What `save` was given, bit for bit."""

    path: Path
    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]
    versions: Mapping[str, str | None]
    """Of what computes: see `versions`."""


class _Unsound(Exception):
    """Why one checkpoint is refused."""


def save(
    root: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
    spare: int | None = None,
) -> Path:
    """Write `checkpoints/step-<step>` of the run `root`; up to this step, keep the newest `keep` and step `spare`.

    One rename makes the checkpoint appear: a kill at any moment leaves the older ones as they were. A step names ONE
    state: a sound checkpoint of this step with the same tensors stays. Raises UserError when it cannot be written.
    """
    files = {f"{group}.safetensors": safetensors.torch.save(_owned(part)) for group, part in tensors.items()}
    files["state.json"] = json.dumps(state, allow_nan=False).encode()
    manifest = _manifest(step, files)
    files["MANIFEST.json"] = _canonical(manifest)
    folder = Path(root) / "checkpoints"
    target = folder / f"step-{step:06d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (target.exists() and _same_tensors(target, manifest)):
            replace_folder(target, files)  # what is there is damaged, or of a history that was abandoned
    except OSError as error:
        raise UserError(
            f"The checkpoint of step {step} could not be written to {folder} ({error.strerror or error}); "
            f"the earlier ones are intact: free space or rights there, then continue with --resume {root}."
        ) from error
    tidy(root, step, keep=keep, spare=spare)
    return target


def load(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of the run `root` whose every byte verifies, and a sentence for each newer one refused.

    (None, []) when the run has none. Raises UserError when it has some but none is sound.
    """
    refused: list[str] = []
    try:
        steps = _steps(root)
    except OSError as error:
        raise UserError(
            f"The folder {Path(root) / 'checkpoints'} cannot be read ({error.strerror or error}); make rights there."
        ) from error
    for _, path in steps:
        try:
            return _read(path), refused
        except _Unsound as error:
            refused.append(f"{path} was refused: {error}.")
    if refused:
        raise UserError(f"No checkpoint of {root} is sound, so it cannot be resumed: {' '.join(refused)}")
    return None, []


def tidy(root: Path, step: int, *, keep: int, spare: int | None = None) -> None:
    """Remove checkpoints as `save` says, and what kills left of the run `root`. Only for the holder of its lock."""
    folder = Path(root) / "checkpoints"
    try:
        for number, old in [(n, path) for n, path in _steps(root) if n <= step][max(1, keep) :]:
            if number != spare:
                old.rename(folder / f".tmp-pruned-{old.name}")  # so that no half-deleted folder is ever named step-*
    except OSError as error:
        raise UserError(
            f"The older checkpoints in {folder} cannot be removed ({error.strerror or error}); make rights there, then "
            f"continue with --resume {root}."
        ) from error
    for place in (Path(root), folder):
        for stale in place.glob(".tmp-*"):
            remove(stale)


def versions() -> dict[str, str | None]:
    """What computes here: with another version of a package a run does not go on bit for bit. None: not there.

    With the same ones it is meant to. That is tested on a CPU, in processes of one machine; on CUDA, where it takes
    `Config.deterministic`, it was not yet run.
    """
    found: dict[str, str | None] = {"python": platform.python_version()}
    found[THREADS], found[INSTRUCTIONS] = str(torch.get_num_threads()), torch.backends.cpu.get_cpu_capability()
    found[GPU] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    for package in ("torch", "transformers", "peft", "bitsandbytes", "safetensors"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _read(path: Path) -> Checkpoint:
    """Verify, then parse the very bytes that were verified."""
    manifest = _read_manifest(path)
    contents = {}
    for name, entry in manifest["files"].items():
        content = _bytes(path / name, [entry["size"]])
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise _Unsound(f"{name} is not what was written (its sha256 differs)")
        contents[name] = content
    try:
        tensors = {
            name.removesuffix(".safetensors"): safetensors.torch.load(content)
            for name, content in contents.items()
            if name.endswith(".safetensors")
        }
        state = json.loads(contents["state.json"])
        if not isinstance(state, dict):
            raise ValueError("state.json is not an object")
    except (safetensors.SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise _Unsound(f"its files are hashed but cannot be parsed ({str(error)!r})") from error
    return Checkpoint(path, manifest["step"], tensors, state, manifest["versions"])


def _read_manifest(path: Path) -> dict:
    raw = _bytes(path / "MANIFEST.json", range(1 << 20))
    try:
        manifest = json.loads(raw)
        # Equal to its own canonical form, and hashed over the rest: no flipped byte of it goes unnoticed.
        if raw != _canonical(manifest) or manifest["sha256"] != _digest(manifest):
            raise _Unsound("MANIFEST.json is not what was written (its sha256 differs)")
        if manifest["format"] != FORMAT:
            raise _Unsound(f"its format is {manifest['format']!r} and this version reads {FORMAT}")
        if f"step-{manifest['step']:06d}" != path.name:
            raise _Unsound(f"MANIFEST.json is that of step {manifest['step']}")
        # These are shown to the user, who has a terminal.
        versions = manifest["versions"]
        shown = [*versions, *(v for v in versions.values() if v is not None)]
        if not all(isinstance(text, str) and text.isprintable() for text in shown):
            raise _Unsound("MANIFEST.json does not say under which versions it was written")
        if not all(
            _FILE.fullmatch(name) and isinstance(entry, dict) and {*entry} == {"size", "sha256"}
            for name, entry in manifest["files"].items()
        ):
            raise _Unsound("MANIFEST.json names files that no checkpoint has")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _Unsound("MANIFEST.json is not a manifest") from error
    return manifest


def _manifest(step: int, files: Mapping[str, bytes]) -> dict:
    manifest = {
        "format": FORMAT,
        "step": step,
        "versions": versions(),
        "files": {
            name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        },
    }
    return {**manifest, "sha256": _digest(manifest)}


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical({k: v for k, v in manifest.items() if k != "sha256"})).hexdigest()


def _canonical(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()


def _same_tensors(path: Path, manifest: Mapping[str, Any]) -> bool:
    """Is the checkpoint at `path` sound, and are its tensors the ones of `manifest`?"""
    try:
        _read(path)
    except _Unsound:
        return False
    mine, its = manifest["files"], _read_manifest(path)["files"]
    return {n: f for n, f in mine.items() if n != "state.json"} == {n: f for n, f in its.items() if n != "state.json"}


def _steps(root: Path) -> list[tuple[int, Path]]:
    """The checkpoint folders of a run, newest first."""
    folder = Path(root) / "checkpoints"
    found = [(_STEP.fullmatch(p.name), p) for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def _owned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and sharing no memory, as safetensors requires."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _bytes(path: Path, sizes: Container[int]) -> bytes:
    """The file's bytes; of a file that has another number of them, which may be a vast one, none is read."""
    try:
        with open_file(path, follow=False) as file:
            if os.fstat(file.fileno()).st_size not in sizes:
                raise _Unsound(f"{path.name} is not what was written (its size differs)")
            return file.read()
    except OSError as error:
        raise _Unsound(f"{path.name} cannot be read ({error.strerror or error})") from error


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict]:
    """The state of a torch optimizer that keeps tensors of its parameters' shapes, and scalars, as (tensors, JSON)."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tensors: dict[str, Tensor] = {}
    entries: dict[str, dict] = {}
    for index, parameter in enumerate(parameters):
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{index}.{key}"] = value
            # Unless it is fused, AdamW keeps its counter on the CPU beside CUDA moments.
            entries[f"{index}.{key}"] = {"with_parameter": value.device == parameter.device}
    shapes = [list(p.shape) for p in parameters]
    return tensors, {"entries": entries, "groups": _groups(optimizer), "shapes": shapes}


def _groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The settings of its groups, as JSON has them."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return json.loads(json.dumps(groups, allow_nan=False))


def _kind(value: Any) -> Any:
    """Of a value of JSON, what another must have in common with it to take its place."""
    if isinstance(value, dict):
        return {key: _kind(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_kind(part) for part in value]
    return float if type(value) is int else type(value)


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Put back what `pack_optimizer` took. Unlike `load_state_dict`, no dtype is changed.

    Raises UserError when the parameters are not those the state belongs to, and ValueError when it is no such state.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if [list(p.shape) for p in parameters] != state["shapes"] or len(state["groups"]) != len(optimizer.param_groups):
        raise UserError(
            "The checkpoint's optimizer belongs to an adapter of another shape; resume with the student and the "
            "--lora-rank of the run's config.json."
        )
    if _kind(state["groups"]) != _kind(_groups(optimizer)):
        raise ValueError("the optimizer's settings are not such as it has")
    optimizer.state.clear()
    for name, entry in state["entries"].items():
        index, key = name.split(".", 1)
        parameter, tensor = parameters[int(index)], tensors[name]
        if tensor.shape not in (parameter.shape, ()):
            raise ValueError(f"the optimizer's {name} has another shape than its parameter")
        device = parameter.device if entry["with_parameter"] else "cpu"
        optimizer.state[parameter][key] = tensor.to(device, copy=True)
    for group, saved in zip(optimizer.param_groups, state["groups"], strict=True):
        # JSON has no tuples; torch compares betas by value, but a tuple stays a tuple.
        group.update({k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in saved.items()})


def rng_state() -> tuple[dict[str, Tensor], dict]:
    """Every global random generator of this process: torch's on the CPU and on the current GPU, Python's, NumPy's."""
    tensors = {"torch_cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["torch_cuda"] = torch.cuda.get_rng_state()
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return tensors, {
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
    }


def restore_rng(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Put every generator back. Raises UserError when the checkpoint's GPU generator has no GPU here."""
    if "torch_cuda" in tensors and not torch.cuda.is_available():
        raise UserError("The checkpoint was written on a GPU, and none is visible here; resume it where one is.")
    torch.set_rng_state(tensors["torch_cpu"])
    if "torch_cuda" in tensors:
        torch.cuda.set_rng_state(tensors["torch_cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """Hold the run's folder for this process. Raises UserError, naming the holder's pid, when another process has it.

    The kernel drops the lock when the process dies, however it dies; the file `.lock` stays and means nothing alone.
    """
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        check_folder(out)
        file = open_file(out / ".lock", "a+b", follow=False)
    except OSError as error:
        raise UserError(f"The run's folder {out} cannot be used ({error.strerror}); choose another --out.") from error
    with file:
        try:
            _lock_file(file)
        except (BlockingIOError, PermissionError) as error:  # what lockf and Windows say of a lock that is held
            file.seek(0)
            holder = file.read(20).decode("ascii", "replace").strip()
            holder = holder if holder.isdecimal() else "unknown"
            raise UserError(
                f"Another process (pid {holder}) is running in {out}; wait for it or stop it, or choose another --out."
            ) from error
        except OSError as error:
            raise UserError(
                f"The run's folder {out} cannot be locked, so two runs might write there at once ({error.strerror}); "
                "choose an --out on another disk."
            ) from error
        try:
            file.truncate(0)
            file.write(str(os.getpid()).encode())
        except OSError as error:
            raise UserError(
                f"The run's folder {out} cannot be written ({error.strerror}); make room or choose another --out."
            ) from error
        yield


def _lock_file(file) -> None:
    """Take an exclusive lock or raise OSError at once.

    lockf and not flock: a forked worker does not inherit it, so the lock cannot outlive a killed run. (In return, this
    process must not open the file a second time: closing that would drop the lock.)
    """
    if os.name == "nt":
        import msvcrt

        file.seek(1 << 20)  # a byte far from the pid, which must stay readable to the process that is refused
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
