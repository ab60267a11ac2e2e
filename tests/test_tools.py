"""Tools: how they are described, and that running a student's call never raises."""

from __future__ import annotations

import enum
import functools
import json
from dataclasses import dataclass
from typing import Annotated, Any, Dict, List, Literal, Optional, TypedDict  # noqa: UP035

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lite_mentor.calculators import abs_value, ceil, floor, round_number, sqrt
from lite_mentor.errors import UserError
from lite_mentor.tasks.ood_tools import unseen_tools
from lite_mentor.tools import (
    MAX_RESULT_CHARS,
    ToolError,
    calculator_tools,
    read_spec,
    render_call,
    run_call,
    signature,
    tool_spec,
)
from lite_mentor.types import ToolSpec

TOOLS = calculator_tools()


def run(name, **arguments):
    call = run_call(render_call(name, arguments), TOOLS)
    return call.status, call.result


def convert(amount: float, unit: Literal["m", "km"], tags: list[str], exact: bool = False, note: str | None = None):
    """Convert an amount
    to another unit.

    More words that a student does not need.

    Args:
        amount: how much there is
        unit (str): the target unit
    """


def test_a_function_is_described_by_its_annotations_and_docstring():
    spec = tool_spec(convert)
    assert spec.name == "convert"
    assert spec.description == "Convert an amount to another unit."
    assert spec.parameters == {
        "type": "object",
        "properties": {
            "amount": {"type": "number", "description": "how much there is"},
            "unit": {"type": "string", "enum": ["m", "km"], "description": "the target unit"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "exact": {"type": "boolean", "default": False},
            "note": {"type": "string"},
        },
        "required": ["amount", "unit", "tags"],
        "additionalProperties": False,
    }
    assert spec.function is convert
    assert signature(spec) == (
        "convert(amount: number, unit: m|km, tags: string[], exact: boolean = false, note: string = null): "
        "Convert an amount to another unit.\n  amount: how much there is\n  unit: the target unit"
    )


def test_a_tool_with_a_path_does_not_hold_its_function():
    spec = tool_spec(convert, path="mine:convert")
    assert (spec.path, spec.function) == ("mine:convert", None)


def no_docstring(a: int):
    pass


def unannotated(a):
    """Does a thing."""


def variadic(*a: int):
    """Does a thing."""


def unknown_name(a: Missing):  # noqa: F821
    """Does a thing."""


def broken_annotation(a: "int["):  # noqa: F722
    """Does a thing."""


def broken_docstring(a: int):
    "::\t:param x: ax (int): yx : int\n    d\n----->>> fReturns:"


def pair(a: tuple[int, int]):
    """Does a thing."""


class Color(enum.Enum):
    RED = "red"


def coloured(a: Color):
    """Does a thing."""


def coloured_literal(a: Literal[Color.RED]):
    """Does a thing."""


@dataclass
class Point:
    x: int


def point(a: Point):
    """Does a thing."""


class Row(TypedDict):
    x: int


def row(a: Row):
    """Does a thing."""


def by_number(a: dict[int, str]):
    """Does a thing."""


def endless(a: float = float("inf")):
    """Does a thing."""


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (no_docstring, "no docstring"),
        (unannotated, "parameter a has no annotation; say its type"),
        (variadic, "cannot be passed by name"),
        (unknown_name, "name 'Missing' is not defined"),
        (broken_docstring, "its docstring cannot be read"),
        (broken_annotation, "its annotations cannot be read"),
        (pair, "parameter a is annotated as tuple"),
        (coloured, "parameter a is annotated as Color, which JSON has no values of"),
        (coloured_literal, "annotated as typing.Literal.*, which JSON has no values of"),
        (point, "parameter a is annotated as Point"),
        (row, "parameter a is annotated as Row"),
        (by_number, r"parameter a is annotated as dict\[int, str\]"),
        (endless, "the default of a, inf, is nothing that JSON can hold"),
        (functools.partial(convert, unit="m"), "its annotations cannot be read"),
    ],
)
def test_what_cannot_be_described_is_the_users_error(function, reason):
    with pytest.raises(UserError, match=reason):
        tool_spec(function, path="mine:tool")


@pytest.mark.parametrize(
    ("annotation", "schema", "text"),
    [
        (int, {"type": "integer"}, "integer"),
        (Any, {}, "any"),
        (list, {"type": "array"}, "any[]"),
        (List, {"type": "array"}, "any[]"),  # noqa: UP006 - as users write it
        (Dict, {"type": "object"}, "object"),  # noqa: UP006
        (Literal[1, 2], {"type": "integer", "enum": [1, 2]}, "1|2"),
        (Literal["a", 1, None], {"enum": ["a", 1, None]}, "a|1|null"),
        (list[Literal["a", "b"]], {"type": "array", "items": {"type": "string", "enum": ["a", "b"]}}, "(a|b)[]"),
        (dict[str, float], {"type": "object", "additionalProperties": {"type": "number"}}, "object"),
        (dict[str, Any], {"type": "object"}, "object"),
        (int | str, {"anyOf": [{"type": "integer"}, {"type": "string"}]}, "integer|string"),
        (Optional[bool], {"anyOf": [{"type": "boolean"}, {"type": "null"}]}, "boolean|null"),  # noqa: UP045
        (Annotated[int, "how many"], {"type": "integer", "description": "how many"}, "integer"),
        (Annotated[int, [1]], {"type": "integer"}, "integer"),
    ],
)
def test_types_and_their_schemas(annotation, schema, text):
    def tool(x):
        """Does a thing."""

    tool.__annotations__["x"] = annotation
    spec = tool_spec(tool)
    assert spec.parameters["properties"]["x"] == schema
    assert signature(spec).startswith(f"tool(x: {text}): Does a thing.")


GOOGLE = """Cost of a parcel.

    Args:
        city (str): Where it goes: a three-letter
            airport code.
        kg: Weight.

    Returns:
        float: dollars
    """
DIRECT = """Cost of a parcel.
    Args:
        city: Where it goes: a three-letter airport code.
        kg: Weight.
    """
NUMPY = """Cost of a parcel.

    Parameters
    ----------
    city : str
        Where it goes: a three-letter
        airport code.
    kg : float, optional
        Weight.
    """
REST = """Cost of a parcel.

    :param str city: Where it goes: a three-letter
        airport code.
    :param kg: Weight.
    :returns: dollars
    """


@pytest.mark.parametrize("doc", [GOOGLE, DIRECT, NUMPY, REST], ids=["google", "direct", "numpy", "rest"])
def test_what_a_docstring_says_of_arguments_reaches_every_student(doc):
    def rate(city: str, kg: float = 1.0):
        pass

    rate.__doc__ = doc
    spec = tool_spec(rate)
    notes = {name: schema["description"] for name, schema in spec.parameters["properties"].items()}
    assert notes == {"city": "Where it goes: a three-letter airport code.", "kg": "Weight."}
    assert signature(spec) == (
        "rate(city: string, kg: number = 1.0): Cost of a parcel.\n"
        "  city: Where it goes: a three-letter airport code.\n"
        "  kg: Weight."
    )


SCALARS = st.sampled_from(
    [(int, 3, 3.0), (float, 0.5, 0.5), (str, "a", "a"), (bool, True, True), (Literal[1, 7], 7, 7.0)]
)
TYPED = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        inner.map(lambda t: (list[t[0]], [t[1], t[1]], [t[2], t[2]])),
        inner.map(lambda t: (dict[str, t[0]], {"k": t[1]}, {"k": t[2]})),
        inner.map(lambda t: (t[0] | None, t[1], t[2])),
        inner.map(lambda t: (t[0] | None, None, None)),
        inner.map(lambda t: (Annotated[t[0], "a note"], t[1], t[2])),
    ),
    max_leaves=4,
)


@settings(deadline=None)
@given(TYPED)
def test_a_tool_gets_the_types_that_it_asks_for(typed):
    annotation, wanted, written = typed
    got = []

    def tool(x):
        """Does a thing."""
        got.append(x)

    tool.__annotations__["x"] = annotation
    call = run_call(render_call("tool", {"x": written}), [tool_spec(tool)])
    assert (call.status, repr(got[0])) == ("ok", repr(wanted))
    wrong = run_call(render_call("tool", {"x": {"no": ["such", {}]}}), [tool_spec(tool)])
    assert wrong.status == "bad_arguments"
    assert len(wrong.result) < 300


def test_an_argument_of_several_types_is_told_all_of_them():
    def tool(x: int | list[int], y: Optional[int] = 5):  # noqa: UP045
        """Does a thing."""
        return repr((x, y))

    spec = tool_spec(tool)
    said = run_call(render_call("tool", {"x": "a"}), [spec]).result
    assert said == "Error: x must be of type integer|integer[]. Use tool(x: integer|integer[], y: integer|null = 5)."
    assert run_call(render_call("tool", {"x": 1.0, "y": None}), [spec]).result == "(1, None)"
    assert run_call(render_call("tool", {"x": [2.0]}), [spec]).result == "([2], 5)"


@pytest.mark.parametrize("raw", ['{"name": "lunch"}', '{"name": "lunch", "arguments": null}'])
def test_arguments_may_be_left_out_where_none_are_needed(raw):
    def lunch(day: str = "today"):
        """When lunch is."""
        return "noon"

    call = run_call(raw, [tool_spec(lunch)])
    assert (call.name, call.arguments, call.status, call.result) == ("lunch", {}, "ok", "noon")
    assert run_call(raw.replace("lunch", "add"), TOOLS).result == SHAPE
    assert run_call(raw, TOOLS).status == "bad_json"


def test_the_twelve_calculators():
    assert [tool.name for tool in TOOLS] == [
        "add", "subtract", "multiply", "divide", "sum_numbers", "floor", "ceil", "round_number", "power", "sqrt",
        "abs_value", "modulo",
    ]  # fmt: skip
    assert signature(TOOLS[0]) == "add(a: number, b: number): a + b"
    assert signature(TOOLS[7]) == ("round_number(number: number, digits: integer = 0): round to a number of decimals")


@pytest.mark.parametrize(
    ("name", "arguments", "result"),
    [
        ("add", {"a": 0.1, "b": 0.2}, "0.3"),
        ("add", {"a": -5, "b": 5}, "0"),
        ("subtract", {"a": 1, "b": 1.5}, "-0.5"),
        ("multiply", {"a": 2.5, "b": 4}, "10"),
        ("multiply", {"a": 12345678, "b": 87654321}, "1082152022374638"),
        ("multiply", {"a": 1e-200, "b": 1e-200}, "0"),
        ("divide", {"a": 1, "b": 3}, "0.3333333333"),
        ("divide", {"a": 2000000, "b": 3}, "666666.6667"),
        ("divide", {"a": 12, "b": 4}, "3"),
        ("sum_numbers", {"numbers": []}, "0"),
        ("sum_numbers", {"numbers": [1, 2.25, -3]}, "0.25"),
        ("floor", {"number": -2.5}, "-3"),
        ("floor", {"number": 2.999}, "2"),
        ("ceil", {"number": 2.001}, "3"),
        ("ceil", {"number": -0.5}, "0"),
        ("round_number", {"number": 2.5}, "3"),
        ("round_number", {"number": -2.5}, "-3"),
        ("round_number", {"number": 2.675, "digits": 2}, "2.68"),
        ("round_number", {"number": 1250, "digits": -2.0}, "1300"),
        ("round_number", {"number": 1.5, "digits": 9}, "1.5"),
        ("power", {"base": 2, "exponent": 10}, "1024"),
        ("power", {"base": 2, "exponent": -2}, "0.25"),
        ("power", {"base": -2, "exponent": 3}, "-8"),
        ("power", {"base": 0, "exponent": 0}, "1"),
        ("power", {"base": 2, "exponent": 100}, "1.2676506e30"),
        ("sqrt", {"number": 144}, "12"),
        ("sqrt", {"number": 2}, "1.414213562"),
        ("abs_value", {"number": -3.50}, "3.5"),
        ("modulo", {"a": 17, "b": 5}, "2"),
        ("modulo", {"a": -7, "b": 3}, "2"),
        ("modulo", {"a": 7.5, "b": -2}, "-0.5"),
        ("modulo", {"a": 0.3, "b": 0.1}, "0"),
    ],
)
def test_calculators_print_what_a_person_would(name, arguments, result):
    assert run(name, **arguments) == ("ok", result)


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("divide", {"a": 1, "b": 0}, "Error: division by zero."),
        ("divide", {"a": 0, "b": 0.0}, "Error: division by zero."),
        ("modulo", {"a": 1, "b": 0}, "Error: division by zero."),
        ("modulo", {"a": 10**90, "b": 3}, "Error: there is no such number."),
        ("power", {"base": 10, "exponent": 10**10}, "Error: the result is too large."),
        ("power", {"base": 9.9e300, "exponent": 9.9e300}, "Error: the result is too large."),
        ("power", {"base": 0, "exponent": -1}, "Error: division by zero."),
        ("power", {"base": -8, "exponent": 0.5}, "Error: there is no real result."),
        ("sqrt", {"number": -1}, "Error: there is no real square root of a negative number."),
        ("multiply", {"a": 1e200, "b": 1e200}, "Error: the result is too large."),
        ("add", {"a": int("9" * 4000), "b": 1}, "Error: the result is too large."),
        ("round_number", {"number": 1, "digits": 10**50}, "Error: digits must be between -15 and 15."),
    ],
)
def test_calculators_say_why_there_is_no_result(name, arguments, sentence):
    assert run(name, **arguments) == ("error", sentence)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"a": 1}, "Error: b is missing. Use add(a: number, b: number)."),
        ({"a": True, "b": 1}, "Error: a must be of type number. Use add(a: number, b: number)."),
        ({"a": "1", "b": 1}, "Error: a must be of type number. Use add(a: number, b: number)."),
        ({"a": 1, "b": 1, "c": 1}, "Error: there is no argument 'c'. Use add(a: number, b: number)."),
    ],
)
def test_arguments_are_checked_against_the_schema(arguments, sentence):
    assert run("add", **arguments) == ("bad_arguments", sentence)


def test_an_unknown_tool_is_told_what_there_is():
    call = run_call('{"name": "plus", "arguments": {"a": 1}}', TOOLS[:2])
    assert call.status == "unknown_tool"
    assert call.result == "Error: there is no tool 'plus'. The tools are add, subtract."
    assert (call.name, call.arguments) == ("plus", {"a": 1})


SHAPE = 'Error: bad call, write {"name": ..., "arguments": {...}}.'
NOT_JSON = "Error: bad call, it is not valid JSON."


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ("", NOT_JSON),
        ("add(1, 2)", NOT_JSON),
        ('{"name": "add", "arguments": {"a": 1, "b": 2}', NOT_JSON),
        ('{"name": "add", "arguments": {"a": 1, "b": 2}} and more', NOT_JSON),
        ("null", SHAPE),
        ("[]", SHAPE),
        ('{"name": "add"}', SHAPE),
        ('{"name": "add", "arguments": [1, 2]}', SHAPE),
        ('{"name": 1, "arguments": {}}', SHAPE),
        ('{"name": "add", "arguments": {}, "id": 1}', SHAPE),
        ('{"name": "add", "arguments": {"a": NaN, "b": 1}}', "Error: bad call, NaN is not a number."),
        ('{"name": "add", "arguments": {"a": -Infinity, "b": 1}}', "Error: bad call, -Infinity is not a number."),
        ('{"name": "add", "arguments": {"a": 1e999, "b": 1}}', "Error: bad call, a number is too large."),
        ('{"name": "add", "arguments": {"a": 1, "a": 2}}', "Error: bad call, a key occurs twice."),
        ('{"name": "\\ud800", "arguments": {}}', "Error: bad call, it holds half a character."),
        ('{"name": "add", "arguments": {"\ud800": 1}}', "Error: bad call, it holds half a character."),
        ('{"name": "add", "arguments": {"a": ' + "[" * 50 + "]" * 50 + "}}",
         "Error: bad call, it is nested too deeply."),
        ("[" * 100_000, "Error: bad call, it is too long."),
        ("[" * 15_000, NOT_JSON),
        ('{"a":' * 3000, NOT_JSON),
    ],
)  # fmt: skip
def test_garbage_is_bad_json(raw, sentence):
    call = run_call(raw, TOOLS)
    assert (call.name, call.arguments, call.status, call.result) == ("", {}, "bad_json", sentence)
    assert call.raw == raw


def test_an_integer_with_too_many_digits_for_python_is_refused():
    call = run_call('{"name": "add", "arguments": {"a": ' + "9" * 5000 + ', "b": 1}}', TOOLS)
    assert call.status in ("bad_json", "error")  # older Pythons convert it, and the sum is too large


SOUND = {"name": "tool", "description": "What it does.", "parameters": {"type": "object", "properties": {}}}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": 1, "maximum": 5},
        {"pattern": "(a+)+$"}, {"$ref": "http://localhost/schema"}, {"$dynamicRef": "#x"}, {"type": 5}, {"type": "odd"},
        {"items": {"pattern": "a"}}, {"anyOf": [{"type": "string"}, {"format": "x"}]}, {"anyOf": []}, {"enum": 3},
        {"additionalProperties": {"not": {}}}, {"properties": {"b": {"allOf": [{}]}}}, [], None, 3, True, False,
        {"type": ["integer", "number"]}, {"items": True}, {"properties": {"a": True}}, {"enum": []}, {"required": [3]},
        {"default": float("nan")}, {"description": "\ud800"}, {"description": "x" * 20_000}, {"default": "x" * 20_000},
        {"anyOf": [{"type": "null"}] * 101}, {"enum": list(range(101))}, {"type": list(range(5000))},
    ],
)  # fmt: skip
def test_a_described_tool_has_the_keywords_of_described_functions_alone(schema):
    row = SOUND | {"parameters": {"type": "object", "properties": {"a": schema}}}
    with pytest.raises(UserError, match="says of it what no function is"):
        read_spec(row, "m:tool")


@pytest.mark.parametrize(
    "change",
    [{"name": 3}, {"name": "a\nb"}, {"description": None}, {"parameters": None}, {"parameters": True},
     {"parameters": {"type": "array"}}, {"parameters": {"properties": {}}}],
)  # fmt: skip
def test_a_description_has_a_name_a_text_and_an_object_of_parameters(change):
    assert read_spec(SOUND, "m:tool") == ToolSpec("tool", "What it does.", SOUND["parameters"], path="m:tool")
    with pytest.raises(UserError, match="says of it what no function is"):
        read_spec(SOUND | change, "m:tool")


def test_every_function_that_can_be_described_is_read_back():
    def tool(
        a: int, b: list[dict[str, float | None]], c: Annotated[Literal["x", "y"], "one of two"] = "x",
        d: str | None = None, e: Any = None, f: dict | list | bool = False,
    ):  # fmt: skip
        """What it does."""

    spec = tool_spec(tool, path="m:tool")
    assert read_spec(json.loads(json.dumps(vars(spec) | {"function": None})), "m:tool") == spec
    for ours in calculator_tools():
        assert read_spec({"name": ours.name, "description": ours.description, "parameters": ours.parameters}, "p")


def test_a_path_tool_goes_to_the_worker_with_checked_arguments():
    def times(n: int) -> int:
        """n times two"""

    spec = tool_spec(times, path="mine:times")
    seen = []

    def run_path(path, arguments):
        seen.append((path, dict(arguments)))
        return "timeout", "Error: it took too long."

    call = run_call('{"name": "times", "arguments": {"n": 2.0}}', [spec], run_path=run_path)
    assert (call.status, call.result) == ("timeout", "Error: it took too long.")
    assert seen == [("mine:times", {"n": 2})]
    assert isinstance(seen[0][1]["n"], int)
    assert run_call('{"name": "times", "arguments": {}}', [spec], run_path=run_path).status == "bad_arguments"
    assert len(seen) == 1
    with pytest.raises(ValueError, match="pass run_path"):
        run_call('{"name": "times", "arguments": {"n": 1}}', [spec])


def test_null_for_an_argument_that_may_be_null_is_that_argument_left_out():
    spec, sent = tool_spec(convert, path="mine:convert"), []

    def take(path, arguments):
        sent.append(arguments)
        return "ok", "1"

    whole = {"amount": 1, "unit": "m", "tags": []}
    for note in ({}, {"note": None}, {"note": "n"}):
        assert run_call(render_call("convert", whole | note), [spec], run_path=take).status == "ok"
    assert sent == [whole, whole, whole | {"note": "n"}]
    assert run_call(render_call("convert", whole | {"exact": None}), [spec], run_path=take).status == "bad_arguments"


def test_a_long_result_is_cut_where_it_can_be_seen():
    spec = tool_spec(convert, path="mine:convert")
    raw = render_call("convert", {"amount": 1, "unit": "m", "tags": []})
    call = run_call(raw, [spec], run_path=lambda path, arguments: ("ok", "x" * 5000 + "\ud800"))
    assert call.result == "x" * MAX_RESULT_CHARS + f"... [{5001 - MAX_RESULT_CHARS} more characters]"
    call = run_call(raw, [spec], run_path=lambda path, arguments: ("ok", "a\ud800"))
    assert call.result == "a?"


def test_a_rendered_call_is_the_text_a_teacher_writes():
    assert render_call("add", {"a": 1, "b": 2.5}) == '{"name": "add", "arguments": {"a": 1, "b": 2.5}}'
    assert render_call("search", {"query": "Zoë"}) == '{"name": "search", "arguments": {"query": "Zoë"}}'


@pytest.mark.parametrize("value", [True, "1", None, float("nan"), float("inf")])
@pytest.mark.parametrize("function", [floor, ceil, round_number, sqrt, abs_value])
def test_functions_called_directly_refuse_what_is_not_a_number(function, value):
    with pytest.raises(ToolError):
        function(value)


NUMBERS = st.one_of(
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(-(10**600), 10**600),
    st.sampled_from([0, -1, 0.5, 1e-308, 1.7e308, 5e-324, 10**300, 1.0000001]),
)


@settings(max_examples=300)
@given(st.sampled_from(calculator_tools() + unseen_tools()), st.data())
def test_every_built_in_tool_is_total_on_arguments_of_the_right_type(spec, data):
    arguments = {}
    for name, schema in spec.parameters["properties"].items():
        kind = {"number": NUMBERS, "integer": st.integers() | st.integers(-(10**600), 10**600)}.get(
            schema["type"], st.text(max_size=12) | st.sampled_from(["m", "km", "kg", "2024-02-29", "2023-02-29"])
        )
        arguments[name] = data.draw(st.lists(NUMBERS, max_size=5) if schema["type"] == "array" else kind)
    call = run_call(render_call(spec.name, arguments), [spec])
    assert call.status in ("ok", "error", "bad_json")
    assert len(call.result) < MAX_RESULT_CHARS
