"""The judge, garbage first: what must be wrong, what must be right, and what must not hang."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lite_mentor import judge
from lite_mentor.calculators import number_text
from lite_mentor.errors import UserError
from lite_mentor.judge import boxed, is_correct, is_right
from lite_mentor.quantities import Quantity, read, same_quantity
from lite_mentor.tasks import make_example
from lite_mentor.types import World
from lite_mentor.units import CARDINALS, SCALES
from lite_mentor.worker import START_SECONDS

HOSTILE = "9^{9^{9^9}}"


@pytest.fixture
def no_worker(monkeypatch):
    """Whatever is decided here is decided without a process."""

    def fail(*_):
        raise AssertionError("asked math-verify")

    monkeypatch.setattr(judge, "_math_verify", fail)


# --- boxed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("", None),
        ("no box", None),
        ("\\boxed", None),
        ("\\boxed 5", None),
        ("\\boxed{", None),
        ("\\boxed{5", None),
        ("\\boxed{{5}", None),
        ("\\boxed{1} \\boxed{2", None),
        ("boxed{5}", None),
        ("\\boxed{}", ""),
        ("\\boxed{ }", " "),
        ("\\boxed{5}", "5"),
        ("\\boxed{5}}", "5"),
        ("\\boxed{1} then \\boxed{2} done", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{a\nb}", "a\nb"),
        ("\\boxed{\\boxed{5}}", "5"),
    ],
)
def test_boxed(text, content):
    assert boxed(text) == content


def test_boxed_is_linear():
    million = 1_000_000
    assert boxed("\\boxed{" * million) is None
    assert boxed("\\boxed{" + "{" * million) is None
    assert boxed("\\boxed{" + "{" * million + "}" * million) is None
    assert boxed("\\boxed{" + "{" * million + "}" * (million + 1)) == "{" * million + "}" * million
    assert boxed("{" * million + "\\boxed{5}") == "5"
    assert boxed("\\boxed{" * million + "7" + "}" * million) == "7"


@given(st.text(alphabet="{}\\boxed a5", max_size=60))
def test_what_boxed_finds_is_balanced_and_last(text):
    content = boxed(text)
    if content is not None:
        assert f"\\boxed{{{content}}}" in text
        assert content.count("{") == content.count("}")
        assert "\\boxed{" not in content


# --- garbage is wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checker", ["math", "text"])
@pytest.mark.parametrize(
    "answer", [None, "", " ", "\n", "$", ".", "5" * 201, " " * 200 + "5", "\x00", "\ud800", "{", "}"]
)
def test_nothing_is_never_right(answer, checker):
    assert not is_correct(answer, ("5", "", " ", "$$", "the"), checker)


@pytest.mark.parametrize("checker", ["math", "text"])
def test_without_an_accepted_answer_nothing_is_right(checker):
    assert not is_correct("5", (), checker)
    assert not is_correct("", ("",), checker)


@given(st.text(max_size=60))
def test_no_text_without_a_digit_is_a_number(text):
    assert (
        read(text) is None
        or any(c.isnumeric() for c in text)
        or set(re.findall("[a-z]+", text.lower())) & set(CARDINALS)
    )


# --- numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        ("5", "6"),
        ("123456789012345678901235", "123456789012345678901234"),
        ("5 seconds", "5 metres"),
        ("-5", "5"),
        ("5", "-5"),
        ("5", "0.5"),
        ("50", "0.5"),
        ("0.5", "50"),
        ("50%", "5"),
        ("5%", "500"),
        ("0.005", "50%"),
        ("1000001", "1000000"),
        ("12345678901234567891", "12345678901234567890"),
        ("1234567", "1234567.89"),
        ("1234567.88", "1234567.89"),
        ("0.333", "1/3"),
        ("0.33333", "1/3"),
        ("1e-9", "0"),
        ("1/2", "2"),
        ("12 million", "12"),
        ("12 h/2", "12"),
        ("12 m/2", "12"),
        ("12 s squared", "12"),
        ("12 km/half", "12"),
        ("12\\text{ million}", "12"),
        ("12\\text{ thousand}", "12000000"),
        ("1,234", "1.234"),
        ("1 1/2", "5.5"),
        ("1e999", "1e998"),
        ("12 million dollars", "12"),
    ],
)
def test_two_different_numbers(answer, accepted, no_worker):
    assert not is_correct(answer, (accepted,), "math")


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        ("5", "5"),
        (" 5 ", "5"),
        ("5.", "5"),
        ("5.00", "5"),
        ("+5", "5"),
        ("005", "5"),
        (".5", "0.5"),
        ("-0", "0"),
        ("−5", "-5"),
        ("–5", "-5"),
        ("- 5", "-5"),
        ("$5$", "5"),
        ("\\(5\\)", "5"),
        ("\\[5\\]", "5"),
        ("$5", "5"),
        ("\\$5", "5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("£5", "5"),
        ("5 €", "5"),
        ("$1,234.50", "1234.5"),
        ("1{,}234", "1234"),
        ("1\\,234", "1234"),
        ("1\\,234\\,567", "1234567"),
        ("1,234,567", "1234567"),
        ("\\text{5}", "5"),
        ("\\mathrm{5}", "5"),
        ("5\\text{ cm}", "5"),
        ("5\\,\\text{cm}", "5"),
        ("5\\ \\mathrm{m}^2", "5"),
        ("5\\text{ years old}", "5"),
        ("5 km", "5"),
        ("12 km/h", "12"),
        ("5 m/s", "5"),
        ("12 m²", "12"),
        ("12 cm^3", "12"),
        ("12 °C", "12"),
        ("1.5 L", "1.5"),
        ("12 dollars/hour", "12"),
        ("5 cm^2", "5"),
        ("5 books", "5"),
        ("5 loaves of bread", "5"),
        ("$12 dollars", "12"),
        ("12 million dollars", "12000000"),
        ("3/4 cup", "0.75"),
        ("90°", "90"),
        ("50%", "50%"),
        ("50\\%", "50"),
        ("50%", "0.5"),
        ("50%", "\\frac{1}{2}"),
        ("0.5", "50%"),
        ("50 percent", "50%"),
        ("50\\text{ percent}", "50%"),
        ("50", "50%"),
        ("0.5%", "0.5"),
        ("1/2", "0.5"),
        ("-1/2", "-0.5"),
        ("1/-2", "-0.5"),
        ("2/4", "1/2"),
        ("\\frac{1}{2}", "1/2"),
        ("\\dfrac{1}{2}", "0.5"),
        ("\\frac12", "0.5"),
        ("-\\frac{3}{4}", "-0.75"),
        ("\\frac{-3}{4}", "-0.75"),
        ("\\frac{1,001}{16}", "62.5625"),
        ("1 1/2", "1.5"),
        ("1\\frac{1}{2}", "1.5"),
        ("-1 1/2", "-1.5"),
        ("\\left5\\right", "5"),
        ("1e3", "1000"),
        ("1.5e-3", "0.0015"),
        ("1.5\\times 10^{3}", "1500"),
        ("2 \\cdot 10^-2", "0.02"),
        ("1.2 million", "1200000"),
        ("$3 billion", "3,000,000,000"),
        ("0.3333333333", "1/3"),
        ("1.414213562", "1.41421356237"),
        ("2.9999999997", "3"),
        ("12345678.91", "12345678.9123"),
        ("1.234567890e24", "1234567890123456789012345"),
    ],
)
def test_the_same_number(answer, accepted, no_worker):
    assert is_correct(answer, (accepted,), "math")


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        ("95*66", "6270"),
        ("95 \\times 66", "6270"),
        ("95 × 66", "6270"),
        ("95 \\cdot 66", "6270"),
        ("95(66)", "6270"),
        ("x = 95*66", "6270"),
        ("95*66 = 95*66", "6270"),
        ("48/2+48", "72"),
        ("48+24", "72"),
        ("72+0", "72"),
        ("72-0.0", "72"),
        ("144/2", "72"),
        ("72/1", "72"),
        ("72 / 1", "72"),
        ("\\frac{144}{2}", "72"),
        ("\\dfrac{1,000}{8}", "125"),
        ("144 \\div 2", "72"),
        ("\\sqrt{5184}", "72"),
        ("sqrt(5184)", "72"),
        ("2^{10}", "1024"),
        ("10^3", "1000"),
        ("5!", "120"),
        ("|-72|", "72"),
        ("\\lfloor 72.3 \\rfloor", "72"),
        ("\\log{1}", "0"),
        ("add(48, 24)", "72"),
        ("17 mod 5", "2"),
        ("5 or 7", "7"),
        ("5 or six", "5"),
        ("5\\text{ or six}", "5"),
        ("5 pi", "5"),
        ("5 squared", "5"),
        ("5\\text{ squared}", "5"),
        ("5 point five", "5"),
        ("5 tenths", "5"),
        ("2 dozen", "2"),
        (HOSTILE, "3"),
        ("100000!", "1"),
        ("1/0", "0"),
    ],
)
def test_arithmetic_that_is_left_to_do_is_no_answer(answer, accepted, no_worker):
    """Or else a student need only copy the question."""
    assert not is_correct(answer, (accepted,), "math")


@given(st.integers(0, 999), st.integers(1, 999), st.sampled_from("+-*×/"), st.sampled_from(["", " "]))
@example(0, 1, "/", "")
def test_a_copied_question_is_never_right(a, b, operator, space):
    values = {"+": a + b, "-": a - b, "*": a * b, "×": a * b, "/": a}
    question = f"{a * b if operator == '/' else a}{space}{operator}{space}{b}"
    assert not is_correct(question, (str(values[operator]),), "math")


@pytest.mark.parametrize(
    ("question", "accepted", "answer", "right"),
    [
        ("How many minutes are 3 hours?", "180 minutes", "3 hours", False),
        ("How many minutes are 3 hours?", "180 minutes", "180", True),
        ("What are 5000 m and 1 km together?", "6 km", "6000 m", True),
        ("What is 50% as a decimal?", "0.5", "50%", False),
        ("What is half of 1?", "0.5", "50%", True),
        ("Is it 12 or 13?", "12", "12", True),
        ("Walk 25 m. How many cm are a fifth of it?", "500 cm", "5 m", True),
        ("What is 12/24 as a decimal?", "0.5", "12/24", False),
        ("What is \\frac{12}{24} as a decimal?", "0.5", "12 / 24", False),
        ("What is 12 / 24 as a decimal?", "0.5", "\\frac{12}{24}", False),
        ("What is 12/24 as a decimal?", "0.5", "1/2", True),
        ("What is 1/20 and 9/20?", "0.5", "10/20", True),
        ("What is 11/20 less 1/20?", "0.5", "1/2", True),
        ("Which is more, 1/2 or 1/3?", "1/2", "1/2", True),
    ],
)
def test_what_has_to_be_worked_out_first_is_not_copied_from_the_question(question, accepted, answer, right):
    assert is_correct(answer, (accepted,), "math", question) is right


def test_any_accepted_answer_will_do(no_worker):
    assert is_correct("7", ("5", "6", "7"), "math")
    assert not is_correct("8", ("5", "6", "7"), "math")


@given(st.integers(-(10**30), 10**30), st.integers(1, 10**6))
def test_a_fraction_is_exact(above, below):
    value = Fraction(above, below)
    assert read(f"{above}/{below}").value == value
    assert read(f"\\frac{{{above}}}{{{below}}}").value == value
    assert read(f"{above:,}").value == above


@given(
    st.one_of(
        st.decimals(-(10**25), 10**25, places=3),
        st.fractions(max_denominator=1000).map(lambda f: Decimal(f.numerator) / f.denominator),
    )
)
@example(Decimal("123456789012345.675"))
@example(Decimal("1234567890123456.5"))
@example(Decimal("99999999999999999999"))
@example(Decimal("123456789012345678901"))
def test_what_a_tool_prints_is_right(value):
    """A student that copies a tool's result is right, however many digits were not printed."""
    assert same_quantity(read(number_text(value)), Quantity(Fraction(value)))


@given(st.text(alphabet="0123456789.,/-+%eE$\\frac{} ^*text", max_size=40))
def test_reading_a_number_never_fails(text):
    number = read(text)
    assert number is None or isinstance(number.value, Fraction)


# --- pairs -----------------------------------------------------------------------------------------------------

PAIRS = Path(__file__).with_name("judge_pairs.tsv")
"""Kind, checker, verdict, accepted answer, answer: what a careful teacher says, whatever the judge does."""


def test_the_judge_says_what_a_teacher_says():
    with PAIRS.open(encoding="utf-8", newline="") as file:
        pairs = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    kinds = Counter((pair["kind"], pair["verdict"]) for pair in pairs)
    assert len(pairs) > 1500
    assert all(kinds[kind, "right"] >= 5 and kinds[kind, "wrong"] for kind, _ in kinds)
    for pair in pairs:
        right = is_correct(pair["answer"], (pair["accepted"],), pair["checker"])
        assert right is (pair["verdict"] == "right"), pair


SPELLINGS = [
    "{}", " {} ", "${}$", r"\({}\)", r"\text{{{}}}", r"\mathbf{{{}}}", "**{}**", "`{}`", "x = {}", "= {}", "({})",
    "{}.", "{} km", "{}\\text{{ books}}", "{} dollars", "${}", "{}0", "{}e0", r"{} \times 10^{{0}}", "{}×10⁰", "+{}",
    "{}x10^0",
]  # fmt: skip


@given(st.integers(1, 10**5), st.integers(1, 4), st.sampled_from(SPELLINGS), st.booleans(), st.booleans())
def test_a_number_equals_itself_in_any_spelling_and_never_its_neighbour(digits, places, spelling, grouped, full_width):
    value = Decimal(digits).scaleb(-places)

    def spelled(number):
        text = spelling.format(f"{number:,f}" if grouped else f"{number:f}")
        return text.translate({48 + n: 0xFF10 + n for n in range(10)}) if full_width else text

    assert is_correct(spelled(value), (f"{value:f}",), "math")
    for step in (1, -1, 10**places, 9 * 10**places):
        assert not is_correct(spelled(value + Decimal(step).scaleb(-places)), (f"{value:f}",), "math")
    assert not is_correct(spelled(-value), (f"{value:f}",), "math")


METRES = {
    "km": 1000, "m": 1, "cm": Fraction(1, 100), "millimetres": Fraction(1, 1000), "miles": Fraction("1609.344"),
    "feet": Fraction("0.3048"), "inches": Fraction("0.0254"),
}  # fmt: skip


@given(st.integers(1, 10**6), st.sampled_from(sorted(METRES)), st.sampled_from(sorted(METRES)))
def test_units_convert_and_must_agree_where_both_sides_have_one(number, one, other):
    converted = number * Fraction(METRES[one]) / Fraction(METRES[other])
    assert is_correct(f"{float(converted):.12g} {other}", (f"{number} {one}",), "math")
    assert is_correct(f"{number} {other}", (f"{number} {one}",), "math") is (one == other)
    assert is_correct(f"{number} {other}", (f"{number}",), "math")
    assert is_correct(f"{number}", (f"{number} {one}",), "math")
    assert not is_correct(f"{number} {other}^2", (f"{number} {one}",), "math")
    assert not is_correct(f"{number} kg", (f"{number} {one}",), "math")
    assert not is_correct(f"{number} {one} per hour", (f"{number} {one}",), "math")


NUMBER_WORDS = [
    *CARDINALS, *SCALES, *(f"{word}s" for word in SCALES),
    *(f"{stem}th{s}" for stem in ("four", "fif", "six", "seven", "eigh", "nin", "ten", "eleven", "twelf", "thirteen",
      "nineteen", "twentie", "ninetie", "hundred", "thousand", "million", "trillion") for s in ("", "s")),
    "half", "halves", "third", "thirds", "quarters", "squared", "cubed", "tenfold", "negative", "pi", "theta", "sin x",
    "plus", "or more", "and a half", "below zero", "percent of two", "to four",
]  # fmt: skip


@given(
    st.integers(2, 10**6), st.sampled_from(NUMBER_WORDS), st.sampled_from(["{} {}", "{}\\text{{ {}}}", "{} books {}"])
)
def test_a_word_that_changes_the_number_is_never_dropped(number, word, form):
    assert not is_correct(form.format(number, word), (str(number),), "math")


NOUNS = [
    "books", "apples", "people", "marbles", "months", "widths", "depths", "teeth", "cloths", "seconds", "bullions",
    "students", "cents", "boxes", "sheep",
]  # fmt: skip
MORE = ["", " left", " in total", " per day"]


@given(st.integers(1, 10**6), st.sampled_from(NOUNS), st.sampled_from(MORE))
def test_a_noun_says_what_was_counted(number, noun, more):
    assert is_correct(f"{number} {noun}{more}", (str(number),), "math")
    assert is_correct(f"{number} {noun}", (f"{number} {noun}",), "math")
    assert not is_correct(f"{number} pigeons", (f"{number} {noun}",), "math")


@given(st.text(alphabet="abcdeABC", min_size=2, max_size=6), st.randoms(), st.sampled_from(["math", "text"]))
def test_letters_that_stand_together_are_a_word(word, random, checker):
    letters = list(word)
    random.shuffle(letters)
    shuffled = "".join(letters)
    assert is_correct(shuffled, (word,), checker) is (shuffled.casefold() == word.casefold())
    for same in (word.upper(), rf"\text{{{word}}}", rf"\textbf{{{word}}}", f"**{word}**", f"{word}."):
        assert is_correct(same, (word,), checker)


@given(
    st.integers(20, 3000), st.integers(1, 50), st.sampled_from(["2^{{-{}}}", r"\frac{{1}}{{3^{{{}}}}}", "10^{{-{}}}"])
)
@settings(max_examples=20)
def test_tiny_values_are_told_apart(exponent, step, form):
    accepted = form.format(exponent)
    assert not is_correct(form.format(exponent + step), (accepted,), "math")
    assert not is_correct("0", (accepted,), "math")


# --- math-verify -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "accepted", "right"),
    [
        ("7$ or $8", "7", False),
        ("\\(7\\) \\(8\\)", "7", False),
        ("7}, \\boxed{8", "8", False),
        ("the answer is 7", "7", False),
        ("2x+3", "3", False),
        ("1,5", "15", False),
        ("0,123", "123", False),
        ("abc", "5", False),
        ("5 | 7", "7", False),
        ("5 \\to 7", "7", False),
        ("5 \\lor 7", "7", False),
        ("5 \\neq 7", "7", False),
        ("5, 7", "7", False),
        ("x<7", "7", False),
        ("100000!", "x", False),
        ("5x", "5", False),
        ("5 x", "5", False),
        ("1\\text{ or }7", "7", False),
        ("x=5,y=7", "7", False),
        ("x=5", "5", True),
        ("2+2=4", "4", True),
        ("(5)", "5", True),
        ("5^\\circ", "5", True),
        ("12\\text{ miles/hour}", "12", True),
        ("2*sqrt(3)", "\\sqrt{12}", True),
        ("2\\sqrt{3}", "\\sqrt{12}", True),
        ("x^2+2x+1", "(x+1)^2", True),
        ("(1,2)", "(1,2)", True),
        ("\\{2,1\\}", "\\{1, 2\\}", True),
        ("2\\pi", "\\pi", False),
        ("3x}+{5x", "3x", False),
    ],
)
def test_what_is_not_a_number_goes_to_math_verify(answer, accepted, right):
    assert is_correct(answer, (accepted,), "math") is right


def test_the_worker_starts_lazily_is_reused_and_survives(monkeypatch):
    worker = judge.Worker("lite_mentor.judge")
    monkeypatch.setattr(judge, "_worker", worker)
    monkeypatch.setattr(judge, "VERIFY_SECONDS", 2.0)
    judge._math_verify.cache_clear()
    try:
        assert is_correct("5", ("5",), "math")
        assert worker.pid is None
        assert is_correct("\\sqrt{9}x", ("3x",), "math")
        first = worker.pid
        assert is_correct("\\sqrt{16}x", ("4x",), "math")
        assert worker.pid == first
        assert not is_correct(HOSTILE, ("3x",), "math")
        assert worker.pid is None
        assert not is_correct(HOSTILE, ("3x",), "math")
        assert worker.pid is None  # the verdict is remembered
        assert is_correct("\\sqrt{25}x", ("5x",), "math")
        assert worker.pid not in (None, first)
    finally:
        worker.close()


@pytest.mark.parametrize("error", [TimeoutError, EOFError])
def test_an_answer_that_breaks_a_limit_is_wrong(monkeypatch, error):
    asked = []

    def request(payload, seconds):
        asked.append((payload["seconds"], seconds))
        raise error

    judge._math_verify.cache_clear()
    monkeypatch.setattr(judge, "_worker", SimpleNamespace(request=request))
    assert not is_correct("\\sqrt{49}y", ("7y",), "math")
    assert asked == [(judge.VERIFY_SECONDS, judge.VERIFY_SECONDS)]
    judge._math_verify.cache_clear()


def test_an_episode_is_judged_by_what_its_calls_did(monkeypatch):
    """A verdict is the judge's; calls that cannot be played again are wrong; a judge that raises is our mistake.

    Importing the judge is not timed as playing is.
    """
    task = replace(make_example("Do it.", ["done"], (), suite="test"), checker="state", world=World({}, "m:f"))

    def verdict(outcome) -> bool:
        def request(payload, seconds):
            if "arguments" not in payload:
                assert seconds == START_SECONDS
                return {}
            if isinstance(outcome, type):
                raise outcome
            return outcome

        monkeypatch.setattr(judge, "_player", lambda: SimpleNamespace(request=request))
        return is_right(task, "done", ())

    assert verdict({"status": "ok", "text": "true"})
    assert not verdict({"status": "ok", "text": "false"})
    assert not verdict(TimeoutError)
    assert not verdict(EOFError)
    with pytest.raises(RuntimeError, match=r"judging example .* of test failed: Error: KeyError"):
        verdict({"status": "error", "text": "Error: KeyError"})
    monkeypatch.setattr(judge, "_player", lambda: SimpleNamespace(request=lambda *_: {"problem": "no such module"}))
    with pytest.raises(RuntimeError, match=r"judging example .* of test failed: no such module"):
        is_right(task, "done", ())


def test_the_worker_ends_with_the_process():
    code = "from lite_mentor import judge; judge.is_correct('x', ('y',), 'math'); print(judge._worker.pid)"
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path}
    )
    if os.name == "posix":
        with pytest.raises(ProcessLookupError):
            os.kill(int(done.stdout), 0)


# --- text ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "accepted", "right"),
    [
        ("Paris", "London", False),
        ("Paris and London", "Paris", False),
        ("1.5", "15", False),
        ("-5", "5", False),
        ("3", "-3", False),
        ("!!!", "...", False),
        ("the", "a", False),
        ("A", "B", False),
        ("paris", "Paris", True),
        ("The Eiffel Tower.", "eiffel tower", True),
        ("  the   United\tStates ", "United States", True),
        ("U.S.", "US", True),
        ("Jean-Luc", "Jean Luc", True),
        ("O'Brien", "OBrien", True),
        ("“Hamlet”", "Hamlet", True),
        ("Yes!", "yes", True),
        ("A", "a.", True),
        ("(B)", "B", True),
        ("1,000", "1000", True),
        ("about −5.5", "about -5.5", True),
        ("1990-1995", "1990 1995", True),
        ("STRASSE", "straße", True),
        ("हिन्दी", "हिन्दी", True),
        ("हिन्दी", "हन्द", False),
    ],
)
def test_text(answer, accepted, right):
    assert is_correct(answer, ("something else", accepted), "text") is right


@given(st.text(alphabet="ab <>+-*/=()[],.!#°$", max_size=12), st.sampled_from("<>+*/=#°"), st.integers(0, 12))
def test_a_symbol_more_or_less_is_another_answer(text, symbol, place):
    changed = text[:place] + symbol + text[place:]
    assert is_correct(text, (text,), "text") is bool(judge._words(text))
    assert not is_correct(changed, (text,), "text")
    assert not is_correct(text, (changed,), "text")


@given(st.text(alphabet="bcxé019 -.!", max_size=50))
@example(". - 0")
def test_text_equals_itself_in_any_case_with_articles_and_spaces(text):
    assert is_correct(f"  The {text.upper()} !", (text,), "text") is any(c.isalnum() for c in text)


def test_a_missing_math_verify_is_not_a_wrong_answer(monkeypatch):
    judge._math_verify.cache_clear()
    judge._check_math_verify.cache_clear()
    monkeypatch.setattr(judge.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^To compare answers, math-verify is needed: pip install"):
        judge._math_verify("x + 1", "1 + x")
