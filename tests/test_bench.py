"""The step bench runs the real trainer and reports what it measured; it is never asked how fast it was."""

from __future__ import annotations

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from mentor_kernels.head_launches import LAUNCHES, k1

from bench import choose, kernels, measure, peers, step
from bench.__main__ import main as bench_main
from bench.keep_rate import DROP_MASSES, keep_rate, score_and_gradient_seconds
from lite_mentor.errors import UserError
from tests.test_train import SHORT


def test_the_step_bench_prints_a_table_and_its_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LITE_MENTOR_CACHE", str(tmp_path))
    assert bench_main(["step", *SHORT, "--steps", "2", "--temperature", "1.5"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    row = json.loads(lines[-1])
    assert row["command"].startswith("python -m bench step --preset tiny")
    assert row["time/step"] >= row["time/rollout"] > row["time/tools"] > 0
    assert row["tokens/sampled"] > 0
    assert row["memory/peak"] > 0
    header = lines.index("| stage | s | share | tokens/s |")
    assert [line.split("|")[1].strip() for line in lines[header + 2 : header + 7]] == [
        "rollout", "tools", "score", "update", "step",
    ]  # fmt: skip


def test_a_step_in_which_no_tool_was_called_has_a_table():
    row = {f"time/{stage}": 2.0 for stage in step.STAGES} | {"tokens/sampled": 8, "memory/peak": 2**30}
    del row["time/tools"]
    assert "| rollout | 2.00 | 100% | 4 |" in step.table(row)
    assert "tools" not in step.table(row)


def test_the_keep_rate_and_its_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LITE_MENTOR_CACHE", str(tmp_path))
    assert bench_main(["keep-rate", *SHORT]) == 0
    row = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    for rates in ([r["kept"] for r in row["rows"]], [r["kept_in_order"] for r in row["rows"]]):
        assert rates == sorted(rates)
        assert 0 < rates[0] <= 1
    assert all(r["error_of_bound"] <= 1 for r in row["rows"])

    # Probabilities 2 / 11 (the target), 8 / 11 and, in the second tile, 1 / 11; nothing else.
    weight = torch.full((256, 1), -40.0)
    weight[[0, 1, 200], 0] = torch.tensor([2.0, 8.0, 1.0]).log()
    head = SimpleNamespace(head_weight_VH=weight, logit_scale=1.0, softcap=None)
    found = keep_rate(torch.ones(1, 1), torch.tensor([0]), torch.ones(1), head, 1.0, 0.1)
    lost = math.log(2) / 11
    whole = lost - 8 * math.log(4) / 11
    assert found == {
        "drop_mass": 0.1, "kept": 0.5, "kept_in_order": 0.5, "error": pytest.approx(-lost / whole),
        "error_of_sum": pytest.approx(-lost / whole), "error_of_bound": pytest.approx(lost / (2 * 0.1 * 40)),
    }  # fmt: skip
    assert keep_rate(torch.ones(1, 1), torch.tensor([0]), torch.ones(1), head, 1.0, 0.05)["kept"] == 1


def test_the_kernels_that_leave_tiles_out_are_timed(kernel_device, monkeypatch):
    """Their ratio on a GPU comes from here; in the interpreter only that all are timed is seen."""
    monkeypatch.setattr("bench.keep_rate.TURNS", 1)
    make = torch.Generator().manual_seed(0)
    weight, hidden = (torch.randn(n, 8, generator=make).to(kernel_device) for n in (300, 5))
    head = SimpleNamespace(head_weight_VH=weight, logit_scale=1.0, softcap=None)
    targets = torch.arange(5, device=kernel_device)
    found = score_and_gradient_seconds(hidden, targets, head, 0.7, kernel_device)
    assert list(found) == [0.0, *DROP_MASSES]
    assert all(taken > 0 for taken in found.values())


def test_the_kernels_bench_times_what_is_right_and_lists_what_is_not(tmp_path, capsys):
    flags = ["--shapes", "tiny", "--rows", "70", "--repeats", "1", "--peers", "cut-cross-entropy", "--device", "cpu"]
    assert bench_main(["kernels", *flags, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "kernels.json").read_text())
    assert "| ours, torch |" in (tmp_path / "kernels.md").read_text()
    assert not any("triton" in row["candidate"] for row in found["results"])
    assert list(found["peers"]) == ["cut-cross-entropy"]
    assert found["dirty"] in (True, False, None)
    for operator in ("policy", "advantage"):
        ours, plain = (row for row in found["results"] if row["operator"] == operator)
        assert (ours["candidate"], plain["candidate"]) == ("ours, torch", "plain torch")
        assert ours["error"] < 1e-5
        assert ours["seconds"] > 0
    head = [row for row in found["results"] if row["operator"] == "head"]
    for mode in ("score", "train", "bonus"):
        rows = {row["candidate"]: row for row in head if row["mode"] == mode}
        assert rows["ours, torch"]["seconds"] > 0
        assert rows["ours, torch"]["error"] < (1e-4 if mode == "score" else 4e-3) < rows["all logits"]["error"]
    if hasattr(torch.nn.functional, "linear_cross_entropy"):  # a newer PyTorch has it
        assert rows["F.linear_cross_entropy"]["problem"] == "gives no entropy"


def timed(by_triton: list[float | str], by_torch: list[float | str]) -> list[dict]:
    """Rows of the head's tables: seconds, or a problem."""
    return [
        {"candidate": name, **({"problem": found} if isinstance(found, str) else {"seconds": found})}
        for name, column in (("ours, triton", by_triton), ("all logits", by_triton), ("ours, torch", by_torch))
        for found in column
    ]


@pytest.mark.parametrize(
    ("by_triton", "by_torch", "chosen"),
    [
        ([1.0, 4.0], [2.0, 2.0], '"triton",  # Triton at 1.00 of cuBLAS (0.50 to 2.00 in 2 tables)'),
        ([1.0, 1.0], [0.8, 0.8], '"triton",  # Triton at 0.80 of cuBLAS (0.80 to 0.80 in 2 tables)'),
        ([1.0, 1.0], [0.5, 0.9], '"torch",  # Triton at 0.67 of cuBLAS (0.50 to 0.90 in 2 tables)'),
        ([9.0, 9.0], [1.0, "wrong, so not timed"], '"triton",  # ours, torch: wrong, so not timed'),
        ([1.0, "failed: OutOfMemoryError"], [9.0, 9.0], '"torch",  # ours, triton: failed: OutOfMemoryError'),
    ],
)
def test_the_choice_of_a_backend(by_triton, by_torch, chosen):
    about = {"device": "cuda: A Card", "date": "2026-01-02", "commit": "abc1234", "more": 1}
    line = kernels.choice(timed(by_triton, by_torch), (9, 0), about)
    assert line == f"    (9, 0): {chosen}; cuda: A Card, 2026-01-02, abc1234"


def test_what_trains_decides():
    rows = [{**row, "mode": mode} for mode, speeds in (("score", ([9.0], [1.0])), ("train", ([1.0], [1.0])))
            for row in timed(*speeds)]  # fmt: skip
    line = kernels.choice(rows, (9, 0), {"device": "d", "date": "t", "commit": "c"})
    assert line == '    (9, 0): "triton",  # Triton at 1.00 of cuBLAS (1.00 to 1.00 in 1 tables); d, t, c'


def test_no_backend_that_passed_is_no_choice():
    with pytest.raises(UserError, match=r"No backend .*: ours, triton: late; ours, torch: wrong\."):
        kernels.choice(timed([1.0, "late"], ["wrong", 1.0]), (9, 0), {})


def test_choose_measures_our_two_backends_and_ends_with_the_line(tmp_path, capsys, monkeypatch):
    seen = []

    def measure(inputs, mode, found, device, repeats):
        seen.append((mode, list(found), device))
        rows = [{"candidate": name, "seconds": s} for name, s in zip(found, (1.0, 0.5), strict=True)]
        return [{**row, "error": 0.0, "bytes": 0, "fastest": 0.4, "slowest": 1.1, "of_floor": 0.5} for row in rows]

    monkeypatch.setattr(kernels, "measure", measure)
    monkeypatch.setattr(kernels, "make_inputs", lambda *_: None)
    monkeypatch.setattr(
        kernels, "machine", lambda device: {"device": f"{device}: A Card", "date": "now", "commit": "c", "torch": "t"}
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(kernels, "LAUNCHES", dict(LAUNCHES))
    faster = k1(64, 64, warps=4, stages=3)
    monkeypatch.setattr(choose, "trials", lambda inputs: None)
    monkeypatch.setattr(choose, "sweep", lambda *_: {"statistics": [choose.Result(faster, 0.5)]})
    monkeypatch.setattr(kernels, "compute_device", lambda requested: requested)
    flags = ["kernels", "--device", "cuda", "--shapes", "tiny", "--out", str(tmp_path)]
    assert bench_main([*flags, "--choose"]) == 0
    assert kernels.LAUNCHES[8, 6] == LAUNCHES[8, 6]._replace(statistics=faster)  # the backends are timed with it
    assert seen == [(mode, ["ours, triton", "ours, torch"], "cuda") for mode in ("train", "score", "bonus")]
    line = '    (8, 6): "torch",  # Triton at 0.50 of cuBLAS (0.50 to 0.50 in 1 tables); cuda: A Card, now, c'
    printed = capsys.readouterr().out
    assert printed.rstrip("\n").splitlines()[-1] == line
    assert "| ours, triton | 1000 (400 to 1100) | 2.00 |" in printed
    entry = "    (8, 6): HeadLaunches(  # cuda: A Card, "
    assert printed.count(entry) == 2  # before the backends are measured, and to paste
    assert (tmp_path / "kernels.md").read_text().rstrip("\n").splitlines()[-1] == line


@pytest.mark.parametrize(
    ("flags", "match"),
    [(["--device", "cpu"], "--choose needs a GPU"), (["--device", "cuda", "--dtype", "fp32"], "drop --dtype fp32")],
)
def test_where_there_is_nothing_to_choose(flags, match, capsys, monkeypatch):
    monkeypatch.setattr(kernels, "compute_device", lambda requested: requested)
    assert bench_main(["kernels", "--choose", *flags]) == 2
    assert match in capsys.readouterr().err


def test_a_wrong_candidate_and_one_that_breaks_are_named_and_not_timed():
    inputs = kernels.make_inputs(30, 16, 300, torch.float32, "cpu")

    def breaks(hidden, weight, targets):
        raise RuntimeError("out of order")

    broken = {
        "one target later": peers.from_head(lambda h, w, y: peers.all_logits(h, w, (y + 1) % 300)),
        "breaks": peers.from_head(breaks),
        "sound": peers.from_head(peers.all_logits),
    }
    rows = kernels.measure(inputs, "train", broken, "cpu", repeats=1)
    assert [row.get("problem") for row in rows] == [
        "wrong, so not timed", "failed: RuntimeError: out of order", None
    ]  # fmt: skip
    assert ["seconds" in row for row in rows] == [False, False, True]


def test_candidates_of_every_mode_agree_with_float64():
    inputs = kernels.make_inputs(2 * peers.CHUNK_ROWS + 3, 16, 300, torch.float32, "cpu")
    found, _ = peers.candidates("cpu", ("none",))
    for mode in ("score", "train", "bonus"):
        wanted = kernels.reference(inputs, mode)
        for name, candidate in found.items():
            if mode == "bonus" and name.startswith("F.linear_cross_entropy"):
                continue
            assert kernels.error(candidate(inputs, mode), wanted, mode) < 1e-4, (name, mode)


def exact(hidden, weight, targets):
    """(logprobs, entropy), plainly."""
    log_p = torch.log_softmax(hidden @ weight.T, -1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)


def stand_ins() -> dict[str, object]:
    """The libraries' entry points by module, with their signatures, on plain torch."""

    def chunked(hidden, weight, bias, targets, temperature, columns, softcap, scale, outputs):
        assert (bias, temperature, columns, softcap, scale) == (None, 1.0, 32_768, None, 1.0)
        logprob, entropy = exact(hidden, weight, targets)
        return logprob, entropy if outputs == ("entropy",) else None, None, None, None

    def cross_entropy(hidden, weight, targets, *, reduction):
        assert reduction == "none"
        return -exact(hidden, weight, targets)[0]

    def scaled(hidden, weight, targets, return_entropy=False):
        logprob, entropy = exact(hidden, weight, targets)
        return (-logprob, entropy) if return_entropy else -logprob

    def cut(hidden, weight, targets, *, reduction, filter_eps):
        assert filter_eps in ("high", None)
        return cross_entropy(hidden, weight, targets, reduction=reduction)

    def verl(hidden, weight, targets, temperature, reduction):
        assert (temperature, reduction) == (1.0, "none")
        return exact(hidden, weight, targets)

    return {
        "trl": None,
        "trl.kernels": {"ChunkedLogProbFunction": SimpleNamespace(apply=chunked)},
        "liger_kernel": None,
        "liger_kernel.ops": {"LigerFusedLinearScaledCrossEntropyFunction": SimpleNamespace(apply=scaled)},
        "liger_kernel.transformers": None,
        "liger_kernel.transformers.functional": {"liger_fused_linear_cross_entropy": cross_entropy},
        "cut_cross_entropy": {"linear_cross_entropy": cut},
        "verl": None,
        "verl.utils": None,
        "verl.utils.kernel": None,
        "verl.utils.kernel.linear_cross_entropy": {"linear_cross_entropy": verl},
    }


@pytest.fixture
def installed(monkeypatch):
    """Every library seems to be installed, as version 1."""
    monkeypatch.setattr(peers.importlib.metadata, "version", lambda _: "1")
    for name, content in stand_ins().items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**(content or {})))


LIBRARY_NAMES = ["TRL, chunked", "Liger, linear CE", "Liger, scaled linear CE", "CCE", "CCE, exact", "verl"]
WITH_ENTROPY = {"TRL, chunked", "Liger, scaled linear CE", "verl"}


def test_adapters_ask_the_libraries_for_the_right_thing(installed):
    inputs = kernels.make_inputs(21, 16, 300, torch.float32, "cpu")
    found, versions = peers.candidates("cuda", ("all",))
    assert versions == dict.fromkeys(("trl", "liger-kernel", "cut-cross-entropy", "verl"), "1")
    assert list(found)[-6:] == LIBRARY_NAMES
    for name in LIBRARY_NAMES:
        for mode in ("score", "train", "bonus"):
            if mode == "bonus" and name not in WITH_ENTROPY:
                with pytest.raises(NotImplementedError, match="gives no entropy"):
                    found[name](inputs, mode)
                continue
            assert kernels.error(found[name](inputs, mode), kernels.reference(inputs, mode), mode) < 1e-5, (name, mode)


def test_a_cpu_gets_the_libraries_that_have_code_for_it(installed):
    found, versions = peers.candidates("cpu", ("all",))
    assert [name for name in LIBRARY_NAMES if name in found] == ["TRL, chunked", "Liger, scaled linear CE"]
    assert versions == {
        "trl": "1", "liger-kernel": "1", "cut-cross-entropy": "1 (needs a GPU)", "verl": "1 (needs a GPU)"
    }  # fmt: skip


@pytest.mark.parametrize("error", [ImportError("no driver"), AssertionError("no driver"), RuntimeError("no driver")])
def test_a_library_that_does_not_import_is_named(installed, monkeypatch, error):
    def fails():
        raise error

    monkeypatch.setitem(peers.LIBRARIES, "verl", fails)
    found, versions = peers.candidates("cpu", ("verl", "trl"))
    assert versions == {"verl": f"1 (does not import: {type(error).__name__}: no driver)", "trl": "1"}
    assert "TRL, chunked" in found


def test_a_gpus_table_has_a_column_for_warm_caches():
    row = {"candidate": "a", "error": 1e-6, "bytes": 3 << 20, "seconds": 2e-3, "fastest": 1e-3, "slowest": 4e-3,
           "of_floor": 0.5}  # fmt: skip
    rows = [{**row, "seconds_warm": 1.5e-3}, {"candidate": "b", "error": 9.0, "problem": "wrong, so not timed"}]
    assert measure.table(rows, "a").splitlines() == [
        "| candidate | ms (fastest to slowest) | ms, warm caches | ratio | memory MiB | % of floor | error |",
        "|---|---|---|---|---|---|---|",
        "| a | 2 (1 to 4) | 1.5 | 1.00 | 3 | 50% | 1.0e-06 |",
        "| b | wrong, so not timed | | | | | 9.0e+00 |",
    ]
    assert measure.table([row], "a").splitlines()[2] == "| a | 2 (1 to 4) | 1.00 | 3 | 50% | 1.0e-06 |"


def test_a_stopped_run_keeps_its_finished_tables(tmp_path, monkeypatch):
    def stops(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "head", stops)
    flags = ["--repeats", "1", "--device", "cpu", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        kernels.main(flags)
    assert len(json.loads((tmp_path / "kernels.json").read_text())["results"]) == 4


def test_a_library_without_an_adapter_is_refused(capsys):
    assert bench_main(["kernels", "--peers", "unknown-package", "--device", "cpu"]) == 2
    assert "--peers unknown-package" in capsys.readouterr().err


@pytest.mark.parametrize("bench", ["kernels", "rollout"])
def test_a_bench_on_a_gpu_that_is_not_there_is_a_sentence(bench, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_main([bench, "--device", "cuda:1"]) == 2
    assert "--device cuda:1: PyTorch sees no GPU here" in capsys.readouterr().err


def test_a_bench_measures_the_gpu_that_it_was_given(monkeypatch):
    """Of torch's questions about a GPU, those without a device are about the current one."""
    asked = []
    for name in ("synchronize", "memory_allocated", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: asked.append((name, device)) or 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"the card {device}")
    assert measure.added_bytes(lambda: None, "cuda:1") == 0
    assert len(asked) == 5
    assert {device for _, device in asked} == {"cuda:1"}
    assert measure.machine("cuda:1")["device"] == "cuda:1: the card cuda:1"


def test_without_git_a_bench_still_says_where_it_ran(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert measure.machine("cpu")["commit"] == "unknown"
    assert measure.dirty() is None


def test_an_unknown_bench_says_how_to_use_it(capsys):
    assert bench_main(["nope"]) == 2
    assert "usage: python -m bench {agreement,all,arms,attacks," in capsys.readouterr().err
