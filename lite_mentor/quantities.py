"""Numbers as people write them, exactly: 1,234.50; 2 1/2; \\frac{1}{2}; 1.5 × 10^3; 50%; $3 million; 12 km/h; x = 5."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from lite_mentor.units import CARDINALS, SCALES, Unit, meanings_of, read_units

MAX_CHARS = 400
RELATIVE_TOLERANCE = Fraction(1, 10**6)
HALF_A_CENT = Fraction(1, 200)
PRINTED_IN_FULL = {"whole": 10**20, "broken": 10**15}
"""Below these, tools print whole numbers with all their digits and others with at least their cents."""


@dataclass(frozen=True)
class Quantity:
    """A number and what was said about it."""

    value: Fraction
    percent: bool = False
    """Had it a percent sign? The value is what stands before it."""
    units: tuple[Unit, ...] = (Unit(),)
    """What it may count; several where a word is ambiguous."""
    name: str = ""
    """The x of x = 5."""
    quotient: bool = False
    """Was it written as a fraction?"""
    unfinished: bool = False
    """Is that arithmetic left to do? 144/2, 150/4 and 1.5/4; but not 3/4 and 7/2."""
    rounded: bool = False
    """Written with a power of ten, as tools print what has too many digits."""


def close(found: Fraction, expected: Fraction, *, rounded: bool) -> bool:
    """Equal but for a millionth of `expected` and at most half a cent.

    Tools print about ten significant digits and a chain of calls loses a few of them, while one unit too much or a
    missing cent must stay wrong. Numbers so large that tools print only ten digits have the millionth alone; but a
    whole one that is not `rounded` to a power of ten, but written out, must be right in all digits.
    """
    tolerance = abs(expected) * RELATIVE_TOLERANCE
    whole = expected.denominator == 1
    if abs(expected) < PRINTED_IN_FULL["whole" if whole else "broken"] or (whole and not rounded):
        tolerance = min(tolerance, HALF_A_CENT)
    return abs(found - expected) <= tolerance


def same_quantity(found: Quantity, expected: Quantity) -> bool:
    """Is `found` the accepted number?

    What only one of the two says (unit, noun, name) is dropped; what both say must agree, and units are converted.
    A percent sign means hundredths, or nothing if only one has it: 50% is 0.5, and 50; 0.5 is not 50. Arithmetic that
    is left to do is right only where a fraction was accepted.
    """
    if found.unfinished and not expected.quotient:
        return False
    if found.name and expected.name and found.name != expected.name:
        return False
    pairs = [(f, e) for f in found.units for e in expected.units]
    if not any(f and e for f, e in pairs):
        scales = {(Fraction(1), Fraction(1))}
    else:
        scales = {(f.factor, e.factor) for f, e in pairs if f.agrees(e)}
    for to_base, expected_to_base in scales:
        value, wanted = found.value * to_base / expected_to_base, expected.value
        if close(value, wanted, rounded=found.rounded):
            return True
        if found.percent != expected.percent:
            hundredths = (value / 100, wanted) if found.percent else (value, wanted / 100)
            if close(*hundredths, rounded=found.rounded):
                return True
    return False


# --- spelling --------------------------------------------------------------------------------------------------

_VULGAR = {
    code: f" {unicodedata.normalize('NFKC', chr(code)).replace('⁄', '/')}"
    for code in (*range(0xBC, 0xBF), *range(0x2150, 0x215F), 0x2189)
}
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-", strict=True))
_POWER = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
MOST_MARKS = 30
"""More than any language writes on a letter; as many as Unicode's stream-safe text has."""
_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|up|normal)?|math(?:rm|bf|it|sf|tt|normal)|boldsymbol|bm|emph|[mhf]box|boxed|underline"
    r"|operatorname|textcolor\s*\{[a-z]*\})\s*\{([^{}]*)\}"
)
_SPELLINGS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"[\u00ad\u200b-\u200f\u2060-\u2064\ufeff]", ""),  # nobody sees them
        (r"[‐‑‒–—−﹣]", "-"),
        (r"[⁄∕]", "/"),
        (r"\\color\s*\{[a-z]*\}", ""),
        (r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\!", ""),
        (r"\\[cdt]frac(?![a-zA-Z])", r"\\frac"),
        (r"(?<=[0-9])(?:\{,\}|\\,)(?=[0-9]{3}(?![0-9]))", ","),
        (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![a-zA-Z])", " "),
        (r"(?<!\\)\\[()\[\]]", ""),
        (r"√([0-9]+|[a-z])", r"\\sqrt{\1}"),
        (r"\^\{?\\circ\}?|\\degree(?![a-zA-Z])", "°"),
    )
)
_SYMBOLS = {
    "%": "%", "_": "_", "&": "&", "#": "#", "$": "$", "{": "{", "}": "}", "times": "×", "cdot": "·", "div": "÷",
    "pm": "±", "le": "≤", "leq": "≤", "ge": "≥", "geq": "≥", "ne": "≠", "neq": "≠", "lt": "<", "gt": ">", "neg": "¬",
    "lnot": "¬", "infty": "∞", "approx": "≈", "to": "→", "rightarrow": "→", "Omega": "Ω", "mu": "μ", "pi": "π",
    "pounds": "£", "euro": "€", "angle": "∠", "triangle": "△",
}  # fmt: skip
_SYMBOL = re.compile(r"\\([%_&#${}]|[a-zA-Z]+)")
_QUOTES = re.compile(r"(\*\*|__|`|\"|“|\*)(.*?)(\*\*|__|`|\"|”|\*)", re.DOTALL)


def tidy(text: str) -> str:
    """LaTeX that means the same in fewer spellings: one minus, one \\frac, ASCII digits, no markup around all."""
    text = _POWER.sub(lambda m: f"^{{{''.join(_SUPERSCRIPTS[c] for c in m[0])}}}", text)
    text = normalized("NFKC", text.translate(_VULGAR))
    text = re.sub(r"(?![0-9])\d", lambda m: str(unicodedata.decimal(m[0])), text)
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    text = text.strip()
    if len(text) > 2 and text[0] == text[-1] == "$":
        text = text.strip("$").strip()
    text = " ".join(text.split())
    quoted = _QUOTES.fullmatch(text)
    return quoted[2].strip() if quoted and quoted[1].replace("“", "”") == quoted[3] else text


def normalized(form: Literal["NFC", "NFKC"], text: str) -> str:
    """Text in one of Unicode's normal forms, in linear time.

    Python sorts the marks that follow a letter, in squared time, so a run of more than MOST_MARKS is taken in parts.
    """
    if text.isascii():
        return text
    parts, start, marks = [], 0, 0
    for at, character in enumerate(text):
        marks = marks + 1 if unicodedata.combining(character) else 0
        if marks > MOST_MARKS:
            parts.append(text[start:at])
            start, marks = at, 1
    return "".join(unicodedata.normalize(form, part) for part in [*parts, text[start:]])


def plain(text: str) -> str:
    """The same without LaTeX, as far as it has a plain spelling: \\text{ km} is km, \\leq is ≤."""
    text = tidy(text)
    for _ in range(3):  # of wrappers in wrappers
        text = _WRAPPER.sub(r"\1", text)
    return _SYMBOL.sub(lambda m: _SYMBOLS.get(m[1], m[0]), text).strip()


# --- reading ---------------------------------------------------------------------------------------------------

_WHOLE = r"(?:[1-9][0-9]{0,2}(?:(?:,[0-9]{3})+|(?:'[0-9]{3})+|(?:_[0-9]{3})+|(?: [0-9]{3})+)(?![0-9])|[0-9]+)"
_DIGITS = rf"(?:{_WHOLE}(?:\.[0-9]*)?|\.[0-9]+)"
_TENS = "|".join(word for word, n in CARDINALS.items() if n >= 20)
_NUMBER = re.compile(
    r"(?:(?P<sign>[+-])\s*)?(?:(?P<currency>US\$|[$£€¥₹]|(?:USD|EUR|GBP|JPY|CNY|INR|Rs\.?)(?=[\s0-9]))\s*)?"
    r"(?:(?P<sign2>[+-])\s*)?"
    rf"(?:(?:(?P<whole>[0-9]+)\s+)?(?P<above>{_DIGITS})\s*/\s*(?P<below>[+-]?{_DIGITS})"
    rf"|(?P<digits>{_DIGITS})(?:[eE](?P<exponent>[+-]?[0-9]{{1,3}})(?![0-9])"
    r"|\s*[×·*xX]\s*10\^(?:\{(?P<power>[+-]?[0-9]{1,3})\}|(?P<power2>[+-]?[0-9]{1,3})(?![0-9])))?"
    rf"|(?:(?P<tens>{_TENS})[\s-])?(?P<word>{'|'.join(CARDINALS)})\b)",
    re.IGNORECASE,
)
_SCALE = re.compile(rf"\s+({'|'.join(SCALES)})s?\b|((?:\s?[mbt]n|[kmb]))(?![^\W_])", re.IGNORECASE)
_LETTERS = {"k": 10**3, "K": 10**3, "M": 10**6, "mn": 10**6, "B": 10**9, "bn": 10**9, "tn": 10**12}
_MONEY_LETTERS = _LETTERS | {"m": 10**6, "b": 10**9}
_PERCENT = re.compile(r"\s*(?:%|(?:percent(?:age)?|per cent|pct)\b)(?:\s*points?\b)?|\s*(‰|permille\b)", re.IGNORECASE)
_LATEX_FRACTION = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9]))")
_PART = re.compile(r"(?<![0-9])([0-9]+(?:\.[0-9]+)?)\s*([^\W\d_]+)(?:(?:,|,? and)\s+(?=[0-9])|\s+(?=[0-9])|\.?$)")
_NAME = re.compile(r"[^\W\d]\w*(?:_\{\w+\}|\(\w+\))?")
_MORE_THAN_A_NAME = re.compile(r"[,;|<>≤≥≠!¬±]|\b(?:or|and|not)\b")
_LETTER = re.compile(r"(?<!\\)[^\W\d_]")
_OPERATION = re.compile(
    r"[+*/^·×÷]|\\(?:frac|sqrt|binom)|\d[^\W\d_]\b|(?<![^\W\d_]{2})\s?-\s?(?![^\W\d_]{2})"  # not in follow-up costs
)
_COUNTED = re.compile(r"(?<=\d)\s[^\W\d_]{3,}(?:/[^\W\d_]+)?")
"""What a number counts in a sum that was worked out: 5 apples + 7 apples = 12."""


def read(text: str) -> Quantity | None:
    """The one number that `text` is; None for anything else, such as arithmetic that is left to do, and x + y = 2."""
    if len(text) > MAX_CHARS:
        return None
    left, _, text = _without_brackets(plain(text)).replace("≈", "=").rpartition("=")
    sides = [_COUNTED.sub("", side) for side in left.split("=")]
    if _MORE_THAN_A_NAME.search(left) or any(_LETTER.search(side) and _OPERATION.search(side) for side in sides):
        return None
    text = _LATEX_FRACTION.sub(_with_a_slash, _without_brackets(text)).strip()
    if compound := _compound(text):
        return compound
    match = _NUMBER.match(text)
    value = match and _value(match)
    if value is None:
        return None
    rest, scale = _scale(text[match.end() :], money=bool(match["currency"]))
    percent = _PERCENT.match(rest)
    if percent:
        rest = rest[percent.end() :]
        scale = scale / 1000 if percent[1] else scale
    units = read_units(rest, (match["currency"] or "").removeprefix("US").rstrip("."))
    if not units:
        return None
    return Quantity(
        value * scale,
        percent=bool(percent and not percent[1]),
        units=units,
        name=left.strip().casefold() if _NAME.fullmatch(left.strip()) else "",
        quotient=bool(match["below"]),
        unfinished=bool(match["below"]) and _is_unfinished(match["above"], match["below"], value * scale),
        rounded=bool(match["exponent"] or match["power"] or match["power2"] or scale != 1),
    )


def _compound(text: str) -> Quantity | None:
    """5 hours 30 minutes, 6 ft 2 in: smaller and smaller units of one dimension, as a number of the first."""
    parts = list(_PART.finditer(text))
    if len(parts) < 2 or "".join(part[0] for part in parts) != text:
        return None
    for first in meanings_of(parts[0][2]):
        same = [[unit for unit in meanings_of(part[2]) if unit.dimension == first.dimension] for part in parts]
        factors = [choices[0].factor for choices in same if choices]
        if len(factors) == len(parts) and factors == sorted(set(factors), reverse=True):
            value = sum(_decimal(part[1]) * factor for part, factor in zip(parts, factors, strict=True)) / first.factor
            return Quantity(value, units=(first,))
    return None


def _is_unfinished(above: str, below: str, value: Fraction) -> bool:
    numerator, denominator = _decimal(above), abs(_decimal(below))
    if 0 < numerator < denominator <= 100 and numerator.denominator == denominator.denominator == 1:
        return False  # 3/4 million, 2 1/2 dozen, 12/24
    return value.denominator == 1 or denominator != (numerator / denominator).denominator


def stands_in(text: str, question: str) -> bool:
    """Is `text` written in the question, however spaces and fractions are written there?"""
    written, question = (_LATEX_FRACTION.sub(_with_a_slash, plain(part)) for part in (text, question))
    pieces = r"\s*".join(re.escape(piece) for piece in re.findall(r"\w+|\S", written))
    return bool(pieces) and re.search(rf"(?<![\w.]){pieces}(?!\w|\.\d)", question) is not None


def _with_a_slash(fraction: re.Match[str]) -> str:
    return f" {fraction[1] or fraction[2]}/{fraction[3] or fraction[4]}"


def _without_brackets(text: str) -> str:
    text = text.strip().removesuffix("\\\\").rstrip().removesuffix(".").strip()
    while text[:1] + text[-1:] in ("()", "[]", "{}") and not set("()[]") & set(text[1:-1]):
        text = text[1:-1].strip()
    return text


def _value(match: re.Match[str]) -> Fraction | None:
    if match["sign"] and match["sign2"]:
        return None
    if match["word"]:
        value = Fraction(CARDINALS[match["word"].lower()])
        if match["tens"]:
            if not 0 < value < 10:
                return None
            value += CARDINALS[match["tens"].lower()]
    elif match["below"]:
        below = _decimal(match["below"])
        if not below or (match["whole"] and not (match["above"] + match["below"]).isdigit()):
            return None
        value = int(match["whole"] or 0) + _decimal(match["above"]) / below
    else:
        exponent = match["exponent"] or match["power"] or match["power2"]
        value = _decimal(match["digits"]) * Fraction(10) ** int(exponent or 0)
    return -value if "-" in (match["sign"], match["sign2"]) else value


def _decimal(digits: str) -> Fraction:
    return Fraction(re.sub("[,'_ ]", "", digits))


def _scale(rest: str, *, money: bool) -> tuple[str, Fraction]:
    """What follows the words that multiply: hundred thousand; and the letters: $2.5M."""
    scale, letters = Fraction(1), _MONEY_LETTERS if money else _LETTERS
    while match := _SCALE.match(rest):
        letter = (match[2] or "").strip()
        if letter and (scale != 1 or letter not in letters):
            break
        scale *= letters[letter] if letter else SCALES[match[1].lower()]
        rest = rest[match.end() :]
    return rest, scale
