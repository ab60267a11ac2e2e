"""The student: what is frozen stays frozen, what is sampled is what is trained, and adapters act as in PEFT."""

from __future__ import annotations

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lite_mentor.attention import PackedPlan
from lite_mentor.engine import Engine
from lite_mentor.errors import UserError
from lite_mentor.load import load_student
from lite_mentor.prompt import Chat
from lite_mentor.rollout import noise
from lite_mentor.student import twin_fits
from lite_mentor.tasks.tiny import generate
from lite_mentor.tiny import tiny_student, tiny_tokenizer

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

KINDS = [("none", "fp32"), ("none", "bf16"), ("nf4", "fp32"), ("nf4", "bf16")]
IDS = torch.randint(300, (1, 20), generator=torch.Generator().manual_seed(3))
POSITIONS = torch.arange(20)[None]


def tiny(quant="none", dtype="fp32", **options):
    return load_student("tiny", quant=quant, dtype=dtype, **options)


def hidden(student, forward=None):
    return (forward or student.hidden)(IDS, POSITIONS, PackedPlan([0], [-1], 20))


def train(student, steps=1, seed=0):
    """Move the adapters somewhere."""
    torch.manual_seed(seed)
    for _ in range(steps):
        for parameter in student.trainable():
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * 0.05)


def base_bytes(student):
    return {n: t.clone() for n, t in student.base.state_dict().items() if "lora_" not in n}


# What is trained


@pytest.mark.parametrize(("quant", "dtype"), KINDS)
def test_only_the_adapters_learn_and_in_float32(quant, dtype):
    student = tiny(quant, dtype, lora_rank=4)
    assert {p.dtype for p in student.trainable()} == {torch.float32}
    assert sum(p.numel() for p in student.trainable()) == 3 * 4 * (2 * (128 + 256) + 2 * (128 + 128) + 3 * (128 + 384))
    assert {id(p) for p in student.model.parameters() if p.requires_grad} == {id(p) for p in student.trainable()}
    hidden(student).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.trainable())
    assert student.hidden(IDS, POSITIONS, PackedPlan([0], [-1], 20)).dtype == student.dtype
    assert student.head_weight_VH.dtype == student.dtype
    assert student.head_weight_VH.shape == (338, 128)


@pytest.mark.parametrize(("quant", "dtype"), KINDS)
def test_a_forward_without_gradients_leaves_later_gradients_alone(quant, dtype):
    """bitsandbytes repacks 4-bit weights on a CPU into a layout without a backward when a module is in eval mode."""
    grads = []
    for look_first in (False, True):
        student = tiny(quant, dtype)
        train(student)
        if look_first:
            with torch.no_grad(), student.reference():
                hidden(student)
            student.rollout_logits(hidden(student, student.rollout_hidden))
        hidden(student).float().square().sum().backward()
        grads.append([p.grad for p in student.trainable()])
    for clean, after in zip(*grads, strict=True):
        assert clean.abs().max() > 0
        assert torch.equal(clean, after)


def test_nf4_gradients_are_those_of_the_dequantised_model(tmp_path):
    """The 4-bit backward, against autograd through plain matrices that hold the same weights."""
    student = tiny("nf4", "fp32")
    student.refresh_rollout_weights()
    plain = dict(student._rollout.model.state_dict())
    folder = tiny_student(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.load_state_dict(plain)
    model.save_pretrained(folder)
    dense = load_student(str(folder), quant="none", dtype="fp32")
    train(student)
    train(dense)
    for each in (student, dense):
        hidden(each).square().sum().backward()
    for a, b in zip(student.trainable(), dense.trainable(), strict=True):
        assert (a.grad - b.grad).norm() < 1e-4 * b.grad.norm()


def test_the_reference_is_the_model_without_adapters():
    student = tiny("nf4", "fp32")
    before = hidden(student)
    train(student)
    after = hidden(student)
    with student.reference():
        assert torch.equal(hidden(student), before)
    assert torch.equal(hidden(student), after)
    assert not torch.allclose(after, before, atol=1e-2)
    with pytest.raises(KeyError), student.reference():
        raise KeyError
    hidden(student).sum().backward()
    assert all(p.grad is not None for p in student.trainable())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("quant", "dtype"), KINDS)
def test_a_reference_that_was_kept_is_the_student_as_it_was(quant, dtype, checkpointing):
    student = tiny(quant, dtype, gradient_checkpointing=checkpointing)
    train(student)
    student.keep_reference()
    then, before = hidden(student).detach(), {n: t.clone() for n, t in student.adapter_state().items()}
    train(student, seed=1)
    student.refresh_rollout_weights()
    now, rollout = hidden(student), hidden(student, student.rollout_hidden)
    now.float().square().sum().backward()
    clean = [p.grad.clone() for p in student.trainable()]
    student.model.zero_grad()
    with torch.no_grad(), student.reference():
        assert torch.equal(hidden(student), then)
    with pytest.raises(KeyError), student.reference():
        raise KeyError
    assert torch.equal(hidden(student, student.rollout_hidden), rollout)
    after = hidden(student)
    assert torch.equal(after, now)
    assert not torch.allclose(after, then, atol=1e-2)
    after.float().square().sum().backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(student.trainable(), clean, strict=True))
    kept = student.reference_state()
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.items())
    again = tiny(quant, dtype)
    again.keep_reference(kept)
    with again.reference():
        assert torch.equal(hidden(again), then)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_backward_through_the_exchange_of_adapters_is_refused(dtype):
    student = tiny(dtype=dtype)
    student.keep_reference()
    out = hidden(student)
    with student.reference():
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_reference_of_another_student_is_refused():
    with pytest.raises(UserError, match="another --lora-rank"):
        tiny().keep_reference(tiny(lora_rank=4).adapter_state())


def test_a_seed_decides_the_adapters_and_nothing_else():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = tiny(seed=1), tiny(seed=1), tiny(seed=2)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(first.trainable(), again.trainable(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first.trainable(), other.trainable(), strict=True))
    assert torch.equal(first.head_weight_VH, other.head_weight_VH)


# What is sampled


@pytest.mark.parametrize(("quant", "dtype"), KINDS)
def test_rollout_weights_never_drift_and_the_base_never_changes(quant, dtype):
    student = tiny(quant, dtype, lora_rank=4)
    before = base_bytes(student)
    buffers = [weight.data_ptr() for _, weight in student._rollout.layers]
    for cycle in range(1000 if (quant, dtype) == ("nf4", "bf16") else 50):
        train(student, seed=cycle)
        student.refresh_rollout_weights()
    assert base_bytes(student).keys() == before.keys()
    assert all(torch.equal(t, before[n]) for n, t in base_bytes(student).items())
    assert [weight.data_ptr() for _, weight in student._rollout.layers] == buffers
    fresh = tiny(quant, dtype, lora_rank=4)
    fresh.load_adapter_state(student.adapter_state())
    for (_, long), (_, short) in zip(student._rollout.layers, fresh._rollout.layers, strict=True):
        assert torch.equal(long, short)


def test_a_rollout_weight_is_base_plus_scaled_product_rounded_once():
    student = tiny("none", "bf16", lora_rank=4, lora_alpha=12)
    train(student)
    student.refresh_rollout_weights()
    layer = student.base.model.layers[1].mlp.down_proj
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    want = layer.base_layer.weight.double() + 12 / 4 * (up.double() @ down.double())
    got = student._rollout.model.model.layers[1].mlp.down_proj.weight
    # At most one bf16 rounding (8 bits), and a float32 one that may tip it over.
    assert ((got.double() - want).abs() <= want.abs() * 2**-8 * 1.001 + 1e-12).all()


@pytest.mark.parametrize(("quant", "dtype", "atol"), [("none", "fp32", 2e-5), ("nf4", "fp32", 2e-5)])
def test_what_is_sampled_is_what_is_trained(quant, dtype, atol):
    student = tiny(quant, dtype)
    train(student)
    student.refresh_rollout_weights()
    trained, sampled = hidden(student), hidden(student, student.rollout_hidden)
    torch.testing.assert_close(sampled, trained, atol=atol, rtol=0)
    want = trained.double() @ student.head_weight_VH.double().T
    torch.testing.assert_close(student.rollout_logits(sampled).double(), want, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("quant", "dtype"), KINDS)
def test_without_merged_weights_the_policy_itself_is_sampled(quant, dtype):
    student = tiny(quant, dtype, rollout_weights="unmerged")
    train(student)
    student.refresh_rollout_weights()
    with torch.inference_mode():
        sampled = hidden(student, student.rollout_hidden)
    assert torch.equal(sampled, hidden(student))
    assert student.rollout_model is student.base
    assert student.describe().endswith("rollouts through the adapters, without merged weights")


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_merged_and_unmerged_weights_draw_the_same_tokens(quant):
    drawn = []
    for kind in ("merged", "unmerged"):
        student = tiny(quant, rollout_weights=kind)
        train(student)
        student.refresh_rollout_weights()
        engine = Engine.of(student, slots=4, context=40)
        sequences = [engine.submit([1 + i, 2, 3], noise(0, 0, "", i, 30)) for i in range(4)]
        while engine.busy:
            engine.step()
        drawn.append([s.ids for s in sequences])
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(("free", "merged"), [(7_373_000, True), (7_372_000, False)])
def test_weights_are_merged_where_the_copy_takes_under_two_fifths(monkeypatch, free, merged):
    """3 layers of 128 x (256 + 128 + 128 + 256 + 3 x 384) numbers of 4 bytes: 2,949,120 in all."""
    base = tiny().base
    assert twin_fits(base)
    monkeypatch.setattr(type(base), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 0))
    assert twin_fits(base) is merged


def test_only_adapted_weights_are_copied():
    student = tiny()
    twin = dict(student._rollout.model.named_parameters(remove_duplicate=False))
    for name, parameter in student.base.named_parameters(remove_duplicate=False):
        if "lora_" not in name and "base_layer" not in name:
            assert twin[name] is parameter
    assert len(student._rollout.layers) == 3 * 7
    assert not any("lora" in name for name, _ in student._rollout.model.named_modules())


def test_rollout_logits_are_capped_and_scaled(tmp_path):
    folder = tiny_student(
        tmp_path, architecture="gemma2", attn_logit_softcapping=None, final_logit_softcapping=2.0, hidden_size=64
    )
    student = load_student(str(folder), quant="none", dtype="fp32")
    assert (student.softcap, student.logit_scale) == (2.0, 1.0)
    raw = hidden(student) @ student.head_weight_VH.T
    torch.testing.assert_close(student.rollout_logits(hidden(student)), 2 * torch.tanh(raw / 2))
    assert raw.abs().max() > 3
    granite = load_student(
        str(tiny_student(tmp_path / "g", architecture="granite", logits_scaling=8.0)), quant="none", dtype="fp32"
    )
    assert (granite.softcap, granite.logit_scale) == (None, 0.125)
    raw = hidden(granite) @ granite.head_weight_VH.T
    torch.testing.assert_close(granite.rollout_logits(hidden(granite)), raw / 8)


# What is kept


def test_adapters_go_out_and_come_back():
    student, other = tiny(seed=1), tiny(seed=2)
    train(student)
    other.load_adapter_state({n: t.clone() for n, t in student.adapter_state().items()})
    assert torch.equal(hidden(student), hidden(other))
    student.refresh_rollout_weights()
    assert torch.equal(hidden(student, student.rollout_hidden), hidden(other, other.rollout_hidden))


@pytest.mark.parametrize("wrong", ["rank", "missing", "renamed", "dtype"])
def test_adapters_of_another_model_are_refused(wrong):
    student = tiny(lora_rank=4)
    state = tiny(lora_rank=8 if wrong == "rank" else 4).adapter_state()
    name = next(iter(state))
    if wrong == "missing":
        del state[name]
    if wrong == "renamed":
        state["x"] = state.pop(name)
    if wrong == "dtype":
        state[name] = state[name].half()
    with pytest.raises(UserError, match="another student or another --lora-rank"):
        student.load_adapter_state(state)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_saved_adapter_loads_in_plain_peft(tmp_path, architecture):
    folder = tiny_student(tmp_path / "base", architecture=architecture)
    student = load_student(str(folder), quant="none", dtype="fp32", lora_rank=4)
    train(student)
    student.save_adapter(tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["target_modules"] == sorted(written["target_modules"])  # the same bytes however strings hash
    assert written["inference_mode"] is True
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (4, 32, True)
    assert sorted(config["target_modules"]) == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    want = hidden(student) @ student.head_weight_VH.T
    # Both are 2e-5 to 3e-5 from float64; their sums are in another order.
    torch.testing.assert_close(model(input_ids=IDS).logits[0], want, atol=5e-5, rtol=0)
    hidden(student).sum().backward()  # saving has not frozen the student


@pytest.fixture(scope="module")
def trained_elsewhere(tmp_path_factory):
    """A base and, by PEFT's own hand, adapters of rank 4 for it: (base's folder, how -> adapter's folder)."""
    root = tmp_path_factory.mktemp("peft")
    base = tiny_student(root / "base")

    def make(**how):
        folder = root / str(len(list(root.iterdir())))
        model = AutoModelForCausalLM.from_pretrained(base)
        how = dict(r=4, target_modules="all-linear", task_type="CAUSAL_LM") | how
        model = get_peft_model(model, LoraConfig(**how))
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(folder)
        return folder

    return base, make


@pytest.mark.parametrize("how", [dict(lora_alpha=32), dict(lora_alpha=7), dict(lora_alpha=8, use_rslora=True)])
def test_an_adapter_acts_as_in_peft_whatever_its_scaling(trained_elsewhere, tmp_path, how):
    base, make = trained_elsewhere
    folder = make(**how)
    student = load_student(str(base), quant="none", dtype="fp32", lora_rank=4, lora_alpha=32)
    student.load_adapter(folder)
    want = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)(input_ids=IDS).logits[0]
    got = student.rollout_logits(hidden(student, student.rollout_hidden))
    torch.testing.assert_close(got, want, atol=2e-4, rtol=0)
    student.save_adapter(tmp_path)  # and once more, with our scaling in its config
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path)(input_ids=IDS).logits[0]
    torch.testing.assert_close(again, want, atol=2e-4, rtol=0)


def test_an_adapter_of_our_own_comes_back_bit_for_bit(tmp_path):
    student = tiny(lora_rank=3, lora_alpha=7)
    train(student)
    student.save_adapter(tmp_path)
    other = tiny(lora_rank=3, lora_alpha=7, seed=1)
    other.load_adapter(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(student.trainable(), other.trainable(), strict=True))


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        (dict(rank_pattern={"q_proj": 2}), "has rank_pattern set, which"),
        (dict(alpha_pattern={"q_proj": 2}), "has alpha_pattern set, which"),
        (dict(use_dora=True), "has use_dora set, which"),
        (dict(bias="all"), "has bias set, which"),
        (dict(modules_to_save=["norm"]), "has modules_to_save set, which"),
        (dict(init_lora_weights="pissa"), r"a base that was changed with it \(pissa\); merge it"),
        (dict(target_modules=["q_proj"]), r"for other layers \(.*\.lora_A.weight is only in one of the two\)"),
        (dict(r=8), "another --lora-rank"),
    ],
)
def test_an_adapter_that_does_more_than_ours_is_refused(trained_elsewhere, how, sentence):
    base, make = trained_elsewhere
    folder = make(**how)
    student = load_student(str(base), quant="none", dtype="fp32", lora_rank=4)
    before = [p.clone() for p in student.trainable()]
    with pytest.raises(UserError, match=sentence):
        student.load_adapter(folder)
    assert all(torch.equal(a, b) for a, b in zip(before, student.trainable(), strict=True))


@pytest.mark.parametrize(
    "config",
    [None, "{", "[]", "[" * 100_000, '{"peft_type": "IA3", "r": 4, "lora_alpha": 8}', '{"peft_type": "LORA", "r": 4}',
     '{"peft_type": "LORA", "r": Infinity, "lora_alpha": 8}', '{"peft_type": "LORA", "r": 0, "lora_alpha": 8}',
     '{"peft_type": "LORA", "r": 4, "lora_alpha": NaN}'],
)  # fmt: skip
def test_an_adapter_without_a_sound_config_is_refused(tmp_path, config):
    student = tiny(lora_rank=4)
    student.save_adapter(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.unlink()
    if config is not None:
        file.write_text(config)
    with pytest.raises(UserError, match=r"adapter_config.json cannot be read as an adapter \(.*a PEFT LoRA"):
        student.load_adapter(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="its pipes")
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_of_pipes_is_refused(tmp_path, name):
    student = tiny(lora_rank=4)
    student.save_adapter(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name} cannot be read as an adapter \(.*it is not a file"):
        student.load_adapter(tmp_path)


# What it says of itself


def test_a_student_describes_itself():
    assert tiny("nf4", "bf16", lora_rank=4).describe() == (
        "tiny (random weights): 0.8 M parameters, NF4, bfloat16 on cpu; training 0.03 M in adapters of rank 4"
    )


# The tiny student's tokenizer


@settings(max_examples=100)
@given(st.text())
def test_any_text_survives_the_tiny_tokenizer(text):
    text = text.encode("utf-8", "replace").decode()
    tokenizer = _TOKENIZER
    assert tokenizer.decode(tokenizer.encode(text, split_special_tokens=True)) == text


_TOKENIZER = tiny_tokenizer()


def test_bytes_are_their_own_ids():
    plain = bytes(b for b in range(128) if chr(b) not in "aA")
    assert _TOKENIZER.encode("A") == [65]
    assert _TOKENIZER.encode("é") == [0xC3, 0xA9]
    assert [_TOKENIZER.encode(chr(b)) for b in plain] == [[b] for b in plain]
    assert _TOKENIZER.all_special_ids == [257, 256]
    assert _TOKENIZER.encode("<|im_end|>") == [257]
    assert 257 not in _TOKENIZER.encode("<|im_end|>", split_special_tokens=True)


def test_a_tiny_prompt_is_short_and_a_call_few_tokens():
    example = generate("train", size=1, seed=0, levels=(1,))[0]
    ids = Chat(_TOKENIZER).prompt_ids(example)
    assert len(ids) < 160
    call = '<tool_call>{"name": "subtract", "arguments": {"a": 36, "b": 26}}</tool_call>'
    assert len(_TOKENIZER.encode(call)) == 11
