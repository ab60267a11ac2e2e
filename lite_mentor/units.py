"""What may follow a number: units, which convert, and plain nouns, which say what was counted.

A table of our own and not a library: a student's text is never parsed as an expression, and a word that is a unit to a
physicist (hand, point, count) stays a noun. Where a word has several meanings (pound), each of them is tried.

A word that is no unit is a noun if it does not change the number. The words that change one are a closed class, and
stand in `_CHANGES`: other numbers, ordinals, fractions, operators, alternatives, negations, and names of functions and
of Greek letters. Other words of one or two letters are variables or unknown units, and nothing that can be dropped.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

MAX_WORDS = 12
"""More of them after a number are prose."""
MAX_READINGS = 32
"""With more, words that have several meanings each are no unit; a dozen of them could be read in millions of ways."""


@dataclass(frozen=True)
class Unit:
    """What a number counts: in `5 km per sunny day` the factor 1000/86400, the dimension m / s, and the noun sunny."""

    factor: Fraction = Fraction(1)
    dimension: frozenset[tuple[str, int]] = frozenset()
    """Powers of base units; none is 0."""
    nouns: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.dimension or self.nouns)

    def agrees(self, other: Unit) -> bool:
        """Can they be said of the same thing? One side may say fewer nouns: 12 loaves are 12 loaves of bread."""
        nested = self.nouns <= other.nouns or other.nouns <= self.nouns
        return self.dimension == other.dimension and nested and bool(self) == bool(other)


# A factor, the dimension, symbols | names. After `+`, both take prefixes. "inche" and "centurie": less their plural s.
_TABLE = """
+ 1 m: m | meter metre
0.0254 m: in | inch inche
0.3048 m: ft | foot feet
0.9144 m: yd | yard
1609.344 m: mi | mile
10000 m^2: ha | hectare
4046.8564224 m^2: | acre
+ 0.001 m^3: l L | liter litre
0.003785411784 m^3: gal | gallon
0.000946352946 m^3: qt | quart
0.000473176473 m^3: | pint
+ 0.001 kg: g gm | gram gramme
1 kg: | kilo
1000 kg: t | tonne ton
907.18474 kg: | ton
0.45359237 kg: lb | pound
0.028349523125 kg: oz | ounce
+ 1 s: s | second
1 s: sec |
60 s: min | minute
3600 s: h hr | hour
86400 s: | day
604800 s: wk | week
1 month: mo | month
12 month: yr | year
120 month: | decade
1200 month: | century centurie
0.44704 m s^-1: mph |
1/3.6 m s^-1: kph kmh |
+ 1 kg m s^-2: N | newton
+ 1 kg m^2 s^-2: J | joule
+ 4.184 kg m^2 s^-2: cal | calorie
+ 3600 kg m^2 s^-2: Wh |
+ 1 kg m^2 s^-3: W | watt
+ 1 kg m^-1 s^-2: Pa | pascal
+ 1 s^-1: Hz | hertz
+ 1 V: V | volt
+ 1 A: A | amp ampere
+ 1 V A^-1: Ω | ohm
+ 1 mol: mol | mole
+ 1 byte: B | byte
1 K: K | kelvin
1 °C: °C | celsius
1 °F: °F | fahrenheit
1 °: ° deg | degree
1 °C: ° deg | degree
1 °F: ° deg | degree
1 rad: rad | radian
1 USD: $ USD | dollar
0.01 USD: ¢ | cent penny pennie
1 EUR: € EUR | euro
0.01 EUR: ¢ | cent
1 GBP: £ GBP | pound
0.01 GBP: | penny pennie pence
1 JPY: ¥ JPY | yen
1 CNY: ¥ CNY | yuan
1 INR: ₹ INR Rs | rupee
1 am: am |
1 pm: pm |
"""
_SYMBOL_PREFIXES = {"n": -9, "μ": -6, "u": -6, "m": -3, "c": -2, "d": -1, "h": 2, "k": 3, "M": 6, "G": 9, "T": 12}
_NAME_PREFIXES = {"nano": -9, "micro": -6, "milli": -3, "centi": -2, "deci": -1, "kilo": 3, "mega": 6, "giga": 9}

_SMALL = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_THOUSANDS = ["thousand", "million", "billion", "trillion", "quadrillion", "quintillion", "sextillion", "septillion"]
CARDINALS = {word: n for n, word in enumerate(_SMALL)} | {word: 10 * n for n, word in enumerate(_TENS, 2)}
SCALES = {word: 1000**n for n, word in enumerate(_THOUSANDS, 1)}
SCALES |= {"hundred": 100, "lakh": 10**5, "crore": 10**7, "dozen": 12, "gross": 144}

_CHANGES = re.compile(
    rf"(?:{'|'.join([*CARDINALS, *SCALES])}|lac|score|[a-z]{{1,7}}illi(?:on|ard)|first|half|halve|third|quarter)s?"
    r"|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|[a-z]{3,5}teen|[a-z]{3,5}tie|hundred|thousand|[a-z]+illion)ths?"
    r"|plus|minus|over|divided|multiplied|squared|cubed|factorial|root|mod|modulo|negative|below|under|and|not|nor|but"
    r"|versus|except|without|twice|thrice|double|triple|[a-z]+fold|percent|permille|infinity|milli|micro|nano|mega|giga"
    r"|sin|cos|tan|cot|csc|log|exp|sqrt|lim|max|gcd|lcm|alpha|beta|gamma|delta|epsilon|theta|lambda|sigma|phi|psi|omega"
)
_SILENT = {
    "of", "in", "the", "a", "an", "for", "on", "at", "by", "each", "total", "all", "unit", "units", "altogether", "as",
    "than", "there", "are",
}  # fmt: skip
"""Words that say nothing about what is counted."""

_REWRITINGS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        (r"\b([ap])\.m\b\.?", r"\1m"),
        (r"\b(left|remaining)\s+over\b", r"\1"),
        (r"(?:°|\bdegrees?|\bdeg\b)\s*c(?:elsius|entigrade)?\b", "°C"),
        (r"(?:°|\bdegrees?|\bdeg\b)\s*f(?:ahrenheit)?\b", "°F"),
        (r"\b(?:square|sq\.?)\s+([a-z]+)", r"\1^2"),
        (r"\b(?:cubic|cu\.?)\s+([a-z]+)", r"\1^3"),
        (r"\bper\b|\b(?:an?|each|every)\s+(?=(?:second|minute|hour|day|week|month|year)\b)", "/"),
        (r"(?<=[a-z])-(?=[a-z])", " "),
    )
)
_IN_ALL = re.compile(r"\s+(?:total|all|the|each|an?)\b", re.IGNORECASE)
_TOKEN = re.compile(r"\s*(?:(/)|[*·]|(°[CF]?|[$£€¥₹¢]|[^\W\d_]+\.?)(?:\^\{?(-?[1-9])\}?|([23])(?![0-9]))?)")


def read_units(text: str, currency: str = "") -> tuple[Unit, ...]:
    """What `text`, all that follows a number, may mean, with the currency sign in front; () if it changes the number.

    The first word may touch the number only if it is a unit: 5km, but not 5xyz.
    """
    first_is_apart = not text or text[0].isspace()
    for pattern, replacement in _REWRITINGS:
        text = pattern.sub(replacement, text)
    parts: list[list[Unit]] = []
    position, power, dangling, text = 0, 1, False, text.rstrip()
    while position < len(text):
        token = _TOKEN.match(text, position)
        if token is None or len(parts) == MAX_WORDS:
            return ()
        position = token.end()
        if token[2] is None:  # an operator
            if dangling or not (parts or token[1]):
                return ()
            power, dangling = -1 if token[1] else 1, True
        else:
            word = token[2].rstrip(".")
            inches = not parts and not _IN_ALL.match(text, position)
            meanings = meanings_of(word) if word != "in" or inches else []
            if not meanings and not (_is_noun(word) and (first_is_apart or parts)):
                return ()
            if meanings or word.lower() not in _SILENT:
                power *= int(token[3] or token[4] or 1)
                parts.append([_power(unit, power) for unit in meanings or [Unit(nouns=frozenset({_stem(word)}))]])
            power, dangling = 1, False
    if dangling:
        return ()
    readings = [Unit()]
    for meanings in parts:  # one by one, so that equal ones are not multiplied
        readings = list(dict.fromkeys(map(_product, itertools.product(readings, meanings))))
        if len(readings) > MAX_READINGS:
            return ()
    money = [unit for unit in meanings_of(currency) if not any(unit.dimension <= r.dimension for r in readings)]
    return tuple(_product(pair) for pair in itertools.product(money or [Unit()], readings))


def _is_noun(word: str) -> bool:
    return word.lower() in _SILENT or (len(word) > 2 and not _CHANGES.fullmatch(word.lower()))


def _stem(word: str) -> str:
    """The same for book and books, box and boxes, lady and ladies."""
    return re.sub(r"(?:ie|e|y)$", "", word.casefold().removesuffix("s"))


def meanings_of(word: str) -> list[Unit]:
    """The units that a word or a sign may be; none of a noun."""
    found = _UNITS.get(word)
    if found is None and len(word) > 1:
        found = _UNITS.get(word.lower()) or (_UNITS.get(word.lower().removesuffix("s")) if len(word) > 2 else None)
    return found or []


def _power(unit: Unit, power: int) -> Unit:
    dimension = frozenset((base, exponent * power) for base, exponent in unit.dimension)
    return Unit(unit.factor**power, dimension, unit.nouns)


def _product(units: Iterable[Unit]) -> Unit:
    factor, dimension, nouns = Fraction(1), Counter(), frozenset()
    for unit in units:
        factor *= unit.factor
        dimension.update(dict(unit.dimension))
        nouns |= unit.nouns
    return Unit(factor, frozenset((base, exponent) for base, exponent in dimension.items() if exponent), nouns)


def _read_table() -> dict[str, list[Unit]]:
    units = defaultdict(list)
    for line in _TABLE.strip().splitlines():
        measure, words = line.split(":")
        prefixed = measure.startswith("+ ")
        factor, *bases = measure.removeprefix("+ ").split()
        dimension = frozenset((base, int(exponent or 1)) for base, _, exponent in (b.partition("^") for b in bases))
        above, _, below = factor.partition("/")
        unit = Unit(Fraction(above) / Fraction(below or 1), dimension)
        for names, prefixes in zip(words.split("|"), (_SYMBOL_PREFIXES, _NAME_PREFIXES), strict=True):
            for name in names.split():
                units[name].append(unit)
                for prefix, exponent in prefixes.items() if prefixed else ():
                    units[prefix + name].append(Unit(unit.factor * Fraction(10) ** exponent, dimension))
    return dict(units)


_UNITS = _read_table()
