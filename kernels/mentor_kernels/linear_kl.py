"""Exact KL(policy || reference) of each row, over the whole vocabulary, from hidden states and one frozen head.

Mathematics. For row n with hidden states h and h' (reference), logits z and z' (linear_logprob.py), d_v = z_v - z'_v:

    KL = E_p[log p - log q] = E_p[d] - g,       g = logsumexp(z) - logsumexp(z')

    d KL / d h = scale / T sum_v p_v (d_v - g - KL) k_v W_v

The estimators k1 and k3 of policy_loss.py look at the sampled token alone; this is their mean over all tokens that
could have been sampled, and its gradient the mean of theirs, without their variance. g is formed from the two maxima
and the two logs apart, so an offset that both policies' logits share never meets a small number.

FLOPs, in units of one GEMM of the head: 2 for the value (both logits). Its gradient takes 2 more on the torch backend,
which sums p d k W and p k W apart because KL and g are known only at the end of its sweep, and 1 more on the Triton
backend, which stores d beside e. Bytes: as linear_logprob, and d of a chunk.
"""

from __future__ import annotations

import torch

from mentor_kernels.backend import resolve_head_backend
from mentor_kernels.linear_logprob import (
    START,
    Head,
    accumulate,
    balanced,
    check_head,
    check_triton,
    chunks,
    float32_sums,
    gradient_chunk,
    logits,
    new_rows,
    operand,
    rows_last_contiguous,
    score_chunk,
    tiles,
    wide_dtype,
)


def _forward_torch(
    hidden_NH: torch.Tensor,
    ref_hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    temperature: float,
    softcap: float | None,
    scale: float,
    jacobian: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(kl_N, d kl / d hidden [N, H], or [0, H] without `jacobian`)."""
    N, H = hidden_NH.shape
    hidden_NH, ref_hidden_NH, wide = operand(hidden_NH), operand(ref_hidden_NH), wide_dtype(hidden_NH.dtype)
    m_N, s_N, a_N, ref_m_N, ref_s_N = hidden_NH.new_tensor([START, 0, 0, START, 0], dtype=wide)[:, None].repeat(1, N)
    plain_N, by_d_N, centre_N = hidden_NH.new_zeros(3, N, dtype=wide)
    plain_NH, by_d_NH = (hidden_NH.new_zeros(N if jacobian else 0, H, dtype=wide) for _ in range(2))
    for rows, weight_CH, first in tiles(hidden_NH, weight_VH):
        z_RC, slope_RC = logits(hidden_NH[rows], weight_CH, temperature, softcap, scale)
        ref_z_RC, _ = logits(ref_hidden_NH[rows], weight_CH, temperature, softcap, scale)
        ref_m_R = torch.maximum(ref_m_N[rows], ref_z_RC.amax(1))
        ref_s_N[rows] *= torch.exp(ref_m_N[rows] - ref_m_R)
        ref_s_N[rows] += (ref_z_RC - ref_m_R[:, None]).exp_().sum(1)
        ref_m_N[rows] = ref_m_R
        d_RC = z_RC - ref_z_RC

        m_R = torch.maximum(m_N[rows], z_RC.amax(1))
        shrink_R = torch.exp(m_N[rows] - m_R)
        m_N[rows] = m_R
        e_RC = z_RC.sub_(m_R[:, None]).exp_()
        s_N[rows] = s_N[rows] * shrink_R + e_RC.sum(1)
        a_N[rows] = a_N[rows] * shrink_R + (e_RC * d_RC).sum(1)
        if jacobian:
            if slope_RC is not None:
                e_RC.mul_(slope_RC)
            if weight_CH.dtype is not wide:
                # An offset that all d share has no part in the gradient, but would in what e d is rounded to.
                if first == 0:
                    centre_N[rows] = d_RC.mean(1)
                d_RC.sub_(centre_N[rows, None])
            accumulate(plain_NH[rows], plain_N[rows], e_RC, weight_CH, shrink_R)
            accumulate(by_d_NH[rows], by_d_N[rows], e_RC.mul_(d_RC), weight_CH, shrink_R)

    g_N = (m_N - ref_m_N) + (s_N.log() - ref_s_N.log())
    kl_N = a_N / s_N - g_N
    if jacobian:
        level_N = g_N + kl_N - centre_N
        if balanced(hidden_NH, softcap):
            level_N = by_d_N / plain_N  # the same, but for what rounding did to the sums
        factor_N = scale / temperature / s_N
        by_d_NH.sub_(plain_NH.mul_(level_N[:, None])).mul_(factor_N[:, None])
    return kl_N, by_d_NH


def _forward_triton(
    hidden_NH: torch.Tensor,
    ref_hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    temperature: float,
    softcap: float | None,
    scale: float,
    jacobian: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_forward_torch`, but for the Jacobian's dtype, which is that of the hidden states."""
    head = Head(rows_last_contiguous(weight_VH), temperature, softcap, scale)
    hidden_NH, ref_hidden_NH = rows_last_contiguous(hidden_NH), rows_last_contiguous(ref_hidden_NH)
    found = new_rows(hidden_NH, reference=True)
    jacobian_NH = hidden_NH.new_empty(hidden_NH.shape if jacobian else (0, hidden_NH.shape[1]))
    # The kernels treat one column of each row apart, as its target; which one does not matter here.
    targets_N = torch.zeros(hidden_NH.shape[0], dtype=torch.int64, device=hidden_NH.device)
    one_N = hidden_NH.new_ones(hidden_NH.shape[0], dtype=torch.float32)
    for rows, space in chunks(hidden_NH, head, jacobian, reference=True):
        part = found.part(rows)
        score_chunk(hidden_NH[rows], targets_N[rows], head, space, part, ref_hidden_NH[rows])
        if jacobian:
            nothing_R = torch.zeros_like(part.kl_R)
            gradient_chunk(targets_N[rows], head, space, part, jacobian_NH[rows], nothing_R, None, one_N[rows])
    return found.kl_R, jacobian_NH


# --- the operator that autograd and torch.compile see --------------------------------------------------------------


@torch.library.custom_op("mentor_kernels::linear_kl", mutates_args=())
def _linear_kl(
    hidden_NH: torch.Tensor,
    ref_hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    temperature: float,
    softcap: float | None,
    scale: float,
    jacobian: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    if backend == "triton":
        with torch.cuda.device_of(hidden_NH):
            return _forward_triton(hidden_NH, ref_hidden_NH, weight_VH, temperature, softcap, scale, jacobian)
    with float32_sums(hidden_NH):
        return _forward_torch(hidden_NH, ref_hidden_NH, weight_VH, temperature, softcap, scale, jacobian)


@_linear_kl.register_fake
def _(hidden_NH, ref_hidden_NH, weight_VH, temperature, softcap, scale, jacobian, backend):
    N, H = hidden_NH.shape
    kl_N = hidden_NH.new_empty(N, dtype=wide_dtype(hidden_NH.dtype))
    dtype = hidden_NH.dtype if backend == "triton" else kl_N.dtype
    return kl_N, kl_N.new_empty(N if jacobian else 0, H, dtype=dtype)


def _setup_context(ctx, inputs, output):
    _, jacobian_NH = output
    ctx.mark_non_differentiable(jacobian_NH)
    ctx.save_for_backward(jacobian_NH)
    ctx.dtype = inputs[0].dtype


def _backward(ctx, grad_kl_N, _jacobian):
    (jacobian_NH,) = ctx.saved_tensors
    return (grad_kl_N[:, None] * jacobian_NH).to(ctx.dtype), *[None] * 7


_linear_kl.register_autograd(_backward, setup_context=_setup_context)


# --- the public function -------------------------------------------------------------------------------------------


def linear_kl(
    hidden_NH: torch.Tensor,
    ref_hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    backend: str | None = None,
) -> torch.Tensor:
    """KL(policy || reference) of each row in nats, float32 [N]; both distributions as in `linear_logprob`.

    hidden_NH, ref_hidden_NH [N, H] and weight_VH [V, H] have one dtype: float32, bfloat16 or float16 (float64 in,
    float64 out, on the torch backend). Differentiable in hidden_NH alone. Rounding can leave an exact 0 a little below
    0. Raises ValueError as `linear_logprob` does.
    """
    for hidden in (hidden_NH, ref_hidden_NH):
        targets_N = torch.empty(hidden_NH.shape[:1], dtype=torch.int64, device=hidden_NH.device)
        check_head(hidden, weight_VH, targets_N, temperature, softcap)
    backend = resolve_head_backend(backend, hidden_NH.device)
    if backend == "triton":
        check_triton(hidden_NH)
    kl_N, _ = _linear_kl(
        hidden_NH, ref_hidden_NH, weight_VH, float(temperature), None if softcap is None else float(softcap),
        float(scale), torch.is_grad_enabled() and hidden_NH.requires_grad, backend,
    )  # fmt: skip
    return kl_N
