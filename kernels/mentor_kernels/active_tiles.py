"""Which tiles of the vocabulary the head's gradient can do without, and by how much it is then wrong at most.

Mathematics. K3 (linear_logprob.py) sums p_v phi_v k_v W_v over all v but the target. A trained student is nearly sure
of most tokens: almost all of that sum is in a few tiles of 128 columns. K1's statistics tell how much of a row's
absolute coefficients a tile t can hold, before K3 has read any of its columns. With the tile's m, s, a, the row's lse,

    q_t = sum p_v         = f s                         f = exp(m - lse)
    r_t = sum -p_v log p_v = -f (a + s (m - lse))

    sum |p_v phi_v|  <=  w_t  =  |c| q_t + |b| (r_t + H q_t)        phi_v = c + b (log p_v + H)

in units of the larger of |c| and |b|. Leave a set of tiles out of a row: with delta = the sum of its w_t, the others'
part of the gradient loses at most delta max |W_v|, and the target's coefficient, which is the sum of the others', at
most delta:

    |error of d loss / d h|  <=  2 delta max(|c|, |b|) max_v |W_v| |scale| / T

A block of rows shares its tiles. Those of the least weight go first, ranked by the largest weight that any of its rows
has there, as long as NO row of the block has lost more than `drop_mass`: that bounds delta for every row, whatever the
distribution. Neighbours in a text need different tiles; sorted by how many tiles they need alone, the many rows that
need three do not pay for the few that need three hundred.

Bytes and FLOPs: the [V / 128, R] weights are read and written some twenty times, half of them as int64: 1.2 bytes a
logit, beside the 4 that K1 writes and K3 reads of e, in some thirty launches; K3's GEMM is saved for the tiles left
out. Nothing is read back: counts and lists stay on the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

UNIT = 2**40
"""Of weight: no tile above 2 is ever left out, and sums over any vocabulary stay below 2^63."""


class ActiveTiles(NamedTuple):
    """The order of a chunk's rows, and what each block of them multiplies."""

    order_R: torch.Tensor
    """int64: the rows, those that need few tiles first, those without coefficients last."""
    tiles_BT: torch.Tensor
    """int32, contiguous: of each block, the tiles to take, ascending; then T."""
    counts_B: torch.Tensor
    """int32: how many those are."""


def tile_weights(
    statistics_3TR: torch.Tensor,
    top_R: torch.Tensor,
    log_total_R: torch.Tensor,
    entropy_R: torch.Tensor,
    by_logprob_R: torch.Tensor | None = None,
    by_entropy_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """w [T, R]: the most that a tile can hold of a row's coefficients, over the row's larger slope.

    statistics_3TR are m, s and a of each tile, without the target; lse is top + log_total. Without slopes c is 1 and
    b is 0.
    """
    m_TR, s_TR, a_TR = statistics_3TR
    below_TR = m_TR - top_R - log_total_R
    f_TR = below_TR.exp()
    q_TR = s_TR * f_TR
    if by_logprob_R is None:
        return q_TR
    c_R = by_logprob_R.abs()
    if by_entropy_R is None:
        return q_TR * (c_R / torch.where(c_R == 0, 1.0, c_R))
    b_R = by_entropy_R.abs()
    size_R = torch.maximum(c_R, b_R)
    size_R = torch.where(size_R == 0, 1.0, size_R)
    r_TR = -f_TR * (a_TR + s_TR * below_TR)
    return c_R / size_R * q_TR + b_R / size_R * (r_TR + entropy_R * q_TR)


def active_tiles(weight_TR: torch.Tensor, drop_mass: float, block_rows: int) -> ActiveTiles:
    """Tiles for blocks of `block_rows` rows, so that no row loses more weight than `drop_mass`, in [0, 1).

    A row with a NaN in it keeps all tiles of its block.
    """
    T, R = weight_TR.shape
    # Whole numbers, rounded up: their sums have no rounding error, and on CUDA no order that could change.
    weight_TR = weight_TR.nan_to_num(nan=2.0).clamp(max=2.0).mul(UNIT).ceil().long()
    most = int(drop_mass * UNIT)
    need_R = (weight_TR > most / T).sum(0)
    need_R = need_R.masked_fill((weight_TR == 0).all(0), T + 1)
    order_R = need_R.sort(stable=True).indices
    weight_TBr = F.pad(weight_TR[:, order_R], (0, -R % block_rows)).unflatten(1, (-1, block_rows))
    rank_TB = weight_TBr.amax(2).sort(dim=0, stable=True).indices
    lost_TB = weight_TBr.gather(0, rank_TB[:, :, None].expand_as(weight_TBr)).cumsum(0).amax(2)
    keep_TB = lost_TB > most
    tiles_TB = torch.where(keep_TB, rank_TB, T).sort(dim=0).values
    return ActiveTiles(order_R, tiles_TB.T.to(torch.int32).contiguous(), keep_TB.sum(0, dtype=torch.int32))
