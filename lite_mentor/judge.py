"""Is an answer right? Numbers exactly, words as text, the rest by math-verify in a process that can be killed.

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
from collections.abc import Callable, Sequence
from typing import Any, Literal

from lite_mentor.errors import UserError
from lite_mentor.quantities import MAX_CHARS, Quantity, close, plain, read, same_quantity, stands_in, tidy
from lite_mentor.sandbox import Worker, find_way, loaded
from lite_mentor.tools import played
from lite_mentor.types import Example, ToolCall
from lite_mentor.units import Unit, read_units
from lite_mentor.worker import Request, serve

MAX_ANSWER_CHARS = 200
VERIFY_SECONDS = 5.0
PLAY_SECONDS = 15.0
"""For all calls of an episode, played again."""
MEMORY_BYTES = 2 << 30

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
    raises, or cannot be loaded, is a mistake of ours and raises RuntimeError.
    """
    if example.checker != "state":
        return is_correct(answer, example.answer, example.checker, example.question)
    played_again = {"world": example.world.start, "calls": played(calls)}
    request = {"path": example.world.judge, "arguments": played_again, "seconds": PLAY_SECONDS}
    try:
        problem = loaded(_player(), example.world.judge).get("problem")
        verdict = {"status": "error", "text": problem} if problem else _player().request(request, PLAY_SECONDS)
    except (TimeoutError, EOFError) as error:
        _log.warning("an episode of example %s is counted as wrong: its judge was stopped (%s)", example.key, error)
        return False
    if verdict["status"] != "ok":
        raise RuntimeError(f"judging example {example.key} of {example.suite} failed: {verdict['text']}")
    return verdict["text"] == "true"


@functools.cache
def _player() -> Worker:
    worker = Worker("lite_mentor.worker", find_way()[0])
    atexit.register(worker.close)
    return worker


def is_correct(answer: str | None, gold: tuple[str, ...], checker: Literal["math", "text"], question: str = "") -> bool:
    """Does the answer equal any of the accepted ones? None, "" and more than 200 characters never do.

    math: by what was accepted.
    - A number is compared exactly, but for what tools round off (see quantities.close). It is one number and nothing
      else: who may write 95*66 or 144/2 for its result needs no tools. (3/4 is a number.) What only one side says, a
      unit, a noun or a name, is dropped; what both say must agree: 5 m is not 5 km, 5000 m is. But what stands in the
      question and still has to be converted or divided is no answer to it.
    - Words are compared as text.
    - Anything else is right if math-verify says so within its limits.

    text: equal in lower case, without LaTeX wrappers, articles and punctuation. Symbols that carry sense are kept: all
    but marks of punctuation, and of these signs and points of numbers, brackets with a comma in them or after a word,
    a colon between digits, and a minus before or after a word.
    """
    if answer is None or len(answer) > MAX_ANSWER_CHARS:
        return False
    gold = [accepted for accepted in gold if len(accepted) <= MAX_CHARS]
    if checker == "text":
        return any(_same_text(answer, accepted) for accepted in gold)
    return any(_same_mathematics(answer, accepted, question) for accepted in gold)


def is_mathematics(accepted: str) -> bool:
    """Does this accepted answer ask for the checker `math`? A number does, and a formula; names and dates do not."""
    if len(accepted) > MAX_CHARS:
        return False
    words = _WORD.findall(re.sub(r"\\[a-zA-Z]+", " ", accepted).casefold())
    formula = _FORMULA.search(tidy(accepted)) and not any(len(word) > 2 for word in words)
    return _number(accepted) is not None or bool(formula)


# --- text ------------------------------------------------------------------------------------------------------

_READINGS: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<!\w)(?:\(([^(),;]*)\)|\[([^\[\],;]*)\])", r"\1\2"),  # (B); but not (0, 1) and f(x)
        (r"^(\w{1,3})\)(?!\S)|^\{([^{},;]*)\}$", r"\1\2"),  # B)
        (r"(?<![\w.,])[1-9]\d{0,2}(?:,\d{3})+(?![\w,])", lambda number: number[0].replace(",", "")),
        (r"['’‘]|\.(?!\d)|\*\*|^\+(?=\.?\d)", ""),  # so that O'Brien and U.S. are one word
        (r"\^\{(\w+)\}", r"^\1"),
        (r">=", "≥"),
        (r"<=", "≤"),
        (r"!=", "≠"),
        (r"\b(?:the\s+(?=\S)|an?\s+(?=[^\W\d_]{2}))", ""),  # but not in "vitamin A" and "A, B"
    )
)
_PIECE = re.compile(
    r"(?P<kept>\w+|^-\s*(?=\.?\d)|(?<!\w)-(?=-*[^\s,;:!?)-]|\.\d)|(?<=\w)-(?!\w)"  # -5, -x, A-
    r"|(?<=\d):(?=\d)|\.(?=\d)|(?<=\d)!|(?<=\b[^\W\d_])!)|\S"  # 3:30, 1.5, 5!, n!
)
_PUNCTUATION = '-,.;:!?"“”„«»…•、。'


def _same_text(answer: str, accepted: str) -> bool:
    words = _words(answer)
    return bool(words) and words == _words(accepted)


def _words(text: str) -> list[str]:
    """Words and the symbols that carry sense; of a text that is nothing but punctuation, that."""
    text = plain(text).casefold()
    for pattern, replacement in _READINGS:
        text = pattern.sub(replacement, text)
    pieces = list(_PIECE.finditer(text.strip()))
    kept = [piece[0].strip() for piece in pieces if piece["kept"] or piece[0] not in _PUNCTUATION]
    return kept or [piece[0] for piece in pieces]


# --- mathematics -----------------------------------------------------------------------------------------------

_FORMULA = re.compile(r"\^|\\(?:frac|sqrt|binom|pi|infty|log|ln|sin|cos|tan|cdot|times|pm|begin|sum|int)(?![a-z])|[π∞]")
_PROSE = re.compile(r"(?:[^\W_]|[\s.,;:'’\"!?&°∠△)-]|(?<![^\W_])\()*")
_WORD = re.compile(r"(?<![^\W_])[^\W\d_][^\W_]+")
_FORMULA_WORDS = {"and", "or", "pi", "sqrt", "sin", "cos", "tan", "log", "ln", "exp"}
_EXPONENT = re.compile(r"^([+-]?[0-9.]+)[eE]([+-]?[0-9]{1,3})$")  # math-verify reads 2e as twice Euler's number
_CAPITALS = re.compile(r"(?<![\\a-zA-Z])[A-Z]{2,}")
_UNIT = re.compile(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}(\^\{?[23]\}?)?$|(?<=\S)(\s+[a-z]{2,}(?:[ /][a-z]+)*)$")


def _same_mathematics(answer: str, accepted: str, question: str) -> bool:
    same_spelling = bool(plain(answer)) and tidy(answer) == tidy(accepted)
    expected = _number(accepted)
    if expected is not None:
        found = read(answer)
        if same_spelling or found is None:
            return same_spelling
        to_divide = found.quotient and not expected.quotient
        to_convert = not close(found.value, expected.value, rounded=found.rounded)
        return same_quantity(found, expected) and not ((to_divide or to_convert) and stands_in(answer, question))
    if _is_words(accepted):
        return _same_text(answer, accepted)
    return same_spelling or _same_formula(tidy(answer), tidy(accepted))


def _number(accepted: str) -> Quantity | None:
    """The accepted answer as a number, unless it is a name: 12 Angry Men."""
    number = read(accepted)
    capitals = re.findall(r"(?<!\w)[A-Z]\w\w", plain(accepted))
    named = number and any(unit.nouns for unit in number.units) and len(capitals) > 1
    return None if named else number


def _is_words(accepted: str) -> bool:
    """Words, and times and ratios. Letters that stand together are a word and no product: BC is not CB."""
    text = plain(accepted)
    if _FORMULA.search(text) or not _PROSE.fullmatch(text):
        return False
    return bool(set(_WORD.findall(text.casefold())) - _FORMULA_WORDS) or re.search(r"\d:\d", text) is not None


def _same_formula(answer: str, accepted: str) -> bool:
    if not answer or not accepted:
        return False
    if len(accepted) == 1 and _same_text(answer, accepted):  # a choice, in either case, in brackets or not
        return True
    answer, units = _without_unit(answer)
    accepted, wanted = _without_unit(accepted)
    if not any((u.factor, u.dimension) == (w.factor, w.dimension) or not (u and w) for u in units for w in wanted):
        return False
    points, wanted_points = sorted(_CAPITALS.findall(answer)), sorted(_CAPITALS.findall(accepted))
    if points and wanted_points and points != wanted_points:
        return False
    return _math_verify(_EXPONENT.sub(r"\1\\times 10^{\2}", answer), accepted)


def _without_unit(formula: str) -> tuple[str, tuple[Unit, ...]]:
    """The formula and what its last words count; no reading at all where they change it: 3\\pi\\text{ million}."""
    unit = _UNIT.search(formula)
    if unit is None or not unit.start():
        return formula, (Unit(),)
    units = read_units(f" {unit[1]}{unit[2] or ''}" if unit[1] is not None else unit[3])
    if not units and unit[3]:
        return formula, (Unit(),)
    return formula[: unit.start()].rstrip(" \\,"), units


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
    from math_verify import LatexExtractionConfig, grader, parse, verify

    if not hasattr(grader, "sympy_numeric_eq"):
        raise RuntimeError("this version of math-verify compares numbers elsewhere")
    grader.sympy_numeric_eq = _same_value

    def read_formula(text: str) -> list[Any]:
        return parse(f"\\boxed{{{text}}}", [LatexExtractionConfig()], parsing_timeout=None)

    def answer(request: Request) -> dict[str, Any]:
        accepted, said = read_formula(request["accepted"]), read_formula(request["answer"])
        return {"correct": verify(accepted, said, allow_set_relation_comp=True, timeout_seconds=None)}

    serve(answer, MEMORY_BYTES)


def _same_value(accepted: Any, said: Any, *_: int) -> bool:
    """In place of math-verify's, which rounds to six decimals and drops 1e-15: all tiny values are the same to it.

    Exact, but where one of them has decimals a millionth and at most half a cent, as for numbers.
    """
    from sympy import Float, MatrixBase

    if isinstance(accepted, MatrixBase) or isinstance(said, MatrixBase):
        same_shape = getattr(accepted, "shape", None) == getattr(said, "shape", None)
        return same_shape and all(map(_same_value, accepted, said))
    accepted, said = accepted.doit(), said.doit()
    difference = accepted - said
    if difference == 0 or difference.free_symbols:
        return difference == 0
    size, error = abs(accepted.evalf(30)), abs(difference.evalf(30))
    if not size.is_finite or (accepted.is_Rational and said.is_Rational):
        return False
    return bool(error <= (min(size / 10**6, 0.005) if accepted.has(Float) or said.has(Float) else size / 10**20))


if __name__ == "__main__":
    _serve()
