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
    return Launch(dict(BLOCK_R=rows, BLOCK_H=hidden), warps, stages)


def k3(rows: int, hidden: int, columns: int, *, warps: int, stages: int) -> Launch:
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
    small_statistics=k1(32, 32, warps=8, stages=2),
    jacobian=k3(64, 64, 32, warps=8, stages=2),
    gradient=k3(64, 64, 32, warps=8, stages=2),
)

# float16 in the interpreter, whatever the machine.
INTERPRETED = HeadLaunches(
    statistics=k1(128, 32, warps=8, stages=4),
    small_statistics=k1(64, 64, warps=8, stages=3),
    jacobian=k3(128, 128, 64, warps=8, stages=3),
    gradient=k3(128, 128, 32, warps=8, stages=4),
)

# bfloat16 and float16, by compute capability.
LAUNCHES: dict[tuple[int, int], HeadLaunches] = {
    capability: INTERPRETED for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0))
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


# What `bench kernels --choose` measures beside the table's, and the architectures on which each compiles without spills.
CANDIDATES: dict[str, list[tuple[Launch, tuple[int, ...]]]] = {}


def head_candidates(field: str, arch: int) -> list[Launch]:
    """The candidates for one field of HeadLaunches on an architecture, 86 as an example."""
    return [launch for launch, archs in CANDIDATES.get(field, []) if arch in archs]
