"""The policy loss straight from hidden states: `policy_loss` of `linear_logprob`, its gradient in one sweep.

Mathematics. With c and b the loss's slopes by a token's logprob and by its entropy (policy_loss.py),

    d loss / d h = c d logp / d h + b d H / d h + a d KL / d h

is one sum over the vocabulary, K3's loss mode (linear_logprob.py); a, of the exact KL (linear_kl.py), is beta w. The
coefficients of a token are known as soon as its logprob is, so a chunk of rows goes through K1, K2, the slopes and K3
while its exponentials are still at hand.

With a teacher's likeliest tokens (linear_topk.py), the loss has a term weight w KL_K for each token. Its part of the
sum joins c as -weight w Q; K + 1 gathered rows of the head are the rest.

FLOPs, in units of one GEMM of the head: 2, an entropy bonus included, and 3 with the exact KL; the separate operators
take 4 and 5 to 7. Rows whose coefficients are all 0 (of a silent group, a clipped token) cost nothing in K3: they go to
the end of their chunk, and blocks of nothing else skip their GEMM. Without the exact KL the logprobs, the loss and
the metrics are bitwise those of the separate operators (in Triton's interpreter; not yet run on a GPU); with it K1 lays
its rows out otherwise on a GPU, and adds them in another order.

gspo and the importance weights of whole sequences need all logprobs of a sequence before the first slope, and a chunk
may cut a sequence. There, and on the torch backend, the separate operators run instead.
"""

from __future__ import annotations

from dataclasses import astuple, replace

import torch

from mentor_kernels.backend import resolve_head_backend
from mentor_kernels.linear_kl import linear_kl
from mentor_kernels.linear_logprob import (
    Head,
    check_drop_mass,
    check_head,
    check_ids,
    check_triton,
    chunks,
    gradient_chunk,
    linear_logprob,
    new_rows,
    rows_last_contiguous,
    score_chunk,
)
from mentor_kernels.linear_topk import TeacherTopK, check_teacher, follow_teacher, linear_topk, topk_kl
from mentor_kernels.policy_loss import (
    METRICS,
    Normaliser,
    PolicyLossConfig,
    PolicyLossOut,
    check_inputs,
    forward_triton,
    named_metrics,
    policy_loss,
    token_weights,
)


def _forward_fused(
    hidden_NH: torch.Tensor,
    targets_N: torch.Tensor,
    old_logp_N: torch.Tensor | None,
    advantage_N: torch.Tensor,
    sequence_N: torch.Tensor,
    ref_logp_N: torch.Tensor | None,
    behaviour_logp_N: torch.Tensor | None,
    ref_hidden_NH: torch.Tensor | None,
    teacher: TeacherTopK | None,
    head: Head,
    config: PolicyLossConfig,
    normaliser: Normaliser,
    gradient: bool,
    drop_mass: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, d loss / d hidden [N, H] in its dtype or [0, H] without `gradient`, metrics, KL to the teacher [N]).

    The metrics are in the order of METRICS; without a teacher the last is empty.
    """
    hidden_NH, targets_N = rows_last_contiguous(hidden_NH), targets_N.contiguous()
    exact = ref_hidden_NH is not None
    if exact:
        ref_hidden_NH = rows_last_contiguous(ref_hidden_NH)
    found = new_rows(hidden_NH, reference=exact)
    grad_NH = hidden_NH.new_empty(hidden_NH.shape if gradient else (0, hidden_NH.shape[1]))
    teacher_kl_N = advantage_N.new_empty(len(advantage_N) if teacher else 0)
    # A token's weight in the loss depends on the sequences alone, its slope by a weight of 1 on the token alone.
    nothing_N = torch.zeros_like(advantage_N)
    w_N = forward_triton(nothing_N, None, nothing_N, sequence_N, None, None, None, config, normaliser)[2]
    by_token, one = replace(config, loss="cispo" if config.loss == "cispo" else "dapo"), Normaliser(1, 1)
    for rows, space in chunks(hidden_NH, head, gradient, reference=exact):
        part = found.part(rows)
        ref_hidden_RH = ref_hidden_NH[rows] if exact else None
        score_chunk(hidden_NH[rows], targets_N[rows], head, space, part, ref_hidden_RH)
        if teacher:
            teacher_kl_N[rows], by_logprob_R, by_tokens_RH = follow_teacher(
                hidden_NH[rows], targets_N[rows], part.logprob_R, head, teacher.ids_NK[rows], teacher.logp_NK[rows]
            )
        if gradient:
            old_R, ref_R, behaviour_R = (
                None if v is None else v[rows] for v in (old_logp_N, ref_logp_N, behaviour_logp_N)
            )
            _, slope_R, _, _ = forward_triton(
                part.logprob_R,
                old_R,
                advantage_N[rows],
                sequence_N[rows],
                part.kl_R if exact else ref_R,
                behaviour_R,
                None,
                by_token,
                one,
            )
            w_R = w_N[rows]
            if teacher:
                slope_R += teacher.weight * by_logprob_R
            gradient_chunk(
                targets_N[rows], head, space, part, grad_NH[rows], w_R * slope_R,
                w_R * -config.entropy_coef if config.entropy_coef else None, w_R * config.beta if exact else None,
                drop_mass,
            )  # fmt: skip
            if teacher:
                grad_NH[rows].addcmul_((teacher.weight * w_R)[:, None], by_tokens_RH)
    loss, _, _, metrics = forward_triton(
        found.logprob_R, old_logp_N, advantage_N, sequence_N, found.kl_R if exact else ref_logp_N, behaviour_logp_N,
        found.entropy_R, config, normaliser,
    )  # fmt: skip
    if teacher:
        loss = loss + teacher.weight * (w_N * teacher_kl_N).sum()
    return loss, grad_NH, metrics, teacher_kl_N


# --- the operator that autograd and torch.compile see --------------------------------------------------------------


@torch.library.custom_op("mentor_kernels::linear_policy_loss", mutates_args=())
def _linear_policy_loss(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    old_logp_N: torch.Tensor | None,
    advantage_N: torch.Tensor,
    sequence_N: torch.Tensor,
    ref_logp_N: torch.Tensor | None,
    behaviour_logp_N: torch.Tensor | None,
    ref_hidden_NH: torch.Tensor | None,
    teacher_ids_NK: torch.Tensor | None,
    teacher_logp_NK: torch.Tensor | None,
    teacher_weight: float,
    temperature: float,
    softcap: float | None,
    scale: float,
    loss: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    cispo_max: float,
    kl: str,
    beta: float,
    entropy_coef: float,
    tis_cap: float | None,
    tis_mode: str,
    tis_level: str,
    max_new_tokens: int | None,
    tokens: int,
    sequences: int,
    drop_mass: float,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    config = PolicyLossConfig(
        loss, clip_low, clip_high, dual_clip, cispo_max, kl, beta, entropy_coef, tis_cap, tis_mode, tis_level,
        max_new_tokens,
    )  # fmt: skip
    check_ids("targets_N", targets_N, weight_VH, "triton")
    teacher = None
    if teacher_ids_NK is not None:
        check_ids("the teacher's ids_NK", teacher_ids_NK, weight_VH, "triton")
        teacher = TeacherTopK(teacher_ids_NK, teacher_logp_NK, teacher_weight)
    with torch.cuda.device_of(hidden_NH):
        return _forward_fused(
            hidden_NH, targets_N, old_logp_N, advantage_N, sequence_N, ref_logp_N, behaviour_logp_N, ref_hidden_NH,
            teacher, Head(rows_last_contiguous(weight_VH), temperature, softcap, scale), config,
            Normaliser(tokens, sequences), gradient, drop_mass,
        )  # fmt: skip


@_linear_policy_loss.register_fake
def _(hidden_NH, weight_VH, targets_N, old_logp_N, advantage_N, sequence_N, ref_logp_N, behaviour_logp_N,
      ref_hidden_NH, teacher_ids_NK, *rest):  # fmt: skip
    N, H = hidden_NH.shape
    return (
        advantage_N.new_empty(()),
        hidden_NH.new_empty(N if rest[-1] else 0, H),
        advantage_N.new_empty(len(METRICS)),
        advantage_N.new_empty(0 if teacher_ids_NK is None else N),
    )


def _setup_context(ctx, inputs, output):
    _, grad_NH, metrics, teacher_kl_N = output
    ctx.mark_non_differentiable(grad_NH, metrics, teacher_kl_N)
    ctx.save_for_backward(grad_NH)


def _backward(ctx, grad_loss, *_):
    (grad_NH,) = ctx.saved_tensors
    return (grad_loss * grad_NH).to(grad_NH.dtype), *[None] * 30


_linear_policy_loss.register_autograd(_backward, setup_context=_setup_context)


# --- the public function -------------------------------------------------------------------------------------------


def linear_policy_loss(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    old_logp_N: torch.Tensor | None,
    advantage_N: torch.Tensor,
    sequence_N: torch.Tensor,
    ref_hidden_NH: torch.Tensor | None = None,
    ref_logp_N: torch.Tensor | None = None,
    behaviour_logp_N: torch.Tensor | None = None,
    teacher: TeacherTopK | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    config: PolicyLossConfig,
    normaliser: Normaliser,
    drop_mass: float = 0.0,
    backend: str | None = None,
) -> PolicyLossOut:
    """`policy_loss` of `linear_logprob`: hidden states and a frozen head in, the loss out.

    The reference comes as logprobs, or as its hidden states under the same head; not both. config.kl = "exact" needs
    the hidden states. With a `teacher`, each token's KL to it is added, under the teacher's weight and the token's own.
    Differentiable in hidden_NH alone; everything else is a constant. Otherwise as the separate operators, their
    ValueErrors included; a drop_mass does not go with the exact KL.
    """
    check_drop_mass(drop_mass)
    head = dict(temperature=temperature, softcap=softcap, scale=scale, backend=backend)
    exact = config.kl == "exact"
    if ref_hidden_NH is not None and ref_logp_N is not None:
        raise ValueError("give ref_hidden_NH or ref_logp_N, not both")
    if exact and drop_mass:
        raise ValueError("drop_mass bounds no error with kl = 'exact'; use k1, k2 or k3, or drop_mass = 0")
    if exact and config.beta and ref_hidden_NH is None:
        raise ValueError("beta is not 0 and kl is 'exact', so ref_hidden_NH is needed")
    if ref_hidden_NH is not None and not exact:
        with torch.no_grad():
            ref_logp_N = linear_logprob(ref_hidden_NH, weight_VH, targets_N, **head).logprob_N
    if teacher:
        check_teacher(teacher, targets_N)
    vectors = dict(old_logp_N=old_logp_N, ref_logp_N=ref_logp_N, behaviour_logp_N=behaviour_logp_N)
    whole_sequences = config.loss == "gspo" or (
        config.tis_level == "sequence" and config.tis_cap is not None and behaviour_logp_N is not None
    )
    if resolve_head_backend(backend, hidden_NH.device) == "torch" or whole_sequences:
        logprob_N, entropy_N = linear_logprob(hidden_NH, weight_VH, targets_N, drop_mass=drop_mass, **head)
        kl_N = linear_kl(hidden_NH, ref_hidden_NH, weight_VH, **head) if exact and ref_hidden_NH is not None else None
        out = policy_loss(
            logprob_N,
            vectors.pop("old_logp_N"),
            advantage_N,
            sequence_N=sequence_N,
            kl_N=kl_N if config.beta or kl_N is None else kl_N.detach(),
            entropy_N=entropy_N if config.entropy_coef else entropy_N.detach(),
            config=config,
            normaliser=normaliser,
            backend=backend,
            **vectors,
        )
        if not teacher:
            return out
        teacher_kl_N = topk_kl(
            linear_topk(hidden_NH, weight_VH, targets_N, logprob_N, teacher.ids_NK, **head), teacher.logp_NK
        )
        w_N = token_weights(sequence_N, logprob_N.dtype, config, normaliser, backend)
        loss = out.loss + teacher.weight * (w_N * teacher_kl_N).sum()
        return PolicyLossOut(loss, {**out.metrics, **_teacher_metric(teacher_kl_N.detach(), normaliser)})
    check_head(hidden_NH, weight_VH, targets_N, temperature, softcap)
    check_triton(hidden_NH)
    logp_N = hidden_NH.new_empty(hidden_NH.shape[0], dtype=torch.float32)
    if exact and ref_hidden_NH is not None:
        check_head(ref_hidden_NH, weight_VH, targets_N, temperature, softcap)
        vectors["kl_N"] = logp_N  # will be made
    check_inputs(logp_N, sequence_N, {"kl_N": None, "advantage_N": advantage_N, **vectors}, config)
    loss, _, metrics, teacher_kl_N = _linear_policy_loss(
        hidden_NH, weight_VH, targets_N, old_logp_N, advantage_N, sequence_N, ref_logp_N, behaviour_logp_N,
        ref_hidden_NH if exact else None,
        *((teacher.ids_NK, teacher.logp_NK, float(teacher.weight)) if teacher else (None, None, 0.0)),
        float(temperature), None if softcap is None else float(softcap), float(scale),
        *astuple(config), normaliser.tokens, normaliser.sequences, float(drop_mass),
        torch.is_grad_enabled() and hidden_NH.requires_grad,
    )  # fmt: skip
    out = named_metrics(
        loss,
        metrics,
        config,
        kl=ref_logp_N is not None or (exact and ref_hidden_NH is not None),
        entropy=True,
        gap=behaviour_logp_N is not None,
    )
    if teacher:
        out.metrics.update(_teacher_metric(teacher_kl_N, normaliser))
    return out


def _teacher_metric(teacher_kl_N: torch.Tensor, normaliser: Normaliser) -> dict[str, torch.Tensor]:
    return {"teacher_kl": teacher_kl_N.sum() / max(normaliser.tokens, 1)}
