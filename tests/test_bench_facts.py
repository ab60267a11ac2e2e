"""What the benches say of a machine: facts, the small timings, and whether a preset fits a card; here in small."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import caps, facts, micro
from bench.__main__ import main as bench_main
from bench.random_student import QWEN3, SHAPES, random_student
from lite_mentor.errors import UserError

SMALL = dict(vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16)  # fmt: skip


def test_every_fact_can_be_had_or_says_why_not():
    found = {fact.__name__: facts.find(fact, "cpu") for fact in facts.FACTS}
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert found["rates"]["copy_gb_per_s"] > 0
    assert found["division"] == {
        "fact": "division", "torch": {"not_1": 0, "silent": True}, "seconds": found["division"]["seconds"],
    }  # fmt: skip
    assert all(found["attention"][f"heads of {n}"]["bits_repeat"] for n in (64, 128))
    assert all(0 <= found["varlen_equals_mask"][name] < 1e-2 for name in ("output", "by query", "by key", "by value"))
    assert found["gradients"]["bits_repeat"] is True
    assert found["gradients"]["worst"] == 0
    assert found["graphs"]["failed"] == "UserError: only a GPU has graphs"
    assert "only a GPU" in found["waits"]["failed"]
    assert found["head_product"]["tiny"] > 0


def test_a_machine_without_nvidias_program_has_its_other_facts(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert facts._driver() is None


def test_a_mask_that_is_off_by_one_would_be_seen(monkeypatch):
    """The same comparison, with a plan that leaves out the youngest key."""
    whole = facts.PackedPlan.attend

    def late(self, layer, query, key, value, **how):
        return whole(self, layer, query, key.roll(1, 2), value.roll(1, 2), **how)

    monkeypatch.setattr(facts.PackedPlan, "attend", late)
    assert facts.varlen_equals_mask("cpu")["output"] > 0.1


def test_a_fact_that_cannot_be_had_costs_no_other(capsys, monkeypatch):
    def division(device):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(facts, "FACTS", (division, facts.versions))
    assert bench_main(["facts", "--device", "cpu"]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["failed"] == "ZeroDivisionError: by zero"
    assert second["fact"] == "versions"


def test_the_small_timings_run(capsys, monkeypatch):
    assert bench_main(["micro", "--device", "cpu"]) == 0
    about, *rows = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert about["command"].startswith("python -m bench micro")
    assert [row["what"] for row in rows] == [
        "sample", "paged attention", "tables", "tables", "decode step", "layer",
    ]  # fmt: skip
    assert not any("failed" in row for row in rows)
    assert min(rows[0]["us"].values()) > rows[0]["floor_us"] > 0
    assert rows[4]["ms_wall"] > rows[4]["floor_ms"] > 0

    monkeypatch.setitem(micro.PARTS, "sample", lambda device, ceilings: iter([1 / 0]))
    with pytest.raises(SystemExit, match="failed: sample"):
        micro.main(["--device", "cpu", "--only", "sample", "paged"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row["what"] for row in rows] == ["sample", "paged attention"]
    assert "ZeroDivisionError" in rows[0]["failed"]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_random_student_has_the_shape_and_no_two_equal_rows(tmp_path, shape):
    from transformers import AutoModelForCausalLM

    folder = random_student(tmp_path / "s", shape, **SMALL)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == "qwen3"
    assert model.config.tie_word_embeddings
    assert model.dtype is torch.bfloat16
    weights = model.state_dict()
    assert len(weights["model.embed_tokens.weight"].unique(dim=0)) == SMALL["vocab_size"]
    assert bool((weights["model.norm.weight"] == 1).all())
    assert {**QWEN3, **SHAPES[shape]}["hidden_size"] in (1024, 2048, 2560)


def test_a_card_is_emulated(monkeypatch):
    """80 GiB that seem to be 8: torch may take 7.4, and free memory is what such a card would say."""
    fractions, GIB = [], caps.GIB
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (76 * GIB, 80 * GIB))
    with caps.card_of(8):
        free, whole = torch.cuda.mem_get_info("cuda:0")
        assert free / GIB == pytest.approx(4.4)
        assert whole == 8 * GIB
        assert fractions == [pytest.approx(7.4 / 80)]
    assert torch.cuda.mem_get_info() == (76 * GIB, 80 * GIB)
    assert fractions[1:] == [1.0]
    with pytest.raises(UserError, match="96 GiB cannot be emulated"), caps.card_of(96):
        pass


@pytest.mark.parametrize(("reserved", "within"), [(7.3, True), (7.5, False)])
def test_fits_means_reserved_memory_and_what_the_process_holds_beside_it(monkeypatch, reserved, within):
    """4 GiB are reserved now and 4.6 gone from the card, so 0.6 are held beside; allocated memory does not count."""
    GIB = caps.GIB
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: int(reserved * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 4 * GIB)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2 * GIB)
    found = caps.memory(8, int(75.4 * GIB), 80 * GIB)
    assert found["within"] is within
    assert found["context_gib"] == pytest.approx(0.6)
    assert found["reserved_gib"] == pytest.approx(reserved)


@pytest.fixture
def small_preset(tmp_path, monkeypatch):
    """8gb on a CPU: a tiny student of its family, and short."""
    monkeypatch.setenv("LITE_MENTOR_CACHE", str(tmp_path / "cache"))
    student = random_student(tmp_path / "student", "qwen3-0.6b", **SMALL)
    config = caps.settings("8gb", student, tmp_path / "run", "cpu")
    assert (config.quant, config.max_new_tokens, config.task) == ("nf4", 1024, "tiny")
    return replace(config, quant="none", max_new_tokens=40, max_prompt_tokens=200, micro_tokens=512, group_size=2)


def test_a_preset_is_proven_by_a_whole_step(small_preset):
    found = caps.prove(small_preset)
    assert found["fits"] is True
    assert found["rollouts"] == 4
    assert found["longest"] == 40  # to the limit
    assert found["grad_norm"] > 0  # the update was made, though every rollout earned the same


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), UserError("A row does not fit")]
)
def test_a_preset_that_does_not_fit_says_so(small_preset, monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(caps, "update", fails)
    found = caps.prove(small_preset)
    assert found["fits"] is False
    assert found["why"] == str(error)


def test_caps_need_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_main(["caps", "--preset", "8gb"]) == 2
    assert "sees no GPU" in capsys.readouterr().err
