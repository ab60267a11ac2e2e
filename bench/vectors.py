"""The policy loss and the advantages against plain torch: cases that are bound by launches and by bytes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from mentor_kernels import Normaliser, PolicyLossConfig, RewardConfig, group_advantage, policy_loss

from bench.measure import Call, compare, relative_error

TOKENS, LENGTH = 131_072, 256
ROLLOUTS, GROUP = 4096, 8
POLICY = PolicyLossConfig(loss="dapo", kl="k3", beta=0.04, dual_clip=None)
REWARD = RewardConfig(reward="mentor", advantage="grpo", eps=1e-4)
POLICY_BYTES = 6 * 4
"""A token: five vectors in, the gradient out."""
REWARD_BYTES = 2 * 8 + 4 + 1 + 1 + 8 + 8 + 4
"""A rollout: two tool sets, correct, finished, answered, invalid calls, group; its advantage."""

TITLES = {
    "policy": f"policy loss (dapo, k3, importance correction), {TOKENS} tokens, fp32, loss and gradient",
    "advantage": f"rewards and advantages (mentor, grpo), {ROLLOUTS} rollouts in groups of {GROUP}",
}


def policy(device: str, repeats: int, rate: float) -> list[dict]:
    """Gradient by the logprobs; `rate` in bytes/s."""
    make = torch.Generator().manual_seed(0)
    logp, *noise = torch.randn(5, TOKENS, generator=make)
    logp = -logp.abs()
    advantage = torch.randn(TOKENS // LENGTH, generator=make).repeat_interleave(LENGTH)
    vectors = [
        v.to(device) for v in (logp, logp + 0.3 * noise[0], advantage, logp + 0.4 * noise[1], logp + 0.5 * noise[2])
    ]
    sequence = torch.arange(TOKENS // LENGTH, device=device).repeat_interleave(LENGTH)

    def gradient(loss: Callable[..., torch.Tensor], vectors: list[torch.Tensor]) -> torch.Tensor:
        logp = vectors[0].detach().requires_grad_()
        return torch.autograd.grad(loss(logp, *vectors[1:]), logp)[0]

    def ours(backend: str) -> Callable[..., torch.Tensor]:
        return lambda logp, old, advantage, ref, behaviour: policy_loss(
            logp, old, advantage, sequence_N=sequence, ref_logp_N=ref, behaviour_logp_N=behaviour, config=POLICY,
            normaliser=Normaliser(TOKENS, TOKENS // LENGTH), backend=backend,
        ).loss  # fmt: skip

    losses = {"ours, torch": ours("torch"), "plain torch": plain_policy}
    if device.startswith("cuda"):
        losses = {"ours, triton": ours("triton"), **losses, "plain torch, compiled": torch.compile(plain_policy)}
    wanted = gradient(plain_policy, [v.double() for v in vectors])
    calls: dict[str, Call] = {name: lambda loss=loss: gradient(loss, vectors) for name, loss in losses.items()}
    return compare(calls, lambda g: relative_error(g, wanted), 1e-3, TOKENS * POLICY_BYTES / rate, device, repeats)


def plain_policy(logp, old, advantage, ref, behaviour) -> torch.Tensor:
    """As it is usually written; the formulas are in mentor_kernels/policy_loss.py."""
    ratio = (logp - old).exp()
    clipped = ratio.clamp(1 - POLICY.clip_low, 1 + POLICY.clip_high)
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    importance = (old - behaviour).exp().clamp(max=POLICY.tis_cap)
    d = ref - logp
    return (importance * (POLICY.beta * ratio * (d.exp() - d - 1) - gain)).mean()


def advantage(device: str, repeats: int, rate: float) -> list[dict]:
    """Advantages; `rate` in bytes/s."""
    make = torch.Generator().manual_seed(0)
    draw = torch.randint(0, 4, (6, ROLLOUTS), generator=make).to(device)
    group = torch.arange(ROLLOUTS, device=device) // GROUP
    columns = (
        draw[0][:, None], draw[1][:, None], (draw[2] > 1).float(), draw[3] > 0, draw[4] > 0, draw[5] // 3, group
    )  # fmt: skip

    def ours(backend: str) -> Call:
        return lambda: group_advantage(
            *columns, config=REWARD, groups=ROLLOUTS // GROUP, backend=backend
        ).advantage_B  # fmt: skip

    calls = {"ours, torch": ours("torch"), "plain torch": lambda: plain_advantage(*columns)}
    if device.startswith("cuda"):
        compiled = torch.compile(plain_advantage)
        calls = {"ours, triton": ours("triton"), **calls, "plain torch, compiled": lambda: compiled(*columns)}
    wanted = plain_advantage(*columns, dtype=torch.float64)
    return compare(calls, lambda a: relative_error(a, wanted), 1e-3, ROLLOUTS * REWARD_BYTES / rate, device, repeats)


def plain_advantage(teacher, student, correct, finished, answered, invalid, group, dtype=torch.float32):
    """For groups of one size, one after another; the formulas are in mentor_kernels/group_advantage.py."""
    align = ((teacher == student) & (student != 0)).all(1).to(dtype)
    correct = correct.to(dtype)
    reward = 0.7 * correct + 0.3 * torch.where(correct == 1, align, 0.2 * align) + 0.1 * (invalid == 0).to(dtype)
    reward = reward.masked_fill(~answered, 0.1).masked_fill(~finished, 0.0).view(-1, GROUP)
    centred = reward - reward.mean(1, keepdim=True)
    return (centred / (reward.std(1, keepdim=True) + REWARD.eps)).flatten()


BENCHES = {"policy": policy, "advantage": advantage}
