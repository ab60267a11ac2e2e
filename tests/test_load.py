"""Loading a student: what cannot be right is refused in a sentence, and what depends on its neighbours is fixed."""

from __future__ import annotations

import ast
import builtins
import contextlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lite_mentor import assets
from lite_mentor.attention import PackedPlan
from lite_mentor.engine import Engine
from lite_mentor.errors import UserError
from lite_mentor.load import load_student, load_tokenizer
from lite_mentor.tiny import tiny_student, tiny_tokenizer

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

ROOT = Path(__file__).parent.parent
IDS = torch.randint(300, (1, 20), generator=torch.Generator().manual_seed(3))


def load(folder, quant="none", dtype="fp32", **options):
    return load_student(str(folder), quant=quant, dtype=dtype, lora_rank=4, **options)


def logits(student, ids_1T, first=0, **beside):
    """Ours, of a sequence from position `first` on, alone or before others in its row: positions by their ids."""
    rows = [(ids_1T[0], torch.arange(first, first + ids_1T.shape[1])), *beside.values()]
    starts = [sum(len(ids) for ids, _ in rows[:i]) for i in range(len(rows))]
    ids_T, positions_T = (torch.cat(parts) for parts in zip(*rows, strict=True))
    plan = PackedPlan(starts, [-1] * len(rows), len(ids_T))
    hidden_TH = student.rollout_hidden(ids_T[None], positions_T[None], plan)
    return student.rollout_logits(hidden_TH)[: ids_1T.shape[1]]


# Families of models


SMALL = dict(
    vocab_size=338, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=257, pad_token_id=257,
)  # fmt: skip
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
GEMMA = dict(
    num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=4, head_dim=16,
    hidden_size_per_layer_input=16, vocab_size_per_layer_input=338, num_kv_shared_layers=2,
)  # fmt: skip
GEMMA3N = GEMMA | dict(laurel_rank=8, activation_sparsity_pattern=[0.0] * 4, intermediate_size=[64] * 4)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
OTHERS_CODE = r"its own code fails under this trainer's attention and adapters \(%s: "
TWICE, SHAPES = "attends twice under one layer index", "differ in their heads of keys and values"
NO_PLACE, BIAS = "has no place for another attention than its own", "head of the student .* has a bias"
NOT_OURS = "no attention that can be taken over"
FAMILIES = [
    ("llama", {}, "none", ""),
    ("llama", dict(attention_bias=True, mlp_bias=True), "nf4", ""),
    ("qwen2", dict(use_sliding_window=True, sliding_window=4, max_window_layers=0), "none", ""),
    ("qwen3", dict(head_dim=16), "nf4", ""),
    ("gemma3_text", GEMMA, "none", ""),
    ("gemma3n_text", GEMMA3N, "none", ""),
    ("gemma3n_text", GEMMA3N, "nf4", OTHERS_CODE % "RuntimeError"),
    ("gemma4_text", GEMMA | dict(global_head_dim=32), "none", SHAPES),
    ("mistral", dict(sliding_window=4), "none", ""),
    ("smollm3", {}, "none", ""),
    ("opt", dict(ffn_dim=64, word_embed_proj_dim=32, layerdrop=0.5), "none", ""),
    ("gpt_neox", {}, "none", ""),
    ("jetmoe", dict(kv_channels=16, num_local_experts=4, num_experts_per_tok=2), "none", ""),
    ("diffllama", {}, "none", TWICE),
    ("hrm_text", {}, "none", TWICE),
    ("minicpm3", LATENT, "none", SHAPES),
    ("youtu", LATENT, "none", SHAPES),
    ("deepseek_v3", LATENT | dict(first_k_dense_replace=2), "none", SHAPES),
    ("phi", {}, "none", BIAS),
    ("gptj", dict(rotary_dim=4), "none", f"{BIAS}|{NO_PLACE}"),
    ("falcon", {}, "none", NO_PLACE),
    ("gpt_neo", dict(num_layers=2, attention_types=[[["global", "local"], 1]]), "none", NO_PLACE),
    ("bloom", {}, "none", NOT_OURS),
    ("xlstm", dict(num_heads=2), "none", NOT_OURS),
    ("mpt", dict(d_model=32, n_heads=4, n_layers=2), "none", OTHERS_CODE % "AttributeError"),
    ("phimoe", EXPERTS, "none", OTHERS_CODE % "AttributeError"),
    ("zamba2", dict(num_hidden_layers=4, layers_block_type=["mamba", "hybrid"] * 2), "none", TWICE),
    ("recurrent_gemma", dict(num_hidden_layers=3, head_dim=8, lru_width=32), "none", "does not reproduce"),
]  # fmt: skip


def family(folder, architecture, options):
    """A random model, its biases too, where most are zero at first."""
    changes = SMALL | options
    if architecture in ("falcon", "jetmoe"):  # these count heads otherwise
        del changes["num_key_value_heads" if architecture == "falcon" else "num_attention_heads"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **changes))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("architecture", "options", "quant", "refusal"), FAMILIES, ids=[f"{f[0]}-{f[2]}" for f in FAMILIES]
)
def test_a_family_is_taken_or_refused_in_bf16_as_in_float32(tmp_path, architecture, options, quant, refusal):
    family(tmp_path, architecture, options)
    for dtype in ("fp32", "bf16"):
        if not refusal:
            student = load(tmp_path, quant, dtype)
            assert student.cache.layers == student.config.num_hidden_layers
            continue
        with pytest.raises(UserError, match=refusal) as error:
            load(tmp_path, quant, dtype)
        assert "\n" not in str(error.value)
        if refusal.startswith(OTHERS_CODE[:20]):
            assert type(error.value.__cause__).__name__ in str(error.value)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "opt", "gpt_neox"])
def test_dropout_is_off_wherever_it_is_set(tmp_path, architecture):
    rates = dict(attention_dropout=0.5, hidden_dropout=0.5, dropout=0.5, activation_dropout=0.5, layerdrop=0.9)
    options = rates | (dict(ffn_dim=64, word_embed_proj_dim=32) if architecture == "opt" else {})
    student = load(family(tmp_path, architecture, options))
    assert torch.equal(logits(student, IDS), logits(student, IDS))


# Rotary embeddings that depend on the longest position


def long_rope(kind):
    if kind == "dynamic":
        return dict(architecture="llama", rope_parameters=dict(rope_theta=1e4, rope_type="dynamic", factor=4.0))
    factors = dict(short_factor=[1.0] * 4, long_factor=[1 + 0.5 * i for i in range(4)])
    rope = dict(rope_theta=1e4, rope_type="longrope", original_max_position_embeddings=64, **factors)
    if kind == "longrope":
        return dict(architecture="phi3", original_max_position_embeddings=64, rope_parameters=rope)
    by_layer = dict(full_attention=rope, sliding_attention=dict(rope_theta=1e3, rope_type="default"))
    types = ["sliding_attention", "full_attention"]
    return dict(architecture="gemma3_text", head_dim=8, rope_parameters=by_layer, layer_types=types)


@pytest.mark.parametrize("kind", ["longrope", "dynamic", "by layer"])
@pytest.mark.parametrize("context", [64, 200])
def test_one_scale_for_all_that_is_decided_by_the_longest_sequence(tmp_path, kind, context):
    """Within the original length it is the model's own there; beyond, its own for a sequence of that length."""
    options = long_rope(kind)
    if kind == "dynamic":
        options |= dict(max_position_embeddings=64)
    folder = family(tmp_path, options.pop("architecture"), options)
    student = load(folder, context=context)
    assert student.context == context
    far = torch.randint(300, (1, context), generator=torch.Generator().manual_seed(1))
    own = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(logits(student, far), own(input_ids=far).logits[0], atol=2e-5, rtol=0)
    alone = logits(student, IDS)
    neighbour = torch.arange(4), torch.arange(context - 4, context)
    torch.testing.assert_close(logits(student, IDS, neighbour=neighbour), alone, atol=2e-5, rtol=0)
    assert f"scaled for sequences of up to {context} tokens" in student.describe()
    with pytest.raises(UserError, match=rf"for sequences of {context} tokens.* may have {context + 1}; load it for"):
        Engine.of(student, slots=1, context=context + 1)
    Engine.of(student, slots=1, context=context)


def test_without_a_context_rotary_embeddings_are_scaled_for_all_that_the_model_takes(tmp_path):
    assert load(family(tmp_path / "a", **arguments("longrope"))).context == 256
    assert load(family(tmp_path / "b", **arguments("dynamic"))).context == 4 * 256
    assert load(family(tmp_path / "c", "llama", {})).context is None


def arguments(kind):
    options = long_rope(kind)
    return dict(architecture=options.pop("architecture"), options=options)


# Tokens


@pytest.mark.parametrize(
    ("token", "template", "refused"),
    [
        (AddedToken("What is", special=False, normalized=False), None, True),
        (AddedToken("<image>", special=True, normalized=False), None, False),  # as Gemma 3 has it
        (AddedToken("<image>", special=True, normalized=False), "<image>", True),
    ],
)
def test_a_token_behind_the_embedding_is_refused_where_text_can_hold_it(tmp_path, token, template, refused):
    folder = tiny_student(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([token], special_tokens=token.special)
    tokenizer.chat_template = (template or "") + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    if not refused:
        assert load(folder).head_weight_VH.shape[0] == 338 < len(tokenizer)
        return
    with pytest.raises(UserError, match=f"token {token.content!r} with the id 338, and its embedding only 338 rows"):
        load(folder)


# The base's name


def test_an_adapter_names_a_base_that_is_found_from_anywhere(tmp_path, monkeypatch):
    tiny_student(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    load("mine").save_adapter(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "mine")


@pytest.mark.parametrize(
    ("name", "folder", "want"),
    [
        ("smollm2-135m", "students/smollm2-135m-2", "students/smollm2-135m-2"),
        ("smollm2-135m", "hub/models--x--y/snapshots/abc", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("Qwen/Qwen3-1.7B", "hub/models--Qwen--Qwen3-1.7B/snapshots/abc", "Qwen/Qwen3-1.7B"),
        ("hub/models--x--y/snapshots/abc", "hub/models--x--y/snapshots/abc", "hub/models--x--y/snapshots/abc"),
    ],
)
def test_the_name_by_which_others_find_a_student(tmp_path, monkeypatch, name, folder, want):
    monkeypatch.chdir(tmp_path)
    (tmp_path / folder).mkdir(parents=True)
    found = assets.published(name, tmp_path / folder)
    assert found == (str(tmp_path / want) if os.path.isdir(want) else want)


# What is refused


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_a_folder_with_an_adapter_beside_the_model_is_refused(tmp_path, quant):
    folder = tiny_student(tmp_path)
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=4)).save_pretrained(folder)
    with pytest.raises(UserError, match=r"holds an adapter \(adapter_config.json\), which would be left out; merge it"):
        load(folder, quant)


def spoil(folder, how):
    weights = folder / "model.safetensors"
    config = json.loads((folder / "config.json").read_text())
    if how == "no config":
        (folder / "config.json").unlink()
    elif how == "config is not JSON":
        (folder / "config.json").write_text("{")
    elif how == "unknown architecture":
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "nonsense"}))
    elif how == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif how == "no weights":
        weights.unlink()
    elif how == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "weights are no safetensors":
        weights.write_bytes(b"garbage" * 100)
    elif how == "pickled weights":
        torch.save(load_file(weights), folder / "pytorch_model.bin")
        weights.unlink()
    elif how == "a tensor is missing":
        tensors = load_file(weights)
        del tensors["model.layers.0.mlp.up_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif how == "a tensor has another shape":
        tensors = load_file(weights)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
        save_file(tensors, weights, metadata={"format": "pt"})
    elif how == "foreign code":
        config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
        (folder / "evil.py").write_text("raise SystemExit('ran')")


@pytest.mark.parametrize(
    "how",
    ["no config", "config is not JSON", "unknown architecture", "no tokenizer", "no weights", "truncated weights",
     "weights are no safetensors", "pickled weights", "a tensor is missing", "a tensor has another shape",
     "foreign code"],
)  # fmt: skip
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_a_damaged_folder_is_refused_in_a_sentence(tmp_path, how, quant):
    folder = tiny_student(tmp_path / "student")
    spoil(folder, how)
    with pytest.raises(UserError) as error:
        load_student(str(folder), quant=quant, dtype="fp32")
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["{}", "null", '{"version": "1.0", "model": {"type": "BPE"}}', "\x1b[2J"])
def test_a_tokenizer_that_cannot_be_read_is_a_sentence(tmp_path, content):
    folder = tiny_student(tmp_path / "student")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="its tokenizer cannot be loaded from"):
        load_tokenizer(str(folder))


def test_no_code_of_a_model_runs_and_nobody_is_asked():
    """Without the word transformers asks on the terminal, where `y` may be on its way for another question."""
    found = 0
    for path in (path for folder in ("lite_mentor", "bench", "kernels") for path in (ROOT / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if not re.search(r"from_pretrained|from_config|pipeline\(", text):
            continue
        calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        loading = [call for call in calls if getattr(call.func, "attr", "") in ("from_pretrained", "from_config")]
        for call in loading:
            said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert said.get("trust_remote_code") == "False", f"{path}, line {call.lineno}"
        # Under another name it would not be seen here.
        assert len(re.findall(r"from_pretrained|from_config|pipeline\(", text)) == len(loading), path
        found += len(loading)
    assert found >= 8


def test_a_tokenizer_with_code_of_its_own(tmp_path, monkeypatch):
    folder, ran = tiny_student(tmp_path / "student"), tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    file = folder / "tokenizer_config.json"
    hostile = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    file.write_text(json.dumps(json.loads(file.read_text()) | hostile))
    asked = []
    monkeypatch.setattr(builtins, "input", lambda question: asked.append(question) or "y")
    for use in (lambda: load_tokenizer(str(folder)), lambda: load(folder)):
        with contextlib.suppress(UserError):  # some versions of transformers take its own class instead
            use()
    assert not asked
    assert not ran.exists()


@pytest.mark.parametrize("why", [None, OSError("libcudart.so.13: cannot open shared object file")])
def test_nf4_without_bitsandbytes_is_a_sentence(monkeypatch, why):
    def fails(name, *rest):
        if name == "bitsandbytes" and why:
            raise why
        return imported(name, *rest)

    imported = builtins.__import__
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # importing it raises ModuleNotFoundError
    monkeypatch.setattr(builtins, "__import__", fails)
    with pytest.raises(UserError, match=r"^--quant nf4 needs bitsandbytes, which .*; pip install bitsandbytes, or"):
        load("tiny", "nf4")
    assert not load("tiny").quantised


def test_a_copied_folder_is_the_same_student(tmp_path):
    folder = tiny_student(tmp_path / "a")
    shutil.copytree(folder, tmp_path / "b")
    one, two = (load(tmp_path / n) for n in "ab")
    assert torch.equal(logits(one, IDS), logits(two, IDS))
    assert torch.equal(logits(one, IDS), logits(load("tiny"), IDS))


def test_the_end_of_a_turn(tmp_path):
    assert load("tiny").eos_ids == (257,)
    folder = tiny_student(tmp_path)
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [10, 257, 11]}))
    assert load(folder).eos_ids == (257, 10, 11)
