"""The user's own tasks, from a .jsonl or .parquet file. One row is one question, in one of two forms.

Ours:

    {"question": "What is 37 times 12?", "answer": "444", "tools": ["multiply", "my_tools:convert"]}

    question  text
    answer    text, a number, or a list of up to 100 of them, the most natural first: any one counts as right
    tools     names of built-in calculators, `python` (runs code that the student writes), or `module:function` of
              functions of yours with type hints and docstring
    checker   optional, "math" or "text" (see types.Example); "math" when any answer is a number or a formula, for it
              compares words as "text" does; else "text"
    suite     optional, a name for the statistics; the file's name when absent

A module named in `tools` is imported in worker processes alone, to read the function's signature and to run calls.

The published MENTOR data: `question`, `reward_model.ground_truth`, `extra_info.func_schemas`, and optionally
`data_source`. Rows whose functions are all among our calculators are read, others set aside;
the code that such rows carry is never run.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lite_mentor.errors import UserError, printable
from lite_mentor.files import replace_file
from lite_mentor.judge import MAX_ANSWER_CHARS, is_correct, is_mathematics
from lite_mentor.tasks import Describe, make_example, same_question
from lite_mentor.tools import calculator_tools, tool_spec
from lite_mentor.types import Example, ToolSpec

MAX_BAD_SHARE = 0.05
MAX_ANSWERS = 100
"""A student's answer is compared with each of them."""
MAX_TOOL_CHARS = 200
"""Python imports a name with a dot more for each of its parts, and keeps a copy of the name for each."""
_KEYS = {"question", "answer", "tools", "checker", "suite"}

_log = logging.getLogger(__name__)


class _BadRow(ValueError):
    """This row is not a task; its text is the reason."""


class _Unsupported(_BadRow):
    """A sound row of the published data whose tools we do not have: set aside, but no fault of the file."""


def read_tasks(path: str | Path, *, quarantine: Path, describe: Describe) -> list[Example]:
    """The examples of a file, in its order.

    Rows that cannot be used go to the file `quarantine` as {"line", "reason", "row"}. Raises UserError when the file
    cannot be read, when more than 5 % of its rows are bad, and when no example is left.
    """
    path = Path(path)
    rows, describe = list(_rows(path)), _once(describe)
    examples: dict[int, Example] = {}
    reasons: dict[int, _BadRow] = {}
    for line, row in rows:
        try:
            examples[line] = _example(_parse(row), path.stem, describe)
        except _BadRow as error:
            reasons[line] = error
    reasons |= _repeated(examples)
    total, bad = len(rows), sum(not isinstance(error, _Unsupported) for error in reasons.values())
    rejected = [
        {"line": line, "reason": printable(str(reasons[line])), "row": _text(row)[:500]}
        for line, row in rows
        if line in reasons
    ]
    if total == 0:
        raise UserError(f"{path} holds no tasks; write one JSON object a line, as lite_mentor/tasks/jsonl.py shows.")
    _write_quarantine(quarantine, rejected)
    if rejected:
        _log.warning("%s: %d of %d rows were set aside, see %s", path, len(rejected), total, quarantine)
    kept = [example for line, example in examples.items() if line not in reasons]
    if bad > MAX_BAD_SHARE * total or not kept:
        first = rejected[0]
        raise UserError(
            f"{path}: {len(rejected)} of {total} rows cannot be used (line {first['line']}: {first['reason']}); "
            f"put them right, all are listed in {quarantine}."
        )
    return kept


def _repeated(examples: Mapping[int, Example]) -> dict[int, _BadRow]:
    """Lines that ask with the same tools what another asks: both where the answers differ, else the later one.

    The same tools in another order are another prompt, and no repetition.
    """
    first: dict[Any, int] = {}
    reasons: dict[int, _BadRow] = {}
    for line, example in examples.items():
        names = [tool.name for tool in example.tools]
        question = same_question(example.question)
        earlier = first.setdefault((question, frozenset(names)), line)
        if not _agree(examples[earlier], example):
            reasons[line] = _BadRow(f"line {earlier} asks the same with the same tools and accepts another answer")
            reasons[earlier] = _BadRow(f"line {line} asks the same with the same tools and accepts another answer")
        elif first.setdefault((question, *names), line) != line:
            reasons[line] = _BadRow("the same question, answer and tools occurred before")
    return reasons


def _agree(one: Example, other: Example) -> bool:
    """Do they share an answer, or is what one of them gives first right for the other?"""
    if not set(one.answer).isdisjoint(other.answer):
        return True
    return is_correct(other.answer[0], one.answer, one.checker) or is_correct(one.answer[0], other.answer, one.checker)


def _rows(path: Path) -> Iterator[tuple[int, bytes | Mapping[str, Any]]]:
    """Line (or row) numbers from 1, with the raw line or the parquet row."""
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"{path}: tasks are read from .jsonl and .parquet files; rename or convert this one.")
    if not path.is_file():
        raise UserError(f"There is no file {path} to read tasks from; check the path given to --task.")
    if path.suffix == ".parquet":
        yield from enumerate(_parquet_rows(path), 1)
        return
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path} is a parquet file: install pyarrow to read it, or convert it to .jsonl.") from error
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}.") from error


def _parse(row: bytes | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(row, bytes):
        row = _json(row, "the line")
    if not isinstance(row, dict):
        raise _BadRow("the line is not a JSON object")
    return row


def _json(text: str | bytes, what: str) -> Any:
    try:
        data = json.loads(text, object_pairs_hook=_distinct)
        json.dumps(data, ensure_ascii=False).encode("utf-8")
    except _BadRow:
        raise
    except UnicodeError as error:
        raise _BadRow(f"{what} is not valid UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise _BadRow(f"{what} is not valid JSON") from error
    return data


def _distinct(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for name, value in pairs:
        if name in data:
            raise _BadRow(f"the field `{name[:40]}` is there twice")
        data[name] = value
    return data


def _example(row: Mapping[str, Any], suite: str, describe: Describe) -> Example:
    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise _BadRow("`question` is missing, empty or not text")
    if "reward_model" in row or "extra_info" in row:
        return _published_example(row, suite)
    unknown = sorted(set(row) - _KEYS)
    if unknown:
        raise _BadRow(f"unknown field `{unknown[0][:40]}`; the fields are {', '.join(sorted(_KEYS))}")
    answers = _answers(row.get("answer"), "`answer`")
    checker = row.get("checker") or ("math" if any(map(is_mathematics, answers)) else "text")
    if checker not in ("math", "text"):
        raise _BadRow('`checker` must be "math" or "text"')
    suite = row.get("suite") or suite
    if not isinstance(suite, str):
        raise _BadRow("`suite` must be text")
    tools = _tools(row.get("tools"), describe)
    return _checked(make_example(question, answers, tools, suite=suite, checker=checker))


def _checked(example: Example) -> Example:
    """An accepted answer that is not right for itself can never be given."""
    for answer in example.answer:
        if not is_correct(answer, (answer,), example.checker):
            why = f"longer than {MAX_ANSWER_CHARS} characters" if len(answer) > MAX_ANSWER_CHARS else "empty as text"
            raise _BadRow(f"the accepted answer {answer[:40]!r} can never be right: it is {why}")
    return example


def _answers(value: Any, name: str) -> list[str]:
    values = value if isinstance(value, list) else [value]
    answers = []
    for item in values:
        if isinstance(item, bool) or not isinstance(item, (str, int, float)) or item in (math.inf, -math.inf):
            raise _BadRow(f"{name} must be text, a number, or a list of them")
        answers.append(str(item).strip())
    if len(answers) > MAX_ANSWERS:
        raise _BadRow(f"{name} lists {len(answers)} answers, and at most {MAX_ANSWERS} are compared")
    if not answers or not all(answers) or "nan" in answers:
        raise _BadRow(f"{name} is missing or empty")
    return answers


def _tools(names: Any, describe: Describe) -> list[ToolSpec]:
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise _BadRow("`tools` must be a list of tool names, and not empty")
    if any(len(name) > MAX_TOOL_CHARS for name in names):
        raise _BadRow(f"a name in `tools` is longer than {MAX_TOOL_CHARS} characters")
    tools = [_tool(name, describe) for name in names]
    if len({tool.name for tool in tools}) < len(tools):
        raise _BadRow("two of the `tools` have the same name")
    return tools


def _tool(name: str, describe: Describe) -> ToolSpec:
    if name == "python":
        return python_tool()
    if ":" not in name:
        return _calculator(name)
    return describe(name)


def _once(describe: Describe) -> Describe:
    """It as often as there are tools and not rows; what cannot be described raises _BadRow for each of them."""
    known: dict[str, ToolSpec | UserError] = {}

    def described(name: str) -> ToolSpec:
        if name not in known:
            try:
                known[name] = describe(name)
            except UserError as error:
                known[name] = error
        found = known[name]
        if isinstance(found, UserError):
            raise _BadRow(str(found).rstrip(".")) from found
        return found

    return described


@functools.cache
def python_tool() -> ToolSpec:
    """The tool that runs a student's code. Raises UserError when pydantic-monty is not installed."""
    try:
        from lite_mentor.python_tool import python
    except ImportError as error:
        raise UserError(
            "The tool `python` needs pydantic-monty; install it with: pip install 'lite-mentor[python]'"
        ) from error
    return tool_spec(python, path="lite_mentor.python_tool:python")


def _calculator(name: str) -> ToolSpec:
    for tool in calculator_tools():
        if tool.name == name:
            return tool
    known = ", ".join(tool.name for tool in calculator_tools())
    raise _BadRow(f"there is no built-in tool {name[:40]!r}; use module:function, python, or one of {known}")


def _published_example(row: Mapping[str, Any], suite: str) -> Example:
    truth = _field(row, "reward_model", "ground_truth")
    answers = _answers(list(truth) if isinstance(truth, (list, tuple)) else truth, "`reward_model.ground_truth`")
    names = _schema_names(_field(row, "extra_info", "func_schemas"))
    ours = {tool.name: tool for tool in calculator_tools()}
    missing = [name for name in names if name not in ours]
    if missing:
        raise _Unsupported(f"its tool {missing[0][:40]!r} is none of the calculators")
    source = row.get("data_source")
    return _checked(
        make_example(
            row["question"],
            answers,
            [ours[name] for name in dict.fromkeys(names)],
            suite=source if isinstance(source, str) and source else suite,
        )
    )


def _field(row: Mapping[str, Any], outer: str, inner: str) -> Any:
    group = row.get(outer)
    if isinstance(group, str):
        group = _json(group, f"`{outer}`")
    if not isinstance(group, dict) or group.get(inner) is None:
        raise _BadRow(f"`{outer}.{inner}` is missing")
    return group[inner]


def _schema_names(schemas: Any) -> Sequence[str]:
    """Function names of OpenAI-style schemas, given as objects or as JSON text."""
    schemas = _json(schemas, "`extra_info.func_schemas`") if isinstance(schemas, str) else schemas
    names = []
    for schema in schemas if isinstance(schemas, list) else [schemas]:
        schema = _json(schema, "a schema") if isinstance(schema, str) else schema
        inner = schema.get("function", schema) if isinstance(schema, dict) else None
        name = inner.get("name") if isinstance(inner, dict) else None
        if not isinstance(name, str):
            raise _BadRow("`extra_info.func_schemas` holds something that is not a function schema")
        names.append(name)
    if not names:
        raise _BadRow("`extra_info.func_schemas` is empty")
    return names


def _text(row: bytes | Mapping[str, Any]) -> str:
    return row.decode("utf-8", "replace") if isinstance(row, bytes) else json.dumps(row, default=str)


def _write_quarantine(quarantine: Path, rejected: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(item) + "\n" for item in rejected)
    try:
        if text:
            quarantine.parent.mkdir(parents=True, exist_ok=True)
            replace_file(quarantine, text.encode())
        else:
            quarantine.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{quarantine} cannot be written ({error.strerror}); make room or rights there.") from error
