"""Fused operators for reinforcement learning of language models with a frozen head; usable on their own.

    linear_logprob       hidden states and the head -> logprob and entropy of each target; no [N, V] tensor exists
    linear_kl            two hidden states and the head -> exact KL of each row
    linear_topk          ... -> logprobs of K chosen tokens a row; topk_kl: the KL to a teacher's K likeliest
    policy_loss          logprobs -> GRPO-family loss, importance correction, KL, entropy bonus, metrics
    linear_policy_loss   all of these in one, with one sweep over the vocabulary for the gradient
    sample               logits -> a token drawn from each row, and its logprob
    paged_attention      one query token a row, keys and values in pages -> what it attends to
    gather_rows          rows by an index, with a gradient that is added up in a fixed order
    group_advantage      tool sets and answers -> composite reward and group-relative advantage

`backend` is "torch", "triton" or None (the best one for the device). Start reading at kernels/README.md.
"""

from __future__ import annotations

from mentor_kernels.gather_rows import RowCopies, gather_rows
from mentor_kernels.group_advantage import STANDARD_TERMS, AdvantageOut, RewardConfig, group_advantage
from mentor_kernels.linear_kl import linear_kl
from mentor_kernels.linear_logprob import LogprobOut, linear_logprob
from mentor_kernels.linear_policy_loss import linear_policy_loss
from mentor_kernels.linear_topk import TeacherTopK, linear_topk, topk_kl
from mentor_kernels.paged_attention import PagedRows, paged_attention
from mentor_kernels.policy_loss import Normaliser, PolicyLossConfig, PolicyLossOut, policy_loss
from mentor_kernels.sample import SampleOut, sample

__all__ = [
    "STANDARD_TERMS",
    "AdvantageOut",
    "LogprobOut",
    "Normaliser",
    "PagedRows",
    "PolicyLossConfig",
    "PolicyLossOut",
    "RewardConfig",
    "RowCopies",
    "SampleOut",
    "TeacherTopK",
    "gather_rows",
    "group_advantage",
    "linear_kl",
    "linear_logprob",
    "linear_policy_loss",
    "linear_topk",
    "paged_attention",
    "policy_loss",
    "sample",
    "topk_kl",
]
