"""How the loss head's two products are launched: block sizes, warps and stages, by architecture.

K1 and K3 (linear_logprob.py) have two launches each, for what they keep in registers differs:

    statistics         K1 with one accumulator
    small_statistics   K1 with two, the policy's and its reference's; and with the tanh of a softcap
    jacobian           K3 with one coefficient for a whole row
    gradient           K3 with coefficients by column (an entropy's, a KL's, a softcap's), or with a list of tiles

Every launch in this file compiles without spills and fits its architecture's shared memory, which
`python -m mentor_kernels.aot` shows. Nothing is tuned at run time: a launch may move the last bits of a sum, so it must
follow from the machine alone. K1's tile of 128 columns and K3's splits of the vocabulary are no part of a launch.

None of this was measured on a GPU. `python -m bench kernels --choose` measures CANDIDATES on one, and prints its lines.
"""

from __future__ import annotations

from typing import NamedTuple

import triton

from mentor_kernels.backend import interpreted


class Launch(NamedTuple):
    """Block sizes of a kernel and how it is launched."""

    blocks: dict[str, int]
    warps: int
    stages: int


def k1(rows: int, hidden: int, *, warps: int, stages: int) -> Launch:
    """A launch of K1, on blocks of so many rows and, in its loop, of the hidden size."""
    return Launch(dict(BLOCK_R=rows, BLOCK_H=hidden), warps, stages)


def k3(rows: int, hidden: int, columns: int, *, warps: int, stages: int) -> Launch:
    """A launch of K3, on blocks of so many rows, of the hidden size and, in its loop, of the vocabulary."""
    return Launch(dict(BLOCK_R=rows, BLOCK_H=hidden, BLOCK_V=columns), warps, stages)


class HeadLaunches(NamedTuple):
    """The launches of one architecture."""

    statistics: Launch
    small_statistics: Launch
    jacobian: Launch
    gradient: Launch

    def for_k1(self, *, softcap: bool, reference: bool) -> Launch:
        return self.small_statistics if softcap or reference else self.statistics

    def for_k3(self, *, softcap: bool, by_column: bool, drop: bool) -> Launch:
        """Is there a softcap, do the coefficients differ by column, are tiles left out?"""
        return self.gradient if softcap or by_column or drop else self.jacobian


# float32, on every architecture: no tensor cores, so the sizes matter less.
FLOAT32 = HeadLaunches(
    statistics=k1(64, 16, warps=8, stages=2),
    small_statistics=k1(64, 16, warps=8, stages=2),
    jacobian=k3(64, 64, 32, warps=4, stages=2),
    gradient=k3(64, 64, 32, warps=8, stages=2),
)

# float16 in the interpreter, on every machine.
INTERPRETED = HeadLaunches(
    statistics=k1(128, 32, warps=8, stages=4),
    small_statistics=k1(64, 64, warps=8, stages=3),
    jacobian=k3(128, 128, 64, warps=8, stages=3),
    gradient=k3(128, 128, 32, warps=8, stages=4),
)

# Where products are mma.sync (8.x and 12.x). Blocks of 128 x 128 need the least traffic of what fits the registers, one
# block of 8 warps to an SM. At most 97 KB of shared memory, so that they start on every card since sm_80: they also
# serve those that the table does not name. (Shared memory and registers of the largest mode, on sm_80.)
_MMA = HeadLaunches(
    statistics=k1(128, 32, warps=8, stages=4),  # 48 KB; 194 registers
    small_statistics=k1(64, 64, warps=8, stages=3),  # 64 KB; two accumulators of 64 x 128; 172 registers
    jacobian=k3(128, 128, 64, warps=8, stages=3),  # 65 KB; 254 registers
    # 81 KB; 220 registers: what columns have of their own takes those that fewer columns save
    gradient=k3(128, 128, 32, warps=8, stages=4),
)

# bfloat16 and float16, by compute capability. None was measured, so each is what its registers and memory suggest.
LAUNCHES: dict[tuple[int, int], HeadLaunches] = {
    (8, 0): _MMA,
    (8, 6): _MMA,
    (8, 9): _MMA,
    # wgmma reads its operands from shared memory, best in rows of 128 bytes: 64 of the hidden size. K1 has 128
    # registers and 96 KB, so two blocks share an SM, and the exponentials of one run beside the products of the other.
    # A fourth stage would leave room for one block.
    (9, 0): _MMA._replace(statistics=k1(128, 64, warps=8, stages=3)),
    (12, 0): _MMA,
}


def head_launches(itemsize: int) -> HeadLaunches:
    """The launches for elements of `itemsize` bytes on the device that Triton compiles for."""
    if itemsize == 4:
        return FLOAT32
    if interpreted():
        return INTERPRETED
    return launches_of(triton.runtime.driver.active.get_current_target().arch)


def launches_of(arch: int | str) -> HeadLaunches:
    """16-bit launches of an architecture as Triton writes it, 86 as an example. One without an entry takes sm_80's."""
    capability = divmod(arch, 10) if isinstance(arch, int) else None
    return LAUNCHES.get(capability, LAUNCHES[8, 0])


_ALL, _LARGE, _WGMMA = (80, 86, 89, 90, 120), (80, 90), (90,)

# What `bench kernels --choose` measures beside the table's, and the architectures where each compiles without spills.
CANDIDATES: dict[str, tuple[tuple[Launch, tuple[int, ...]], ...]] = {
    "statistics": (
        (k1(128, 64, warps=8, stages=3), _ALL),
        (k1(128, 32, warps=8, stages=4), _ALL),
        (k1(64, 64, warps=4, stages=3), _ALL),  # two or three blocks an SM, for more traffic
        (k1(64, 64, warps=8, stages=4), _ALL),
        (k1(128, 64, warps=8, stages=4), _LARGE),
        (k1(128, 64, warps=4, stages=3), _WGMMA),
        (k1(256, 64, warps=8, stages=3), _WGMMA),
    ),
    "small_statistics": (
        (k1(64, 64, warps=8, stages=3), _ALL),
        (k1(64, 32, warps=8, stages=4), _ALL),
    ),
    "jacobian": (
        (k3(128, 128, 64, warps=8, stages=3), _ALL),
        (k3(128, 128, 32, warps=8, stages=4), _ALL),
        (k3(64, 256, 64, warps=8, stages=3), _ALL),
        (k3(128, 64, 64, warps=8, stages=3), _ALL),
        (k3(128, 128, 64, warps=8, stages=4), _LARGE),
        (k3(128, 128, 32, warps=4, stages=4), _WGMMA),  # two blocks an SM, as for the next
        (k3(64, 128, 64, warps=4, stages=3), _WGMMA),
    ),
    "gradient": (
        (k3(128, 128, 32, warps=8, stages=4), _ALL),
        (k3(128, 64, 32, warps=8, stages=4), (80, 86, 89, 90)),
        (k3(128, 128, 32, warps=8, stages=3), (120,)),
        (k3(64, 128, 32, warps=4, stages=4), _WGMMA),
    ),
}


def head_candidates(field: str, arch: int) -> list[Launch]:
    """What one field of HeadLaunches could be on an architecture, 86 as an example, beside what the table has."""
    found = [launch for launch, archs in CANDIDATES[field] if arch in archs]
    return [launch for launch in found if launch != getattr(launches_of(arch), field)]
