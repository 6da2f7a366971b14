"""What there is to choose from: the shipped recipes, and the keys of any recipe.

mini-r1 recipes                    # the table of recipes
mini-r1 recipes --keys             # every key: type, default, range or choices, meaning
mini-r1 recipes --keys lora        # those with lora in their name
"""

import difflib
import json
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mini_r1 import InputError
from mini_r1.keys import RANGES, shortened
from mini_r1.recipe import all_keys, default_of

CARD = ("runs on", "takes", "expect")


def recipe_cards(folder: Path) -> list[list[str]]:
    """Name, hardware, time and expected result of each recipe in a folder.

    They stand in the lines `# runs on: ...` at the head of each file.

    Raises:
        InputError: there are none.
    """
    cards = []
    for path in sorted(folder.glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        comments = [line.removeprefix("# ").partition(": ") for line in lines if line[:1] == "#"]
        card = {key: value for key, _, value in comments}
        cards.append([path.stem, *(card.get(key, "not known") for key in CARD)])
    if not cards:
        raise InputError(
            "no recipes here; run from a clone of the repository, installed with 'make setup'",
            where=folder,
        )
    # The ones that anybody can run come first.
    return sorted(cards, key=lambda card: ("CPU" not in card[1], card[1], len(card[0])))


def recipe_table(folder: Path) -> str:
    """The recipes of a folder as a Markdown table, each with a link.

    Raises:
        InputError: there are none.
    """
    cards = [[f"[{name}](recipes/{name}.yaml)", *rest] for name, *rest in recipe_cards(folder)]
    return markdown_table(["recipe", *CARD], cards)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows as Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    escaped = ([cell.replace("|", r"\|") for cell in row] for row in lines)
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)


def key_rows(pattern: str = "") -> dict[str, list[tuple[str, str]]]:
    """The keys whose name holds a text, by owner: name; type, default and meaning.

    Raises:
        InputError: no key does.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    known = all_keys()
    for owner, keys in known.items():
        for name, key in keys.items():
            if not fnmatch(name, f"*{pattern.replace('-', '_')}*"):
                continue
            default = key.default if owner == "task" else default_of(name)
            sentence = re.split(r"(?<=[^.]{2}\.)\s", key.help.strip(), maxsplit=1)[0]
            meaning = [sentence.rstrip(".")]
            meaning += [str(RANGES[name])] if name in RANGES else []
            meaning += [f"one of {', '.join(key.choices)}"] if key.choices else []
            text = "; ".join(meaning).replace("%%", "%")
            text = f"{key.kind} = {_as_yaml(default)}: {text}"
            found.setdefault(owner, []).append((name, text))
    if not found:
        every = [name for keys in known.values() for name in keys]
        near = difflib.get_close_matches(pattern, every, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "leave it out to see all"
        raise InputError(f"no key with '{shortened(pattern)}' in it; {hint}", where="--keys")
    return found


def _as_yaml(value: Any) -> str:
    """A default as a recipe would say it."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(str, value))}]"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value) or "''"
