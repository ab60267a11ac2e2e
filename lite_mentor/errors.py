"""What a user reads when something is wrong, and how any text reaches a terminal: shown as it is, and never obeyed.

Sentences quote what strangers wrote (tasks, models, records, servers, names of files), and in a terminal a control
character moves, hides or replaces what else stands there. So all that is printed goes through `printable`: a UserError
by itself, a line of ours by `say`, and by `guard_terminal` what libraries log. Nor does a stream that cannot be written
(its disk is full, its reader or its terminal is gone) end what takes hours: after `guard_terminal`, it takes all.
"""

import contextlib
import io
import logging
import os
import sys
import threading
import traceback
import unicodedata
from typing import Any, TextIO

_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Categories of Unicode: control and format characters (which change the direction of text), surrogates, characters
that do not exist, and breaks of lines."""
_DECEIVING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""The format characters that reorder the text around them. Others belong to words, as Persian's, or to an emoji."""


class UserError(Exception):
    """Says in one sentence, which is one line, what is wrong, where, and what to change.

    `train.py` prints it and exits, without a traceback.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(printable(sentence))


def printable(text: str) -> str:
    r"""The text in one line, with `\x1b` for the character that a terminal would obey, and so on."""
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in _UNSEEN else c for c in text)


def deceives(text: str) -> bool:
    """Does the text hold a control character, one that reorders others, or half of one? No name needs them."""
    return any(c in _DECEIVING or unicodedata.category(c) in ("Cc", "Cs") for c in text)


def say(text: str, file: TextIO | None = None) -> None:
    """Print one line, to stdout unless told otherwise; `?` stands for what its encoding lacks."""
    file = file or sys.stdout
    encoding = file.encoding or "ascii"
    print(printable(text).encode(encoding, "replace").decode(encoding), file=file, flush=True)


def guard_terminal() -> None:
    """For a command's process: whoever writes to stdout or stderr there never fails, and is shown, not obeyed.

    The latter holds line by line for what libraries log and warn of, and for a traceback.
    """
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)
    logging.setLogRecordFactory(_Record)
    logging.captureWarnings(True)
    sys.excepthook = _show
    # Those that somebody else has set, as a runner of tests, stay.
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = _show_last
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _show_last


def _lasting(stream: TextIO | None) -> TextIO:
    """The same stream, which takes any character, and goes on where it cannot be written. None: it was closed."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # with python -u, it has no buffer
    if type(raw) is not io.FileIO or raw.fileno() not in (1, 2):  # one of these, Windows' console, a test's capture
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Lasting(raw.fileno(), "w", closefd=False)), encoding=stream.encoding, errors="replace",
        line_buffering=stream.line_buffering or stream.write_through,
    )  # fmt: skip


class _Lasting(io.FileIO):
    """What cannot be written is lost. The first time, stderr is told."""

    _told = False

    def write(self, content: Any) -> int:
        try:
            return super().write(content) or len(content)  # None: it would have to wait
        except OSError as error:
            if not self._told and self.fileno() == 1:
                self._told = True
                say(f"stdout cannot be written ({error.strerror}); what follows there may be lost", sys.stderr)
            return len(content)


def _show(*error: Any) -> None:
    print(_printable_lines("".join(traceback.format_exception(*error))), end="", file=sys.stderr)


def _show_last(found: Any) -> None:
    """An exception that ends a thread, or that no one can catch."""
    if found.exc_type is not SystemExit:
        _show(found.exc_type, found.exc_value, found.exc_traceback)


class _Record(logging.LogRecord):
    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        if self.exc_info and self.exc_info[0]:  # a formatter takes this text rather than make its own
            self.exc_text = _printable_lines("".join(traceback.format_exception(*self.exc_info)).rstrip("\n"))
        if self.stack_info:
            self.stack_info = _printable_lines(self.stack_info)

    def getMessage(self) -> str:
        return _printable_lines(super().getMessage())


def _printable_lines(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))
