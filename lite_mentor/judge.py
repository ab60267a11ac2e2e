"""Is an answer right? Exactly where both sides are numbers, else by math-verify in a process that can be killed.

math-verify guards itself with signals, which cannot stop the arithmetic of `9^{9^{9^9}}`; so it runs in one long-lived
worker, under limits of wall-clock time and memory, and an answer that breaks a limit is wrong. Only its reading of the
whole text as LaTeX is used: its reading of prose would pick the 7 out of "5 or 7".

Where it is not the answer that counts but what the calls did to a world, they are played again in such a worker too.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import logging
import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

from lite_mentor.errors import UserError
from lite_mentor.sandbox import Worker, find_way
from lite_mentor.tools import played
from lite_mentor.types import Example, ToolCall
from lite_mentor.worker import Request, serve

MAX_ANSWER_CHARS = 200
VERIFY_SECONDS = 5.0
PLAY_SECONDS = 15.0
"""For all calls of an episode, played again, and the first time for importing what they need."""
MEMORY_BYTES = 2 << 30
RELATIVE_TOLERANCE = Fraction(1, 10**6)
HALF_A_CENT = Fraction(1, 200)
PRINTED_IN_FULL = {"whole": 10**20, "broken": 10**15}
"""Below these, tools print whole numbers with all their digits and others with at least their cents."""

_log = logging.getLogger(__name__)
_worker = Worker("lite_mentor.judge")
atexit.register(_worker.close)


def boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}`, braces balanced; None if there is none or it does not close. Linear time."""
    start = text.rfind("\\boxed{") + len("\\boxed{")
    if start < len("\\boxed{"):
        return None
    depth = 1
    for brace in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[start : brace.start()]
    return None


def is_right(example: Example, answer: str | None, calls: Sequence[ToolCall]) -> bool:
    """Did an episode that ended by itself, with this answer and these calls, do what the example asks?

    By its answer (see `is_correct`), or where the checker is `state` by what its calls did, played again in a worker
    process. Calls that worked once but break the worker's limits when they are played again are wrong; a judge that
    raises is a mistake of ours and raises RuntimeError.
    """
    if example.checker != "state":
        return is_correct(answer, example.answer, example.checker)
    played_again = {"world": example.world.start, "calls": played(calls)}
    request = {"path": example.world.judge, "arguments": played_again, "seconds": PLAY_SECONDS}
    try:
        verdict = _player().request(request, PLAY_SECONDS)
    except (TimeoutError, EOFError):
        return False
    if verdict["status"] != "ok":
        raise RuntimeError(f"judging example {example.key} of {example.suite} failed: {verdict['text']}")
    return verdict["text"] == "true"


@functools.cache
def _player() -> Worker:
    worker = Worker("lite_mentor.worker", find_way()[0])
    atexit.register(worker.close)
    return worker


def is_correct(answer: str | None, gold: tuple[str, ...], checker: Literal["math", "text"]) -> bool:
    """Does the answer equal any of the accepted ones? None, "" and more than 200 characters never do.

    math: two numbers are compared exactly, but for a millionth of the accepted one and at most half a cent: tools
    print about ten significant digits and a chain of calls loses a few of them, while one unit too much or a missing
    cent must stay wrong. (Numbers so large that tools print only ten digits have the millionth alone.)
    A percent sign means hundredths, or nothing if only one of the two has it: 50% is 0.5, and 50; 0.5 is not 50.
    Units are dropped: 12\\text{ km}, 12 books. Arithmetic that is left to do is no answer to a question about a number:
    who may write 95*66 or 144/2 for its result needs no tools. (A fraction such as 3/4 is a number.)
    What is not a number is right if math-verify says so within its limits.

    text: equal in lower case, without articles and punctuation, keeping the points and signs of numbers.
    """
    if answer is None or len(answer) > MAX_ANSWER_CHARS:
        return False
    same = {"math": _same_mathematics, "text": _same_text}[checker]
    return any(same(answer, accepted) for accepted in gold)


# --- text ------------------------------------------------------------------------------------------------------

_DROPPED = re.compile(r"(?<=\d),(?=\d{3})|['’]|\.(?!\d)")  # so that 1,000 and U.S. are one word
_MARK = re.compile(r"((?<!\w)-(?=\.?\d)|\.(?=\d))|([^\w\s])")


def _same_text(answer: str, accepted: str) -> bool:
    words = _words(answer)
    return bool(words) and words == _words(accepted)


def _words(text: str) -> list[str]:
    text = unicodedata.normalize("NFKC", text.replace("−", "-")).casefold()
    text = _MARK.sub(_keep_or_space, _DROPPED.sub("", text))
    words = text.split()
    return [word for word in words if word not in ("a", "an", "the")] or words  # "A" may be the answer


def _keep_or_space(mark: re.Match[str]) -> str:
    """A number's sign or point stays, and so do the vowel signs of scripts that write them as marks."""
    return mark[0] if mark[1] or unicodedata.category(mark[2]).startswith("M") else " "


# --- numbers ---------------------------------------------------------------------------------------------------

_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_UNSIGNED = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?"
_DECIMAL = re.compile(rf"([+-]?)({_UNSIGNED})(?:[eE]([+-]?[0-9]{{1,3}}))?")
_POWER = re.compile(rf"([+-]?)({_UNSIGNED})\s*(?:\\times|\\cdot|×|\*)\s*10\^\{{?([+-]?[0-9]{{1,3}})\}}?")
_QUOTIENT = re.compile(r"([+-]?)(?:([0-9]+)\s)?\s*([^/]+)/([^/]+)")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9]))")

_CLEANINGS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"[−–]", "-"),
        (r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\!", ""),
        (r"(?<=[0-9])(?:\{,\}|\\,|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))", ","),
        (r"\\[,;: ]|~", " "),
        (r"(?<!\\)\\[()\[\]]|\\?[$]|[£€¥₹]", ""),
        (r"\\%", "%"),
        (r"\\(?:text|mathrm|mbox)\s*\{\s*(percent|hundred|thousand|million|billion|trillion)\s*\}", r" \1"),
        (r"^\s*\\(?:text|textbf|mathbf|mathrm|mbox)\s*\{([^{}]*)\}\s*$", r"\1"),
    )
)
_NO_UNIT = (  # words that change the number before them
    r"\b(?:or|and|to|not|plus|minus|times|over|mod|modulo|point|squared|cubed|factorial|pi|tau|percent|dozen|hundred|"
    r"thousand|million|billion|trillion|half|halves|(?:third|quarter|fourth|fifth|sixth|eighth|tenth|hundredth|"
    r"thousandth)s?)\b"
)
_SHORT_UNIT = r"(?:[ckm]?m|[km]?g|m?l|m?s|h|hr|min)(?:\^\{?[23]\}?|[²³])?"
_UNIT = re.compile(
    rf"(?:\s*\\(?:text|mathrm|mbox)\s*\{{(?:\s*(?!{_NO_UNIT})\b[A-Za-z]+\.?)*\s*\}}(?:\^\{{?[23]\}}?)?"
    rf"|(?:\s+(?!{_NO_UNIT})(?:of|(?:[A-Za-z]{{3,}}|{_SHORT_UNIT})(?:/(?!{_NO_UNIT})(?:{_SHORT_UNIT}|[A-Za-z]{{3,}}))?))+"
    r"|\s*°[CF]?)$",
    re.IGNORECASE,
)
_NUMERAL = re.compile(r"[0-9][0-9,]*(?:\.[0-9]*)?|\.[0-9]+")
_OPERATION = re.compile(
    r"[!|]|\^(?!\{?\\circ)|[a-z]\s*\(|\\(?:sqrt|lfloor|lceil|lvert|log|ln|exp|sin|cos|tan|[dt]?binom)(?![a-zA-Z])|"
    + _NO_UNIT,
    re.IGNORECASE,
)
_DIVISION = re.compile(r"[0-9.})]\s*/|frac")


def _same_mathematics(answer: str, accepted: str) -> bool:
    answer, accepted = _clean(answer), _clean(accepted)
    if not answer or answer == accepted:
        return bool(answer)
    found, expected = _number(answer), _number(accepted)
    if expected is not None and _left_to_do(answer):
        return False
    if found is None or expected is None:
        return _math_verify(answer, accepted)
    (found_value, found_percent), (expected_value, expected_percent) = found, expected
    if _close(found_value, expected_value):
        return True
    if found_percent and not expected_percent:
        return _close(found_value / 100, expected_value)
    return expected_percent and not found_percent and _close(found_value, expected_value / 100)


def _left_to_do(text: str) -> bool:
    """Is this arithmetic instead of a number? Of an equation, the part after the last = counts."""
    result = text.rpartition("=")[2].strip()
    number = _number(result)
    if number is not None:
        return number[0].denominator == 1 and _DIVISION.search(result) is not None
    return len(_NUMERAL.findall(result)) > 1 or _OPERATION.search(result) is not None


def _close(found: Fraction, expected: Fraction) -> bool:
    tolerance = abs(expected) * RELATIVE_TOLERANCE
    if abs(expected) < PRINTED_IN_FULL["whole" if expected.denominator == 1 else "broken"]:
        tolerance = min(tolerance, HALF_A_CENT)
    return abs(found - expected) <= tolerance


def _clean(text: str) -> str:
    for pattern, replacement in _CLEANINGS:
        text = pattern.sub(replacement, text)
    return text.rstrip().removesuffix(".").strip()


def _number(text: str) -> tuple[Fraction, bool] | None:
    """(value, does it have a percent sign) of cleaned text; None for what is not plainly one number."""
    if len(text) > 2 * MAX_ANSWER_CHARS:
        return None
    text = _UNIT.sub("", text)
    bare = re.sub(r"\s*(?:%|percent)$", "", text)
    words = bare.rsplit(maxsplit=1)
    scale = _SCALES.get(words[-1].lower(), 1) if len(words) == 2 else 1
    value = _value(words[0] if scale > 1 else bare)
    return None if value is None else (value * scale, bare != text)


def _value(text: str) -> Fraction | None:
    text = re.sub(r"^([+-]?)\s+", r"\1", text)
    if match := _DECIMAL.fullmatch(text) or _POWER.fullmatch(text):
        return _decimal(*match.groups())
    latex = _LATEX_FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]}", text)
    match = _QUOTIENT.fullmatch(re.sub(r"^([+-]?)\s+", r"\1", latex))
    if match is None:
        return None
    sign, whole, *parts = match.groups()
    decimals = [_DECIMAL.fullmatch(part.strip()) for part in parts]
    if not all(decimals) or (whole and not all(part.strip().isdigit() for part in parts)):
        return None
    above, below = (_decimal(*match.groups()) for match in decimals)
    if above is None or not below:
        return None
    return (int(whole or 0) + above / below) * (-1 if sign == "-" else 1)


def _decimal(sign: str, digits: str, exponent: str | None) -> Fraction | None:
    if not digits.strip("."):
        return None
    return Fraction(digits.replace(",", "")) * Fraction(10) ** int(exponent or 0) * (-1 if sign == "-" else 1)


# --- everything else -------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _math_verify(answer: str, accepted: str) -> bool:
    if "\\boxed" in answer or boxed(f"\\boxed{{{answer}}}") != answer:
        return False  # it would not be read as one whole
    _check_math_verify()
    request = {"answer": answer, "accepted": accepted, "seconds": VERIFY_SECONDS}
    try:
        return _worker.request(request, VERIFY_SECONDS)["correct"]
    except (TimeoutError, EOFError) as error:
        _log.warning("%r is counted as wrong: math-verify was stopped (%s)", answer, error)
        return False


@functools.cache
def _check_math_verify() -> None:
    """Without it the worker would end at once, which looks like an answer that it could not read."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError("To compare answers, math-verify is needed: pip install 'math-verify[antlr4-13-2]'.")


def _serve() -> None:
    from math_verify import LatexExtractionConfig, parse, verify

    def read(text: str) -> list[Any]:
        return parse(f"\\boxed{{{text}}}", [LatexExtractionConfig()], parsing_timeout=None)

    def answer(request: Request) -> dict[str, Any]:
        return {"correct": verify(read(request["accepted"]), read(request["answer"]), timeout_seconds=None)}

    serve(answer, MEMORY_BYTES)


if __name__ == "__main__":
    _serve()
