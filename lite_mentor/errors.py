"""The one exception for what a user can put right: `train.py` prints its sentence and exits, without a traceback."""


class UserError(Exception):
    """Says in one sentence what is wrong, where, and what to change."""
