"""What is kept knows what it was made of: facts of tools, code and judge; records that are renewed or asked again."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lite_mentor import calculators, teacher
from lite_mentor import facts as room
from lite_mentor.errors import UserError
from lite_mentor.facts import facts_of
from lite_mentor.tasks import load_suite, make_example
from lite_mentor.teach import Options, fill, record_of
from lite_mentor.teacher import Manifest, append_to, open_cache, seal
from lite_mentor.tools import calculator_tools, caller, render_call
from lite_mentor.transcript import with_calls
from lite_mentor.types import ToolSpec, World

SCHEMA = {"type": "object", "properties": {"kg": {"type": "integer"}}, "required": ["kg"]}
RATE = ToolSpec("rate", "Cost of a parcel.", SCHEMA, path="facts_parcels.rates:rate")


@pytest.fixture(autouse=True)
def code(tmp_path, monkeypatch) -> Path:
    """The file of RATE's function. It must be read, never imported."""
    file = tmp_path / "facts_parcels" / "rates.py"
    file.parent.mkdir()
    (file.parent / "__init__.py").write_text("raise SystemExit")
    file.write_text("raise SystemExit")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield file
    assert "facts_parcels" not in sys.modules


def parcel(tool=RATE, answer="15 dollars", checker="math", **more):
    return make_example("What does a parcel of 3 kg cost?", [answer], [tool], suite="s", checker=checker, **more)


def differing(before, after) -> set[str]:
    (one,), (other,) = facts_of([before]).values(), facts_of([after]).values()
    assert before.key == after.key
    return {name for name in one if one[name] != other[name]}


def test_each_fact_is_of_one_thing(code, monkeypatch):
    old = parcel()
    assert differing(old, parcel()) == set()
    assert differing(old, parcel(replace(RATE, description="Cost in cents."))) == {"tools"}
    assert differing(old, parcel(replace(RATE, parameters={**SCHEMA, "required": []}))) == {"tools"}
    assert differing(old, parcel(replace(RATE, path="elsewhere:rate"))) == {"code"}
    assert differing(old, parcel(checker="text")) == {"judge"}
    one, other = (parcel(world=World({}, judge)) for judge in ("facts_parcels.rates:judge", "facts_parcels:judge"))
    assert differing(one, other) == set()  # both files say the same
    (before,) = facts_of([old]).values()
    code.write_text("raise SystemExit  # other")
    assert differing(one, other) == {"judge"}
    (after,) = facts_of([old]).values()
    assert {name for name in before if before[name] != after[name]} == {"code"}
    monkeypatch.setattr(room, "_math_verify", lambda: "9.9")
    (later,) = facts_of([old]).values()
    assert {name for name in after if after[name] != later[name]} == {"judge"}


def test_a_tool_in_a_package_that_only_a_finder_of_its_own_knows(tmp_path, monkeypatch):
    """As of an editable install."""
    code = tmp_path / "elsewhere.py"
    code.write_text("1")

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            return importlib.util.spec_from_file_location(name, code) if name == "facts_elsewhere" else None

    tool = parcel(replace(RATE, path="facts_elsewhere:f"))
    (unknown,) = facts_of([tool]).values()
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder])
    (found,) = facts_of([tool]).values()
    code.write_text("2")
    (mended,) = facts_of([tool]).values()
    assert len({facts["code"] for facts in (unknown, found, mended)}) == 3


def test_a_calculator_under_another_name_is_still_that_calculator(monkeypatch):
    example = load_suite("math_varied", split="train", size=1, seed=0)[0]
    (before,) = facts_of([example]).values()
    real = room._sha256
    monkeypatch.setattr(room, "_sha256", lambda file: "mended" if file == calculators.__file__ else real(file))
    (after,) = facts_of([example]).values()
    assert {name for name in before if before[name] != after[name]} == {"code"}


def test_tools_without_a_file_and_our_own():
    nowhere = [parcel(replace(RATE, path=path)) for path in ("no.such.module:f", "facts_parcels.no:f")]
    assert differing(*nowhere) == set()
    first, second, _ = calculator_tools()[:3]
    assert differing(parcel(first), parcel(replace(first, description="sum"))) == {"tools"}
    both = facts_of([parcel(first), parcel(second)]).values()
    assert len({facts["code"] for facts in both}) == 1  # they stand in the same file


# --- the teacher's records ---------------------------------------------------------------------------------------


class Filling:
    """Fills a cache from a teacher who calls `rate` and says 15; counts what that teacher is asked."""

    def __init__(self, out: Path):
        self.options, self.asked, self.result = Options(out, suite="t.jsonl", source="endpoint", model="m"), 0, "15"

    def __call__(self, *examples):
        run = caller(lambda path, arguments: ("ok", self.result))

        def ask(todo, _):
            for example in todo:
                self.asked += 1
                call = run(render_call("rate", {"kg": 3}), example, ())
                messages = [{"role": "assistant", "content": with_calls("", [call.raw])}]
                messages.append({"role": "tool", "content": call.result})
                messages.append({"role": "assistant", "content": "\\boxed{15}"})
                yield record_of(example, "endpoint:m", messages, [call], "15")

        fill(self.options, examples, ask, run)
        return open_cache(self.options.out)


@pytest.fixture
def filled(tmp_path) -> Filling:
    filling = Filling(tmp_path / "cache")
    filling(parcel())
    assert filling.asked == 1
    return filling


def stale(cache, example, words: str) -> bool:
    with pytest.raises(UserError, match=f"1 of 1 records in .* were made with {words}, the first .* python -m lite"):
        cache.usable([example])
    return True


def test_what_has_not_changed_is_left_alone(filled, capsys):
    before = (filled.options.out / "records.jsonl").read_bytes()
    assert filled(parcel()).usable([parcel()]) == [parcel()]
    assert (filled.asked, (filled.options.out / "records.jsonl").read_bytes()) == (1, before)
    assert "made with" not in capsys.readouterr().out


def test_a_corrected_checker_judges_again_and_asks_nobody(filled, capsys):
    example = parcel(checker="text")
    assert stale(open_cache(filled.options.out), example, "another checker or judge")
    cache = filled(example)
    assert (filled.asked, len(cache), cache.rejected) == (1, 0, 1)  # as texts, 15 is not 15 dollars
    assert "1 records were made with another checker or judge; 0 no longer hold" in capsys.readouterr().out
    cache = filled(parcel())
    assert (filled.asked, len(cache), cache.rejected) == (1, 1, 0)
    assert (cache.manifest.records, cache.manifest.correct) == (3, 1)
    assert cache.usable([parcel()])


def test_other_code_is_run_again_and_other_results_are_asked_for(filled, code):
    code.write_text("raise SystemExit  # a comment")
    assert stale(open_cache(filled.options.out), parcel(), "other code of the tools")
    assert filled(parcel()).usable([parcel()])
    assert filled.asked == 1  # the same results
    code.write_text("raise SystemExit  # dearer")
    filled.result = "1500"
    cache = filled(parcel())
    assert filled.asked == 2
    assert cache[parcel().key].calls[0].result == "1500"


def test_other_descriptions_are_asked_about_again(filled, capsys):
    example = parcel(replace(RATE, description="Cost in cents."))
    assert stale(open_cache(filled.options.out), example, "other descriptions of the tools")
    assert filled(example).usable([example])
    assert filled.asked == 2
    assert "1 no longer hold and are asked again" in capsys.readouterr().out


def test_a_cache_of_before_is_read_and_renewed(filled):
    (line,) = (filled.options.out / "records.jsonl").read_bytes().splitlines()
    row = json.loads(line)
    old = seal(**{k: v for k, v in vars(teacher._record(line)).items() if k not in ("sha256", "facts")})
    assert "facts" in row
    assert b"facts" not in teacher.render_record(old)
    there = filled.options.out / "before"
    manifest = json.loads((filled.options.out / "manifest.json").read_text())
    kept = Manifest("endpoint:m", "endpoint", manifest["decoding"], "t.jsonl", tuple(manifest["command"]))
    with append_to(there, kept) as cache:
        cache.append(old)
        cache.publish()
        current = cache.manifest
    content = (there / "records.jsonl").read_bytes()
    sha = teacher.hashlib.sha256(content).hexdigest()
    whole = replace(current, records=1, correct=1, bytes=len(content), sha256=sha)
    (there / "manifest.json").write_bytes(teacher._render_manifest(whole, 1))
    assert stale(open_cache(there), parcel(), "tools and a judge that they do not tell")
    filled.options = replace(filled.options, out=there)
    assert filled(parcel()).usable([parcel()])
    assert filled.asked == 1
    assert json.loads((there / "manifest.json").read_text())["format"] == 2
