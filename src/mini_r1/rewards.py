"""The format and equation rewards, the registry, rewards of your own, and what a reward may return.

Rewards have TRL's signature: keyword columns with one entry per completion in, one number per
completion out. A malformed completion scores 0. A defect (a missing column, a target that is no
number) raises; it is never turned into reward 0.
"""

import copy
import difflib
import functools
import importlib
import importlib.util
import inspect
import re
import reprlib
import sys
import sysconfig
import traceback
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from hashlib import sha256
from itertools import count
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

from mini_r1 import InputError, RunFailed, one_line
from mini_r1.completion import parse_completion
from mini_r1.countdown.expression import is_solution

# What TRL calls rewards with, by keyword, beside the columns of the data.
TRL_COLUMNS = ("prompts", "completions", "completion_ids")
TRL_COLUMNS += ("trainer_state", "log_extra", "log_metric")
# TRL squares rewards in 32 bits: the spread of larger ones is infinite, and they teach nothing.
LARGEST_REWARD = 1e18


# ---- The rewards ----------------------------------------------------------------------------


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


REWARDS: dict[str, FunctionType] = {"format": format_reward, "equation": equation_reward}


def completion_text(completion: Any) -> str:
    """The text of a completion, which TRL hands over as a string or as a conversation."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


# ---- A reward of a recipe -------------------------------------------------------------------


@dataclass(frozen=True)
class RewardFunction:
    """A reward as a recipe names it.

    Attributes:
        name: of its metric, `rewards/NAME/mean`, and in the samples; its own within the recipe.
        path: what the recipe says.
        address: the folders, module and attributes that lead to it, however the path is written.
        function: columns in, one number per completion out, or a coroutine of them.
    """

    name: str
    path: str
    address: tuple[str, ...]
    function: Callable[..., Any]

    @property
    def is_async(self) -> bool:
        """Whether it gives a coroutine; of a partial and of an object, what they call."""
        function = self.function
        while isinstance(function, functools.partial):
            function = function.func
        return any(map(inspect.iscoroutinefunction, (function, function.__call__)))

    def check_columns(self, columns: Iterable[str]) -> None:
        """Refuse a reward that wants more than the data have.

        Args:
            columns: of the data.

        Raises:
            InputError: names what it wants, and what there is.
        """
        there = [name for name in columns if name not in TRL_COLUMNS]
        if (signature := _signature(self.function)) is None:
            return
        wanted = [
            parameter.name
            for parameter in signature.parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            and parameter.name not in (*TRL_COLUMNS, *there)
        ]
        if wanted:
            raise _error(
                f"'{self.path}' wants '{wanted[0]}', and the data have {', '.join(there)}; write "
                f"columns: {{{wanted[0]}: its name there}}, or give it a default"
            )
        try:
            signature.bind(**dict.fromkeys((*TRL_COLUMNS, *there)))
        except TypeError as error:
            raise _uncallable(self.path, error, there) from None

    def call(self, **columns: Any) -> Any:
        """What the function returns, or the coroutine that it gives.

        It gets copies: what it changes is neither recorded, nor seen by other rewards, nor trained
        on.
        """
        return self.function(**{name: _copied(value) for name, value in columns.items()})

    @contextmanager
    def blamed(self, step: int) -> Generator[None]:
        """An exception of the function names it, and is a defect, whatever it is."""
        where = f"in the reward {self.path}, step {step}"
        try:
            yield
        except (SystemExit, InputError, RunFailed) as error:  # would end the run without a trace
            raise RuntimeError(f"{error!r} {where}") from error
        except Exception as error:
            error.add_note(where)
            raise

    def scores(self, returned: Any, completions: Sequence[Any], step: int) -> list[float | None]:
        """What the function returned in a step, as plain numbers; None where it does not apply.

        Raises:
            RunFailed: it is not one number or None for each completion.
        """
        listed = isinstance(returned, Iterable) and getattr(returned, "ndim", 1) > 0
        if not listed or isinstance(returned, str | bytes | Mapping | Set):
            raise self._failed(step, f"{_short(returned)}; want a list of numbers")
        with self.blamed(step):  # a generator works only now
            entries = list(returned)
        if len(entries) != len(completions):
            raise self._failed(
                step, f"{len(entries)} rewards for {len(completions)} completions; want one each"
            )
        scores = list(map(_number, entries))
        for index, score in enumerate(scores):
            if score is not None and not abs(score) <= LARGEST_REWARD:
                text = _short(completion_text(completions[index]))
                raise self._failed(
                    step,
                    f"{_short(entries[index])} for completion {index + 1} of {len(scores)}, "
                    f"{text}; want a finite number (at most {LARGEST_REWARD:g}), or None where it "
                    "does not apply",
                )
        return scores

    def _failed(self, step: int, returned: str) -> RunFailed:
        return RunFailed(f"the reward {self.path} returned, in step {step}, {returned}")


def _number(entry: Any) -> float | None:
    """An entry of numpy or torch, too, as a plain number; NaN if it is none."""
    if entry is None:
        return None
    if isinstance(entry, str | bytes) or getattr(entry, "ndim", 0):
        return float("nan")
    try:
        return float(entry.item() if hasattr(entry, "item") else entry)
    except (TypeError, ValueError, OverflowError):
        return float("nan")


# What cannot be changed is its own copy.
_FIXED = frozenset((str, int, float, bool, bytes, type(None), FunctionType, MethodType))


def _copied(value: Any) -> Any:
    """A copy, all that it holds included; functions stay what they are."""
    kind = type(value)
    if kind in _FIXED:
        return value
    if kind is list:
        return value.copy() if _FIXED.issuperset(map(type, value)) else [*map(_copied, value)]
    if kind is dict:
        return dict(zip(value, map(_copied, value.values()), strict=True))
    return copy.deepcopy(value)


def _short(value: Any) -> str:
    shown = reprlib.Repr()
    shown.maxstring = shown.maxother = 80
    return one_line(shown.repr(value))


# ---- Finding it -----------------------------------------------------------------------------


def get_reward_functions(paths: Sequence[str], key: str = "reward_funcs") -> list[RewardFunction]:
    """The reward functions that a key of a recipe names: whatever TRL can call.

    A path is a registered name, a dotted path such as `my_package.my_module.my_reward`, or a file
    such as `my_module.py:my_reward`, whose only function need not be named. Modules are looked up
    among the installed packages, then in the current folder.

    Raises:
        InputError: nothing there, nothing that can be called, or the same reward twice.
    """
    try:
        found = [_find(path) for path in paths]
    except InputError as error:
        raise InputError(error.problem, key=key) from None
    for index, one in enumerate(found):
        for other in found[:index]:
            if one.function is other.function or one.address == other.address:
                raise _error(
                    f"'{other.path}' and '{one.path}' are the same reward; name it once, and "
                    "weigh it with reward_weights"
                )

    # Equal names are told apart by as much of the addresses as it takes. Those of the registered
    # rewards stay theirs: metrics and samples go by them.
    own = [index for index, one in enumerate(found) if one.function not in REWARDS.values()]
    names = [found[index].name for index in own]
    names += [function.__name__ for function in REWARDS.values()]
    equal = {i: found[i].address for i in own if names.count(found[i].name) > 1}
    for index, address in equal.items():
        for size in count(2):
            if sum(other[-size:] == address[-size:] for other in equal.values()) == 1:
                found[index] = replace(found[index], name=".".join(address[-size:]))
                break
    return found


def _find(path: str) -> RewardFunction:
    module, attribute = _module_of(path)
    if not attribute:
        if len(functions := _functions(module)) != 1:
            raise _error(f"'{path}' has {_listed(functions)}; write {path.rstrip(':')}:NAME")
        (attribute,) = functions
    function: Any = module
    for part in attribute.split("."):
        with _told_in_one_line(path):
            known = part.isidentifier() and hasattr(function, part)
        if not known:
            near = difflib.get_close_matches(part, _functions(module), n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"it has {_listed(_functions(module))}"
            raise _error(f"{_name_of(module)} has no '{part}'; {_file_hint(path) or hint}")
        function = getattr(function, part)
    _check_call(path, function)
    name = getattr(function, "__name__", None)  # a lambda's is <lambda>
    name = name if isinstance(name, str) and name.isidentifier() else attribute.rpartition(".")[2]
    return RewardFunction(name, path, (*_address(module), *attribute.split(".")), function)


def _module_of(path: str) -> tuple[ModuleType, str]:
    """The module that a path leads to, imported, and the rest of the path."""
    if path in REWARDS:
        return sys.modules[__name__], REWARDS[path].__name__
    _look_last_in(Path.cwd())
    if match := re.fullmatch(r"(.+\.py)(?::(.*))?", path):
        return _import_file(path, Path(match[1])), match[2] or ""
    parts = path.replace(":", ".").split(".")
    if len(parts) == 1 or not all(parts) or "/" in path:
        near = difflib.get_close_matches(path, REWARDS, n=1)
        choices = f"choose from {', '.join(REWARDS)}, or write my_module.my_reward or "
        hint = f"did you mean '{near[0]}'?" if near else f"{choices}my_module.py:my_reward"
        raise _error(f"no reward '{path}'; {_file_hint(path) or hint}")
    _refuse_shadowed(path, parts)
    for size in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:size])
        with _told_in_one_line(path):
            try:
                return importlib.import_module(name), ".".join(parts[size:])
            except ModuleNotFoundError as error:
                if not f"{name}.".startswith(f"{error.name}."):
                    raise  # the module is there; what it imports is not
    raise _error(f"cannot import '{path}': no '{parts[0]}' is installed, or in {Path.cwd()}")


def _import_file(path: str, file: Path) -> ModuleType:
    """A module from its file, under a name that no other module can have."""
    try:
        file = file.expanduser().resolve()
    except (RuntimeError, ValueError) as error:  # the home folder of nobody, or no path at all
        raise _error(f"'{path}': {one_line(error)}") from None
    if not file.is_file():
        raise _error(f"no file {file}")
    name = f"{file.stem}_{sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    _look_last_in(file.parent)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None  # it ends in .py
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        with _told_in_one_line(path):
            spec.loader.exec_module(module)
    except InputError:
        del sys.modules[name]
        raise
    return module


def _look_last_in(folder: Path) -> None:
    """Last: a datasets.py beside a reward must not stand in for the library of that name."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _refuse_shadowed(path: str, parts: Sequence[str]) -> None:
    """Whether a module of the user's has the name of another, which would be taken for it."""
    here = next(filter(Path.is_file, (Path(f"{parts[0]}.py"), Path(parts[0], "__init__.py"))), None)
    if here is None:
        return
    with _told_in_one_line(path):
        spec = importlib.util.find_spec(parts[0])
    other = spec.origin if spec is not None else None
    if other and not (Path(other).exists() and here.samefile(other)):
        instead = f", or write {here}:{'.'.join(parts[1:])}" if here.parent == Path() else ""
        raise _error(
            f"'{path}': {here} has the name of an installed module ({other}), which comes first; "
            f"rename it{instead}"
        )


def _check_call(path: str, function: Any) -> None:
    if inspect.isclass(function):
        raise _error(f"'{path}' is a class; write my_reward = {function.__name__}(), and name that")
    if not callable(function):
        raise _error(f"'{path}' is not callable: {_short(function)}")
    try:
        signature = _signature(function)
        if signature is not None:
            if "self" in signature.parameters:
                raise _error(f"'{path}' is a method; make an object, and name the method of that")
            signature.bind_partial(**dict.fromkeys(TRL_COLUMNS))  # the data's are not known yet
    except TypeError as error:
        raise _uncallable(path, error, ()) from None


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function, follow_wrapped=False)
    except (TypeError, ValueError):
        return None  # not every callable has one


def _uncallable(path: str, error: TypeError, columns: Iterable[str]) -> InputError:
    given = ", ".join((*TRL_COLUMNS, *(columns or ["the columns of the data"])))
    return _error(
        f"'{path}' cannot be called: {error}; it gets {given}, all by keyword: name what it needs, "
        "and **columns for the rest"
    )


@contextmanager
def _told_in_one_line(path: str) -> Generator[None]:
    """Whatever a module raises when it is imported, with the line of the file that did it."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, SyntaxError) and error.filename:
            said, places = error.msg, [(error.filename, error.lineno)]
        else:
            frames = traceback.walk_tb(error.__traceback__)
            said, places = str(error), [(frame.f_code.co_filename, n) for frame, n in frames]
        where = [f"{_shown(Path(file))} line {n}: " for file, n in places if _is_users(file)]
        what = one_line(f"{type(error).__name__}: {said}", 200).removesuffix(":")
        raise _error(f"cannot import '{path}': {where[-1] if where else ''}{what}") from None


def _is_users(file: str) -> bool:
    """Whether a file is neither Python's nor of an installed package nor ours."""
    libraries = (
        sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")
    )
    return not file.startswith(("<", str(Path(__file__).parent), *libraries))


def _functions(module: ModuleType) -> list[str]:
    """The public functions that a module defines."""
    return [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    ]


def _listed(functions: Sequence[str]) -> str:
    return ", ".join(functions) or "no function"


def _address(module: ModuleType) -> tuple[str, ...]:
    """The folders and the name of a module's file."""
    file = getattr(module, "__file__", None)
    if file is None:
        return tuple(module.__name__.split("."))
    parts = Path(file).resolve().with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def _name_of(module: ModuleType) -> str:
    file = getattr(module, "__file__", None)
    return _shown(Path(file)) if file else f"module '{module.__name__}'"


def _shown(file: Path) -> str:
    here = Path.cwd()
    return str(file.relative_to(here) if file.is_relative_to(here) else file)


def _file_hint(path: str) -> str | None:
    """What to write where a module was named without a function."""
    file = Path(path.replace(".", "/") + ".py")
    return f"write {file}:NAME" if file.is_file() else None


def _error(problem: str) -> InputError:
    return InputError(problem, key="reward_funcs")
