"""No operator waits for the GPU: between its inputs and its outputs the host reads no value of any tensor.

On a GPU torch itself raises at the first such wait. Without one, every operation that would wait there is forbidden
while the Triton backends run in the interpreter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from mentor_kernels import (
    Normaliser,
    PagedRows,
    PolicyLossConfig,
    RewardConfig,
    RowCopies,
    TeacherTopK,
    gather_rows,
    group_advantage,
    linear_kl,
    linear_logprob,
    linear_policy_loss,
    linear_topk,
    paged_attention,
    policy_loss,
    sample,
    topk_kl,
)
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default, aten.equal.default,
    aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_consecutive.default,
}  # fmt: skip


class Waits(TorchDispatchMode):
    """Raises where a GPU's host would wait: for a value, or for how many there are."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        indices = args[1] if operation in (aten.index.Tensor, aten.index_put_.default) else ()
        if operation in WAITS or any(i is not None and i.dtype is torch.bool for i in indices):
            raise AssertionError(f"{operation} waits for the GPU")
        if operation.namespace != "mentor_kernels":
            return operation(*args, **(kwargs or {}))
        with self:  # what our operators are made of is looked at too
            return OPDEFS[operation.name().removesuffix(".default")]._init_fn(*args, **(kwargs or {}))


@contextmanager
def no_wait(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    # In the interpreter alone, the operators look at ids and groups and refuse bad ones.
    for module in ("linear_logprob", "group_advantage"):
        monkeypatch.setattr(sys.modules[f"mentor_kernels.{module}"], "interpreted", lambda: False)
    with Waits():
        yield


N, H, V, K = 13, 24, 300, 4


def head_inputs(device: str) -> tuple[torch.Tensor, ...]:
    """Hidden states (a leaf), head, targets, reference's hidden states."""
    make = torch.Generator().manual_seed(0)
    hidden, weight, reference = (torch.randn(n, H, generator=make).to(device) for n in (N, V, N))
    return hidden.requires_grad_(), weight, torch.randint(0, V, (N,), generator=make).to(device), reference


def score(device: str) -> Callable[[], object]:
    hidden, weight, targets, _ = head_inputs(device)
    return lambda: linear_logprob(hidden.detach(), weight, targets, temperature=0.7, backend="triton")


def logprob_and_entropy(device: str, drop_mass: float = 0.0) -> Callable[[], object]:
    hidden, weight, targets, _ = head_inputs(device)

    def run():
        out = linear_logprob(hidden, weight, targets, drop_mass=drop_mass, backend="triton")
        (out.logprob_N * 0.3 + out.entropy_N).sum().backward()

    return run


def exact_kl(device: str) -> Callable[[], object]:
    hidden, weight, _, reference = head_inputs(device)
    return lambda: linear_kl(hidden, reference, weight, backend="triton").sum().backward()


def teachers_tokens(device: str) -> Callable[[], object]:
    hidden, weight, targets, _ = head_inputs(device)
    ids, teacher = torch.arange(N * K, device=device).view(N, K), torch.full((N, K), -2.0, device=device)

    def run():
        logp = linear_logprob(hidden, weight, targets, backend="triton").logprob_N
        topk_kl(linear_topk(hidden, weight, targets, logp, ids, backend="triton"), teacher).sum().backward()

    return run


def of_the_loss(device: str) -> dict:
    sequence = torch.arange(N, device=device) // 4
    advantage = torch.linspace(-1, 1, 4, device=device)[sequence]
    return dict(advantage_N=advantage, sequence_N=sequence, behaviour_logp_N=torch.full((N,), -2.0, device=device))


def fused_loss(device: str, **settings) -> Callable[[], object]:
    hidden, weight, targets, reference = head_inputs(device)
    config, vectors = PolicyLossConfig(entropy_coef=0.01, beta=0.1, **settings), of_the_loss(device)
    teacher = TeacherTopK(torch.arange(N * K, device=device).view(N, K), torch.full((N, K), -2.0, device=device), 0.5)

    def run():
        out = linear_policy_loss(
            hidden, weight, targets, old_logp_N=None, ref_hidden_NH=reference, config=config,
            normaliser=Normaliser(N, 4), backend="triton", teacher=teacher, **vectors,
        )  # fmt: skip
        out.loss.backward()

    return run


def separate_loss(device: str) -> Callable[[], object]:
    config, vectors = PolicyLossConfig(loss="gspo", tis_level="sequence"), of_the_loss(device)
    logp = torch.full((N,), -1.5, device=device).requires_grad_()
    old = torch.full((N,), -1.6, device=device)

    def run():
        policy_loss(logp, old, config=config, normaliser=Normaliser(N, 4), backend="triton", **vectors).loss.backward()

    return run


def advantages(device: str, advantage: str) -> Callable[[], object]:
    B = 8
    tools = torch.arange(B, device=device)[:, None]
    flags = torch.arange(B, device=device) % 3 == 0
    zeros = torch.zeros(B, dtype=torch.int64, device=device)
    group = torch.arange(B, device=device) // 4
    return lambda: group_advantage(
        tools, tools.flip(0), flags.float(), ~flags, ~flags, zeros, group,
        groups=2, config=RewardConfig(reward="mentor", advantage=advantage), backend="triton",
    )  # fmt: skip


def sampling(device: str) -> Callable[[], object]:
    logits, uniform = torch.randn(5, V, device=device), torch.linspace(0.1, 0.9, 5, device=device)
    return lambda: sample(logits, uniform, temperature=0.8, backend="triton")


def attention(device: str) -> Callable[[], object]:
    query, keys = torch.randn(2, 4, 16, device=device), torch.randn(6, 16, 2, 16, device=device)
    whole = dict(dtype=torch.int64, device=device)
    tables, shared, end = (torch.tensor(x, **whole) for x in ([[0, 1], [2, 3]], [0, 0], [20, 5]))
    rows = PagedRows(tables, shared, end, prefix=0, page=16)

    def run():
        rows.advance()
        paged_attention(query, keys, keys, rows, scaling=0.25, backend="triton")

    return run


def gathering(device: str) -> Callable[[], object]:
    source = torch.randn(4, 2, 8, device=device, requires_grad=True)
    copies = RowCopies.of(torch.tensor([1, 3, 1, 0]), 4, device)
    return lambda: gather_rows(source, copies, repeats=2, backend="triton").sum().backward()


CASES = {
    "score": score,
    "logprob and entropy": logprob_and_entropy,
    "without the tiles of little weight": lambda device: logprob_and_entropy(device, drop_mass=0.1),
    "exact KL": exact_kl,
    "a teacher's tokens": teachers_tokens,
    "fused loss": fused_loss,
    "fused loss, exact KL": lambda device: fused_loss(device, kl="exact"),
    "fused loss, whole sequences": lambda device: fused_loss(device, loss="gspo"),
    "separate loss": separate_loss,
    "advantages of groups": lambda device: advantages(device, "grpo"),
    "advantages of a step": lambda device: advantages(device, "gdpo"),
    "sampling": sampling,
    "attention over pages": attention,
    "gathered rows": gathering,
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_no_operator_waits(kernel_device, monkeypatch, case):
    run = case(kernel_device)
    if kernel_device == "cuda":
        run()  # compiling may wait
    with no_wait(kernel_device, monkeypatch):
        run()


def test_the_check_sees_into_our_operators(kernel_device, monkeypatch):
    """Without the number of groups, it is read from the device."""
    flags = torch.ones(4, dtype=torch.bool, device=kernel_device)
    zeros = torch.zeros(4, dtype=torch.int64, device=kernel_device)

    def run():
        group_advantage(zeros[:, None], zeros[:, None], flags.float(), flags, flags, zeros, zeros,
                        config=RewardConfig(), backend="triton")  # fmt: skip

    run()
    with pytest.raises((AssertionError, RuntimeError)), no_wait(kernel_device, monkeypatch):
        run()


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: float(x.max()),
        lambda x: 1 if (x > 0).all() else 0,
        lambda x: x.unique(),
    ],
)
def test_the_check_sees_what_waits(kernel_device, monkeypatch, waiting):
    x = torch.arange(5.0, device=kernel_device)
    waiting(x)
    with pytest.raises((AssertionError, RuntimeError)), no_wait(kernel_device, monkeypatch):
        waiting(x)
