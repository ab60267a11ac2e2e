"""The checker that every implementation of the loss operators must pass, and that wrong ones must fail.

The reference is float64 and written down a second time, in the plainest form. The tolerance is torch's own error: what
the plain form in the operator's dtype gets wrong, doubled, plus a little. Upstream gradients are never uniform, sizes
never round, and memory that an operator leaves uninitialised holds NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from mentor_kernels import Normaliser, PolicyLossConfig


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN here."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def relative_rms(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-300))


# --- linear_logprob ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadCase:
    name: str
    hidden_NH: torch.Tensor
    weight_VH: torch.Tensor
    targets_N: torch.Tensor
    options: dict
    grad_logprob_N: torch.Tensor
    grad_entropy_N: torch.Tensor


def head_case(name: str, dtype: torch.dtype, *, N=37, H=24, V=4133, size=1.0, seed=0, **options) -> HeadCase:
    """Random inputs; the logits' spread is `size`. The last columns are among the targets, twice."""
    make = torch.Generator().manual_seed(seed)
    hidden_NH = torch.randn(N, H, generator=make)
    weight_VH = torch.randn(V, H, generator=make) * size / math.sqrt(H)
    ids = torch.randint(0, V, (N + 1,), generator=make)
    ids[1:4] = torch.tensor([V - 1, V - 1, 0])
    grads = torch.randn(2, N, generator=make)
    return HeadCase(name, hidden_NH.to(dtype), weight_VH.to(dtype), ids[1:], options, *grads)  # ids[1:]: not aligned


def head_cases(dtype: torch.dtype, tile: int = 4096) -> list[HeadCase]:
    """One case for each trap; `tile` is the number of columns that the implementation takes at once."""
    cases = [
        head_case("plain", dtype),
        head_case("one tile", dtype, V=131, N=5),
        head_case("no phantom columns", dtype, V=tile, size=4.0, seed=1),
        head_case("a last tile of nothing but the target", dtype, V=tile + 1, size=4.0, seed=2),
        head_case("the same under a softcap", dtype, V=tile + 1, size=4.0, seed=13, softcap=3.0, temperature=0.7),
        head_case("ragged last tile", dtype, V=tile + 37, size=4.0, seed=3),
        head_case("many tiles", dtype, V=5 * tile + 37, N=24, size=3.0, seed=4),
        head_case("temperature", dtype, seed=5, size=2.0, temperature=0.6),
        head_case("softcap and scale", dtype, seed=6, size=9.0, softcap=7.0, scale=1.5, temperature=1.3),
        head_case("one row", dtype, N=5, V=300, seed=7),
        head_case("many rows", dtype, N=600, V=257, seed=8),
    ]
    if dtype is torch.float16:  # it can hold neither logits of 2^20 nor gradients of e^-40
        return [*cases, _all_low(dtype, tile)]
    return [*cases, _all_low(dtype, tile), _offset(dtype), _confident(dtype)]


def _all_low(dtype: torch.dtype, tile: int) -> HeadCase:
    """Every logit near -200: a phantom column, or a maximum that starts at 0, would own the whole softmax."""
    case = head_case("all logits near -200", dtype, V=tile + 37, seed=9)
    case.hidden_NH[:, -1] = 1.0
    case.weight_VH[:, -1] = -200.0
    return case


def _offset(dtype: torch.dtype) -> HeadCase:
    """Whole logits, all offset by 2^20: float32 holds each of them exactly, but not logsumexp."""
    case = head_case("a common offset of 2^20", dtype, V=515, seed=10)
    make = torch.Generator().manual_seed(11)
    case.hidden_NH[:] = torch.randint(-1, 2, case.hidden_NH.shape, generator=make).to(dtype)
    case.weight_VH[:] = torch.randint(-1, 2, case.weight_VH.shape, generator=make).to(dtype)
    case.hidden_NH[:, -1] = 1024.0
    case.weight_VH[:, -1] = 1024.0
    return case


def _confident(dtype: torch.dtype) -> HeadCase:
    """Margins of 20 to 40 nats over everything else together: logp is tiny, but neither it nor its gradient is 0."""
    N = 21
    case = head_case("confident tokens", dtype, N=N, H=48, V=4099, seed=12)
    hidden_NH, targets_N = torch.eye(N, 48) * 8, torch.arange(N) * 7 + 1
    weight_VH = case.weight_VH.float()
    logits_NV = hidden_NH @ weight_VH.T
    logits_NV[torch.arange(N), targets_N] = -torch.inf
    goal_N = logits_NV.logsumexp(1) + torch.linspace(20, 40, N)
    weight_VH[targets_N, torch.arange(N)] = goal_N / 8
    return replace(case, hidden_NH=hidden_NH.to(dtype), weight_VH=weight_VH.to(dtype), targets_N=targets_N)


def plain_head(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, targets_N: torch.Tensor, temperature=1.0, softcap=None, scale=1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The textbook: all logits, in the dtype of the inputs, then log_softmax in float32 or more."""
    logits_NV = scale * (hidden_NH @ weight_VH.T)
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    wide = torch.float64 if hidden_NH.dtype is torch.float64 else torch.float32
    log_p_NV = torch.log_softmax(logits_NV.to(wide) / temperature, -1)
    return log_p_NV.gather(1, targets_N[:, None])[:, 0], -(log_p_NV.exp() * log_p_NV).sum(1)


def exact_head(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, targets_N: torch.Tensor, temperature=1.0, softcap=None, scale=1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """float64, with the logprob from the logits of the others: right to the last digits even at a margin of 40 nats."""
    logits_NV = scale * (hidden_NH.double() @ weight_VH.double().T)
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    z_NV = logits_NV / temperature
    own = F.one_hot(targets_N, z_NV.shape[1]).bool()
    others_N = z_NV.masked_fill(own, -torch.inf).logsumexp(1)
    log_p_NV = torch.log_softmax(z_NV, -1)
    return F.logsigmoid(z_NV[own] - others_N), -(log_p_NV.exp() * log_p_NV).sum(1)


def head_result(operator: Callable, case: HeadCase, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """(logprob, entropy, gradient of a non-uniform mix of both, gradient of the logprobs alone) on the CPU."""
    hidden_NH = case.hidden_NH.to(device).detach().requires_grad_()
    logprob_N, entropy_N = operator(hidden_NH, case.weight_VH.to(device), case.targets_N.to(device), **case.options)
    from_logprob = (logprob_N * case.grad_logprob_N.to(device, logprob_N.dtype)).sum()
    from_entropy = (entropy_N * case.grad_entropy_N.to(device, entropy_N.dtype)).sum()
    (alone_NH,) = torch.autograd.grad(from_logprob, hidden_NH, retain_graph=True)
    (both_NH,) = torch.autograd.grad(from_logprob + from_entropy, hidden_NH)
    return logprob_N.detach().cpu(), entropy_N.detach().cpu(), both_NH.cpu(), alone_NH.cpu()


def check_head(operator: Callable, case: HeadCase, device: str = "cpu") -> None:
    """`operator(hidden, weight, targets, **options) -> (logprob, entropy)` against float64 of the same inputs."""
    with poisoned_memory():
        found = head_result(operator, case, device)
    want = head_result(exact_head, replace(case, hidden_NH=case.hidden_NH.double()))
    torchs = head_result(plain_head, case)
    half = case.hidden_NH.dtype in (torch.bfloat16, torch.float16)
    for i, name in enumerate(("logprob", "entropy")):
        error, own = float((found[i] - want[i]).abs().max()), float((torchs[i] - want[i]).abs().max())
        bound = (min(2 * own, 1e-4) if half else 2 * own) + 2e-6 * (1 + float(want[i].abs().max()))
        assert error <= bound, f"{case.name}: {name} off by {error:.2e}, torch by {own:.2e}"
    for i, name in ((2, "both"), (3, "the logprob")):
        error, own = relative_rms(found[i], want[i]), relative_rms(torchs[i], want[i])
        # bf16 rounds p and then the gradient: 2.0e-3 to 3.0e-3 were seen when both were emulated.
        most = {torch.bfloat16: 4e-3, torch.float16: 3e-3}.get(case.hidden_NH.dtype, math.inf)
        bound = min(2 * own, most) + 2e-6
        assert error <= bound, f"{case.name}: gradient of {name} off by {error:.2e}, torch by {own:.2e}"
    # Confident tokens: the errors relative to their own tiny sizes.
    small_N = want[0] > -1e-3
    error = ((found[0] - want[0]).abs() / want[0].abs())[small_N].amax() if small_N.any() else torch.zeros(())
    assert error <= 1e-3, f"{case.name}: a confident logprob is off by {float(error):.2e} of its size"
    error = ((found[3].double() - want[3]).norm(dim=1) / want[3].norm(dim=1)).amax()
    assert error <= (2e-2 if half else 1e-3), f"{case.name}: a row of the gradient is off by {float(error):.2e}"


# --- active_tiles --------------------------------------------------------------------------------------------------


def weight_cases() -> dict[str, torch.Tensor]:
    """Weights [T, R] of tiles: many rows that need few, few that need many, rows without any, a NaN."""
    make = torch.Generator().manual_seed(0)
    peaked_TR = torch.softmax(torch.randn(40, 70, generator=make) * torch.linspace(0, 9, 70), 0)
    some_TR = peaked_TR.clone()
    some_TR[:, ::3] = 0
    sick_TR = peaked_TR.clone()
    sick_TR[:, 11] = torch.nan  # a NaN in the hidden states spoils all tiles of its row
    return {
        "peaked": peaked_TR,
        "even": torch.full((40, 9), 1 / 40),
        "one row": peaked_TR[:, 40:41],
        "one tile": torch.rand(1, 20, generator=make),
        "rows without a slope": some_TR,
        "nothing": torch.zeros(5, 7),
        "a row of NaN": sick_TR,
        "small in each tile, large together": torch.cat([torch.full((39, 30), 5e-3), torch.full((1, 30), 0.805)]),
    }


def check_active_tiles(operator: Callable, weight_TR: torch.Tensor, drop_mass: float, block_rows: int) -> None:
    """`operator(weight [T, R], drop_mass, block_rows) -> ActiveTiles`: no row loses more, and no block could lose more.

    A NaN counts as more than any drop_mass.
    """
    T, R = weight_TR.shape
    order_R, tiles_BT, counts_B = (x.cpu() for x in operator(weight_TR, drop_mass, block_rows))
    assert sorted(order_R.tolist()) == list(range(R)), "not an order of the rows"
    assert tiles_BT.shape == (-(-R // block_rows), T)
    assert tiles_BT.is_contiguous(), "the kernel counts on it"
    assert bool((tiles_BT[torch.arange(T) >= counts_B[:, None]] == T).all()), "more tiles than were counted"
    weight_TR = weight_TR.cpu().double().nan_to_num(nan=2.0)[:, order_R]
    silent_R = (weight_TR == 0).all(0)
    assert silent_R.tolist() == sorted(silent_R.tolist()), "rows without a slope are not the last"
    for block, rows_TR in enumerate(weight_TR.split(block_rows, 1)):
        tiles = tiles_BT[block, : counts_B[block]].tolist()
        assert tiles == sorted(set(tiles)), "not ascending"
        lost_R = rows_TR.sum(0) - rows_TR[tiles].sum(0)
        assert bool((lost_R <= drop_mass + 1e-12).all()), f"a row loses {float(lost_R.max()):.2e}"
        if tiles:
            least = rows_TR[tiles].amax(1).argmin()
            assert bool((lost_R + rows_TR[tiles[least]] > drop_mass - 1e-9).any()), "a tile is kept for nothing"


# --- policy_loss ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PolicyCase:
    name: str
    config: PolicyLossConfig
    lengths: tuple[int, ...] = (3, 1, 7, 4, 2)
    on_policy: bool = False
    seed: int = 0

    def vectors(self) -> dict[str, torch.Tensor | None]:
        """float64: logprobs, advantages and entropies of all sequences, those of one sequence together."""
        make = torch.Generator().manual_seed(self.seed)
        N = sum(self.lengths)
        noise = torch.randn(5, N, generator=make, dtype=torch.float64)
        sequence_N = torch.repeat_interleave(torch.tensor(self.lengths))
        wide = 0.002 if self.config.loss == "gspo" else 0.5
        logp_N = -1.5 - noise[0].abs()
        return dict(
            logp_N=logp_N,
            old_logp_N=None if self.on_policy else logp_N + wide * noise[1],
            advantage_N=torch.randn(len(self.lengths), generator=make, dtype=torch.float64)[sequence_N],
            sequence_N=sequence_N * 3,  # indices of a step: some sequences are in other micro-batches
            ref_logp_N=logp_N + 0.4 * noise[2],
            behaviour_logp_N=logp_N + 0.6 * noise[3],
            entropy_N=noise[4].abs(),
        )


def policy_cases() -> list[PolicyCase]:
    def case(name: str, on_policy: bool = False, **fields) -> PolicyCase:
        return PolicyCase(name, PolicyLossConfig(**fields), on_policy=on_policy, seed=len(name))

    extras = dict(max_new_tokens=11, tis_cap=None)
    tight = dict(clip_low=3e-4, clip_high=4e-4)
    return [
        *(case(f"only {loss}", loss=loss, **extras) for loss in ("grpo", "dapo", "dr_grpo")),
        case("only gspo", loss="gspo", tis_cap=None, **tight),
        case("only cispo", loss="cispo", cispo_max=1.3, tis_cap=None),
        case("dual clip", dual_clip=1.1, tis_cap=None),
        *(case(f"{kl} with entropy", loss="grpo", kl=kl, beta=0.3, entropy_coef=0.1) for kl in ("k1", "k2", "k3")),
        case("gspo with all", loss="gspo", beta=0.2, entropy_coef=0.2, tis_cap=1.2, **tight),
        case("dr_grpo with all", loss="dr_grpo", beta=0.2, entropy_coef=0.2, tis_cap=1.2, max_new_tokens=9),
        *(
            case(f"{mode} {level}", tis_mode=mode, tis_level=level, tis_cap=1.2)
            for mode in ("tis", "masked")
            for level in ("token", "sequence")
        ),
        case("on-policy", on_policy=True, beta=0.1, entropy_coef=0.05, tis_cap=1.2),
    ]


def plain_kl(logp: torch.Tensor, ref_logp: torch.Tensor, weight: torch.Tensor, estimator: str) -> torch.Tensor:
    """The estimator's value; the gradient is k2's, whichever it is."""
    d = ref_logp - logp
    value = {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - d - 1}[estimator]
    k2 = weight.detach() * d**2 / 2
    return (weight * value).detach() + k2 - k2.detach()


def plain_policy(
    *, logp_N, old_logp_N, advantage_N, sequence_N, ref_logp_N, behaviour_logp_N, entropy_N, config, normaliser,
    kl_of=plain_kl,
) -> torch.Tensor:  # fmt: skip
    """The loss, sequence after sequence, with autograd's own stop-gradients."""
    old_logp_N = logp_N.detach() if old_logp_N is None else old_logp_N
    loss = logp_N.new_zeros(())
    for q in sequence_N.unique().tolist():
        at = sequence_N == q
        logp, old, advantage = logp_N[at], old_logp_N[at], advantage_N[at]
        ratio = (logp - old).exp()
        if config.loss == "gspo":
            ratio = (logp - old).mean().exp().detach() * (logp - logp.detach()).exp()
        if config.loss == "cispo":
            pg = -ratio.detach().clamp(max=config.cispo_max) * advantage * logp
        else:
            clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
            gain = torch.minimum(ratio * advantage, clipped * advantage)
            if config.dual_clip is not None and config.loss != "gspo":
                gain = torch.where(advantage < 0, torch.maximum(gain, config.dual_clip * advantage), gain)
            pg = -gain
        kl_weight = (logp - old).exp()
        if config.tis_cap is not None:
            gap = old.detach() - behaviour_logp_N[at]
            weight = (gap.sum() if config.tis_level == "sequence" else gap).exp()
            over = config.tis_cap if config.tis_mode == "tis" else 0.0
            weight = torch.where(weight > config.tis_cap, over, weight)
            pg, kl_weight = pg * weight, kl_weight * weight
        kl = kl_of(logp, ref_logp_N[at], kl_weight, config.kl)
        total = (pg + config.beta * kl - config.entropy_coef * entropy_N[at]).sum()
        if config.loss in ("grpo", "gspo"):
            loss = loss + total / len(logp) / normaliser.sequences
        elif config.loss == "dr_grpo":
            loss = loss + total / (normaliser.sequences * config.max_new_tokens)
        else:
            loss = loss + total / normaliser.tokens
    return loss


def policy_result(operator: Callable, case: PolicyCase, dtype: torch.dtype, device: str, split: int) -> tuple:
    """(loss, d / d logp, d / d entropy): sums over micro-batches of `split` sequences."""
    vectors = {k: v if v is None else v.to(device) for k, v in case.vectors().items()}
    vectors = {k: v.to(dtype) if v is not None and v.is_floating_point() else v for k, v in vectors.items()}
    leaves = [vectors[name].requires_grad_() for name in ("logp_N", "entropy_N")]
    # The step has more in it than these micro-batches.
    normaliser = Normaliser(tokens=sum(case.lengths) + 5, sequences=len(case.lengths) + 2)
    loss = torch.zeros((), dtype=dtype, device=device)
    for first in range(0, len(case.lengths), split):
        rows = slice(sum(case.lengths[:first]), sum(case.lengths[: first + split]))
        part = {k: v if v is None else v[rows] for k, v in vectors.items()}
        loss = loss + operator(**part, config=case.config, normaliser=normaliser)
    loss.backward()
    grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    return tuple(x.detach().cpu() for x in (loss, *grads))


def check_policy(operator: Callable, case: PolicyCase, dtype=torch.float32, device: str = "cpu") -> None:
    """`operator(logp_N=, ..., config=, normaliser=) -> loss` against float64, whole and in micro-batches of 2 and 1."""
    want = policy_result(plain_policy, case, torch.float64, "cpu", len(case.lengths))
    torchs = policy_result(plain_policy, case, dtype, "cpu", len(case.lengths))
    for split in (len(case.lengths), 2, 1):
        with poisoned_memory():
            found = policy_result(operator, case, dtype, device, split)
        for i, name in enumerate(("loss", "gradient by logp", "gradient by entropy")):
            error, own = float((found[i] - want[i]).abs().max()), float((torchs[i] - want[i]).abs().max())
            # The terms of the loss, as large as its slopes, may cancel.
            size = max(float(w.abs().max()) for w in ((want[0], want[1]) if i == 0 else (want[i],)))
            bound = 2 * own + 100 * torch.finfo(dtype).eps * size
            assert error <= bound, f"{case.name}, split by {split}: {name} off by {error:.2e}, torch by {own:.2e}"
