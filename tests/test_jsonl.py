"""The user's own task files: what is read, what is set aside, and what stops the run."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
from sample_tools import no_module

from lite_mentor.errors import UserError
from lite_mentor.sandbox import Sandbox
from lite_mentor.tasks import jsonl
from lite_mentor.tasks.jsonl import read_tasks
from lite_mentor.tools import calculator_tools

GOOD = {"question": "What is 37 times 12?", "answer": "444", "tools": ["multiply"]}


@pytest.fixture
def describe():
    with Sandbox(1, way="limits only") as sandbox:
        yield sandbox.describe


@pytest.fixture
def read(tmp_path, describe):
    def write_and_read(rows, name="mine.jsonl"):
        path = tmp_path / name
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"\n".join(lines))
        return read_tasks(path, quarantine=tmp_path / "out" / "quarantine.jsonl", describe=describe)

    return write_and_read


@pytest.fixture
def quarantined(tmp_path):
    def rows():
        text = (tmp_path / "out" / "quarantine.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    return rows


def good(count):
    return [{**GOOD, "question": f"What is {n} times 12?", "answer": str(12 * n)} for n in range(count)]


def published(**changes):
    schemas = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("add", "sqrt")]
    row = {
        "question": "What is the root of 9 + 16?",
        "reward_model": {"ground_truth": ["5", "5.0"], "style": "rule"},
        "extra_info": {"func_schemas": json.dumps(schemas), "env": "raise SystemExit", "index": 3},
        "tool_calls_used": ["add", "sqrt"],
        "data_source": "math",
    }
    return {**row, **changes}


def test_a_row_becomes_an_example(read):
    (example,) = read([GOOD])
    assert example.question == "What is 37 times 12?"
    assert example.answer == ("444",)
    assert [tool.name for tool in example.tools] == ["multiply"]
    assert example.tools[0].function is not None
    assert (example.checker, example.suite, dict(example.meta)) == ("math", "mine", {})


@pytest.mark.parametrize(
    ("answer", "answers", "checker"),
    [
        (444, ("444",), "math"),
        (-1.5, ("-1.5",), "math"),
        ("1,234.5", ("1,234.5",), "math"),
        (["3", "a few"], ("3", "a few"), "math"),
        (".5", (".5",), "math"),
        ("1/2", ("1/2",), "math"),
        (r"\frac{1}{2}", (r"\frac{1}{2}",), "math"),
        ("$14.50", ("$14.50",), "math"),
        ("50%", ("50%",), "math"),
        ("−5", ("−5",), "math"),
        ("12 km", ("12 km",), "math"),
        ("12 apples", ("12 apples",), "math"),
        ("x = 5", ("x = 5",), "math"),
        ("2^10", ("2^10",), "math"),
        (r"2\sqrt{3}", (r"2\sqrt{3}",), "math"),
        (" Paris ", ("Paris",), "text"),
        (r"\text{Oslo}", (r"\text{Oslo}",), "text"),
        ("12 Angry Men", ("12 Angry Men",), "text"),
        ("2024-12-25", ("2024-12-25",), "text"),
        ("3:30 pm", ("3:30 pm",), "text"),
        ("1,2,3", ("1,2,3",), "text"),
        ("C++", ("C++",), "text"),
        ("<", ("<",), "text"),
        ("the rule x^2 here", ("the rule x^2 here",), "text"),
    ],
)
def test_answers(read, answer, answers, checker):
    (example,) = read([{**GOOD, "answer": answer}])
    assert (example.answer, example.checker) == (answers, checker)


def test_checker_and_suite_can_be_given(read):
    (example,) = read([{**GOOD, "checker": "text", "suite": "times"}])
    assert (example.checker, example.suite) == ("text", "times")


def test_a_byte_order_mark_blank_lines_and_windows_line_ends_are_fine(read):
    rows = [b"\xef\xbb\xbf" + json.dumps(row).encode() + b"\r" for row in good(1)] + [b"", b"  \r", *good(3)[1:]]
    assert len(read(rows)) == 3


def test_a_function_of_the_users_own(read, tmp_path, monkeypatch):
    (tmp_path / "users_tools.py").write_text(
        'def shout(text: str, times: int = 1) -> str:\n    """Say it loudly."""\n    raise SystemExit\n',
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    (example,) = read([{**GOOD, "tools": ["add", "users_tools:shout"]}])
    tool = example.tools[1]
    assert (tool.name, tool.description, tool.path, tool.function) == (
        "shout", "Say it loudly.", "users_tools:shout", None,
    )  # fmt: skip
    assert tool.parameters["required"] == ["text"]
    assert "users_tools" not in sys.modules


BAD_ROWS = [
    (b"{", "the line is not valid JSON"),
    (b'{"question": "\xff"}', "the line is not valid UTF-8"),
    (b'{"question": "\\ud800"}', "the line is not valid UTF-8"),
    (b"[" * 100_000, "the line is not valid JSON"),
    (b"9" * 10_000, "the line is not"),
    (b"[1]", "the line is not a JSON object"),
    ({}, "`question` is missing, empty or not text"),
    ({**GOOD, "question": " "}, "`question` is missing, empty or not text"),
    ({**GOOD, "question": 5}, "`question` is missing, empty or not text"),
    ({**GOOD, "answer": None}, "`answer` must be text, a number, or a list of them"),
    ({**GOOD, "answer": True}, "`answer` must be text, a number, or a list of them"),
    ({**GOOD, "answer": float("inf")}, "`answer` must be text, a number, or a list of them"),
    ({**GOOD, "answer": float("nan")}, "`answer` is missing or empty"),
    ({**GOOD, "answer": []}, "`answer` is missing or empty"),
    ({**GOOD, "answer": ["1", " "]}, "`answer` is missing or empty"),
    ({**GOOD, "answer": list(range(101))}, "`answer` lists 101 answers, and at most 100 are compared"),
    ({**GOOD, "tools": ["a." * 100 + "b:f"]}, "a name in `tools` is longer than 200 characters"),
    ({**GOOD, "tools": []}, "`tools` must be a list of tool names, and not empty"),
    ({**GOOD, "tools": "add"}, "`tools` must be a list of tool names, and not empty"),
    (
        {**GOOD, "tools": ["plus"]},
        "there is no built-in tool 'plus'; use module:function, python, or one of add, subtract",
    ),
    ({**GOOD, "tools": ["add", "add"]}, "two of the `tools` have the same name"),
    (
        {**GOOD, "tools": ["no_such_module:f"]},
        "The tool no_such_module:f cannot be imported (ModuleNotFoundError: No module named",
    ),
    ({**GOOD, "tools": ["json:no_such_function"]}, "The tool json:no_such_function cannot be imported"),
    ({**GOOD, "tools": [".relative:f"]}, "The tool .relative:f cannot be imported (TypeError: the 'package' argument"),
    ({**GOOD, "tools": ["a\nb:f"]}, "The tool a\\nb:f cannot be imported"),
    ({**GOOD, "\x1b[2J\u202e": "1"}, "unknown field `\\x1b[2J\\u202e`"),
    ({**GOOD, "tools": [":f"]}, "The tool :f cannot be imported"),
    ({**GOOD, "tools": ["sys:path"]}, "The tool sys:path cannot be imported (TypeError: path is not a function)"),
    ({**GOOD, "tools": ["json:dumps"]}, "Tool json:dumps: parameter obj has no annotation"),
    ({**GOOD, "checker": "exact"}, '`checker` must be "math" or "text"'),
    ({**GOOD, "suite": 3}, "`suite` must be text"),
    ({**GOOD, "anwser": "1"}, "unknown field `anwser`; the fields are answer, checker, question, suite, tools"),
    (published(reward_model={}), "`reward_model.ground_truth` is missing"),
    (published(extra_info="no"), "`extra_info` is not valid JSON"),
    (published(extra_info={"func_schemas": "[]"}), "`extra_info.func_schemas` is empty"),
    (published(extra_info={"func_schemas": [{"type": "function"}]}), "holds something that is not a function schema"),
    (good(1)[0], "the same question, answer and tools occurred before"),
    ({**good(1)[0], "question": " What is  0 times 12?"}, "the same question, answer and tools occurred before"),
    ({**good(1)[0], "answer": "0.0"}, "the same question, answer and tools occurred before"),
    ({**GOOD, "answer": "5" * 201}, "can never be right: it is longer than 200 characters"),
    ({**GOOD, "answer": "."}, "the accepted answer '.' can never be right: it is empty as text"),
    ({**GOOD, "answer": ["4", r"\text{}"]}, "can never be right: it is empty as text"),
    (published(reward_model={"ground_truth": "$" * 201}), "can never be right: it is longer than 200 characters"),
    (b'{"question": "a", "answer": "4", "answer": "5", "tools": ["add"]}', "the field `answer` is there twice"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS, ids=[reason[:40] for _, reason in BAD_ROWS])
def test_a_bad_row_is_set_aside_with_its_line_and_reason(read, quarantined, row, reason):
    assert len(read([*good(30), row])) == 30
    (rejected,) = quarantined()
    assert rejected["line"] == 31
    assert reason in rejected["reason"]
    assert len(rejected["row"]) <= 500


def test_rows_that_contradict_each_other_are_all_set_aside(read, quarantined):
    rows = [{**row, "tools": ["add", "multiply"]} for row in good(100)]
    rows += [{**rows[5], "answer": "61"}, {**rows[7], "answer": "9", "tools": ["multiply", "add"]}]
    assert [e.question for e in read(rows)] == [row["question"] for n, row in enumerate(rows[:100]) if n not in (5, 7)]
    assert [(row["line"], row["reason"]) for row in quarantined()] == [
        (line, f"line {other} asks the same with the same tools and accepts another answer")
        for line, other in ((6, 101), (8, 102), (101, 6), (102, 8))
    ]


def test_rows_with_many_answers_agree_by_the_first_of_either_or_by_a_common_one(read, quarantined):
    rest = [str(n) for n in range(1000, 1098)]
    rows = [{**GOOD, "question": f"Q{n % 3}?", "answer": answer} for n, answer in enumerate(
        [["5", *rest], ["0.5", *rest], ["7"], ["5.0"], ["50%", "a"], ["8", "7"]]
    )]  # fmt: skip
    assert len(read([*good(300), *rows])) == 303
    assert {row["reason"] for row in quarantined()} == {"the same question, answer and tools occurred before"}


def test_the_answers_of_two_rows_are_not_compared_each_with_each(read, monkeypatch):
    rows = [{**GOOD, "question": "Q?", "answer": [str(s * n) for n in range(1, 101)]} for s in (1, -1)]
    compared = []
    monkeypatch.setattr(jsonl, "is_correct", lambda answer, gold, checker: compared.extend(gold) or answer in gold)
    assert len(read([*good(50), *rows])) == 50
    assert len(compared) == 50 + 200 + 200  # each answer with itself, and the first of either row with the other's


def test_the_same_question_with_other_tools_or_in_another_order_is_another_example(read):
    rows = [{**GOOD, "tools": tools} for tools in (["add"], ["add", "multiply"], ["multiply", "add"])]
    rows.append({**GOOD, "answer": 12, "tools": ["sqrt"]})
    assert len(read(rows)) == len(read(rows[::-1])) == 4


def test_a_tool_is_described_once_for_all_rows(tmp_path):
    """That may import its module, or fail to for a minute."""
    asked = []

    def describe(path):
        asked.append(path)
        if path == "bad:f":
            raise UserError("no")
        return dataclasses.replace(calculator_tools()[0], path=path)

    rows = good(50) + [{**GOOD, "tools": [path]} for path in ("good:f", "bad:f", "bad:f")]
    rows.append({**GOOD, "question": "Again?", "tools": ["good:f"]})
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(read_tasks(tmp_path / "mine.jsonl", quarantine=tmp_path / "quarantine", describe=describe)) == 52
    assert asked == ["good:f", "bad:f"]


def test_more_than_five_percent_bad_rows_stop_the_run(read, quarantined):
    assert len(read([*good(38), {}, {"question": "?"}])) == 38  # exactly 5 %
    with pytest.raises(UserError, match=r"3 of 41 rows cannot be used \(line 39: `question` is missing"):
        read([*good(38), {}, {"question": ""}, {"question": 0}])
    assert [row["line"] for row in quarantined()] == [39, 40, 41]


def test_a_sound_file_leaves_no_quarantine_behind(read, tmp_path):
    read([*good(30), {}])
    assert (tmp_path / "out" / "quarantine.jsonl").exists()
    read(good(30))
    assert not (tmp_path / "out" / "quarantine.jsonl").exists()


def test_a_published_row_becomes_an_example(read):
    (example,) = read([published()])
    assert example.question == "What is the root of 9 + 16?"
    assert example.answer == ("5", "5.0")
    assert [tool.name for tool in example.tools] == ["add", "sqrt"]
    assert (example.checker, example.suite) == ("math", "math")
    assert example.meta == {}


def test_published_rows_with_other_tools_are_set_aside_and_are_no_fault_of_the_file(read, quarantined):
    other = published(extra_info={"func_schemas": [{"name": "run_python"}]})
    assert len(read([published(), other, other, other])) == 1
    assert [row["line"] for row in quarantined()] == [2, 3, 4]
    assert quarantined()[0]["reason"] == "its tool 'run_python' is none of the calculators"
    with pytest.raises(UserError, match="run_python"):
        read([other])


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "published.parquet"
    rows = [published(), published(question="And of 36 + 64?", reward_model={"ground_truth": ["10"], "style": "rule"})]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    examples = read_tasks(path, quarantine=tmp_path / "quarantine.jsonl", describe=no_module)
    assert [example.answer for example in examples] == [("5", "5.0"), ("10",)]
    assert not (tmp_path / "quarantine.jsonl").exists()
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        read_tasks(path, quarantine=tmp_path / "quarantine.jsonl", describe=no_module)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="install pyarrow"):
        read_tasks(tmp_path / "a.parquet", quarantine=tmp_path / "quarantine.jsonl", describe=no_module)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_the_users_error(tmp_path, content):
    (tmp_path / "empty.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="holds no tasks"):
        read_tasks(tmp_path / "empty.jsonl", quarantine=tmp_path / "quarantine.jsonl", describe=no_module)


@pytest.mark.parametrize(
    ("name", "reason"), [("missing.jsonl", "There is no file"), (".", "are read from"), ("tasks.csv", "are read from")]
)
def test_a_wrong_path_is_the_users_error(tmp_path, name, reason):
    with pytest.raises(UserError, match=reason):
        read_tasks(tmp_path / name, quarantine=tmp_path / "quarantine.jsonl", describe=no_module)


def test_rows_that_cannot_be_set_aside_are_one_sentence(tmp_path):
    (tmp_path / "tasks.jsonl").write_text("{oops\n")
    (tmp_path / "file").write_text("")
    quarantine = tmp_path / "file" / "quarantine.jsonl"
    with pytest.raises(UserError, match=r"quarantine\.jsonl cannot be written .*make room or rights there"):
        read_tasks(tmp_path / "tasks.jsonl", quarantine=quarantine, describe=no_module)
