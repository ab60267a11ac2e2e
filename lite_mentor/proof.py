"""Proof, when a student is loaded, that what this trainer computes with it is what the model computes by itself.

Whatever else a model does (recurrence across tokens, a multiplier in its head, other attention, randomness) shows up
as a difference. It is looked for in float32, where models that we understand differ by their rounding alone, and then
in the student's own dtype, where ours may be at most twice as far from float32 as the model's own forward is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from lite_mentor import attention
from lite_mentor.attention import PackedPlan
from lite_mentor.engine import Engine
from lite_mentor.errors import UserError
from lite_mentor.student import Student, backbone

_EXACT = 1e-3
"""Of the logits' spread, in float32; rounding was seen to give up to 1e-5."""
_AT_ONCE = 1 << 30
"""Bytes of a model in float32 up to which all of it is widened at once, and not a layer at a time in each forward."""


@torch.no_grad()
def prove(student: Student, context: int) -> None:
    """Decode two sequences from pages and pack them into a row, and compare both with the model's own forward.

    Raises UserError where they differ, be it only beside a sequence of `context` tokens.
    """
    base = student.base
    with student.reference(), warnings.catch_warnings():
        # A fused norm whose weight could not be widened says so.
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        with in_float32(base):
            ids_BT, sampled_BT, logp_BT = _decode(student)
            exact_BTV = _own(base, ids_BT)
            packed_BTV = _packed(student, partial(backbone, base), ids_BT, context)
        exact_BT = _unit(exact_BTV).log_softmax(-1)[:, :-1].gather(2, ids_BT[:, 1:, None])[..., 0]
        _check(student, "decoding", (logp_BT[:, 1:] - exact_BT)[sampled_BT[:, 1:]].abs().max(), _EXACT)
        _check(student, "training", _error(packed_BTV, exact_BTV).max(), _EXACT)
        own_BTV = exact_BTV if student.dtype is torch.float32 else _own(base, ids_BT)
        error_BT = _error(_packed(student, student.rollout_hidden, ids_BT, context), exact_BTV)
        noise_BT = _error(own_BTV, exact_BTV)
        _check(student, str(student.dtype)[6:], _rms(error_BT), 2 * _rms(noise_BT) + _EXACT)


def _decode(student: Student) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two sequences of one length, their beginning shared, from the engine: ids, whether sampled, logprobs [B, T].

    Both end a turn and go on, the first one with tokens that are put in between. They are drawn from logits whose
    spread is 1: so no token is certain, and every error shows.
    """
    rows = min(student.base.get_input_embeddings().weight.shape[0], student.head_weight_VH.shape[0])
    ids = torch.randint(rows, (12,), generator=torch.Generator().manual_seed(0)).tolist()
    engine = Engine(
        partial(backbone, student.base), lambda hidden_RH: _unit(student.rollout_logits(hidden_RH)),
        **student.cache._asdict(), eos_ids=(), slots=2, context=32, page=4, device=student.device, burst=1,
        graphs="off", backend="torch",
    )  # fmt: skip
    prompts = ids[:6] + ids[6:7], ids[:6] + ids[7:10]
    both = [engine.submit(prompt, [(0.37 * i) % 1 for i in range(20)]) for prompt in prompts]
    for _ in range(3):
        engine.step()
    engine.eos_ids = frozenset(range(student.head_weight_VH.shape[0]))
    engine.step()
    engine.eos_ids = frozenset()
    engine.resume(both[0], ids[10:])
    engine.resume(both[1], [])
    for _ in range(4):
        engine.step()
    found = [[s.ids for s in both], [s.sampled for s in both], [s.logp for s in both]]
    return tuple(torch.tensor(rows, device=student.device) for rows in found)


def _own(model: PreTrainedModel, ids_BT: torch.Tensor) -> torch.Tensor:
    """The model's own logits [B, T, V]."""
    with attending_by(model, "eager"):
        return model(input_ids=ids_BT, use_cache=False).logits.float()


def _packed(student: Student, forward: Callable[..., torch.Tensor], ids_BT: torch.Tensor, context: int) -> torch.Tensor:
    """The same logits from one row: what both share only once, and behind them the end of a far longer sequence."""
    (a_T, b_T), T = ids_BT, ids_BT.shape[1]
    shared = int((a_T != b_T).nonzero()[0])
    positions = [*range(T), *range(shared, T), *range(context - 4, context)]
    positions_1T = torch.tensor([positions], device=student.device)
    starts = [0, shared, T, 2 * T - shared]
    plan = PackedPlan(starts, [-1, 0, 0, -1], len(positions), student.device, backend="torch")
    ids_1T = torch.cat([a_T, b_T[shared:], a_T[:4]])[None]
    logits_TV = student.rollout_logits(forward(ids_1T, positions_1T, plan))
    return torch.stack([logits_TV[:T], torch.cat([logits_TV[:shared], logits_TV[T : 2 * T - shared]])])


def _unit(logits_TV: torch.Tensor) -> torch.Tensor:
    return logits_TV / logits_TV.std(-1, keepdim=True)


def _error(ours_BTV: torch.Tensor, exact_BTV: torch.Tensor) -> torch.Tensor:
    """For each token, the distance of its logits over their spread [B, T]."""
    return (ours_BTV - exact_BTV).norm(dim=-1) / exact_BTV.std(-1) / exact_BTV.shape[-1] ** 0.5


def _rms(error_BT: torch.Tensor) -> torch.Tensor:
    return error_BT.square().mean().sqrt()


def _check(student: Student, what: str, error: torch.Tensor, allowed: torch.Tensor | float) -> None:
    if not error <= allowed:
        raise UserError(
            f"The student {student.name} ({student.config.model_type}) computes its logits in a way that this trainer "
            f"does not reproduce (in {what}, they differ by {float(error):.2%} of their spread); choose a Llama, "
            "Qwen2, Qwen3 or Gemma3 model."
        )


@contextmanager
def attending_by(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Inside, the model's layers attend by another implementation than ours, such as "eager" or "sdpa"."""
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(attention.NAME)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes in float32. Of a large one only the layer that runs has its weights widened."""
    held: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def widen(module: nn.Module, whole: bool) -> None:
        tensors = [*module.parameters(whole), *module.buffers(whole)]
        held[module] = [(t, t.data) for t in tensors if t.is_floating_point() and t.dtype is not torch.float32]
        for tensor, data in held[module]:
            tensor.data = data.float()

    def narrow(module: nn.Module) -> None:
        for tensor, data in held.pop(module, ()):
            tensor.data = data

    hooks = []
    at_once = 4 * sum(p.numel() for p in model.parameters()) <= _AT_ONCE
    for module, whole in () if at_once else _units(model):
        hooks.append(module.register_forward_pre_hook(lambda module, _, whole=whole: widen(module, whole)))
        hooks.append(module.register_forward_hook(lambda module, *_: narrow(module), always_call=True))
    computing = {m: m.compute_dtype for m in model.modules() if getattr(m, "compute_dtype", None) is not None}
    try:
        if at_once:
            widen(model, True)
        for module in computing:  # with four-bit weights
            module.compute_dtype = torch.float32
        yield
    finally:
        for module, dtype in computing.items():
            module.compute_dtype = dtype
        for hook in hooks:
            hook.remove()
        for module in list(held):
            narrow(module)


def _units(module: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """What is widened at once: each layer with all that it holds, and of other modules their own tensors."""
    for child in module.children():
        if isinstance(module, nn.ModuleList):
            yield child, True
        else:
            yield child, False
            yield from _units(child)
