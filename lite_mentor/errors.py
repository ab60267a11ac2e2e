"""What a user reads when something is wrong, and how any text reaches a terminal: shown as it is, and never obeyed.

Sentences quote what strangers wrote (tasks, models, records, servers, names of files), and in a terminal a control
character moves, hides or replaces what else stands there. So all that is printed goes through `printable`: a UserError
by itself, a line of ours by `say`, and by `guard_terminal` what libraries log.
"""

import logging
import sys
import traceback
import unicodedata
from typing import Any, TextIO

_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Categories of Unicode: control and format characters (which change the direction of text), surrogates, characters
that do not exist, and breaks of lines."""


class UserError(Exception):
    """Says in one sentence, which is one line, what is wrong, where, and what to change.

    `train.py` prints it and exits, without a traceback.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(printable(sentence))


def printable(text: str) -> str:
    r"""The text in one line, with `\x1b` for the character that a terminal would obey, and so on."""
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in _UNSEEN else c for c in text)


def say(text: str, file: TextIO | None = None) -> None:
    """Print one line, to stdout unless told otherwise; `?` stands for what its encoding lacks."""
    file = file or sys.stdout
    encoding = file.encoding or "ascii"
    print(printable(text).encode(encoding, "replace").decode(encoding), file=file, flush=True)


def guard_terminal() -> None:
    """For a command's process: what libraries log and warn of there, and a traceback, are printable line by line."""
    logging.setLogRecordFactory(_Record)
    logging.captureWarnings(True)
    sys.excepthook = _show


def _show(*error: Any) -> None:
    print(_printable_lines("".join(traceback.format_exception(*error))), end="", file=sys.stderr)


class _Record(logging.LogRecord):
    def getMessage(self) -> str:
        return _printable_lines(super().getMessage())


def _printable_lines(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))
