"""Rollouts -> packed rows under a token budget. The only place that pads or packs (and nothing here pads).

A row is a forest: the prefix that all its prompts share, then each group's own prompt, then each rollout's tokens.
Eight rollouts of one prompt cost one prompt, not eight, forward and backward; and since a token sees exactly its own
rollout's past, at its own positions, every logprob and every gradient is what the unpacked rollout would give.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lite_mentor.engine import common_prefix
from lite_mentor.types import Batch, Rollout


def pack(rollouts: Sequence[Rollout], advantages: Sequence[float], micro_tokens: int) -> list[Batch]:
    """All rollouts of one optimizer step as rows of at most `micro_tokens` tokens, none of them split.

    Rollouts without a sampled token are left out. Raises ValueError when a single rollout exceeds the budget.
    """
    indexed = [(i, r) for i, r in enumerate(rollouts) if bool(r.sampled.any())]
    tokens = sum(int(r.sampled.sum()) for _, r in indexed)
    rows: list[list[tuple[int, Rollout]]] = []
    for item in indexed:
        if rows and _row_tokens([r for _, r in (*rows[-1], item)]) <= micro_tokens:
            rows[-1].append(item)
        else:
            if _row_tokens([item[1]]) > micro_tokens:
                raise ValueError(f"a rollout of {len(item[1].ids)} tokens exceeds the row budget of {micro_tokens}")
            rows.append([item])
    return [_row(row, advantages, tokens, len(indexed)) for row in rows]


def _prompt(rollout: Rollout) -> list[int]:
    return rollout.ids[: rollout.prompt_length].tolist()


def _tail(rollout: Rollout) -> slice:
    """The tokens after the prompt that predict something: the last sampled token predicts nothing."""
    return slice(rollout.prompt_length, int(rollout.sampled.nonzero()[-1]))


def _row_tokens(rollouts: Sequence[Rollout]) -> int:
    prompts = {tuple(_prompt(r)) for r in rollouts}
    shared = len(common_prefix(list(prompts)))
    tails = sum(_tail(r).stop - _tail(r).start for r in rollouts)
    return shared + sum(len(p) - shared for p in prompts) + tails


class _Forest:
    """Segments as they are laid down: ids, positions, and where each segment starts and continues from."""

    def __init__(self):
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.starts: list[int] = []
        self.parents: list[int] = []

    def add(self, ids: list[int], parent: int, position: int) -> int:
        """Lay a segment down and return its index; an empty one is its parent."""
        if not ids:
            return parent
        self.starts.append(len(self.ids))
        self.parents.append(parent)
        self.positions += range(position, position + len(ids))
        self.ids += ids
        return len(self.starts) - 1


def _row(row: list[tuple[int, Rollout]], advantages: Sequence[float], tokens: int, sequences: int) -> Batch:
    forest = _Forest()
    root_ids = common_prefix([_prompt(r) for _, r in row])
    root = forest.add(root_ids, -1, 0)
    prompts: dict[tuple[int, ...], tuple[int, int]] = {}  # prompt -> (its segment, the row of its last token)
    row_index, targets, behaviour, advantage, sequence = [], [], [], [], []
    for index, rollout in row:
        prompt = tuple(_prompt(rollout))
        if prompt not in prompts:
            segment = forest.add(list(prompt[len(root_ids) :]), root, len(root_ids))
            last = len(forest.ids) - 1 if len(prompt) > len(root_ids) else len(root_ids) - 1
            prompts[prompt] = (segment, last)
        segment, last = prompts[prompt]
        tail = _tail(rollout)
        start = len(forest.ids)
        forest.add(rollout.ids[tail].tolist(), segment, tail.start)
        at = rollout.sampled.nonzero()[:, 0]
        # The token at position t is predicted by the hidden state of position t - 1.
        row_index += [last if t == tail.start else start + t - 1 - tail.start for t in at.tolist()]
        targets.append(rollout.ids[at])
        behaviour.append(rollout.behaviour_logp[at])
        advantage += [advantages[index]] * len(at)
        sequence += [index] * len(at)
    return Batch(
        ids_T=torch.tensor(forest.ids),
        positions_T=torch.tensor(forest.positions),
        segment_starts=tuple(forest.starts),
        segment_parents=tuple(forest.parents),
        row_index_N=torch.tensor(row_index),
        targets_N=torch.cat(targets),
        behaviour_logp_N=torch.cat(behaviour),
        advantage_N=torch.tensor(advantage, dtype=torch.float32),
        sequence_N=torch.tensor(sequence),
        global_tokens=tokens,
        global_sequences=sequences,
    )
