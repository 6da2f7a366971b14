"""Mini-R1: see reinforcement learning teach a language model to reason, on the Countdown number game."""

__version__ = "0.1.0"


class InputError(ValueError):
    """The user's input is wrong. Its message is one line that says what, where and what to do; the commands exit with 2."""
