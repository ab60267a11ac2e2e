"""The block that a burst of decoding steps reads: however it was patched, it is what a fresh one would be."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from lite_mentor.paging import DecodePlan, Fields, PagePool, RowBlock, Span


def pool_of(pages: int = 50, page: int = 4) -> PagePool:
    return PagePool(layers=1, pages=pages, page=page, kv_heads=1, head_dim=2, device="cpu", dtype=torch.float32)


def same(found: Fields, want: Fields) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def span(pages: list[int], last: int) -> Span:
    """A row whose last token lies at place `last` of its last page."""
    end = (len(pages) - 1) * 4 + last + 1
    return Span(pages, 0, end - 1, end)


def change(choose: random.Random, rows: list[list[int]]) -> None:
    """As the engine does, in place: grow, give pages back and take others, leave, come in anywhere, change places."""
    what = choose.choice(["grow", "other end", "shrink", "leave", "come", "swap", "renew", "other within"])
    row = choose.choice(rows)
    if what == "grow" and len(row) < 8:
        row.append(choose.randrange(50))
    elif what == "other end":  # the same list, as long as before
        row[-1] = choose.randrange(50)
    elif what == "other within":
        row[choose.randrange(len(row))] = choose.randrange(50)
    elif what == "shrink":
        del row[max(1, len(row) - 2) :]
    elif what == "leave" and len(rows) > 1:
        rows.remove(row)
    elif what == "come" and len(rows) < 6:
        rows.insert(choose.randrange(len(rows) + 1), [choose.randrange(50)])
    elif what == "swap":
        choose.shuffle(rows)
    elif what == "renew":  # its slot, with the pages of another
        rows[rows.index(row)] = [choose.randrange(50) for _ in range(len(row))]


@pytest.mark.parametrize("seed", range(20))
def test_a_patched_block_is_a_fresh_one(seed):
    choose, pool = random.Random(seed), pool_of()
    block = RowBlock(pool, 6, 3, 8)
    rows = [[choose.randrange(50)] for _ in range(3)]
    for _ in range(100):
        for _ in range(choose.randint(0, 3)):
            change(choose, rows)
        spans = [span(row, choose.randrange(4)) for row in rows]
        ids = [choose.randrange(9) for _ in rows]
        uniforms = [[choose.random() for _ in range(3)] for _ in rows]
        block.fields.tables_BN.fill_(-1)  # what steps have done there is of no account
        block.fields.end_B.add_(1)
        block.fields.k.add_(1)
        fresh = RowBlock(pool, 6, 3, 8)
        for one in (block, fresh):
            one.fill(spans, ids, uniforms)
        used = [
            fields._replace(uniform_KB=fields.uniform_KB[:, : len(rows)]) for fields in (block.fields, fresh.fields)
        ]
        assert same(*used)


def test_a_block_by_hand():
    block = RowBlock(pool_of(pages=9), 4, 2, 3)
    block.fill([Span([7, 3], 5, 10, 11), Span([2], 0, 0, 1)], [6, 8], [[0.1, 0.2], [0.3, 0.4]])
    fields = block.fields
    assert fields.k.tolist() == [0]
    assert fields.ids_B.tolist() == [6, 8, 0, 0]
    assert fields.shared_B.tolist() == [5, 0, 0, 0]
    assert fields.end_B.tolist() == [11, 1, 1, 1]
    assert fields.positions_B.tolist() == [10, 0, 0, 0]
    assert fields.write_B.tolist() == [3 * 4 + 1, 2 * 4, 36, 36]
    assert fields.tables_BN.tolist() == [[7, 3, 9], [2, 9, 9], [9] * 3, [9] * 3]
    assert fields.uniform_KB[:, :2].tolist() == [[0.1, 0.3], [0.2, 0.4]]
    plan = DecodePlan(block, 5)
    plan.advance()
    assert plan.positions_T.tolist() == [11, 1, 1, 1]
    assert plan.write_T.tolist() == [3 * 4 + 2, 2 * 4 + 1, 37, 37]


@pytest.mark.parametrize("rows", [0, 1, 2, 5])
def test_every_field_begins_where_aligned_loads_may(rows):
    flat = torch.zeros(Fields.numbers(rows, 3, 7), dtype=torch.long)
    # Not by data_ptr: of a field without rows it may be 0.
    assert all(field.storage_offset() * field.itemsize % 128 == 0 for field in Fields.of(flat, rows, 3, 7))


def test_only_what_changed_is_written():
    """Growth writes the new page, and a row that stays costs no write at all."""
    block = RowBlock(pool_of(), 2, 1, 8)
    pages = [[1, 2, 3], [4, 5]]
    block.fill([span(p, 0) for p in pages])
    block._host.tables_BN[:, :2] = -7  # a mark where nothing is to be written
    pages[0].append(6)
    block.fill([span(p, 0) for p in pages])
    assert np.array_equal(block._host.tables_BN[:, :4], [[-7, -7, 3, 6], [-7, -7, 50, 50]])
