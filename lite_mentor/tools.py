"""What a tool is to a student, and how a student's call is run.

A call is text that a student wrote, so `run_call` is total: any text gives a ToolCall whose result is a short value
or one short sentence that says what was wrong.
"""

from __future__ import annotations

import decimal
import functools
import inspect
import json
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from lite_mentor.calculators import CALCULATORS, ToolError
from lite_mentor.errors import UserError
from lite_mentor.results import MAX_RESULT_CHARS, clip, finished, result_text
from lite_mentor.types import CallStatus, Example, ToolCall, ToolSpec, World

MAX_CALL_CHARS = 16_000
MAX_CALL_DEPTH = 16
MAX_SPEC_BYTES = 16_000
"""Of what a tool outside says of itself: all of it stands in every prompt."""
MAX_CHOICES = 100
"""In a type of its arguments: each is tried for each value."""

RunPath = Callable[[str, Mapping[str, Any]], "tuple[CallStatus, str]"]
"""Runs the tool at `module:function` with these arguments somewhere safe -> (status, result text)."""

RunCall = Callable[[str, Example, Sequence[ToolCall]], ToolCall]
"""The text of one call, the example whose tools it may use, and the episode's earlier calls -> the call, with result.

Called from several threads at once for examples with tools that live elsewhere (`ToolSpec.path`), but never for two
calls of one episode.
"""


class _BadCall(ValueError):
    """The text between the tags is not a call."""


# --- describing a tool -----------------------------------------------------------------------------------------


def tool_spec(function: Callable[..., Any], *, path: str | None = None) -> ToolSpec:
    """Describe a function by its annotations and docstring.

    The description is the docstring's first paragraph; what it says of the parameters may be written as Google, numpy
    or reST do, or as a text in `Annotated`. With `path` (`module:function`) the spec names the function instead of
    holding it, so that it runs elsewhere. Raises UserError for a parameter or docstring that cannot be described.
    """
    where = path or function.__name__
    doc = inspect.getdoc(function) or ""
    if not doc.strip():
        raise UserError(f"Tool {where} has no docstring; say in it what the tool does, for the student reads it.")
    try:
        hints = typing.get_type_hints(function, include_extras=True)
        parameters = inspect.signature(function).parameters.values()
    except (AttributeError, NameError, SyntaxError, TypeError, ValueError) as error:
        raise UserError(f"Tool {where}: its annotations cannot be read ({error}).") from error
    description, notes = _read_docstring(doc, where)
    properties, required = {}, []
    for parameter in parameters:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UserError(f"Tool {where}: {parameter} cannot be passed by name; use plain named parameters.")
        schema = _type_schema(hints.get(parameter.name), f"Tool {where}: parameter {parameter.name}")
        if parameter.name in notes:
            schema["description"] = notes[parameter.name]
        if parameter.default is parameter.empty:
            required.append(parameter.name)
        elif parameter.default is None:
            schema = _without_null(schema)  # for it, null is the argument left out
        else:
            schema["default"] = _json_default(parameter, where)
        properties[parameter.name] = schema
    return ToolSpec(
        name=function.__name__,
        description=description,
        parameters={
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        },
        function=None if path else function,
        path=path,
    )


def read_spec(row: Mapping[str, Any], path: str) -> ToolSpec:
    """The ToolSpec that a worker says the tool at `path` has. Raises UserError for what `tool_spec` would not make.

    A tool's module could say anything: a schema with a pattern that never ends, or one that refers to the network.
    """
    name, description, parameters = row.get("name"), row.get("description"), row.get("parameters")
    try:
        size = len(json.dumps([name, description, parameters], ensure_ascii=False, allow_nan=False).encode())
        sound = size <= MAX_SPEC_BYTES and _is_plain(parameters) and parameters.get("type") == "object"
    except (ValueError, TypeError, RecursionError):  # half a character, no number, or nested without end
        sound = False
    if not (sound and isinstance(name, str) and name.isprintable() and name and isinstance(description, str)):
        raise UserError(f"Tool {path}: its module says of it what no function is; describe it by hints and docstring.")
    return ToolSpec(name, description, parameters, path=path)


_PLAIN: Mapping[str, Callable[[Any], bool]] = {
    "type": lambda value: isinstance(value, str) and value in _SIMPLE.values(),
    "description": lambda value: isinstance(value, str),
    "default": lambda value: True,
    "enum": lambda value: isinstance(value, list) and 0 < len(value) <= MAX_CHOICES,
    "required": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    "properties": lambda value: isinstance(value, dict) and all(map(_is_plain, value.values())),
    "items": lambda value: _is_plain(value),
    "additionalProperties": lambda value: value is False or _is_plain(value),
    "anyOf": lambda value: isinstance(value, list) and 0 < len(value) <= MAX_CHOICES and all(map(_is_plain, value)),
}
"""The keywords that `tool_spec` writes, and what they may say."""


def _is_plain(schema: Any) -> bool:
    """Is it a JSON schema of these keywords? What takes them in is fast, and fetches nothing."""
    return isinstance(schema, dict) and all(name in _PLAIN and _PLAIN[name](value) for name, value in schema.items())


@functools.cache
def calculator_tools() -> tuple[ToolSpec, ...]:
    """The paper's twelve calculators, always in the same order (so that prompts share their beginning)."""
    return tuple(tool_spec(function) for function in CALCULATORS)


def _read_docstring(doc: str, where: str) -> tuple[str, dict[str, str]]:
    """(its first paragraph, what it says of each parameter), each on one line."""
    import docstring_parser  # here, for a tool's worker describes nothing

    try:
        parsed = docstring_parser.parse(doc)
    except (docstring_parser.ParseError, IndexError, ValueError) as error:
        raise UserError(
            f"Tool {where}: its docstring cannot be read ({error}); write plain text and `Args:`."
        ) from error
    words = [(p.arg_name, " ".join((p.description or "").split())) for p in parsed.params]
    first = (parsed.description or "").split("\n\n")[0]
    return " ".join(first.split()), {name: text for name, text in words if text}


_SIMPLE = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
_SIMPLE |= {list: "array", dict: "object"}


def _type_schema(annotation: Any, where: str) -> dict[str, Any]:
    """A new JSON schema of the values that a parameter takes."""
    if annotation is None:
        raise UserError(f"{where} has no annotation; say its type.")
    if annotation is Any:
        return {}
    simple = next((name for kind, name in _SIMPLE.items() if kind is annotation), None)
    if simple:
        return {"type": simple}
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        notes = [note for note in inner[1:] if isinstance(note, str)]
        return _type_schema(inner[0], where) | ({"description": notes[0]} if notes else {})
    if origin is Literal:
        kinds = {_SIMPLE.get(type(value)) for value in inner}
        if None not in kinds:
            return ({"type": kinds.pop()} if len(kinds) == 1 else {}) | {"enum": list(inner)}
    if origin is list:
        return {"type": "array"} | ({"items": _type_schema(inner[0], where)} if inner else {})
    if origin is dict and (not inner or inner[0] in (str, Any)):
        values = _type_schema(inner[1], where) if inner else {}
        return {"type": "object"} | ({"additionalProperties": values} if values else {})
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_type_schema(kind, where) for kind in inner]}
    shown = getattr(annotation, "__name__", None) if isinstance(annotation, type) and not inner else annotation
    raise UserError(
        f"{where} is annotated as {shown}, which JSON has no values of; use int, float, str, bool, None, list[...], "
        "dict[str, ...], Literal[...] or a union of these."
    )


def _without_null(schema: Mapping[str, Any]) -> dict[str, Any]:
    kinds = [kind for kind in schema.get("anyOf", ()) if kind != {"type": "null"}]
    rest = {key: value for key, value in schema.items() if key != "anyOf" or not kinds}
    return (kinds[0] if len(kinds) == 1 else {"anyOf": kinds} if kinds else {}) | rest


def _json_default(parameter: inspect.Parameter, where: str) -> Any:
    try:
        return json.loads(json.dumps(parameter.default, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        raise UserError(
            f"Tool {where}: the default of {parameter.name}, {parameter.default!r:.60}, is nothing that JSON can hold; "
            "use None and choose in the function."
        ) from None


def signature(spec: ToolSpec) -> str:
    """What a tool is, to a student: `add(a: number, b: number): a + b`; and a line for each argument with a note."""
    notes = [
        f"\n  {name}: {' '.join(str(schema['description']).split())}"
        for name, schema in spec.parameters.get("properties", {}).items()
        if schema.get("description")
    ]
    return f"{_usage(spec)}: {spec.description}{''.join(notes)}"


def _usage(spec: ToolSpec) -> str:
    required = spec.parameters.get("required", ())
    shown = []
    for name, schema in spec.parameters.get("properties", {}).items():
        optional = "" if name in required else f" = {json.dumps(schema.get('default'))}"
        shown.append(f"{name}: {_type_text(schema)}{optional}")
    return f"{spec.name}({', '.join(shown)})"


def _type_text(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return "|".join(value if isinstance(value, str) else json.dumps(value) for value in schema["enum"])
    if "anyOf" in schema:
        return "|".join(_type_text(kind) for kind in schema["anyOf"])
    if schema.get("type") == "array":
        item = _type_text(schema.get("items", {}))
        return f"({item})[]" if "|" in item else f"{item}[]"
    return str(schema.get("type", "any"))


# --- running a call --------------------------------------------------------------------------------------------


def render_call(name: str, arguments: Mapping[str, Any]) -> str:
    """The text of a call as a teacher writes it between the call tags."""
    return json.dumps({"name": name, "arguments": dict(arguments)}, ensure_ascii=False)


def caller(run_path: RunPath | None = None) -> RunCall:
    """How episodes run their calls."""
    return lambda raw, example, earlier: run_call(
        raw, example.tools, run_path=run_path, world=example.world, earlier=earlier
    )


def run_call(
    raw: str,
    tools: Sequence[ToolSpec],
    *,
    run_path: RunPath | None = None,
    world: World | None = None,
    earlier: Sequence[ToolCall] = (),
) -> ToolCall:
    """Parse, check and run the text between a pair of call tags. Never raises, whatever the text is.

    Tools that name a `path` are handed to `run_path`, with arguments that satisfy their schema; where there is a
    world, these arguments come with what its functions need beside them.
    """
    try:
        name, arguments = _parse_call(raw)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, _BadCall) else "it is not valid JSON"
        return _call("", {}, raw, "bad_json", f"Error: bad call, {reason}.")
    spec = next((tool for tool in tools if tool.name == name), None)
    if arguments is None:
        if spec is None or spec.parameters.get("required"):
            return _call("", {}, raw, "bad_json", f"Error: bad call, {_SHAPE}.")
        arguments = {}
    if spec is None:
        known = ", ".join(tool.name for tool in tools)
        text = f"Error: there is no tool {clip(name, 40)!r}. The tools are {known}."
        return _call(name, arguments, raw, "unknown_tool", text)
    arguments = {k: v for k, v in arguments.items() if v is not None or k not in _nullable(spec)}
    problem = _schema_problem(spec, arguments)
    if problem:
        return _call(name, arguments, raw, "bad_arguments", f"Error: {problem}. Use {_usage(spec)}.")
    arguments = _as_python(arguments, spec.parameters)
    if spec.path is not None:
        if run_path is None:
            raise ValueError(f"tool {name} lives at {spec.path}: pass run_path, which runs it")
        sent = arguments
        if world is not None:
            sent = {"world": world.start, "earlier": played(earlier), "name": name, "arguments": arguments}
        return _call(name, arguments, raw, *run_path(spec.path, sent))
    try:
        return _call(name, arguments, raw, "ok", result_text(finished(spec.function(**arguments))))
    except ToolError as error:
        return _call(name, arguments, raw, "error", f"Error: {error}.")
    except decimal.Overflow:
        return _call(name, arguments, raw, "error", "Error: the result is too large.")
    except ArithmeticError:
        return _call(name, arguments, raw, "error", "Error: there is no such number.")


def _nullable(spec: ToolSpec) -> set[str]:
    """Arguments whose default is null: for them, null is the argument left out."""
    required, properties = spec.parameters.get("required", ()), spec.parameters.get("properties", {})
    return {name for name, schema in properties.items() if name not in required and "default" not in schema}


def played(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """The calls that worked, which are a world's state, as JSON."""
    return [{"name": call.name, "arguments": dict(call.arguments)} for call in calls if call.status == "ok"]


def _call(name: str, arguments: Mapping[str, Any], raw: str, status: CallStatus, text: str) -> ToolCall:
    clean = text.encode("utf-8", "replace").decode("utf-8")
    if len(clean) > MAX_RESULT_CHARS + 40:  # more than a result that result_text has cut, with its note of that
        clean = clip(clean, MAX_RESULT_CHARS)
    return ToolCall(name, arguments, raw, status, clean)


_SHAPE = 'write {"name": ..., "arguments": {...}}'


def _parse_call(raw: str) -> tuple[str, dict[str, Any] | None]:
    """(name, arguments) of a call; None for arguments that are left out or null."""
    if len(raw) > MAX_CALL_CHARS:
        raise _BadCall("it is too long")
    data = json.loads(raw, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    shaped = isinstance(data, dict) and {"name"} <= set(data) <= {"name", "arguments"} and isinstance(data["name"], str)
    if not shaped or not isinstance(data.get("arguments"), (dict, types.NoneType)):
        raise _BadCall(_SHAPE)
    if _depth(data) > MAX_CALL_DEPTH:
        raise _BadCall("it is nested too deeply")
    try:
        json.dumps(data, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise _BadCall("it holds half a character") from None
    return data["name"], data.get("arguments")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        raise _BadCall("a key occurs twice")
    return data


def _no_constant(name: str) -> None:
    raise _BadCall(f"{name} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _BadCall("a number is too large")
    return value


def _depth(data: Any) -> int:
    depth, layer = 0, [data]
    while layer:
        depth += 1
        layer = [
            child
            for node in layer
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
        ]
    return depth


def _schema_problem(spec: ToolSpec, arguments: Mapping[str, Any]) -> str | None:
    import jsonschema  # here, for a tool's worker checks nothing and starts in half the time without it

    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(spec.parameters).iter_errors(arguments))
    if error is None:
        return None
    if error.parent is not None and error.parent.validator == "anyOf":
        error = error.parent
    where = ".".join(str(part) for part in error.absolute_path)
    if error.validator == "required":
        missing = next(name for name in error.validator_value if name not in error.instance)
        return f"{missing} is missing"
    if error.validator == "additionalProperties":
        extra = next(name for name in error.instance if name not in error.schema.get("properties", {}))
        return f"there is no argument {clip(extra, 40)!r}"
    if error.validator in ("type", "enum", "anyOf"):
        return f"{clip(where, 40)} must be of type {_type_text(error.schema)}"
    return clip(f"{where}: {error.message}", 120)


def _as_python(value: Any, schema: Any) -> Any:
    """A value that satisfies its schema; 2.0 as int where an integer is meant, for JSON schema counts it as one."""
    kinds = list(_branches(schema))
    if isinstance(value, float):
        named = {kind.get("type") for kind in kinds}
        listed = next((item for kind in kinds for item in kind.get("enum", ()) if item == value), value)
        return int(value) if "integer" in named and "number" not in named and value.is_integer() else listed
    for kind in kinds:
        if isinstance(value, list) and "items" in kind:
            return [_as_python(item, kind["items"]) for item in value]
        if isinstance(value, dict) and ("properties" in kind or "additionalProperties" in kind):
            known, others = kind.get("properties", {}), kind.get("additionalProperties", {})
            return {name: _as_python(part, known.get(name, others)) for name, part in value.items()}
    return value


def _branches(schema: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(schema, Mapping):  # true and false are schemas too
        yield schema
        for kind in schema.get("anyOf", ()):
            yield from _branches(kind)
