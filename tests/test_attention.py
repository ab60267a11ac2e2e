"""Packed attention: a token sees exactly its own path, and packed models equal unpacked ones, gradients included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lite_mentor.attention import PackedPlan, as_bias, under_bias
from lite_mentor.errors import UserError
from lite_mentor.load import load_student
from lite_mentor.tiny import tiny_student

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

WINDOW = 8
MODELS = {
    "llama": {},
    "llama-untied": dict(architecture="llama", tied=False),
    "qwen2": {},
    "qwen3": {},
    "gemma3_text": dict(
        sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "mistral": dict(sliding_window=WINDOW),
    "granite": dict(logits_scaling=8.0),
    "cohere": dict(logit_scale=0.0625),
    "gemma2": dict(attn_logit_softcapping=None, final_logit_softcapping=5.0, sliding_window=WINDOW),
}
# A root of 7, two children (5 and 1), and leaves: four rollouts that share their prefixes, and one that shares nothing.
STARTS, PARENTS, TOKENS = [0, 7, 12, 18, 21, 22, 31], [-1, 0, 1, 1, 0, 4, -1], 36
LENGTHS = [7, 5, 6, 3, 1, 9, 5]
PATHS = [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 4], [0, 4, 5], [6]]


def test_the_paths_of_the_forest():
    plan = PackedPlan(STARTS, PARENTS, TOKENS)
    assert plan.paths == PATHS
    assert plan.lengths == LENGTHS


@pytest.mark.parametrize(
    ("starts", "parents", "tokens"),
    [([], [], 0), ([0, 3], [-1], 5), ([1], [-1], 5), ([0, 3], [-1, 1], 5), ([0, 3], [-1, 0], 3), ([0], [-2], 3),
     ([0, 3, 2], [-1, 0, 0], 5)],
)  # fmt: skip
def test_what_is_not_a_forest_is_refused(starts, parents, tokens):
    with pytest.raises(ValueError, match="not a forest"):
        PackedPlan(starts, parents, tokens)


@st.composite
def forests(draw):
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=8))
    parents = [draw(st.integers(-1, s - 1)) for s in range(len(lengths))]
    return [sum(lengths[:s]) for s in range(len(lengths))], parents, sum(lengths)


def seen_by(starts, parents, tokens, window):
    """For each token the tokens it may see, from the definition: walk its path."""
    segment = [max(s for s, start in enumerate(starts) if start <= t) for t in range(tokens)]
    ends = [*starts[1:], tokens]
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for t in range(tokens):
        path = list(range(starts[segment[t]], t + 1))
        ancestor = parents[segment[t]]
        while ancestor >= 0:
            path = [*range(starts[ancestor], ends[ancestor]), *path]
            ancestor = parents[ancestor]
        seen[t, path[-window:] if window else path] = True
    return seen


@settings(max_examples=40)
@given(forests(), st.sampled_from([None, 1, 3, 100]))
def test_both_forms_see_what_the_definition_says(forest, window):
    starts, parents, tokens = forest
    plan, seen = PackedPlan(*forest), seen_by(starts, parents, tokens, window)
    assert torch.equal(plan._dense_mask(window), seen)
    torch.manual_seed(0)
    query = torch.randn(1, 4, tokens, 8, dtype=torch.float64)
    key, value = torch.randn(2, 1, 2, tokens, 8, dtype=torch.float64)
    got = plan.attend(0, query, key, value, scaling=0.3, window=window)
    want = F.scaled_dot_product_attention(query, key, value, seen, scale=0.3, enable_gqa=True)
    assert got.shape == (1, tokens, 4, 8)
    torch.testing.assert_close(got, want.transpose(1, 2), atol=1e-12, rtol=0)
    bias = as_bias(seen, query.dtype)
    assert bias.stride(0) % 16 == 0
    torch.testing.assert_close(under_bias(query, key, value, bias, 0.3), want, atol=1e-12, rtol=0)


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """One float32 student of each kind, its adapters no longer zero."""
    made = {}

    def get(kind):
        if kind not in made:
            options = dict(architecture=kind) | MODELS[kind]
            folder = tiny_student(tmp_path_factory.mktemp(kind), num_hidden_layers=3, hidden_size=64, **options)
            made[kind] = load_student(str(folder), quant="none", dtype="fp32", lora_rank=4)
            torch.manual_seed(1)
            for parameter in made[kind].trainable():
                torch.nn.init.normal_(parameter, std=0.1)
            made[kind].refresh_rollout_weights()
        return made[kind]

    return get


def packed_row():
    ids_T = torch.randint(300, (TOKENS,), generator=torch.Generator().manual_seed(2))
    positions = {}
    for s, path in enumerate(PATHS):
        offset = sum(LENGTHS[a] for a in path[:-1])
        positions[s] = torch.arange(offset, offset + LENGTHS[s])
    rows = [torch.cat([torch.arange(STARTS[s], STARTS[s] + LENGTHS[s]) for s in path]) for path in PATHS]
    return ids_T, torch.cat([positions[s] for s in range(len(PATHS))]), rows


def logits(student, hidden_TH):
    scaled = hidden_TH @ student.head_weight_VH.T * student.logit_scale
    return scaled if student.softcap is None else student.softcap * torch.tanh(scaled / student.softcap)


def alone(student, ids):
    """The model's own forward on one sequence, with transformers' own attention and masks."""
    student.base.set_attn_implementation("eager")
    out = student.base(input_ids=ids[None], use_cache=False).logits[0]
    student.base.set_attn_implementation("lite_mentor")
    return out


def gradients(student, loss):
    student.model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in student.trainable()]


@pytest.mark.parametrize("kind", MODELS)
def test_a_packed_row_equals_each_sequence_alone(students, kind):
    student = students(kind)
    ids_T, positions_T, rows = packed_row()
    hidden_TH = student.hidden(ids_T[None], positions_T[None], PackedPlan(STARTS, PARENTS, TOKENS))
    packed_TV = logits(student, hidden_TH)
    atol = 1e-5 * float(packed_TV.detach().abs().max())
    for row in rows:
        torch.testing.assert_close(packed_TV[row], alone(student, ids_T[row]), atol=atol, rtol=0)
    leaves = [rows[i] for i in (2, 3, 5, 6)]
    weights = [torch.randn(len(row), packed_TV.shape[1]) / 10 for row in leaves]
    packed = sum((packed_TV[row] * w).sum() for row, w in zip(leaves, weights, strict=True))
    got = gradients(student, packed)
    want = gradients(student, sum((alone(student, ids_T[r]) * w).sum() for r, w in zip(leaves, weights, strict=True)))
    for g, w in zip(got, want, strict=True):
        assert w.norm() > 0
        assert (g - w).norm() < 5e-5 * w.norm()


def test_a_short_window_matters(students):
    """Else the sliding-window cases above would prove nothing."""
    student = students("mistral")
    ids_T, positions_T, rows = packed_row()
    assert len(rows[2]) > WINDOW
    seen = student.hidden(ids_T[None], positions_T[None], PackedPlan(STARTS, PARENTS, TOKENS))
    for layer in student.base.model.layers:
        layer.self_attn.config.sliding_window = None
    try:
        wide = student.hidden(ids_T[None], positions_T[None], PackedPlan(STARTS, PARENTS, TOKENS))
    finally:
        student.config.sliding_window = WINDOW
    torch.testing.assert_close(seen[: WINDOW - 1], wide[: WINDOW - 1], atol=1e-6, rtol=0)
    assert (seen[rows[2][WINDOW:]] - wide[rows[2][WINDOW:]]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_gradient_checkpointing_changes_nothing(tmp_path, kind):
    folder = tiny_student(tmp_path, architecture=kind, hidden_size=64)
    ids_T, positions_T, _ = packed_row()
    grads = []
    for checkpointing in (False, True):
        student = load_student(str(folder), quant="none", dtype="fp32", gradient_checkpointing=checkpointing)
        torch.manual_seed(0)
        for parameter in student.trainable():
            torch.nn.init.normal_(parameter, std=0.1)
        # transformers 5.23 renamed it.
        names = ("is_activation_checkpointing", "is_gradient_checkpointing")
        assert getattr(student.base, next(n for n in names if hasattr(student.base, n))) == checkpointing
        hidden_TH = student.hidden(ids_T[None], positions_T[None], PackedPlan(STARTS, PARENTS, TOKENS))
        grads.append(gradients(student, hidden_TH.square().sum()))
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("gemma2", {}, "caps its attention scores"),
        ("gpt_oss", dict(num_local_experts=2), "attention sinks|of type"),
        ("mamba", {}, "Adapters cannot be put"),
        ("lfm2", dict(layer_types=["conv", "full_attention", "conv"]), "does not reproduce"),
        (
            "stablelm",
            dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16, partial_rotary_factor=1.0),
            "does not pass arguments on",
        ),
        ("qwen3_moe", dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32), "of type Qwen3MoeExperts"),
    ],
)
def test_models_that_compute_otherwise_are_refused(tmp_path, architecture, options, message):
    folder = tiny_student(tmp_path, architecture=architecture, hidden_size=64, **options)
    with pytest.raises(UserError, match=message):
        load_student(str(folder), quant="none", dtype="fp32")
