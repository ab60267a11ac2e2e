"""python -m bench {step,keep-rate,...} [flags]"""

from __future__ import annotations

import sys

from bench import agreement, arms, attacks, fuzz, keep_rate, kernels, launches, rollout, soak, step
from bench import all as everything
from lite_mentor.errors import UserError

COMMANDS = {
    "agreement": agreement.main,
    "all": everything.main,
    "arms": arms.main,
    "attacks": attacks.main,
    "fuzz": fuzz.main,
    "kernels": kernels.main,
    "launches": launches.main,
    "rollout": rollout.main,
    "soak": soak.main,
    "step": step.main,
    "keep-rate": keep_rate.main,
}


def main(argv: list[str]) -> int:
    """Run one bench; 2 and a sentence when it was asked for something that does not exist."""
    if not argv or argv[0] not in COMMANDS:
        print(f"usage: python -m bench {{{','.join(COMMANDS)}}} [flags]", file=sys.stderr)
        return 2
    try:
        COMMANDS[argv[0]](argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
