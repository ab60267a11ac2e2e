"""Which device a run takes, and the sentence that a user reads when it is not there, too old or too full."""

from __future__ import annotations

import pytest
import torch

from lite_mentor import device as room
from lite_mentor import load as load_room
from lite_mentor.config import PRESETS
from lite_mentor.device import compute_device, compute_dtype, memory_left, too_small, why_cpu
from lite_mentor.errors import UserError
from lite_mentor.load import load_student
from lite_mentor.log import Stopwatch, reserved_memory_bytes

GIB = 2**30


@pytest.fixture
def card(monkeypatch):
    """One stand-in GPU of 8 GB with 7.1 GiB free, as torch.cuda describes it; returns a function that changes it."""

    def put(**calls):
        for name, value in calls.items():
            monkeypatch.setattr(torch.cuda, name, value if callable(value) else lambda *_, value=value: value)

    put(is_available=True, device_count=1, get_device_capability=(8, 6), get_device_name="A Card")
    put(mem_get_info=(7.1 * GIB, 7.8 * GIB), memory_reserved=0)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.ones(1))  # nothing can be allocated there
    return put


@pytest.fixture
def no_gpu(monkeypatch):
    """A CUDA build on a machine where CUDA cannot start; returns a function that sets torch's reason."""

    def fails(reason: str):
        def init():
            raise RuntimeError(reason)

        monkeypatch.setattr(torch.cuda, "init", init)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fails


OLD_DRIVER = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver"


def test_auto_takes_the_gpu_and_a_name_stands_for_itself(card):
    assert [compute_device(name) for name in ("auto", "cuda", "cuda:0", "cpu")] == ["cuda", "cuda", "cuda:0", "cpu"]


@pytest.mark.parametrize(("count", "here"), [(1, "only cuda:0"), (4, "cuda:0 to cuda:3")])
def test_a_gpu_with_too_high_a_number_is_refused(card, count, here):
    card(device_count=count)
    with pytest.raises(UserError, match=f"^--device cuda:9: there is no such GPU; here is {here}.$"):
        compute_device("cuda:9")


@pytest.mark.parametrize("requested", ["auto", "cuda"])
def test_a_gpu_that_cannot_compute_is_a_sentence_and_not_the_cpu(card, monkeypatch, requested):
    def fails(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore\n")

    monkeypatch.setattr(torch, "zeros", fails)
    with pytest.raises(UserError, match=f"^--device {requested}: .*cannot compute there .*no kernel image.* device\\)"):
        compute_device(requested)


@pytest.mark.parametrize("requested", ["cuda", "cuda:1"])
def test_a_driver_older_than_the_wheel_is_named(no_gpu, requested):
    no_gpu(OLD_DRIVER + ".\nmore")
    with pytest.raises(UserError, match=rf"^--device {requested}: PyTorch sees no GPU here \(The NVIDIA driver .*old"):
        compute_device(requested)


def test_other_reasons_for_no_gpu(no_gpu, monkeypatch):
    no_gpu("Found no NVIDIA driver on your system.")
    with pytest.raises(UserError, match="Found no NVIDIA driver on your system\\)"):
        compute_device("cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES hides all of them"):
        compute_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match="built without CUDA; install its CUDA build"):
        compute_device("cuda")


def test_auto_says_why_it_took_the_cpu_of_a_machine_with_a_gpu(no_gpu, monkeypatch):
    no_gpu(OLD_DRIVER)
    assert compute_device("auto") == "cpu"
    monkeypatch.setattr(room.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert why_cpu("auto").endswith(f"PyTorch does not see it ({OLD_DRIVER})")
    assert why_cpu("cpu") == ""  # that was asked for
    monkeypatch.setattr(room.shutil, "which", lambda name: None)
    monkeypatch.setattr(room.Path, "glob", lambda *_: iter(()))
    assert why_cpu("auto") == ""


def test_the_dtype_on_a_cpu():
    assert compute_dtype("cpu", "bf16") is torch.bfloat16
    assert compute_dtype("cpu", "fp32") is torch.float32


@pytest.mark.parametrize(
    ("capabilities", "mkldnn", "dtype"),
    [
        (dict(avx512_bf16=True), True, torch.bfloat16),
        (dict(amx_bf16=True, avx512_bf16=False), True, torch.bfloat16),
        (dict(architecture="aarch64", bf16=True), True, torch.bfloat16),
        (dict(architecture="aarch64", bf16=True), False, torch.float32),
        (dict(avx512_f=True, avx512_bf16=False), True, torch.float32),
        (dict(), True, torch.float32),
    ],
)
def test_auto_is_bf16_where_a_cpu_multiplies_in_it_and_no_clock_decides(monkeypatch, capabilities, mkldnn, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: mkldnn)
    assert compute_dtype("cpu") is dtype
    assert compute_dtype("cpu", "fp32") is torch.float32


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_auto_is_bf16_where_a_gpu_has_it(card, capability, dtype):
    card(get_device_capability=capability)
    assert compute_dtype("cuda:1", "auto") is dtype
    assert compute_dtype("cuda:1", "fp32") is torch.float32


def test_bf16_is_refused_where_a_gpu_has_none(card):
    card(get_device_capability=(7, 5))
    with pytest.raises(UserError, match=r"^--dtype bf16 needs .* 8\.0 or more, and A Card has 7\.5; use --dtype fp32"):
        compute_dtype("cuda", "bf16")


@pytest.mark.parametrize(
    ("free", "held", "sentence"),
    [
        (7.1, 0, "A Card has 7.1 of 80.0 GiB free for this process; --preset 8gb is made for that."),
        (1.1, 14, "A Card has 15.1 of 80.0 GiB free for this process; --preset 16gb is made for that."),
        (75.0, 0, "A Card has 75.0 of 80.0 GiB free for this process; --preset 24gb is made for that."),
        (5.0, 0, "A Card has 5.0 of 80.0 GiB free for this process; --preset 8gb is made for more, --preset quick for"),
    ],
)
def test_the_preset_that_the_free_memory_is_made_for(card, free, held, sentence):
    card(mem_get_info=(free * GIB, 80 * GIB), memory_reserved=held * GIB)
    assert memory_left("cuda").startswith(sentence)
    assert memory_left("cpu") == ""


def test_a_preset_larger_than_the_card_is_said_before_anything_is_loaded(card):
    assert set(room.CARDS) < set(PRESETS)
    assert too_small("8gb", "cuda") == too_small("quick", "cuda") == too_small("24gb", "cpu") == ""
    assert too_small("12gb", "cuda").startswith("--preset 12gb may not fit: A Card has 7.1 of 7.8 GiB free")


def test_a_student_that_does_not_fit_is_a_sentence(card, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(load_room, "_load", full)
    with pytest.raises(UserError, match=r"^--student tiny does not fit on cuda; .*--quant nf4.*--preset 8gb is made"):
        load_student("tiny", quant="none", device="cuda")


@pytest.mark.parametrize(("device", "current"), [("cuda:1", ["cuda:1"]), ("cuda", []), ("cpu", [])])
def test_the_gpu_of_a_student_becomes_the_current_one_first(card, monkeypatch, device, current):
    """Kernels, streams, graphs and generators belong to the current device, whatever their tensors are on."""
    made_current = []
    card(set_device=made_current.append)
    monkeypatch.setattr(load_room, "_load", lambda *_: (list(made_current), None, {}))
    monkeypatch.setattr(load_room, "_take_over", lambda found, *_, **__: found)
    assert load_student("tiny", quant="none", device=device) == current


def test_the_stopwatch_waits_for_its_own_device(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append(device))
    with Stopwatch("cuda:1").stage("update"):
        pass
    assert waited == [torch.device("cuda:1")]


def test_the_memory_that_a_card_must_have(card):
    """8 GiB, of which 5 are free: 3 in use, 2 of them reserved by torch, which had 4 at its peak."""
    card(mem_get_info=(5 * GIB, 8 * GIB), memory_reserved=2 * GIB, max_memory_reserved=4 * GIB)
    assert reserved_memory_bytes("cuda") == 5 * GIB
    assert reserved_memory_bytes("cpu") is None
