"""Small files that a user hands over: read within bounds, and YAML without its traps.

What a recipe, a sweep, a prompt template or a published curve holds may come from anywhere. Never a
traceback, and never a long wait, whatever it is.
"""

from pathlib import Path
from typing import Any

import yaml

from mini_r1 import one_line

MAX_BYTES = 128 * 1024  # of a file of YAML; all keys of recipes with their help have a quarter
MAX_DEPTH = 20  # of lists and mappings within each other
MAX_NODES = 5000  # lists, mappings, keys and values; ten times as many as there are keys


def read_text(path: Path, limit: int = MAX_BYTES) -> str:
    """The text of a file of at most `limit` bytes.

    Raises:
        OSError, ValueError: it cannot be had, is no ordinary file, is larger, or is not UTF-8.
    """
    refuse_special(path)
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"more than {limit // 1024} KiB")
    return content.decode("utf-8")


def refuse_special(path: Path) -> None:
    """Devices and pipes may never end, and pipes are gone before the next process reads them.

    Raises:
        ValueError: it is one, or a folder.
    """
    if path.exists() and not path.is_file():
        raise ValueError("a folder" if path.is_dir() else "no ordinary file; write it into one")


def reason(error: Exception) -> str:
    """Why a file cannot be read, without its name."""
    return one_line(getattr(error, "strerror", None) or error, 200)


class NotRead(yaml.MarkedYAMLError):
    """YAML, but none that is read here."""


class Loader(yaml.SafeLoader):
    """Reads texts, lists and mappings, without anchors, aliases, merge keys, tags or doubles."""

    _depth = _nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event, problem = self.peek_event(), None
        self._nodes += 1
        if event.anchor is not None or getattr(event, "tag", None) is not None:
            problem = "anchors, aliases and tags (&, *, !) are not read; write the value itself"
        elif self._depth == MAX_DEPTH:
            problem = "nested too deeply"
        elif self._nodes > MAX_NODES:
            problem = f"more than {MAX_NODES} keys and values"
        if problem:
            raise NotRead(problem=problem, problem_mark=event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for key, _ in node.value:
            line, problem = key.start_mark.line + 1, None
            if not isinstance(key, yaml.ScalarNode):
                kind = "list" if isinstance(key, yaml.SequenceNode) else "mapping"
                problem = f"a key is a word, not a {kind}"
            elif key.tag == "tag:yaml.org,2002:merge":
                problem = "merge keys (<<) are not read; write the keys themselves"
            elif key.value in first:
                problem = f"{one_line(key.value, 40)} is set twice; first in {first[key.value]}"
            if problem:
                raise NotRead(problem=problem, problem_mark=key.start_mark)
            first[key.value] = line
        return node


def compose(text: str) -> yaml.Node | None:
    """The nodes of a text in YAML, each with its place.

    Raises:
        yaml.YAMLError: it is none that is read here; see `yaml_problem`.
    """
    loader = Loader(text)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


def load_yaml(text: str) -> Any:
    """What a text in YAML says, in plain values.

    Raises:
        ValueError: it is none that is read here; says in which line.
    """
    loader = Loader(text)
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(place + yaml_problem(error)) from None
    finally:
        loader.dispose()


def yaml_problem(error: yaml.YAMLError) -> str:
    """What is wrong with a text in YAML, in one line."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return f"not valid YAML: {one_line(error, 200)}"
    if isinstance(error, NotRead):
        return str(error.problem)
    problem = ", ".join(filter(None, (error.context, error.problem)))
    hint = "; write spaces" if "'\\t'" in problem else ""
    return f"not valid YAML: {one_line(problem, 200)}{hint}"
