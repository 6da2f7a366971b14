"""Mini-R1: see reinforcement learning teach a language model to reason, on the Countdown game."""

import signal
from pathlib import Path

__version__ = "0.1.0"

FAILED, BAD_INPUT, SIGNALLED = 1, 2, 128  # exit codes; the last as in a shell, plus the signal


class InputError(ValueError):
    """The user's input is wrong; the commands print it as one line and exit with 2.

    Args:
        problem: what is wrong and what to do, in one line.
        key: the key of the recipe that it is about.
        where: the line of the file, or the option, that set the key.
    """

    def __init__(self, problem: str, *, key: str | None = None, where: str | Path | None = None):
        self.problem, self.key, self.where = problem, key, where
        parts = (where, None if where == f"--{key}" else key, problem)
        super().__init__(": ".join(str(part) for part in parts if part is not None))


class Interrupted(KeyboardInterrupt):
    """A signal ended a command; it prints this and how to go on, and exits with 128 and the signal.

    Args:
        said: how far it came.
        number: of the signal.
    """

    def __init__(self, said: str, number: int = signal.SIGINT):
        super().__init__(said)
        self.number = number


class RunFailed(RuntimeError):
    """A run cannot go on; the commands print this without a traceback and exit with 1."""


def one_line(error: object, limit: int | None = None) -> str:
    """What a library says, in one line of at most `limit` characters."""
    return " ".join(str(error).split())[:limit]
