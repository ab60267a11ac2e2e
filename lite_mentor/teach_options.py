"""What `python -m lite_mentor.teach` was asked for."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lite_mentor.errors import UserError


@dataclass(frozen=True)
class Options:
    """Fill a teacher's cache."""

    out: Path
    """Folder of the cache."""
    suite: str = "math"
    """A built-in suite, or a path to a .jsonl or .parquet file."""
    source: Literal["oracle", "endpoint", "local"] = "oracle"
    """oracle: the built-in tasks' own solutions. endpoint: an OpenAI-compatible server. local: a model run here."""
    split: Literal["train", "validation", "test"] = "train"
    """Of a built-in suite."""
    size: int = 2000
    """Examples of a built-in suite."""
    levels: tuple[int, ...] = ()
    """Difficulties of a built-in suite; none given: all."""
    seed: int = 0
    """Of a built-in suite."""
    student: str = ""
    """local: the model, a folder or a hub id. It answers greedily."""
    base_url: str = ""
    """endpoint: where the server answers, as http://HOST:PORT/PATH; its key is read from OPENAI_API_KEY."""
    model: str = ""
    """endpoint: the model's name there."""
    temperature: float = 0.6
    """endpoint: of the teacher's sampling."""
    max_turns: int = 8
    """endpoint and local: assistant turns in a trajectory."""
    max_new_tokens: int = 2048
    """endpoint: tokens of a turn, 0 to let the server decide. local: tokens of all turns and results together."""
    concurrency: int = 8
    """endpoint and local: examples under way at the same time."""
    requests_per_minute: float = 0.0
    """endpoint: no faster than this; 0 is no limit."""
    sandbox: Literal["on", "off"] = "on"
    """off: tools of yours can read and change your files and use the network."""


def teacher_name(options: Options) -> str:
    """Who the records say the teacher is."""
    name = {"oracle": "", "endpoint": options.model, "local": options.student}[options.source]
    return f"{options.source}:{name}" if name else options.source


def command(options: Options) -> list[str]:
    """The flags that ask for these options again, but for the folder. They are written down: no secret is in them."""
    words = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name) if field.name != "base_url" else _address(options.base_url)
        if field.name in ("suite", "source") or (field.name != "out" and value != field.default):
            values = value if isinstance(value, tuple) else (value,)
            words += ["--" + field.name.replace("_", "-"), *map(str, values)]
    return words


def check(options: Options) -> None:
    """Raises UserError for a number that makes no sense, and for a server's address that holds more than that."""
    least = dict(size=1, max_turns=1, concurrency=1, requests_per_minute=0, temperature=0)
    least["max_new_tokens"] = 1 if options.source == "local" else 0
    for name, limit in least.items():
        flag, value = f"--{name.replace('_', '-')}", getattr(options, name)
        if not value >= limit:  # so that NaN is not, either
            raise UserError(f"{flag} is {value}; it must be at least {limit}.")
        if value == math.inf:
            raise UserError(f"{flag} is {value}; it must be finite.")
    if _address(options.base_url) != options.base_url:
        raise UserError(
            "--base-url must be an address alone, http://HOST:PORT/PATH, without a user, a password, a ?query or a "
            "#fragment, for it is written into the cache; put the server's key into the environment as OPENAI_API_KEY."
        )


_ADDRESS = re.compile(r"(https?://)(?:[^/?#\\]*@)?((?:[\w.-]+|\[[\w.:%]+\])(?::\d+)?(?:/[^?#\s\\]*)?)")


def _address(url: str) -> str:
    """What of a URL says where a server is; "" of what is no such URL."""
    found = _ADDRESS.match(url)
    return found[1] + found[2] if found else ""
