"""The format and equation rewards, the registry, and plug-ins by dotted path.

Rewards have TRL's signature: keyword columns with one entry per completion in, one float per
completion out. A malformed completion scores 0. A defect (a missing column, a target that is no
number) raises; it is never turned into reward 0.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

from mini_r1 import InputError
from mini_r1.completion import parse_completion
from mini_r1.countdown.expression import is_solution


class RewardFunction(Protocol):
    """TRL's signature: columns in, one float per completion out, or a coroutine of them."""

    __name__: str

    def __call__(self, *args: Any, **columns: Any) -> Any: ...


def format_reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    """1.0 for a well-formed completion, else 0.0.

    That is one think block, whitespace, one non-empty answer block and after it nothing but
    whitespace.

    Args:
        completions: texts that follow a prefilled `<think>`, or TRL's conversational form of them.
    """
    texts = map(completion_text, completions)
    return [float(parse_completion(text).well_formed) for text in texts]


def equation_reward(
    completions: Sequence[Any], target: Sequence[Any], nums: Sequence[Sequence[Any]], **columns: Any
) -> list[float]:
    """1.0 if the answer makes the target of the given numbers, else 0.0.

    It is an equation that uses each of them exactly once and is worth exactly the target. The rules
    of the answer are those of `completion.parse_completion`, those of the equation
    `countdown.expression`'s.

    Args:
        completions: as for `format_reward`.
        target: one number per completion (an int, or text such as "65" or "27.4").
        nums: the given integers per completion.

    Raises:
        ValueError: the columns differ in length, or hold something that is not a number.
    """
    rewards = []
    for completion, value, numbers in zip(completions, target, nums, strict=True):
        value, numbers = Fraction(str(value)), [int(n) for n in numbers]
        answer = parse_completion(completion_text(completion)).answer
        rewards.append(float(answer is not None and is_solution(answer, numbers, value)))
    return rewards


REWARDS: dict[str, RewardFunction] = {"format": format_reward, "equation": equation_reward}


def get_reward_functions(names: Sequence[str]) -> list[RewardFunction]:
    """The reward functions that a recipe names.

    A name is a registered one or a dotted path such as `my_package.my_module.my_reward`, looked up
    from the current folder first, then among the installed packages.

    Raises:
        InputError: nothing of that name, or it is not callable.
    """
    return [_get_reward_function(name) for name in names]


def _get_reward_function(name: str) -> RewardFunction:
    if name in REWARDS:
        return REWARDS[name]
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        near = difflib.get_close_matches(name, REWARDS, n=1)
        choices = f"choose from {', '.join(REWARDS)}, or give a dotted path"
        hint = f"did you mean '{near[0]}'?" if near else choices
        raise InputError(f"no reward '{name}'; {hint}", key="reward_funcs")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise InputError(f"cannot import '{name}': {error}", key="reward_funcs") from error
    except AttributeError as error:
        problem = f"module '{module_name}' has no '{attribute}'"
        raise InputError(problem, key="reward_funcs") from error
    if not callable(function):
        raise InputError(f"'{name}' is not callable", key="reward_funcs")
    return function


def completion_text(completion: Any) -> str:
    """The text of a completion, which TRL hands over as a string or as a conversation."""
    return completion if isinstance(completion, str) else completion[-1]["content"]
