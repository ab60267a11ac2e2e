"""A checkpoint is whole or absent, any flipped byte is noticed, and what comes back is what was put in, bit for bit."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from lite_mentor import checkpoint, files
from lite_mentor.checkpoint import load, lock, pack_optimizer, restore_rng, rng_state, save, unpack_optimizer
from lite_mentor.errors import UserError
from tests.disk_order import DiskOrder

SHARED = torch.arange(12.0)
TENSORS = {
    "adapter": {
        "a.weight": torch.tensor([[1.5, float("nan")], [-0.0, float("inf")]]),
        "b.weight": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T,  # not contiguous
        "empty": torch.zeros(0, 4),
    },
    "optimizer": {"0.step": torch.tensor(7.0), "0.q": torch.arange(256, dtype=torch.uint8), "view": SHARED[3:7]},
    "nothing": {},
}
STATE = {"cursor": 12, "text": "ü\u2028\ud800", "float": 0.1 + 0.2, "none": None, "big": 2**80}


def write(root: Path, step: int, value: float = 0.0, keep: int = 10, **state) -> Path:
    tensors = {"adapter": {"w": torch.full((5,), value)}}
    return save(root, step, tensors=tensors, state={"step": step, **state}, keep=keep)


def names(root: Path) -> list[str]:
    return sorted(p.name for p in (root / "checkpoints").iterdir())


def bits(tensor: torch.Tensor) -> tuple:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(-1).view(torch.uint8).tolist()


def test_a_run_without_checkpoints(tmp_path):
    assert load(tmp_path) == (None, [])
    (tmp_path / "checkpoints" / ".tmp-000003-77").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-3").mkdir()
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    assert load(tmp_path) == (None, [])


def test_what_comes_back_is_what_was_put_in(tmp_path):
    path = save(tmp_path, 123, tensors=TENSORS, state=STATE, keep=1)
    assert path == tmp_path / "checkpoints" / "step-000123"
    files = ["MANIFEST.json", "adapter.safetensors", "nothing.safetensors", "optimizer.safetensors", "state.json"]
    assert sorted(p.name for p in path.iterdir()) == files
    found, refused = load(tmp_path)
    assert (found.step, found.path, found.state, refused) == (123, path, STATE, [])
    assert {g: {n: bits(t) for n, t in part.items()} for g, part in found.tensors.items()} == {
        g: {n: bits(t) for n, t in part.items()} for g, part in TENSORS.items()
    }


def test_nan_in_the_state_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        save(tmp_path, 1, tensors={}, state={"loss": float("nan")}, keep=1)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("versions", {"torch": "\x1b[2J"}, "does not say under which versions"),
        ("versions", {"torch": "\n2"}, "does not say under which versions"),
        ("versions", {"torch": 2}, "does not say under which versions"),
        ("versions", [], "is not a manifest"),
        ("files", {"state.json": ["size", "sha256"]}, "names files that no checkpoint has"),
        ("files", {}, "'state.json'"),
        ("step", "1", "is not a manifest"),
    ],
)
def test_a_manifest_of_another_shape_is_refused_though_its_hash_is_right(tmp_path, field, value, reason):
    path = write(tmp_path, 1) / "MANIFEST.json"
    manifest = {**json.loads(path.read_text()), field: value}
    path.write_bytes(checkpoint._canonical({**manifest, "sha256": checkpoint._digest(manifest)}))
    with pytest.raises(UserError, match=reason):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"0", b"[]", b"null", b"[" * 100_000])
def test_a_state_that_is_no_object_is_refused_though_its_hash_is_right(tmp_path, content):
    path = write(tmp_path, 1)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    manifest["files"]["state.json"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "state.json").write_bytes(content)
    (path / "MANIFEST.json").write_bytes(checkpoint._canonical({**manifest, "sha256": checkpoint._digest(manifest)}))
    with pytest.raises(UserError, match="its files are hashed but cannot be parsed"):
        load(tmp_path)


def test_pruning_keeps_the_newest_and_spares_strangers(tmp_path):
    for step in (1, 2, 5):
        write(tmp_path, step, keep=2)
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    write(tmp_path, 10, keep=2)
    assert names(tmp_path) == ["notes.txt", "step-000005", "step-000010"]
    save(tmp_path, 11, tensors={}, state={}, keep=1, spare=5)
    assert names(tmp_path) == ["notes.txt", "step-000005", "step-000011"]
    write(tmp_path, 1_000_000, keep=1)
    assert names(tmp_path) == ["notes.txt", "step-1000000"]


def test_a_damaged_newer_checkpoint_falls_back_and_is_replaced_when_its_step_comes_again(tmp_path):
    write(tmp_path, 1, 1.0, keep=1)
    (write(tmp_path, 2, 2.0) / "state.json").write_text("{}")
    found, refused = load(tmp_path)
    assert found.step == 1
    assert len(refused) == 1
    assert "step-000002 was refused: state.json is not what was written" in refused[0]
    write(tmp_path, 1, 1.0, keep=1)
    assert names(tmp_path) == ["step-000001", "step-000002"], "the one just resumed from is never pruned"
    write(tmp_path, 2, 2.5, keep=1)
    assert names(tmp_path) == ["step-000002"]
    assert load(tmp_path)[0].tensors["adapter"]["w"].tolist() == [2.5] * 5


def test_files_are_durable_before_they_are_named_and_the_name_before_older_ones_go(tmp_path, monkeypatch):
    write(tmp_path, 1)
    order = DiskOrder(monkeypatch)
    path = write(tmp_path, 2, keep=1)
    seen = order.seen(path, path.parent)
    assert sorted(seen[:3]) == ["MANIFEST.json", "adapter.safetensors", "state.json"]
    assert seen[3:] == ["step-000002", "> step-000002", "checkpoints", "> .tmp-pruned-step-000001"]


def test_saving_the_same_step_twice(tmp_path):
    manifest = write(tmp_path, 3, 1.0, seconds=1) / "MANIFEST.json"
    written = manifest.stat().st_mtime_ns, manifest.read_bytes()
    write(tmp_path, 3, 1.0, seconds=2)
    assert (manifest.stat().st_mtime_ns, manifest.read_bytes()) == written
    write(tmp_path, 3, 9.0)
    assert load(tmp_path)[0].tensors["adapter"]["w"].tolist() == [9.0] * 5
    assert names(tmp_path) == ["step-000003"]


def test_what_computes_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX9")
    write(tmp_path, 1)
    said = load(tmp_path)[0].versions
    assert (said[checkpoint.THREADS], said[checkpoint.INSTRUCTIONS], said["torch"]) == ("7", "AVX9", version("torch"))


def test_every_flipped_bit_is_noticed(tmp_path):
    path = save(tmp_path, 7, tensors=TENSORS, state={"a": 1}, keep=1)
    files = sorted(path.iterdir())
    places = [(f, i) for f in files for i in range(f.stat().st_size)]
    generator = random.Random(20)
    # Half of the flips in the manifest, which has no one but itself to vouch for it.
    manifest = [place for place in places if place[0].name == "MANIFEST.json"]
    for file, offset in generator.sample(places, 150) + generator.sample(manifest, 150):
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[offset] ^= 1 << generator.randrange(8)
        file.write_bytes(flipped)
        with pytest.raises(UserError, match="No checkpoint"):
            load(tmp_path)
        file.write_bytes(content)
    assert load(tmp_path)[0].step == 7


@pytest.mark.parametrize("name", ["MANIFEST.json", "adapter.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "short", "long"])
def test_missing_and_cut_files_are_noticed(tmp_path, name, damage):
    file = write(tmp_path, 7) / name
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes({"empty": b"", "short": content[:-1], "long": content + b"\n"}[damage])
    with pytest.raises(UserError, match=f"step-000007 was refused: .*{name}"):
        load(tmp_path)


def rewrite_manifest(path: Path, **changes) -> None:
    manifest = json.loads((path / "MANIFEST.json").read_bytes()) | changes
    manifest["sha256"] = checkpoint._digest(manifest)
    (path / "MANIFEST.json").write_bytes(checkpoint._canonical(manifest))


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 99},
        {"step": 8},
        {"step": "7"},
        {"files": {}},
        {"files": {"../../secret.json": {"size": 1, "sha256": "x"}}},
        {"files": None},
        {"sha256": None, "files": [1]},
    ],
)
def test_a_well_hashed_but_wrong_manifest_is_refused(tmp_path, changes):
    rewrite_manifest(write(tmp_path, 7), **changes)
    with pytest.raises(UserError, match="step-000007 was refused"):
        load(tmp_path)


def test_a_checkpoint_that_names_a_file_elsewhere_is_refused_though_that_is_as_it_says(tmp_path):
    (tmp_path / "theirs.json").write_bytes(b"{}")
    path = write(tmp_path, 7)
    names = json.loads((path / "MANIFEST.json").read_bytes())["files"]
    theirs = {"size": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    rewrite_manifest(path, files=names | {"../../theirs.json": theirs})
    with pytest.raises(UserError, match="names files that no checkpoint has"):
        load(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="its files with holes")
@pytest.mark.parametrize("name", ["state.json", "adapter.safetensors", "MANIFEST.json"])
def test_a_file_of_another_size_is_not_read(tmp_path, name):
    path = write(tmp_path, 1) / name
    os.truncate(path, 1 << 42)  # more than any memory, and nothing on the disk
    with pytest.raises(UserError, match=rf"{name} is not what was written \(its size differs"):
        load(tmp_path)


def test_a_renamed_checkpoint_is_refused(tmp_path):
    path = write(tmp_path, 7)
    path.rename(path.with_name("step-000009"))
    with pytest.raises(UserError, match="is that of step 7"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["adapter.safetensors", "state.json", "MANIFEST.json"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_disk_leaves_no_half_checkpoint(tmp_path, monkeypatch, name, code):
    write(tmp_path, 1, 1.0)
    real = files._create

    def full(path: Path, content: bytes) -> None:
        if path.name == name:
            path.write_bytes(content[: len(content) // 2])
            raise OSError(code, os.strerror(code))
        real(path, content)

    monkeypatch.setattr(files, "_create", full)
    with pytest.raises(UserError, match=f"step 2 could not be written .*{os.strerror(code)}"):
        write(tmp_path, 2, 2.0)
    assert names(tmp_path) == ["step-000001"]
    monkeypatch.setattr(files, "_create", real)
    assert load(tmp_path)[0].tensors["adapter"]["w"].tolist() == [1.0] * 5
    write(tmp_path, 2, 2.0)
    assert names(tmp_path) == ["step-000001", "step-000002"]


class Killed(BaseException):
    """Stands for SIGKILL: no handler of ours may run."""


@pytest.mark.parametrize("moment", range(12))
def test_a_kill_at_any_write_leaves_a_sound_checkpoint(tmp_path, monkeypatch, moment):
    """Stops `save` at its n-th call to the file system; what is then on disk loads, and the next save succeeds."""
    write(tmp_path, 1, 1.0)
    calls = iter(range(100))
    with monkeypatch.context() as patch:
        for owner, name in [(files, "_write"), (files, "sync_folder"), (Path, "rename"), (shutil, "rmtree")]:
            real = getattr(owner, name)

            def stop(*args, real=real, **kwargs):
                if next(calls) == moment:
                    raise Killed
                return real(*args, **kwargs)

            patch.setattr(owner, name, stop)
        try:
            write(tmp_path, 2, 2.0, keep=1)
            finished = True
        except Killed:
            finished = False
    assert finished == (moment >= 8), "3 files, 2 folders, 2 renames and 1 deletion"
    found, refused = load(tmp_path)
    assert refused == []
    assert found.tensors["adapter"]["w"].tolist() == [float(found.step)] * 5
    write(tmp_path, 3, 3.0, keep=1)
    assert names(tmp_path) == ["step-000003"]


def foreign(checkpoints: Path, outside: Path, what: str) -> None:
    """Put something in the folder of checkpoints that no run puts there."""
    if what == "a checkpoint that was moved, and a link to it":
        shutil.move(checkpoints / "step-000001", outside)
        (checkpoints / "step-000001").symlink_to(outside)
    elif what == "links to nothing":
        for name in ("step-000003", "step-000009", ".tmp-x", ".tmp-step-000003"):
            (checkpoints / name).symlink_to(outside / "nothing")
    elif what == "links to a folder":
        for name in ("step-000003", "step-000000", ".tmp-x", ".tmp-replaced-step-000003"):
            (checkpoints / name).symlink_to(outside)
    elif what == "files":
        for name in ("step-000003", "step-000009", ".tmp-x", ".tmp-step-000003"):
            (checkpoints / name).write_text("?")
    elif what == "checkpoints of pipes":
        for step in ("step-000003", "step-000009"):
            (checkpoints / step).mkdir()
            os.mkfifo(checkpoints / step / "MANIFEST.json")


@pytest.mark.skipif(os.name != "posix", reason="its kinds of files")
@pytest.mark.parametrize(
    "what",
    [
        "a checkpoint that was moved, and a link to it",
        "links to nothing",
        "links to a folder",
        "files",
        "checkpoints of pipes",
    ],
)
def test_something_foreign_among_the_checkpoints_stops_no_save_and_no_resume(tmp_path, what):
    root, outside = tmp_path / "run", tmp_path / "theirs"
    for step in (1, 2):
        write(root, step, float(step))
    outside.mkdir()
    (outside / "precious").write_text("theirs")
    foreign(root / "checkpoints", outside, what)
    kept = sorted(p.relative_to(outside) for p in outside.rglob("*"))
    assert load(root)[0].step == 2
    checkpoint.tidy(root, 2, keep=2)
    for step in (3, 4):
        write(root, step, float(step), keep=2)
        assert load(root)[0].tensors["adapter"]["w"].tolist() == [float(step)] * 5
    assert {"step-000003", "step-000004"} <= set(names(root))
    assert not [name for name in names(root) if name.startswith(".tmp")]
    assert sorted(p.relative_to(outside) for p in outside.rglob("*")) == kept


def test_what_cannot_be_removed_stops_no_save(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    for step in (1, 2):
        (write(tmp_path, step) / "state.json").unlink()
        write(tmp_path, step, 5.0, keep=1)
        assert load(tmp_path)[0].step == step


def test_checkpoints_that_cannot_be_listed_are_one_sentence(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def denied(self):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(UserError, match="checkpoints cannot be read"):
        load(tmp_path)
    with pytest.raises(UserError, match=r"checkpoints in .* cannot be removed"):
        write(tmp_path, 2)


def test_what_a_kill_kept_a_save_from_removing_is_removed(tmp_path):
    for step in range(4):
        write(tmp_path, step)
    (tmp_path / ".tmp-best").mkdir()
    (tmp_path / "checkpoints" / ".tmp-step-000004").mkdir()
    checkpoint.tidy(tmp_path, 2, keep=1, spare=0)
    assert names(tmp_path) == ["step-000000", "step-000002", "step-000003"]
    assert not (tmp_path / ".tmp-best").exists()


def model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2).to(torch.bfloat16))


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list:
    for _ in range(steps):
        (net[1](net[0](torch.randn(5, 4)).to(torch.bfloat16)) ** 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [bits(p.detach()) for p in net.parameters()]


FUSED = partial(torch.optim.AdamW, fused=True)  # what a GPU takes


@pytest.mark.parametrize("kind", [torch.optim.AdamW, FUSED, torch.optim.SGD, torch.optim.Adamax])
def test_optimizer_continues_bit_for_bit(tmp_path, kind):
    net = model()
    optimizer = kind([{"params": net[0].parameters(), "lr": 0.01}, {"params": net[1].parameters()}], lr=0.1)
    train(net, optimizer, 3)
    packed, state = pack_optimizer(optimizer)
    rng, rng_json = rng_state()
    save(
        tmp_path,
        3,
        tensors={"adapter": net.state_dict(), "optimizer": packed, "rng": rng},
        state={"optimizer": state, "rng": rng_json},
        keep=1,
    )
    expected = train(net, optimizer, 3)

    torch.manual_seed(99)
    other = model(seed=5)
    resumed = kind([{"params": other[0].parameters()}, {"params": other[1].parameters()}], lr=7.0)
    found, _ = load(tmp_path)
    other.load_state_dict(found.tensors["adapter"])
    unpack_optimizer(resumed, found.tensors["optimizer"], found.state["optimizer"])
    restore_rng(found.tensors["rng"], found.state["rng"])
    assert train(other, resumed, 3) == expected
    assert isinstance(resumed.param_groups[0].get("betas", ()), tuple)


def test_optimizer_state_of_any_dtype_survives():
    """Whatever an optimizer keeps: bytes, and float32 beside bf16 parameters."""
    parameter = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    state = {
        "state1": torch.tensor([1, 2, 255, 0], dtype=torch.uint8),
        "state2": torch.linspace(-1, 1, 4),
        "counter": torch.tensor(2.0**24 + 2),
    }
    optimizer.state[parameter] = dict(state)
    packed, described = pack_optimizer(optimizer)
    assert sorted(packed) == ["0.counter", "0.state1", "0.state2"]
    optimizer.state[parameter] = {"stale": torch.ones(1)}
    unpack_optimizer(optimizer, packed, json.loads(json.dumps(described)))
    back = optimizer.state[parameter]
    assert sorted(back) == sorted(state)
    assert all(bits(back[k]) == bits(state[k]) for k in state)


def test_optimizer_of_another_shape_is_refused():
    small, large = torch.nn.Linear(2, 2), torch.nn.Linear(3, 2)
    packed, state = pack_optimizer(torch.optim.AdamW(small.parameters()))
    with pytest.raises(UserError, match="--lora-rank"):
        unpack_optimizer(torch.optim.AdamW(large.parameters()), packed, state)


def test_every_generator_continues():
    def draw() -> list:
        return [torch.randn(3).tolist(), random.random(), random.gauss(0, 1), np.random.randn(3).tolist()]

    random.gauss(0, 1)
    np.random.randn(1)
    tensors, state = rng_state()
    expected = [draw(), draw()]
    restore_rng(tensors, json.loads(json.dumps(state)))
    assert [draw(), draw()] == expected


def test_a_gpu_generator_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tensors, state = rng_state()
    with pytest.raises(UserError, match="GPU"):
        restore_rng({**tensors, "torch_cuda": torch.zeros(16, dtype=torch.uint8)}, state)


HOLD = """
import sys
from pathlib import Path
from lite_mentor.checkpoint import lock
from lite_mentor.errors import UserError
try:
    with lock(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
except UserError as error:
    print(error)
"""


def hold(out: Path) -> subprocess.Popen:
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", HOLD, str(out)], **pipes, env=os.environ)


def test_a_second_process_is_refused_and_a_killed_one_lets_go(tmp_path):
    first = hold(tmp_path / "run")
    try:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"pid {first.pid}.*--out"), lock(tmp_path / "run"):
            pass
    finally:
        first.kill()
        first.communicate()
    with lock(tmp_path / "run"):
        second = hold(tmp_path / "run")
        assert f"pid {os.getpid()}" in second.communicate("")[0]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS])
def test_a_disk_that_knows_no_locks_is_not_another_process(tmp_path, monkeypatch, code):
    monkeypatch.setattr(checkpoint, "_lock_file", Mock(side_effect=OSError(code, os.strerror(code))))
    with pytest.raises(UserError, match=f"cannot be locked.*{os.strerror(code)}.*on another disk"), lock(tmp_path):
        pass


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="choose another --out"), lock(tmp_path / "file"):
        pass


@pytest.mark.skipif(os.name != "posix", reason="its limits")
def test_a_disk_that_is_full_from_the_first_byte(tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(UserError, match=f"The run's folder {tmp_path} cannot be written"), lock(tmp_path):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with lock(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


@pytest.mark.skipif(os.name != "posix", reason="its kinds of files")
def test_a_folder_whose_files_lead_elsewhere_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "theirs").write_text("precious")
    (tmp_path / "run").mkdir()
    for name in (".lock", "rollouts.jsonl"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "theirs")
        with pytest.raises(UserError, match=f"{name} is a symbolic link"), lock(tmp_path / "run"):
            pass
        (tmp_path / "run" / name).unlink()
        assert list((tmp_path / "run").iterdir()) == []
    assert (tmp_path / "theirs").read_text() == "precious"
