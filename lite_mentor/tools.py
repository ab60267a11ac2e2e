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
import numbers
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, Literal

from lite_mentor.calculators import CALCULATORS, ToolError, number_text
from lite_mentor.errors import UserError
from lite_mentor.types import CallStatus, Example, ToolCall, ToolSpec, World

MAX_CALL_CHARS = 16_000
MAX_CALL_DEPTH = 16
MAX_RESULT_CHARS = 4000
"""What leaves a tool at most. How much of it a student reads is counted in tokens (rollout.Limits)."""

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

    The description is the docstring's first paragraph; lines `name: text` under `Args:` describe the parameters.
    With `path` (`module:function`) the spec names the function instead of holding it, so that it runs elsewhere.
    Raises UserError for a parameter or docstring that cannot be described.
    """
    where = path or function.__name__
    doc = inspect.getdoc(function) or ""
    if not doc.strip():
        raise UserError(f"Tool {where} has no docstring; say in it what the tool does, for the student reads it.")
    try:
        hints = typing.get_type_hints(function)
        parameters = inspect.signature(function).parameters.values()
    except (NameError, TypeError, ValueError) as error:
        raise UserError(f"Tool {where}: its annotations cannot be read ({error}).") from error
    notes = _argument_notes(doc)
    properties, required = {}, []
    for parameter in parameters:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UserError(f"Tool {where}: {parameter} cannot be passed by name; use plain named parameters.")
        schema = _type_schema(hints.get(parameter.name), f"Tool {where}: parameter {parameter.name}")
        if parameter.name in notes:
            schema["description"] = notes[parameter.name]
        if parameter.default is parameter.empty:
            required.append(parameter.name)
        elif parameter.default is not None:
            schema["default"] = parameter.default
        properties[parameter.name] = schema
    return ToolSpec(
        name=function.__name__,
        description=" ".join(doc.split("\n\n")[0].split()),
        parameters={
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        },
        function=None if path else function,
        path=path,
    )


@functools.cache
def calculator_tools() -> tuple[ToolSpec, ...]:
    """The paper's twelve calculators, always in the same order (so that prompts share their beginning)."""
    return tuple(tool_spec(function) for function in CALCULATORS)


def _argument_notes(doc: str) -> dict[str, str]:
    section = re.split(r"^\s*Args:\s*$", doc, maxsplit=1, flags=re.M)
    if len(section) == 1:
        return {}
    block = section[1].lstrip("\n").split("\n\n")[0]
    return {name: text.strip() for name, text in re.findall(r"^\s*(\w+)[^:\n]*:\s*(.+)$", block, flags=re.M)}


def _type_schema(annotation: Any, where: str) -> dict[str, Any]:
    simple = {int: "integer", float: "number", str: "string", bool: "boolean", list: "array", dict: "object"}
    if annotation in simple:
        return {"type": simple[annotation]}
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return {"enum": list(inner)}
    if origin is list:
        return {"type": "array", "items": _type_schema(inner[0], where)}
    if origin is dict:
        return {"type": "object"}
    if origin in (typing.Union, types.UnionType) and len(inner) == 2 and type(None) in inner:
        return _type_schema(inner[0] if inner[1] is type(None) else inner[1], where)
    raise UserError(
        f"{where} is annotated as {annotation}; use int, float, str, bool, list[...], dict, Literal[...] "
        "or one of them | None."
    )


def signature(spec: ToolSpec) -> str:
    """One line that describes a tool to a student: `add(a: number, b: number): a + b`."""
    return f"{_usage(spec)}: {spec.description}"


def _usage(spec: ToolSpec) -> str:
    required = spec.parameters.get("required", ())
    shown = []
    for name, schema in spec.parameters.get("properties", {}).items():
        optional = "" if name in required else f" = {json.dumps(schema.get('default'))}"
        shown.append(f"{name}: {_type_text(schema)}{optional}")
    return f"{spec.name}({', '.join(shown)})"


def _type_text(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return "|".join(str(value) for value in schema["enum"])
    if schema.get("type") == "array":
        return f"{_type_text(schema.get('items', {}))}[]"
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
    if spec is None:
        known = ", ".join(tool.name for tool in tools)
        text = f"Error: there is no tool {_clip(name, 40)!r}. The tools are {known}."
        return _call(name, arguments, raw, "unknown_tool", text)
    arguments = {k: v for k, v in arguments.items() if v is not None or k not in _nullable(spec)}
    problem = _schema_problem(spec, arguments)
    if problem:
        return _call(name, arguments, raw, "bad_arguments", f"Error: {problem}. Use {_usage(spec)}.")
    arguments = _integers_as_int(spec, arguments)
    if spec.path is not None:
        if run_path is None:
            raise ValueError(f"tool {name} lives at {spec.path}: pass run_path, which runs it")
        sent = arguments
        if world is not None:
            sent = {"world": world.start, "earlier": played(earlier), "name": name, "arguments": arguments}
        return _call(name, arguments, raw, *run_path(spec.path, sent))
    try:
        return _call(name, arguments, raw, "ok", result_text(spec.function(**arguments)))
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


def result_text(value: Any, limit: int = MAX_RESULT_CHARS) -> str:
    """A tool's result as a student should read and copy it: 12 and not 12.0, at most about ten digits, short."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (numbers.Integral, Decimal)):
        return number_text(Decimal(value if isinstance(value, Decimal) else int(value)))
    if isinstance(value, numbers.Real):  # numpy's and others' too
        return number_text(Decimal(repr(float(value))))
    if isinstance(value, (list, tuple)):
        return _clip(", ".join(result_text(item) for item in value), limit)
    return _clip(value if isinstance(value, str) else repr(value), limit)


def _call(name: str, arguments: Mapping[str, Any], raw: str, status: CallStatus, text: str) -> ToolCall:
    clean = text.encode("utf-8", "replace").decode("utf-8")
    if len(clean) > MAX_RESULT_CHARS + 40:  # more than a result that result_text has cut, with its note of that
        clean = _clip(clean, MAX_RESULT_CHARS)
    return ToolCall(name, arguments, raw, status, clean)


def _clip(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}... [{len(text) - limit} more characters]"


def _parse_call(raw: str) -> tuple[str, dict[str, Any]]:
    if len(raw) > MAX_CALL_CHARS:
        raise _BadCall("it is too long")
    data = json.loads(raw, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    shaped = isinstance(data, dict) and set(data) == {"name", "arguments"} and isinstance(data["name"], str)
    if not shaped or not isinstance(data["arguments"], dict):
        raise _BadCall('write {"name": ..., "arguments": {...}}')
    if _depth(data) > MAX_CALL_DEPTH:
        raise _BadCall("it is nested too deeply")
    try:
        json.dumps(data, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise _BadCall("it holds half a character") from None
    return data["name"], data["arguments"]


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
    where = ".".join(str(part) for part in error.absolute_path)
    if error.validator == "required":
        missing = next(name for name in error.validator_value if name not in error.instance)
        return f"{missing} is missing"
    if error.validator == "additionalProperties":
        extra = next(name for name in error.instance if name not in error.schema.get("properties", {}))
        return f"there is no argument {_clip(extra, 40)!r}"
    if error.validator in ("type", "enum"):
        return f"{_clip(where, 40)} must be of type {_type_text(error.schema)}"
    return _clip(f"{where}: {error.message}", 120)


def _integers_as_int(spec: ToolSpec, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """JSON schema counts 2.0 as an integer; Python functions do not."""
    schemas = spec.parameters.get("properties", {})
    whole = {name for name, schema in schemas.items() if schema.get("type") == "integer"}
    return {name: int(value) if name in whole else value for name, value in arguments.items()}
