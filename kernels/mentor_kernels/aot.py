"""What the kernels compile to, for five generations of GPUs, on a machine without any.

    python -m mentor_kernels.aot [--arch 86 ...]

Triton's compiler needs no driver: the pointers' types, the constants and the target are enough. For every kernel, in
the variants and with the launches that the operators use there, this prints registers, spilled bytes, shared memory and
matrix instructions, and ends with status 1 when one breaks its budget. So it does in bf16 for the launches that a GPU
may choose instead (`--only candidate`; head_launches.py).

    spills        none: a spilled accumulator is traffic that no count of bytes shows
    shared        what a thread block may have on that architecture
    matrix        in float16 and bfloat16, K1 and K3 must use the tensor cores
    float64       none: a Python float that became a double would be 32 times slower on a consumer card
    exact         rewards and advantages are compared for equality: no approximate division, nothing fused
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mentor_kernels.backend import interpreted
from mentor_kernels.head_launches import FLOAT32, HeadLaunches, Launch, head_candidates, launches_of

# The package's attributes of these names are the operators.
HEAD, TOPK, POLICY, ADVANTAGE, SAMPLE, PAGED, GATHER = (
    sys.modules[f"mentor_kernels.{name}"]
    for name in (
        "linear_logprob", "linear_topk", "policy_loss", "group_advantage", "sample", "paged_attention", "gather_rows",
    )
)  # fmt: skip

SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 120: 101_376}
"""Shared memory of one thread block, by architecture (CUDA C Programming Guide, technical specifications)."""
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
MATRIX = re.compile(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)")
INEXACT = re.compile(r"\b(?:div\.full|div\.approx|rcp\.approx|sqrt\.approx|fma\.rn)\S*\.f32")
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Variant:
    """One way in which an operator launches a kernel."""

    name: str
    kernel: Any
    launch: Any
    types: dict[str, str]
    """Of the arguments that are passed at run time."""
    constants: dict[str, Any]
    matrix: bool = False
    """Must it use the tensor cores?"""
    registers: int | None = None
    """The limit that the launch sets."""
    aligned: tuple[str, ...] = field(default=())
    """Integer arguments that are divisible by 16, as they are for every model's sizes."""
    exact: bool = False
    """Must each operation be rounded once? Then multiplications and additions are not fused either."""


@dataclass(frozen=True)
class Built:
    """What a variant compiled to."""

    variant: Variant
    arch: int
    registers: int
    spilled: int
    """Bytes of local memory a thread."""
    shared: int
    matrix: int
    """Tensor-core instructions in the PTX."""
    doubles: bool
    inexact: int
    """Approximate divisions and roots, and fused multiply-adds, in the PTX."""

    def complaints(self) -> list[str]:
        """The budgets that it breaks."""
        wrong = {
            f"{self.spilled} bytes spilled": self.spilled > 0,
            f"{self.shared} bytes of shared memory, over {SHARED_BYTES[self.arch]}": self.shared
            > SHARED_BYTES[self.arch],
            "no tensor-core instruction": self.variant.matrix and not self.matrix,
            "float64 arithmetic": self.doubles,
            f"{self.inexact} inexact operations": self.variant.exact and self.inexact > 0,
        }
        return [text for text, broken in wrong.items() if broken]


def build(variant: Variant, arch: int) -> Built:
    """Compile for one architecture, and read the machine code's resources."""
    names = variant.kernel.arg_names
    source = ASTSource(
        variant.kernel,
        {name: variant.types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in variant.constants.items()},
        {
            (names.index(name),): [["tt.divisibility", 16]]
            for name, kind in variant.types.items()
            if kind.startswith("*") or name in variant.aligned
        },
    )
    options = dict(num_warps=variant.launch.warps, num_stages=variant.launch.stages, maxnreg=variant.registers,
                   enable_fp_fusion=not variant.exact)  # fmt: skip
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    return Built(
        variant, arch, int(found[1]), int(found[2]), built.metadata.shared, len(MATRIX.findall(built.asm["ptx"])),
        ".f64" in built.asm["ptx"], len(INEXACT.findall(built.asm["ptx"])),
    )  # fmt: skip


# --- the variants ---------------------------------------------------------------------------------------------------


def _arguments(kernel, types: dict[str, str], absent: tuple[str, ...] = ()) -> tuple[dict[str, str], dict[str, None]]:
    """Types of the kernel's arguments: named ones, pointers to float32, sizes and strides; and None for absent ones."""
    constants = {p.name for p in kernel.params if p.is_constexpr}
    found = {}
    for name in kernel.arg_names:
        if name in constants or name in absent:
            continue
        found[name] = types.get(name) or ("*fp32" if name.endswith("_ptr") else "i32")
    return found, dict.fromkeys(absent)


def statistics(dtype: str, launch: Launch, *, reference: bool, softcap: bool, store: bool) -> Variant:
    """K1."""
    kernel = HEAD._tile_statistics
    absent = () if reference else ("ref_hidden_ptr", "ref_m_ptr", "ref_s_ptr", "drift_ptr", "target_d_ptr", "d_ptr")
    inputs = dict.fromkeys(("hidden_ptr", "ref_hidden_ptr", "weight_ptr", "e_ptr", "d_ptr"), "*" + dtype)
    types, none = _arguments(kernel, {**inputs, "target_ptr": "*i64", "inner": "fp32", "outer": "fp32"}, absent)
    constants = dict(SOFTCAP=softcap, STORE=store, EVEN_H=True, BARRED=HEAD.BARRED, BLOCK_V=HEAD.STATISTICS_TILE)
    name = " ".join(["K1", dtype, *_marks(reference=reference, softcap=softcap, store=store)])
    return Variant(name, kernel, launch, types, {**none, **constants, **launch.blocks}, dtype != "fp32", None,
                   ("H", "hidden_stride", "ref_hidden_stride", "weight_stride", "e_stride"))  # fmt: skip


def gradient(
    dtype: str, gemm: Launch, *, softcap: bool, loss: bool = False, entropy: bool = False, kl: bool = False,
    drop: bool = False,
) -> Iterator[Variant]:  # fmt: skip
    """K3, its GEMM and its end."""
    of_loss, of_entropy, of_drop = ("by_logprob_ptr",), ("by_entropy_ptr",), ("tiles_ptr", "counts_ptr")
    of_kl = ("by_kl_ptr", "d_ptr", "target_d_ptr", "level_ptr")
    given = dict.fromkeys(("e_ptr", "d_ptr", "weight_ptr", "out_ptr"), "*" + dtype)
    given |= dict.fromkeys(("target_ptr", "order_ptr"), "*i64") | dict.fromkeys(("factor", "slope_factor"), "fp32")
    given |= dict.fromkeys(of_drop, "*i32")
    boost = {"fp16": 2.0**12 if loss else 2.0**15}.get(dtype, 1.0)
    constants = dict(SOFTCAP=softcap, LOSS=loss, BOOST=boost)
    marks = " ".join([dtype, *_marks(loss=loss, entropy=entropy, kl=kl, softcap=softcap, drop=drop)])
    whole = dict(EVEN_H=True, TILE=HEAD.STATISTICS_TILE)
    parts = {"K3": (HEAD._gradient_sums, gemm, whole)}
    if not drop:  # the end is the same
        parts["K3 end"] = (HEAD._gradient_rows, HEAD.ROWS, {})
    for name, (kernel, launch, more) in parts.items():
        absent = (() if loss else of_loss) + (() if entropy else of_entropy) + (() if kl else of_kl)
        absent += (() if drop else of_drop) + (() if loss or drop else ("order_ptr",))
        types, none = _arguments(kernel, given, tuple(n for n in absent if n in kernel.arg_names))
        aligned = tuple(n for n in ("H", "span", "e_stride", "weight_stride", "out_stride") if n in types)
        fixed = {**none, **constants, **more, **launch.blocks}
        matrix = name == "K3" and dtype != "fp32"
        yield Variant(f"{name} {marks}", kernel, launch, types, fixed, matrix, None, aligned)


def merges() -> Iterator[Variant]:
    """K2, and its half for the reference."""
    launch = HEAD.FINISH
    for name, kernel in (("K2", HEAD._merge_tiles), ("K2 reference", HEAD._merge_divergence)):
        types, _ = _arguments(kernel, {})
        yield Variant(name, kernel, launch, types, dict(START=HEAD.START, **launch.blocks))


def gathered(dtype: str) -> Iterator[Variant]:
    """Products with chosen rows of the head, and the sum of such rows."""
    launch = Launch(dict(BLOCK_K=TOPK.BLOCK_K, BLOCK_H=TOPK.BLOCK_H), TOPK.WARPS, 3)
    kernels = {"gathered dots": (TOPK._gathered_dots, ("hidden_ptr", "weight_ptr")),
               "gathered sum": (TOPK._gathered_sum, ("weight_ptr", "out_ptr"))}  # fmt: skip
    for name, (kernel, narrow) in kernels.items():
        types, _ = _arguments(kernel, {**dict.fromkeys(narrow, "*" + dtype), "ids_ptr": "*i64"})
        aligned = ("H", "hidden_stride", "weight_stride") if "hidden_ptr" in narrow else ("H", "weight_stride")
        yield Variant(f"{name} {dtype}", kernel, launch, types, launch.blocks, aligned=aligned)


def policy(loss: str, kl: str, tis: str) -> Variant:
    """The policy loss; `kl` or `tis` empty: without."""
    kernel = POLICY._policy_tokens
    launch = Launch({}, POLICY.WARPS, 3)
    absent = (() if kl else ("ref_ptr",)) + (() if tis else ("behaviour_ptr",))
    numbers = dict.fromkeys(("weight", "lower", "upper", "dual", "cap", "above", "beta", "entropy_coef"), "fp32")
    types, none = _arguments(kernel, {"sequence_ptr": "*i64", **numbers}, absent)
    by_sequence = loss in ("grpo", "gspo") or tis == "sequence"
    constants = dict(LOSS=loss, KL=kl or "k3", TIS=tis, TOP=POLICY.EXPONENT_MAX, SEQUENCES=by_sequence,
                     SPAN=POLICY.SPAN if by_sequence else POLICY.BLOCK, BLOCK=POLICY.BLOCK,
                     COLUMNS=POLICY.COLUMNS)  # fmt: skip
    name = " ".join(["policy", loss, *filter(None, (kl, tis and f"tis-{tis}"))])
    return Variant(name, kernel, launch, types, {**none, **constants}, registers=POLICY.REGISTERS)


def policy_sums() -> Variant:
    """The second launch of the policy loss."""
    kernel = POLICY._policy_sums
    types, _ = _arguments(kernel, {"token": "fp32"})
    constants = dict(ROWS=POLICY.SUM_ROWS, COLUMNS=POLICY.COLUMNS, METRICS=len(POLICY.METRICS))
    return Variant("policy sums", kernel, Launch({}, POLICY.WARPS, 3), types, constants)


def advantages(reward: str, advantage: str) -> Variant:
    """Rewards and advantages of a group."""
    kernel = ADVANTAGE._group_rewards
    integers = dict.fromkeys(("teacher_ptr", "student_ptr", "invalid_ptr", "group_ptr"), "*i64")
    flags = dict.fromkeys(("finished_ptr", "answered_ptr", "silent_ptr"), "*i1")
    numbers = dict.fromkeys(("w_correct", "w_align", "w_valid", "eps"), "fp32")
    types, none = _arguments(kernel, {**integers, **flags, **numbers}, () if reward == "strict" else ("process_ptr",))
    constants = dict(WORDS=1, REWARD=reward, ADVANTAGE=advantage, ALIGNS=reward not in ("no_align", "sparse", "strict"),
                     NO_ANSWER=ADVANTAGE.NO_ANSWER, WRONG_KEEPS=ADVANTAGE.WRONG_KEEPS,
                     BLOCK=ADVANTAGE.BLOCK)  # fmt: skip
    launch = Launch({}, ADVANTAGE.WARPS, 3)
    return Variant(f"advantage {reward} {advantage}", kernel, launch, types, {**none, **constants}, exact=True)


def whole_step(own: bool) -> Variant:
    """Advantages over the whole step."""
    kernel = ADVANTAGE._whole_step
    types, _ = _arguments(kernel, {"silent_ptr": "*i1", "group_ptr": "*i64", "eps": "fp32"})
    launch = Launch({}, ADVANTAGE.WARPS, 3)
    name = "advantage, whole step " + ("gdpo" if own else "batch")
    return Variant(name, kernel, launch, types, dict(OWN=own, BLOCK=ADVANTAGE.BLOCK), exact=True)


def sampling(dtype: str) -> Iterator[Variant]:
    """A token of each row of logits: three launches; without a race, and with all tokens or the likeliest in it."""
    pointers = {"logits_ptr": "*" + dtype, "weight_ptr": "*i64", "token_ptr": "*i64"}
    pointers |= dict.fromkeys(("seed_ptr", "first_ptr", "winner_ptr"), "*i32") | {"inverse_temperature": "fp32"}
    constants = {n: getattr(SAMPLE, n) for n in ("STRIDE", "MIX_1", "MIX_2", "ALMOST_ONE", "ONE", "UNSOUND", "BLOCK")}
    constants |= dict(BLOCKS=SAMPLE.padded_blocks(-(-151_936 // SAMPLE.BLOCK)))
    parts = {"top": (SAMPLE._block_top, SAMPLE.WARPS), "race": (SAMPLE._block_race, SAMPLE.WARPS),
             "merge": (SAMPLE._merge_blocks, SAMPLE.MERGE_WARPS)}  # fmt: skip
    for name, (kernel, warps) in parts.items():
        races, may_cut = "GREEDY" in kernel.arg_names, "least_ptr" in kernel.arg_names
        for greedy, cut in ((False, False), *([(True, False)] if races else []), *([(False, True)] if may_cut else [])):
            types, none = _arguments(kernel, pointers, ("least_ptr",) if may_cut and not cut else ())
            fixed = {n: value for n, value in {**constants, "GREEDY": greedy}.items() if n in kernel.arg_names}
            label = " ".join(["sample", dtype, name, *_marks(greedy=greedy, cut=cut)])
            yield Variant(label, kernel, Launch({}, warps, 3), types, {**none, **fixed}, aligned=("V", "stride"))


def attention(dtype: str, width: int) -> Variant:
    """Attention over pages, heads of `width`."""
    kernel, launch = PAGED._attend_split, PAGED.attend_launch(BYTES[dtype], width)
    pointers = dict.fromkeys(("query_ptr", "keys_ptr", "values_ptr"), "*" + dtype)
    indices = dict.fromkeys(("tables_ptr", "shared_ptr", "end_ptr"), "*i64")
    types, _ = _arguments(kernel, {**pointers, **indices, "scaling": "fp32"})
    constants = dict(PAGE=16, SPLIT=PAGED.SPLIT, START=HEAD.START, BARRED=HEAD.BARRED, BLOCK_Q=16, BLOCK_D=width)
    aligned = ("D", "query_stride", "query_head_stride")
    return Variant(f"attention {dtype} {width}", kernel, launch, types, {**constants, **launch.blocks},
                   dtype != "fp32", aligned=aligned)  # fmt: skip


def attention_merge(dtype: str, width: int) -> Variant:
    """The second launch of the attention over pages."""
    kernel, launch = PAGED._merge_splits, PAGED.MERGE
    types, _ = _arguments(kernel, {"out_ptr": "*" + dtype})
    constants = dict(START=HEAD.START, BLOCK_D=width, **launch.blocks)
    return Variant(f"attention merge {dtype} {width}", kernel, launch, types, constants, aligned=("D",))


def copies(dtype: str) -> Variant:
    """The gradient of gathered rows."""
    kernel, launch = GATHER._add_copies, GATHER.ADD
    indices = dict.fromkeys(("ends_ptr", "places_ptr"), "*i64")
    types, _ = _arguments(kernel, {**indices, **dict.fromkeys(("grad_ptr", "out_ptr"), "*" + dtype)})
    return Variant(f"copies {dtype}", kernel, launch, types, launch.blocks, aligned=("C", "D"))


def _marks(**flags: bool) -> list[str]:
    return [name for name, on in flags.items() if on]


def products(dtype: str, launches: HeadLaunches) -> Iterator[Variant]:
    """K1 and K3 in all their modes."""
    booleans = (False, True)
    for r, s, store in itertools.product(booleans, repeat=3):
        yield statistics(dtype, launches.for_k1(softcap=s, reference=r), reference=r, softcap=s, store=store)
    for loss, e, kl, s, drop in itertools.product(booleans, repeat=5):
        if (loss or not (e or kl)) and not (kl and drop):
            launch = launches.for_k3(softcap=s, by_column=e or kl, drop=drop)
            yield from gradient(dtype, launch, softcap=s, loss=loss, entropy=e, kl=kl, drop=drop)


def candidates(arch: int) -> Iterator[Variant]:
    """Every mode of K1 and K3 under every launch that a GPU of this architecture may choose."""
    for kind in HeadLaunches._fields:
        for launch in head_candidates(kind, arch):
            for variant in products("bf16", launches_of(arch)._replace(**{kind: launch})):
                if variant.launch is launch:
                    sizes = "x".join(map(str, launch.blocks.values()))
                    yield replace(variant, name=f"candidate {variant.name} {sizes}")


def variants(arch: int) -> list[Variant]:
    """Every variant of every kernel that the operators can launch, but for sizes that are not divisible by 16."""
    booleans = (False, True)
    head = [
        *(v for dtype in BYTES for v in products(dtype, FLOAT32 if BYTES[dtype] == 4 else launches_of(arch))),
        *merges(),
        *candidates(arch),
    ]
    losses = ("grpo", "dapo", "dr_grpo", "gspo", "cispo")
    return [
        *head,
        *(variant for dtype in BYTES for variant in gathered(dtype)),
        *(policy(loss, kl, tis) for loss in losses for kl, tis in (("", ""), ("k3", "token"), ("k1", "sequence"))),
        *(policy("dapo", kl, "token") for kl in ("k2", "exact")),
        policy_sums(),
        *(
            advantages(reward, advantage)
            for reward in get_args(ADVANTAGE.Reward)
            for advantage in ("dr_grpo", "grpo", "gdpo")
        ),
        *(whole_step(own) for own in booleans),
        *(variant for dtype in BYTES for variant in sampling(dtype)),
        *(make(dtype, width) for make in (attention, attention_merge) for dtype in BYTES for width in (64, 128, 256)),
        *(copies(dtype) for dtype in BYTES),
    ]


def main(argv: list[str] | None = None) -> int:
    """Print the table; 0 when every budget is kept, 1 when one is broken, 2 where nothing can be compiled."""
    parser = argparse.ArgumentParser(prog="python -m mentor_kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(SHARED_BYTES), default=sorted(SHARED_BYTES))
    parser.add_argument("--only", nargs="+", default=[""], help="variants whose name starts so, such as 'K3 bf16'")
    options = parser.parse_args(argv)
    if interpreted():
        print("error: TRITON_INTERPRET is set, so there is nothing to compile; unset it.", file=sys.stderr)
        return 2
    chosen = [(arch, v) for arch in options.arch for v in variants(arch) if v.name.startswith(tuple(options.only))]
    if not chosen:
        print(f"error: no variant's name starts with {' or '.join(map(repr, options.only))}.", file=sys.stderr)
        return 2
    broken = 0
    print("| kernel | sm | warps | stages | registers | spilled | shared | matrix | |")
    print("|---|---|---|---|---|---|---|---|---|")
    for arch, variant in chosen:
        built = build(variant, arch)
        wrong = "; ".join(built.complaints())
        broken += bool(wrong)
        launch = variant.launch
        print(f"| {variant.name} | {arch} | {launch.warps} | {launch.stages} | {built.registers} | {built.spilled} "
              f"| {built.shared} | {built.matrix} | {wrong or 'ok'} |", flush=True)  # fmt: skip
    print(f"\n{len(chosen)} compiled, {broken} over budget; triton {triton.__version__}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
