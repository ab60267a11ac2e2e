"""python -m bench {step,keep-rate,...} [flags]"""

from __future__ import annotations

import importlib
import sys

from lite_mentor.errors import UserError

COMMANDS = (
    "agreement", "all", "arms", "attacks", "caps", "facts", "fuzz", "keep-rate", "kernels", "launches", "micro",
    "mutants", "random-student", "rollout", "soak", "step",
)  # fmt: skip
"""Each is the `main` of the module of that name, which is imported alone: it may need what another does not."""


def main(argv: list[str]) -> int:
    """Run one bench; 2 and a sentence when it was asked for something that does not exist."""
    if not argv or argv[0] not in COMMANDS:
        print(f"usage: python -m bench {{{','.join(COMMANDS)}}} [flags]", file=sys.stderr)
        return 2
    try:
        importlib.import_module(f"bench.{argv[0].replace('-', '_')}").main(argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
