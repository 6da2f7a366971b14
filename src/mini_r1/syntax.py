"""How a recipe is written: YAML without its traps, and `--key value` on the command line.

What is read are YAML's nodes, each with its place: what they say depends on the type of their key,
and keys.py knows that. Which traps of YAML are refused is in files.py.
"""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mini_r1 import InputError
from mini_r1.files import compose, read_text, reason, yaml_problem
from mini_r1.keys import Key

HUB_TOKEN = ("--hub_token", "--hub-token")


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What a YAML file says to each key and, for every key, where it stands (`FILE line 7`)."""
    try:
        node = compose(read_text(path))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read: {reason(error)}", where=path) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path} line {mark.line + 1}" if mark else path
        raise InputError(yaml_problem(error), where=place) from None
    if not isinstance(node, yaml.MappingNode):
        found = "an empty file" if node is None else "not a recipe"
        raise InputError(f"{found}; want lines of the form 'key: value'", where=path)
    given = {key.value: value for key, value in node.value}
    return given, {key.value: f"{path} line {key.start_mark.line + 1}" for key, _ in node.value}


def parse_overrides(arguments: Sequence[str]) -> dict[str, list[str]]:
    """`--key value`, `--key=value`, `--key a b` (a list) and `--flag` (true), word by word."""
    words: dict[str, list[str]] = {}
    key = None
    for argument in arguments:
        if argument.startswith("--"):
            key, equals, value = argument.removeprefix("--").partition("=")
            key = key.replace("-", "_")
            words[key] = [value] if equals else []
        elif key is None:
            raise InputError(f"{argument!r}: want --key value")
        else:
            words[key].append(argument)
    return words


def node_of(words: Sequence[str], key: Key) -> yaml.Node:
    """What the command line says to a key. Words are YAML, but to a key that is a text just that.

    Raises:
        TypeError, ValueError: there is no value, or it is not valid YAML.
    """
    is_text = "str" in key.annotation and not re.search("list|tuple|dict", key.annotation)
    nodes = []
    for word in words:
        try:
            node = compose(word) or yaml.ScalarNode("tag:yaml.org,2002:null", "")
        except yaml.YAMLError as error:
            if not is_text:
                raise ValueError(yaml_problem(error)) from None
            node = None
        whole = isinstance(node, yaml.ScalarNode) and (node.style or node.value == word)
        if node is None or (is_text and not whole):
            node = yaml.ScalarNode("tag:yaml.org,2002:str", word)
        nodes.append(node)
    if not nodes and "bool" not in key.annotation:
        raise TypeError("no value")
    if not nodes:
        return yaml.ScalarNode("tag:yaml.org,2002:bool", "true")
    return nodes[0] if len(nodes) == 1 else yaml.SequenceNode("tag:yaml.org,2002:seq", nodes)


def take_hub_token(arguments: Sequence[str]) -> list[str]:
    """Arguments without `--hub_token VALUE`, which goes on as HF_TOKEN, where the libraries look.

    A run keeps its recipe and its command, shows them and may upload them. So the token is in
    neither, nor is it in the command lines of the processes that this one starts.

    Raises:
        InputError: there is no value.
    """
    kept, token = _without_token(arguments)
    if token is None:
        return kept
    if not token:
        raise InputError("no value", where=HUB_TOKEN[0])
    os.environ["HF_TOKEN"] = token
    for words in (sys.argv, sys.orig_argv):  # which trackers keep, too
        words[:] = presentable(words)
    return kept


def presentable(words: Sequence[str]) -> list[str]:
    """A command line as it may be kept and shown: without the token of the hub."""
    kept, token = _without_token(words)
    return kept if token is None else [*kept, HUB_TOKEN[0], "***"]


def _without_token(words: Sequence[str]) -> tuple[list[str], str | None]:
    """A command line without --hub_token, and what that said last; None if it is not there."""
    left, kept, token = [*words], [], None
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        if name not in HUB_TOKEN:
            kept.append(word)
        elif equals or not left or left[0].startswith("--"):
            token = value
        else:
            token = left.pop(0)
    return kept, token
