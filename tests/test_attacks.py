"""Attacks on tools in every way that this machine can start workers; bench/attacks.py has the list."""

from __future__ import annotations

import pytest

from bench.attacks import ATTACKS, SECONDS, attempt, enforced, scene
from lite_mentor.sandbox import Sandbox, problem_with


@pytest.fixture(scope="module")
def targets():
    with scene() as targets:
        yield targets


@pytest.fixture(scope="module", params=["limits only", "user namespaces", "bubblewrap"])
def sandbox(request):
    if request.param != "limits only" and problem_with(request.param):
        pytest.skip(problem_with(request.param))
    with Sandbox(1, SECONDS, request.param) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def best_sandbox():
    with Sandbox(1, SECONDS) as sandbox:
        yield sandbox


def name(attack) -> str:
    return attack.name


@pytest.mark.parametrize("attack", ATTACKS["tool"], ids=name)
def test_a_tools_attack_is_contained_and_the_sandbox_goes_on(sandbox, targets, attack):
    if not enforced(attack, sandbox.way):
        pytest.skip(f"{sandbox.way}: {attack.by} cannot be had here")
    assert attempt("tool", attack, sandbox, targets)[1] == ""


@pytest.mark.parametrize("attack", ATTACKS["python"], ids=name)
def test_a_students_codes_attack_is_contained_and_the_sandbox_goes_on(best_sandbox, targets, attack):
    pytest.importorskip("pydantic_monty")
    assert attempt("python", attack, best_sandbox, targets)[1] == ""


@pytest.mark.parametrize("attack", ATTACKS["calculator"], ids=name)
def test_an_attack_on_a_calculator_is_contained(best_sandbox, targets, attack):
    assert attempt("calculator", attack, best_sandbox, targets)[1] == ""
