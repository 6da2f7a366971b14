"""Mini-R1: see reinforcement learning teach a language model to reason, on the Countdown game."""

import re
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


# What acts where it is shown, turns the order of letters around, hides, or is no character at all:
# controls but tab and newline, line separators, bidi controls, what has no width (but the joiners,
# which scripts and emoji need), halves of surrogate pairs, tags.
_HIDDEN = (
    r"\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    r"\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f"
)
_CODE = r"U\+([0-9A-F]{4}|E00[0-7][0-9A-F])>"
_UNSAFE = re.compile(rf"[{_HIDDEN}]|<(?={_CODE})")
_ESCAPED = re.compile(f"<{_CODE}")


def visible(text: str) -> str:
    """The text as it may leave the program, wherever it came from: `<U+001B>` stands for ESC.

    All else is left as it is, so that it can be `restored`: what looks like such a code is escaped,
    too.
    """
    return _UNSAFE.sub(lambda match: f"<U+{ord(match[0]):04X}>", text)


def restored(text: str) -> str:
    """The text that was made `visible`."""
    return _ESCAPED.sub(lambda match: chr(int(match[1], 16)), text)


def one_line(error: object, limit: int | None = None) -> str:
    """What a library says, in one line of at most `limit` characters, all of them `visible`."""
    return visible(" ".join(str(error).split()))[:limit]
