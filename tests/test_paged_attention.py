"""Attention over pages: both backends against float64 on every trap, wrong twins, what a row's bits depend on."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from mentor_kernels import PagedRows, paged_attention
from mentor_kernels.paged_attention import ATTEND, SPLIT, attend_launch
from paged_checks import check_paged, paged_case, paged_cases, reference

BLOCK = ATTEND[4].blocks["BLOCK"]
NAMES = [case.name for case in paged_cases(8, 4)]
by_torch, by_triton = (partial(paged_attention, backend=name) for name in ("torch", "triton"))


def seen(case):
    """Values that no row may see as 0: the torch backend multiplies what it masks with a weight of 0."""
    return replace(case, keys=case.keys.nan_to_num(0), values=case.values.nan_to_num(0))


# --- against float64 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("i", range(len(NAMES)), ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_torch_against_float64(dtype, i):
    check_paged(by_torch, seen(paged_cases(16, 4, dtype)[i]))


@pytest.mark.parametrize("i", range(len(NAMES)), ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_kernel_against_float64(kernel_device, dtype, i):
    check_paged(by_triton, paged_cases(SPLIT, BLOCK, dtype)[i], kernel_device)


@pytest.mark.gpu
@pytest.mark.parametrize("i", range(len(NAMES)), ids=NAMES)
def test_the_kernel_against_float64_in_bf16(i):
    check_paged(by_triton, paged_cases(SPLIT, BLOCK, torch.bfloat16)[i], "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("D", "window"), [(256, None), (160, None), (256, 70)])
def test_wide_heads_against_float64(kernel_device, dtype, D, window):
    """float32 takes fewer tokens at once there."""
    own = [1, SPLIT - 1, SPLIT + attend_launch(dtype.itemsize, 256).blocks["BLOCK"] + 1]
    check_paged(by_triton, paged_case("wide", own, prefix=21, D=D, window=window, dtype=dtype), kernel_device)


def test_wide_float32_heads_have_a_launch_of_their_own():
    """Every width up to 256 compiles without spills with Triton 3.6 and 3.7: python -m mentor_kernels.aot."""
    assert [attend_launch(4, width).blocks["BLOCK"] for width in (64, 128, 256)] == [32, 32, 16]
    assert [attend_launch(2, width).blocks["BLOCK"] for width in (64, 128, 256)] == [64, 64, 64]


# --- what a row depends on -----------------------------------------------------------------------------------------


def part(case, chosen: list[int]):
    """The case with these rows alone."""
    rows = case.rows
    fewer = PagedRows(rows.tables_BN[chosen], rows.shared_B[chosen], rows.end_B[chosen], rows.prefix, rows.page)
    return replace(case, query_BQD=case.query_BQD[chosen], rows=fewer)


def run(operator, case, device="cpu"):
    rows = case.rows
    rows = PagedRows(*(t.to(device) for t in (rows.tables_BN, rows.shared_B, rows.end_B)), rows.prefix, rows.page)
    inputs = (t.to(device) for t in (case.query_BQD, case.keys, case.values))
    return operator(*inputs, rows, scaling=case.scaling, window=case.window).cpu()


@pytest.mark.parametrize("window", [None, 20])
def test_a_row_has_the_same_bits_in_every_batch(kernel_device, window):
    case = paged_case("", [SPLIT + 9, 1, 40], prefix=7, window=window)
    whole = run(by_triton, case, kernel_device)
    for chosen in ([0], [2, 1], [1, 1, 0]):
        assert torch.equal(run(by_triton, part(case, chosen), kernel_device), whole[chosen])


def test_a_longer_table_changes_no_bit(kernel_device):
    short, long = (paged_case("", [5, 9], prefix=3, extra=extra) for extra in (0, 2 * SPLIT // 4))
    keys, values = long.keys.clone(), long.values.clone()
    for cache, source in ((keys, short.keys), (values, short.values)):
        cache[0] = source[0]  # the prefix
        for table, other in zip(long.rows.tables_BN, short.rows.tables_BN, strict=True):
            cache[table[: len(other)]] = source[other]
    long = replace(long, keys=keys, values=values, query_BQD=short.query_BQD)
    assert torch.equal(run(by_triton, long, kernel_device), run(by_triton, short, kernel_device))


def test_strided_queries(kernel_device):
    """As the model hands them over: the heads before the rows."""
    case = paged_case("", [5, 9], prefix=3)
    strided = replace(case, query_BQD=case.query_BQD.transpose(0, 1).contiguous().transpose(0, 1))
    assert torch.equal(run(by_triton, strided, kernel_device), run(by_triton, case, kernel_device))


def test_rows_advance_in_place():
    case = seen(paged_case("", [5, 9], prefix=3, extra=1))
    before = replace(case, rows=part(case, [0, 1]).rows)
    address = before.rows.end_B.data_ptr()
    run(by_torch, before)  # what it keeps for other layers must not outlive the token
    before.rows.advance()
    assert before.rows.end_B.tolist() == [9, 13]
    assert before.rows.end_B.data_ptr() == address
    assert run(by_torch, before).numpy() == pytest.approx(reference(before).numpy(), abs=1e-5)


# --- wrong twins ---------------------------------------------------------------------------------------------------


def twin(change):
    """`right` on a changed problem."""

    def operator(query_BQD, keys, values, rows, *, scaling, window):
        inputs = dict(query_BQD=query_BQD, keys=keys, values=values, rows=rows, scaling=scaling, window=window)
        inputs |= change(**inputs)
        return by_torch(**inputs)

    return operator


def with_rows(rows, **changes):
    fields = {name: getattr(rows, name) for name in ("tables_BN", "shared_B", "end_B", "prefix", "page")}
    return dict(rows=PagedRows(**(fields | changes)))


def _swap_heads(query_BQD, keys, **_):
    """Query head h reads KV head h % Hkv."""
    kv = keys.shape[2]
    order = torch.arange(query_BQD.shape[1]).view(-1, kv).T.flatten()
    return dict(query_BQD=query_BQD[:, order])


WRONG = {
    "without the newest token": lambda rows, **_: with_rows(
        rows, end_B=torch.maximum(rows.end_B - 1, rows.shared_B + 1)
    ),
    "one token too many": lambda rows, **_: with_rows(rows, end_B=rows.end_B + 1),
    "everybody has the prefix": lambda rows, **_: with_rows(
        rows, shared_B=rows.shared_B * 0 + rows.prefix, end_B=rows.end_B - rows.shared_B + rows.prefix
    ),
    "nobody has the prefix": lambda rows, **_: with_rows(
        rows, shared_B=rows.shared_B * 0, end_B=rows.end_B - rows.shared_B
    ),
    "pages in another order": lambda rows, **_: with_rows(rows, tables_BN=rows.tables_BN.flip(1)),
    "pages of the row before": lambda rows, **_: with_rows(rows, tables_BN=rows.tables_BN.roll(1, 0)),
    "a window one too wide": lambda window, **_: dict(window=window and window + 1),
    "a window one too narrow": lambda window, **_: dict(window=window and max(1, window - 1)),
    "no window": lambda **_: dict(window=None),
    "no scaling": lambda **_: dict(scaling=1.0),
    "values for keys": lambda values, **_: dict(keys=values),
    "heads in another order": _swap_heads,
}  # fmt: skip


def passes(operator) -> bool:
    try:
        for case in paged_cases(16, 4):
            check_paged(operator, seen(case))
    except (AssertionError, IndexError):
        return False
    return True


@pytest.mark.parametrize("name", WRONG)
def test_wrong_ones_are_rejected(name):
    assert not passes(twin(WRONG[name]))


def test_the_right_one_passes():
    assert passes(twin(lambda **_: {}))


# --- garbage -------------------------------------------------------------------------------------------------------


def test_no_rows(kernel_device):
    empty = part(paged_case("", [5], prefix=3), [])
    for operator in (by_torch, by_triton):
        assert run(operator, empty, kernel_device).shape == (0, 6, 8)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: dict(query_BQD=c["query_BQD"][0]), r"expected query_BQD \[B, Q, D\]"),
        (lambda c: dict(values=c["values"][:1]), "keys and values"),
        (lambda c: dict(values=c["values"].half()), "of one dtype"),
        (lambda c: dict(query_BQD=c["query_BQD"][:, :, :5]), "do not go with keys"),
        (lambda c: dict(query_BQD=c["query_BQD"][:, :5]), "do not go with keys"),
        (lambda c: dict(query_BQD=c["query_BQD"][:1]), "query_BQD has 1 rows, but the tables have 2"),
        (lambda c: dict(keys=c["keys"].transpose(1, 2).contiguous().transpose(1, 2)), "must be contiguous"),
        (lambda _: dict(window=0), "a window has at least 1 token, not 0"),
        (lambda _: dict(backend="cuda"), "backend must be"),
    ],
)
def test_what_has_no_meaning_is_refused(change, sentence):
    case = paged_case("", [5, 9], prefix=3)
    inputs = dict(query_BQD=case.query_BQD, keys=case.keys, values=case.values, rows=case.rows, scaling=1.0)
    with pytest.raises(ValueError, match=sentence):
        paged_attention(**(inputs | change(inputs)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes bf16")
def test_the_interpreter_is_not_trusted_with_bf16():
    case = paged_case("", [5], dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="interpreter computes garbage from bfloat16"):
        run(by_triton, case)
