"""Attention of rows that decode one token each, over keys and values that lie in pages.

Mathematics. Row b sees the tokens 0 .. end_b - 1 of its sequence, or the last `window` of them:

    out_b = sum over t of softmax_t(scaling q_b . k_t) v_t

Token t < shared_b lies at place t of the pool: a prefix that many rows share, in the pool's first pages. Token
t >= shared_b lies on the row's own pages, i = t - shared_b: at place tables[b, i // page] page + i % page.

Bytes and FLOPs: every row reads its own keys and values once, 2 Hkv D numbers a token; that is the floor, at 4 Hq D
FLOPs a token. The prefix is read by all rows. The torch backend reads it once, as ONE product for the whole batch; the
Triton backend once a row, from the L2 cache all but the first time.

The Triton kernels (the split over the sequence is that of Flash-Decoding, Dao et al. 2023):

    _attend_split   a row, a KV head, SPLIT tokens of the sequence: running maximum m, sum s of exp(score - m), and the
                    same sum of values; the query heads that share the KV head are rows of one product
    _merge_splits   a row's splits together

SPLIT does not depend on the batch, so a row's bits do not depend on who decodes beside it (tested in the interpreter,
not yet on a GPU). Nothing on the host depends on a length: lengths and tables are read on the device, so one CUDA graph
serves every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl

from mentor_kernels.backend import interpreted, resolve_backend
from mentor_kernels.head_launches import Launch
from mentor_kernels.linear_logprob import BARRED, START


@dataclass(eq=False)
class PagedRows:
    """Where the keys and values of B rows lie; all tensors int64, on the pool's device."""

    tables_BN: torch.Tensor
    """The pages of each row, in order; those behind its last token do not matter, but exist."""
    shared_B: torch.Tensor
    """Leading tokens in the shared prefix: all of it, or 0."""
    end_B: torch.Tensor
    """Tokens that the row sees; at least one lies on its own pages."""
    prefix: int
    """Length of the shared prefix."""
    page: int
    """Tokens of a page."""

    @property
    def longest(self) -> int:
        """No row can see more tokens."""
        return self.prefix + self.tables_BN.shape[1] * self.page

    def advance(self) -> None:
        """One token more for each row, in place."""
        self.end_B += 1
        vars(self).pop("back_BS", None)

    @cached_property
    def back_BS(self) -> torch.Tensor:
        """How many tokens each place lies before the row's last one: the prefix's places, then its own pages'.

        Negative where the row has no token.
        """
        own = torch.arange(self.tables_BN.shape[1] * self.page, device=self.end_B.device)
        shared_B1, last_B1 = self.shared_B[:, None], self.end_B[:, None] - 1
        places_1P = torch.arange(self.prefix, device=own.device)[None]
        back_BP = (last_B1 - places_1P).masked_fill(shared_B1 == 0, -1)
        return torch.cat([back_BP, last_B1 - shared_B1 - own], 1)


# --- the torch backend: the readable reference, and the path that CPUs run -----------------------------------------


def _attend_torch(query_BQD, keys, values, rows: PagedRows, scaling: float, window: int | None) -> torch.Tensor:
    """All in float32; the query heads that share a KV head are rows of one product."""
    B, _, D = query_BQD.shape
    kv_heads, P = keys.shape[2], rows.prefix
    pages = -(-P // rows.page)
    q = (query_BQD.transpose(0, 1).float() * scaling).unflatten(0, (kv_heads, -1))  # [Hkv, rep, B, D]
    q_flat = q.flatten(1, 2)  # [Hkv, rep * B, D]
    prefix_k, prefix_v = (x[:pages].flatten(0, 1)[:P].float().transpose(0, 1) for x in (keys, values))  # [Hkv, P, D]
    own_k, own_v = (
        x.index_select(0, rows.tables_BN.flatten()).view(B, -1, kv_heads, D).float().transpose(1, 2)
        for x in (keys, values)
    )  # [B, Hkv, S, D]
    q_rows = q.permute(2, 0, 1, 3)  # [B, Hkv, rep, D]
    scores_prefix = (q_flat @ prefix_k.mT).unflatten(1, (-1, B)).permute(2, 0, 1, 3)  # [B, Hkv, rep, P]
    blind_BS = rows.back_BS < 0 if window is None else (rows.back_BS < 0) | (rows.back_BS >= window)
    scores = torch.cat([scores_prefix, q_rows @ own_k.mT], -1).masked_fill_(blind_BS[:, None, None], float("-inf"))
    weights = scores.softmax(-1)
    from_prefix = weights[..., :P].permute(1, 2, 0, 3).flatten(1, 2) @ prefix_v  # [Hkv, rep * B, D]
    out = from_prefix.unflatten(1, (-1, B)).permute(2, 0, 1, 3) + weights[..., P:] @ own_v
    return out.reshape(B, -1, D).to(query_BQD.dtype)


# --- the Triton backend --------------------------------------------------------------------------------------------

SPLIT = 256
"""Tokens of a sequence that one program reads."""
# By bytes of an element: without spills, `python -m mentor_kernels.aot` shows it.
ATTEND = {
    2: Launch(dict(BLOCK=64), warps=4, stages=2),
    4: Launch(dict(BLOCK=32), warps=8, stages=1),
}
WIDE = {**ATTEND, 4: Launch(dict(BLOCK=16), warps=8, stages=1)}
"""For heads of more than 128; with 32 tokens, Triton 3.6 would spill there."""
MERGE = Launch(dict(BLOCK_S=8), warps=4, stages=1)


# These change from step to step: a kernel compiled for a width of 16 pages would be compiled again for 17.
@triton.jit(do_not_specialize=("window", "splits", "table_stride"))
def _attend_split(
    query_ptr, keys_ptr, values_ptr, tables_ptr, shared_ptr, end_ptr, sum_ptr, m_ptr, s_ptr,
    scaling, window, splits, kv_heads, repeats, D, query_stride, query_head_stride, table_stride,
    PAGE: tl.constexpr, SPLIT: tl.constexpr, START: tl.constexpr, BARRED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: SPLIT tokens of a row under one KV head. Splits outside the row's tokens store a sum of 0."""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    shared, end = tl.load(shared_ptr + row), tl.load(end_ptr + row)
    oldest = tl.maximum(end - window, 0)
    stop = tl.minimum(split * SPLIT + SPLIT, end)
    # Blocks lie where they always lie, a window or not.
    begin = tl.maximum(split * SPLIT, oldest // BLOCK * BLOCK)
    rep_Q, d_D = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    head_Q = kv_head * repeats + rep_Q
    wide_QD = (rep_Q < repeats)[:, None] & (d_D < D)[None, :]
    at_QD = head_Q[:, None] * query_head_stride + d_D[None, :]
    q_QD = tl.load(query_ptr + row.to(tl.int64) * query_stride + at_QD, mask=wide_QD, other=0.0)
    m_Q = tl.full([BLOCK_Q], START, tl.float32)
    s_Q = tl.zeros([BLOCK_Q], tl.float32)
    sum_QD = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in range(begin, stop, BLOCK):
        t_T = start + tl.arange(0, BLOCK)
        seen_T = (t_T >= oldest) & (t_T < stop)
        own_T = t_T - shared
        page_T = tl.load(
            tables_ptr + row.to(tl.int64) * table_stride + own_T // PAGE, mask=seen_T & (own_T >= 0), other=0
        )
        place_T = tl.where(own_T < 0, t_T, page_T * PAGE + own_T % PAGE).to(tl.int64)
        at_TD = (place_T[:, None] * kv_heads + kv_head) * D + d_D[None, :]
        mask_TD = seen_T[:, None] & (d_D < D)[None, :]
        k_TD = tl.load(keys_ptr + at_TD, mask=mask_TD, other=0.0)
        score_QT = tl.dot(q_QD, tl.trans(k_TD), input_precision="ieee") * scaling
        score_QT = tl.where(seen_T[None, :], score_QT, BARRED)
        higher_Q = tl.maximum(m_Q, tl.max(score_QT, 1))
        shrink_Q = tl.exp(m_Q - higher_Q)
        e_QT = tl.exp(score_QT - higher_Q[:, None])
        v_TD = tl.load(values_ptr + at_TD, mask=mask_TD, other=0.0)
        s_Q = s_Q * shrink_Q + tl.sum(e_QT, 1)
        sum_QD = tl.dot(e_QT.to(v_TD.dtype), v_TD, sum_QD * shrink_Q[:, None], input_precision="ieee")
        m_Q = higher_Q
    to_Q = (row.to(tl.int64) * kv_heads * repeats + head_Q) * splits + split
    tl.store(m_ptr + to_Q, m_Q, mask=rep_Q < repeats)
    tl.store(s_ptr + to_Q, s_Q, mask=rep_Q < repeats)
    if begin < stop:
        tl.store(sum_ptr + to_Q[:, None] * D + d_D[None, :], sum_QD, mask=wide_QD)


@triton.jit(do_not_specialize=("splits",))
def _merge_splits(
    sum_ptr, m_ptr, s_ptr, out_ptr, splits, D,
    START: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: a row's query head."""
    at = tl.program_id(0).to(tl.int64)
    d_D = tl.arange(0, BLOCK_D)
    m, total = START, 0.0
    sum_D = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, splits, BLOCK_S):
        split_S = start + tl.arange(0, BLOCK_S)
        m_S = tl.load(m_ptr + at * splits + split_S, mask=split_S < splits, other=START)
        s_S = tl.load(s_ptr + at * splits + split_S, mask=split_S < splits, other=0.0)
        # A split without tokens has stored no values.
        mask_SD = (s_S > 0)[:, None] & (d_D < D)[None, :]
        part_SD = tl.load(sum_ptr + (at * splits + split_S)[:, None] * D + d_D[None, :], mask=mask_SD, other=0.0)
        higher = tl.maximum(m, tl.max(m_S))
        weight_S, shrink = tl.exp(m_S - higher), tl.exp(m - higher)
        sum_D = sum_D * shrink + tl.sum(part_SD * weight_S[:, None], 0)
        total = total * shrink + tl.sum(s_S * weight_S)
        m = higher
    tl.store(out_ptr + at * D + d_D, (sum_D / total).to(out_ptr.dtype.element_ty), mask=d_D < D)


def attend_launch(element: int, width: int) -> Launch:
    """For an element of so many bytes and heads of `width`, a power of two."""
    return (WIDE if width > 128 else ATTEND)[element]


def _attend_triton(query_BQD, keys, values, rows: PagedRows, scaling: float, window: int | None) -> torch.Tensor:
    """As `_attend_torch`, without a host sync; the keys' dtype meets the tensor cores."""
    B, heads, D = query_BQD.shape
    kv_heads, splits = keys.shape[2], triton.cdiv(rows.longest, SPLIT)
    query_BQD = query_BQD.to(keys.dtype)
    query_BQD = query_BQD if query_BQD.stride(2) == 1 else query_BQD.contiguous()
    out_BQD = query_BQD.new_empty(B, heads, D)
    sums = query_BQD.new_empty(B, heads, splits, D, dtype=torch.float32)
    m, s = sums.new_empty(2, B, heads, splits)
    width = triton.next_power_of_2(D)
    launch = attend_launch(keys.element_size(), width)
    with torch.cuda.device_of(keys):
        _attend_split[(B, kv_heads, splits)](
            query_BQD, keys, values, rows.tables_BN, rows.shared_B, rows.end_B, sums, m, s,
            scaling, rows.longest if window is None else window, splits, kv_heads, heads // kv_heads, D,
            query_BQD.stride(0), query_BQD.stride(1), rows.tables_BN.stride(0),
            PAGE=rows.page, SPLIT=SPLIT, START=START, BARRED=BARRED, **launch.blocks,
            BLOCK_Q=max(16, triton.next_power_of_2(heads // kv_heads)), BLOCK_D=max(16, width),
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
        _merge_splits[(B * heads,)](
            sums, m, s, out_BQD, splits, D,
            START=START, **MERGE.blocks, BLOCK_D=max(16, width), num_warps=MERGE.warps, num_stages=MERGE.stages,
        )  # fmt: skip
    return out_BQD


# --- the public function -------------------------------------------------------------------------------------------


def paged_attention(
    query_BQD: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: PagedRows,
    *,
    scaling: float,
    window: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """What each row's token attends to, [B, Q, D] in the query's dtype.

    keys and values [pages, page, Hkv, D] are contiguous, float32, bfloat16 or float16; query head h reads KV head
    h // (Q / Hkv). A window sees that many tokens, the row's own last one included. Not differentiable. What `rows`
    says of lengths and pages is not checked: to look would stop the CPU until the GPU has caught up.

    Raises ValueError for shapes or dtypes that do not agree, and for an unknown backend.
    """
    _check(query_BQD, keys, values, rows, window)
    backend = resolve_backend(backend, keys.device)
    if backend == "triton" and interpreted() and keys.dtype is torch.bfloat16:
        raise ValueError("Triton's interpreter computes garbage from bfloat16; use float32, or backend='torch'")
    if not len(query_BQD):
        return torch.empty_like(query_BQD)
    attend = _attend_triton if backend == "triton" else _attend_torch
    return attend(query_BQD, keys, values, rows, scaling, window).to(query_BQD.dtype)


def _check(query_BQD, keys, values, rows: PagedRows, window: int | None) -> None:
    if query_BQD.dim() != 3 or keys.dim() != 4 or keys.shape != values.shape or keys.dtype != values.dtype:
        raise ValueError(
            "expected query_BQD [B, Q, D] and keys and values [pages, page, Hkv, D] of one dtype, not "
            f"{tuple(query_BQD.shape)}, {keys.dtype} {tuple(keys.shape)} and {values.dtype} {tuple(values.shape)}"
        )
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("keys and values must be contiguous")
    B, heads, D = query_BQD.shape
    if keys.shape[3] != D or keys.shape[1] != rows.page or heads % keys.shape[2]:
        raise ValueError(
            f"query_BQD {tuple(query_BQD.shape)} and pages of {rows.page} tokens do not go with keys "
            f"{tuple(keys.shape)}"
        )
    if {B} != {len(rows.tables_BN), len(rows.shared_B), len(rows.end_B)}:
        raise ValueError(f"query_BQD has {B} rows, but the tables have {len(rows.tables_BN)}")
    if window is not None and window < 1:
        raise ValueError(f"a window has at least 1 token, not {window}")
