"""Segments over their own keys: training's forest and the engine's mixed steps through a varlen kernel.

Without a GPU a stand-in with the kernel's signature takes its place, one explicit mask a segment; it is compared with
the dense mask of the definition, and stand-ins with a defect must be refused by the same comparison.
"""

from __future__ import annotations

import random
import sys
import types
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mentor_kernels import gather_rows

from lite_mentor import attention, paging
from lite_mentor.attention import PackedPlan, as_bias, takes_varlen, under_bias
from lite_mentor.errors import UserError
from lite_mentor.load import load_student
from lite_mentor.paging import PagePool, Span, StepPlan
from lite_mentor.tiny import tiny_student
from tests.test_attention import MODELS, PARENTS, STARTS, TOKENS, forests, packed_row, seen_by

# --- a stand-in for the kernel, and wrong ones -----------------------------------------------------------------------


def seen_from_the_end(Q: int, K: int, window_size: tuple[int, int]) -> torch.Tensor:
    """bool [Q, K] of a segment: the last query is aligned with the last key."""
    left, right = window_size
    back = torch.arange(Q)[:, None] + K - Q - torch.arange(K)
    seen = back >= -right
    return seen if left < 0 else seen & (back <= left)


def kernel_of(seen):
    """A stand-in whose queries see what `seen(Q, K, window_size)` says; as strict about its input as the kernel is."""

    def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        bounds_q, bounds_k = cu_seq_q.tolist(), cu_seq_k.tolist()
        assert (bounds_q[0], bounds_k[0], bounds_q[-1], bounds_k[-1]) == (0, 0, len(query), len(key))
        lengths = [torch.tensor(b).diff().tolist() for b in (bounds_q, bounds_k)]
        assert [type(max_q), type(max_k)] == [int, int]
        assert (max_q, max_k) == tuple(max(n) for n in lengths)
        assert type(window_size) is tuple
        assert enable_gqa or query.shape[1] == key.shape[1]
        assert query.dtype == key.dtype == value.dtype
        assert {x.stride(-1) for x in (query, key, value)} == {1}
        out = []
        for q, k, v in zip(query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]), strict=True):
            how = dict(attn_mask=seen(len(q), len(k), window_size), scale=scale, enable_gqa=enable_gqa)
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            out.append(F.scaled_dot_product_attention(q, k, v, **how)[0].transpose(0, 1))
        return torch.cat(out)

    return kernel


def from_the_start(Q, K, window_size):
    back = torch.arange(Q)[:, None] - torch.arange(K)
    return (back >= 0) & ((window_size[0] < 0) | (back <= window_size[0]))


def a_token_too_far_back(Q, K, window_size):
    return seen_from_the_end(Q, K, (window_size[0] + (window_size[0] >= 0), 0))


def a_token_too_few(Q, K, window_size):
    return seen_from_the_end(Q, K, (max(window_size[0] - 1, 0) if window_size[0] >= 0 else -1, 0))


def without_the_first_key(Q, K, window_size):
    seen = seen_from_the_end(Q, K, window_size)
    seen[:, : min(1, K - Q)] = False
    return seen


def the_next_token(Q, K, window_size):
    return seen_from_the_end(Q, K, (window_size[0], 1))


def no_window(Q, K, window_size):
    return seen_from_the_end(Q, K, (-1, 0))


WRONG = [from_the_start, a_token_too_far_back, a_token_too_few, without_the_first_key, the_next_token, no_window]


@contextmanager
def through(kernel, grouped: bool):
    """Every attention of the plans goes through this stand-in."""
    with mock.patch.multiple(
        attention, varlen_attn=kernel, GROUPED=grouped, FLASH_ATTN=False, takes_varlen=lambda query: True
    ):
        yield


# --- the forest ------------------------------------------------------------------------------------------------------


def attended(plan, qkv, window) -> list[torch.Tensor]:
    """[1, T, heads, D] and the gradients by query, key and value of an uneven sum of it."""
    leaves = [x.clone().requires_grad_() for x in qkv]
    out = plan.attend(0, *leaves, scaling=0.3, window=window)
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


class Defined:
    """The attention of the definition, under its dense mask; as a plan."""

    def __init__(self, forest, window):
        self.seen = seen_by(*forest, window)

    def attend(self, layer, query, key, value, *, scaling, window):
        seen = self.seen.to(query.device)
        return F.scaled_dot_product_attention(query, key, value, seen, scale=scaling, enable_gqa=True).transpose(1, 2)


def inputs(tokens: int, heads: int, kv_heads: int, dtype: torch.dtype, D: int = 8) -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, n, tokens, D, generator=make, dtype=torch.float64).to(dtype) for n in (heads, kv_heads, kv_heads)
    ]


def check(kernel, forest, window, *, heads=(4, 2), dtype=torch.float64, grouped=False, plan_of=PackedPlan) -> None:
    """The forest through this kernel: output and gradients are the definition's."""
    qkv = inputs(forest[2], *heads, dtype)
    with through(kernel, grouped):
        found = attended(plan_of(*forest), qkv, window)
    wanted = attended(Defined(forest, window), qkv, window)
    bound = 1e-12 if dtype is torch.float64 else 2e-5
    for name, a, b in zip(("output", "query", "key", "value"), found, wanted, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= bound * (1 + float(b.abs().max())), name


DEEP = ([0, 1, 3, 4, 8, 9, 10], [-1, 0, 1, 2, 3, 2, 5], 13)
"""Six generations, and segments of one token."""
FLAT = ([0, 4, 7, 8], [-1, -1, -1, -1], 12)
"""Nothing is shared."""
WIDE = ([0, 6, 8, 9, 14, 17], [-1, 0, 0, 1, 1, 2], 20)
HEADS = {"one KV head each": (3, 3), "grouped": (6, 2), "one for all": (4, 1)}


@pytest.mark.parametrize("grouped", [False, True], ids=["repeated", "grouped by the kernel"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("forest", [DEEP, FLAT, WIDE], ids=["deep", "flat", "wide"])
def test_the_forest_through_a_kernel(forest, window, heads, grouped):
    check(kernel_of(seen_from_the_end), forest, window, heads=heads, grouped=grouped)
    check(kernel_of(seen_from_the_end), forest, window, heads=heads, grouped=grouped, dtype=torch.float32)


@settings(max_examples=40)
@given(forests(), st.sampled_from([None, 1, 2, 5, 100]), st.sampled_from(list(HEADS.values())), st.booleans())
def test_any_forest_through_a_kernel_and_one_by_one(forest, window, heads, grouped):
    check(kernel_of(seen_from_the_end), forest, window, heads=heads, grouped=grouped)
    qkv = inputs(forest[2], *heads, torch.float64)
    found, wanted = attended(PackedPlan(*forest), qkv, window), attended(Defined(forest, window), qkv, window)
    for a, b in zip(found, wanted, strict=True):
        assert float((a - b).abs().max()) <= 1e-12 * (1 + float(b.abs().max()))


@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
def test_a_wrong_kernel_is_refused(wrong):
    refused = 0
    for window in (None, 3):
        try:
            check(kernel_of(wrong), WIDE, window)
        except AssertionError:
            refused += 1
    assert refused


class WithoutTheRoot(PackedPlan):
    """Grandchildren see their parent, but not its own."""

    def __init__(self, *forest):
        super().__init__(*forest)
        self.paths = [path[-2:] for path in self.paths]


def test_a_missing_ancestor_is_refused():
    with pytest.raises(AssertionError):
        check(kernel_of(seen_from_the_end), WIDE, None, plan_of=WithoutTheRoot)


def test_repeated_heads_in_another_order_are_refused(monkeypatch):
    def wrong(source, copies, *, repeats, backend):
        out = gather_rows(source, copies, repeats=repeats, backend=backend)
        return out.unflatten(1, (-1, repeats)).transpose(1, 2).flatten(1, 2)

    monkeypatch.setattr(attention, "gather_rows", wrong)
    with pytest.raises(AssertionError):
        check(kernel_of(seen_from_the_end), WIDE, None)


def test_the_index_is_made_once():
    plan = PackedPlan(*WIDE)
    with through(kernel_of(seen_from_the_end), False):
        first = plan.copies, plan.segments.bounds
        attended(plan, inputs(WIDE[2], 4, 2, torch.float32), None)
    assert plan.copies is first[0]
    assert plan.segments.bounds is first[1]


@pytest.mark.parametrize("kind", MODELS)
def test_models_in_bf16_through_a_kernel(tmp_path, kind):
    """What a model hands over is what the kernel takes, and checkpointing hands it over again."""
    options = dict(architecture=kind) | MODELS[kind]
    folder = tiny_student(tmp_path, num_hidden_layers=3, hidden_size=64, **options)
    student = load_student(str(folder), quant="none", dtype="bf16", lora_rank=4, gradient_checkpointing=True)
    ids_T, positions_T, _ = packed_row()
    calls, results = [], []

    def counted(query, *arguments, **how):
        calls.append(query.dtype)
        return kernel_of(seen_from_the_end)(query, *arguments, **how)

    for kernel in (False, True):
        with through(counted, False) if kernel else nullcontext():
            hidden_TH = student.hidden(ids_T[None], positions_T[None], PackedPlan(STARTS, PARENTS, TOKENS))
            hidden_TH.float().square().sum().backward()
        grads = torch.cat([p.grad.flatten() for p in student.trainable()])
        student.model.zero_grad()
        results.append((hidden_TH.detach().float(), grads))
    assert calls == [torch.bfloat16] * 6  # three layers, forward and again in the backward
    for one_by_one, through_kernel in zip(*results, strict=True):
        assert one_by_one.norm() > 0
        assert float((through_kernel - one_by_one).norm() / one_by_one.norm()) < 0.05


# --- which kernel ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "D", "cuda", "takes"),
    [
        (torch.bfloat16, 128, True, True), (torch.float16, 64, True, True), (torch.bfloat16, 256, True, True),
        (torch.bfloat16, 80, True, True), (torch.float32, 128, True, False), (torch.bfloat16, 100, True, False),
        (torch.bfloat16, 264, True, False), (torch.bfloat16, 208, True, False), (torch.bfloat16, 128, False, False),
    ],
)  # fmt: skip
def test_what_a_kernel_takes(monkeypatch, dtype, D, cuda, takes):
    monkeypatch.setattr(attention, "_has_flash", lambda device: True)
    query = SimpleNamespace(is_cuda=cuda, dtype=dtype, shape=(1, 4, 9, D), device="cuda:0")
    assert takes_varlen(query) is takes


@pytest.mark.parametrize(
    ("capability", "built", "takes"), [((8, 0), True, True), ((7, 5), True, False), ((9, 0), False, False)]
)
def test_which_gpu_has_one(monkeypatch, capability, built, takes):
    attention._has_flash.cache_clear()
    monkeypatch.setattr(attention, "FLASH_ATTN", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    assert attention._has_flash(torch.device("cuda:0")) is takes
    attention._has_flash.cache_clear()


def test_flash_attn_is_called_in_its_own_words(monkeypatch):
    """Its arguments stand in another order behind the lengths, and it is asked for the deterministic backward."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
    ):  # fmt: skip
        assert (dropout_p, causal, deterministic) == (0.0, True, True)
        how = dict(scale=softmax_scale, window_size=window_size, enable_gqa=True)
        kernel = kernel_of(seen_from_the_end)
        return kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **how)

    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    attention._flash_attn.cache_clear()
    qkv = inputs(WIDE[2], 4, 2, torch.float64)
    with mock.patch.multiple(attention, FLASH_ATTN=True, GROUPED=True, takes_varlen=lambda query: True):
        for window in (None, 3):
            found = attended(PackedPlan(*WIDE), qkv, window)
            for a, b in zip(found, attended(Defined(WIDE, window), qkv, window), strict=True):
                torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    attention._flash_attn.cache_clear()


def test_a_flash_attn_that_cannot_be_imported_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    attention._flash_attn.cache_clear()
    with pytest.raises(UserError, match=r"flash-attn is installed but cannot be imported .*; install .*, or remove it"):
        attention._flash_attn()


# --- mixed steps of the engine ---------------------------------------------------------------------------------------


def step(rows: list[tuple[int, int]], prefix: int, window: int | None, dtype=torch.float32, device="cpu", D=8):
    """(the step's attention, what it should be) of rows with `cached` and `new` tokens, on shuffled pages of 4.

    A row whose `cached` is below the prefix does not share it.
    """
    make, pages = torch.Generator().manual_seed(0), list(range(-(-prefix // 4), 200))
    random.Random(0).shuffle(pages)
    pool = PagePool(layers=1, pages=200, page=4, kv_heads=2, head_dim=D, device=device, dtype=dtype)
    tokens = sum(new for _, new in rows)
    q, k, v = (torch.randn(1, n, tokens, D, generator=make).to(device, dtype) for n in (6, 2, 2))
    for cache in (pool.keys, pool.values):
        cache.copy_(torch.randn(cache.shape, generator=make))
    spans, wanted, at = [], [], 0
    for cached, new in rows:
        shared, end = prefix if cached >= prefix else 0, cached + new
        table = [pages.pop() for _ in range(pool.pages_for(end - shared))]
        spans.append(Span(table, shared, cached, end))
        places = [*range(shared), *(table[i // 4] * 4 + i % 4 for i in range(end - shared))][:cached]
        seen = seen_from_the_end(new, end, (-1 if window is None else window - 1, 0)).to(device)
        own = slice(at, at + new)
        old_k, old_v = (x[0].flatten(0, 1)[places].transpose(0, 1)[None] for x in (pool.keys, pool.values))
        row = (q[:, :, own], torch.cat([old_k, k[:, :, own]], 2), torch.cat([old_v, v[:, :, own]], 2))
        row = (x.double() for x in row)
        wanted.append(F.scaled_dot_product_attention(*row, seen, scale=0.3, enable_gqa=True)[0].transpose(0, 1))
        at += new
    plan = StepPlan(pool, prefix, spans)
    return plan, plan.attend(0, q, k, v, scaling=0.3, window=window)[0], torch.cat(wanted)


STEPS = {
    "a prompt": ([(0, 9)], 0),
    "prompts behind a prefix": ([(6, 3), (6, 8), (6, 2)], 6),
    "results among rows that decode": ([(9, 1), (12, 4), (7, 1), (30, 5), (6, 7)], 6),
    "one without the prefix": ([(0, 5), (9, 3)], 6),
    "all decode": ([(9, 1), (7, 1)], 6),
}


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "one by one"])
@pytest.mark.parametrize("gathered", [8192, 20], ids=["at once", "in parts"])
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("rows", STEPS.values(), ids=STEPS)
def test_a_mixed_step(monkeypatch, rows, window, gathered, kernel):
    monkeypatch.setattr(paging, "GATHERED", gathered)
    if kernel:
        for grouped in (False, True):
            with through(kernel_of(seen_from_the_end), grouped):
                plan, found, wanted = step(*rows, window)
            torch.testing.assert_close(found.double(), wanted, atol=2e-6, rtol=1e-5)
    else:
        plan, found, wanted = step(*rows, window)
        torch.testing.assert_close(found.double(), wanted, atol=2e-6, rtol=1e-5)
    assert sum(len(s.segments.queries) for s in plan.several) == sum(new > 1 for _, new in rows[0])
    assert len(plan.several) <= (1 if gathered > 20 else 4)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
def test_a_mixed_step_through_a_wrong_kernel_is_refused(wrong):
    off = []
    for window in (None, 3):
        with through(kernel_of(wrong), False):
            _, found, wanted = step(*STEPS["results among rows that decode"], window)
        off.append(float((found - wanted).abs().max()))
    assert max(off) > 1e-3


# --- the real kernel -------------------------------------------------------------------------------------------------


def big_forest() -> tuple[list[int], list[int], int]:
    lengths, parents = [130, 60, 1, 257, 90, 33, 64, 128, 5], [-1, 0, 0, 1, 1, 2, 2, 0, 7]
    return [sum(lengths[:s]) for s in range(len(lengths))], parents, sum(lengths)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("window", [None, 7, 100])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_the_real_kernel_errs_no_more_than_the_dense_mask(heads, window, D):
    forest = big_forest()
    qkv = [x.cuda() for x in inputs(forest[2], *heads, torch.bfloat16, D)]
    assert takes_varlen(qkv[0])
    plan = PackedPlan(*forest, "cuda")
    found = attended(plan, qkv, window)
    exact = attended(Defined(forest, window), [x.double() for x in qkv], window)
    with mock.patch.object(attention, "takes_varlen", return_value=False):
        dense = attended(plan, qkv, window)
    for name, a, b, x in zip(("output", "query", "key", "value"), found, dense, exact, strict=True):
        errors = [float((y.double() - x).norm() / x.norm()) for y in (a, b)]
        assert errors[0] <= 2 * errors[1] + 1e-4, f"{name}: {errors}"


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("rows", STEPS.values(), ids=STEPS)
def test_a_mixed_step_on_a_gpu(rows, window):
    for dtype, bound in ((torch.bfloat16, 3e-2), (torch.float32, 1e-4)):
        _, found, wanted = step(*rows, window, dtype, "cuda", D=64)
        assert float((found - wanted).abs().max() / wanted.abs().max()) <= bound


@pytest.mark.gpu
def test_float32_takes_the_dense_mask_on_a_gpu():
    forest = big_forest()
    qkv = [x.cuda() for x in inputs(forest[2], 4, 2, torch.float32, 64)]
    assert not takes_varlen(qkv[0])
    found, wanted = attended(PackedPlan(*forest, "cuda"), qkv, 50), attended(Defined(forest, 50), qkv, 50)
    for a, b in zip(found, wanted, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-4


def test_the_bias_says_what_the_mask_says():
    seen = seen_by(*WIDE, 3)
    q, k, v = inputs(WIDE[2], 4, 2, torch.float64)
    wanted = F.scaled_dot_product_attention(q, k, v, seen, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(under_bias(q, k, v, as_bias(seen, q.dtype), 0.3), wanted, atol=1e-12, rtol=0)
