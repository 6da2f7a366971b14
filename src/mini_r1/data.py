"""hub | local file | generated -> leak-free split -> prompt dataset.

What is taken and what is held out is decided for each puzzle by a hash of `split_seed` and its
canonical key, and by nothing else: every rank, every resume and every order of the rows gives the
same parts, and no puzzle can stand in both. Where the data's author made a part to test on, that
part is held out as it is, and whatever of it stands among the training rows is dropped from them.

A row is its columns. One step, `_rows`, makes a puzzle of two of them, `nums` and `target`, which
the recipe's `columns` may look up under other names; the rest go to the rewards as they are. Where
the task is no Countdown game (`TaskConfig.is_countdown`), a row is a question instead.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mini_r1 import InputError, one_line
from mini_r1.countdown.puzzles import Puzzle, generate, uniform_hash
from mini_r1.countdown.solver import Difficulty, check_numbers, difficulty
from mini_r1.prompts import PromptTemplate
from mini_r1.recipe import TaskConfig
from mini_r1.tables import KEY, Parts, Table, load_tables

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Columns that cannot reach the rewards: TRL gives their names a meaning of its own, in a data set
# or among a reward's arguments. The last two are what pandas calls an index.
RESERVED_COLUMNS = {
    *("prompt", "prompts", "completion", "completions", "completion_ids", "image", "images"),
    *("environment", "environments", "trainer_state", "log_extra", "log_metric"),
    *("", "__index_level_0__"),
}

# How numbers and lists of them are written where a file has only text.
WHOLE = re.compile(r"\s*([+-]?[0-9]{1,25})(\.0*)?\s*")
QUOTED = re.compile(r"^(['\"])(.*)\1$")
BETWEEN_ITEMS = re.compile(r"\s*,\s*|\s+")


@dataclass(frozen=True)
class Split:
    """The two parts of a task's puzzles or questions, each in the order of its hashes.

    Of equal ones the first is kept, and a held-out one before one to train on; `duplicates` counts
    those that were dropped. `columns` holds what else is in a puzzle's row, by its key.
    """

    train: "tuple[Item, ...]"
    heldout: "tuple[Item, ...]"
    duplicates: int
    columns: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """SHA-256 of both parts.

        Equal exactly when two runs learn from and are judged on the same puzzles.
        """
        parts = ("\n".join(puzzle.key for puzzle in part) for part in (self.train, self.heldout))
        return sha256("\n\n".join(parts).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Question:
    """A row of a task that is not the Countdown game: what prompt and rewards are made of."""

    columns: Mapping[str, Any]

    @cached_property
    def key(self) -> str:
        """The canonical key: what is in the row."""
        return json.dumps(self.columns, sort_keys=True, ensure_ascii=False, default=str)


Item = Puzzle | Question  # what a prompt asks


class Row(NamedTuple):
    """A question, or a puzzle and the row of a table that it was made of, if it was."""

    item: Item
    table: Table | None = None
    index: int = 0


def load_split(task: TaskConfig) -> Split:
    """Load the task's puzzles and part them.

    Raises:
        InputError: the data cannot be had or read, or hold fewer puzzles than the recipe needs.
    """
    train, heldout = load_rows(task)

    # Of equal puzzles the first is kept, the author's held-out ones before all others.
    distinct: dict[str, Row] = {}
    for row in (*heldout, *train):
        distinct.setdefault(row.item.key, row)
    by_author = {row.item.key for row in heldout}

    # What is taken, and which part it goes to.
    ordered = sorted(distinct, key=lambda key: uniform_hash("take", task.split_seed, key))
    taken = [key for key in ordered if key not in by_author][: task.num_puzzles]
    held_out = by_author or {key for key in taken if is_heldout(key, task)}
    train_keys = [key for key in taken if key not in held_out]
    heldout_keys = [key for key in ordered if key in held_out]
    if not train_keys or not heldout_keys:
        what = "puzzles" if task.is_countdown else "rows"
        raise InputError(
            f"{len(taken)} {what} in {task.dataset_id_or_path} leave {len(train_keys)} to train "
            f"on and {len(heldout_keys)} held out; use more {what} or another test_share",
            key=KEY,
        )
    return Split(
        train=tuple(distinct[key].item for key in train_keys),
        heldout=tuple(distinct[key].item for key in heldout_keys),
        duplicates=len(train) + len(heldout) - len(distinct),
        columns=_further_columns(
            {key: distinct[key] for key in (*train_keys, *heldout_keys)}, task.columns or {}
        ),
    )


def is_heldout(key: str, task: TaskConfig) -> bool:
    """Whether the puzzle with this canonical key belongs to the held-out part.

    Asks the task for split_seed and test_share only.
    """
    return uniform_hash("split", task.split_seed, key) < task.test_share * 2**64


def load_rows(task: TaskConfig) -> tuple[list[Row], list[Row]]:
    """The task's rows in their order: those to train on, and those that their author held out.

    Raises:
        InputError: they cannot be had, or a row is no puzzle; names the file and the row.
    """
    if task.dataset_id_or_path == "generated":
        try:
            puzzles = generate(task.num_puzzles, task.split_seed, task.space)
            return [Row(puzzle) for puzzle in puzzles], []
        except ValueError as error:
            raise InputError(str(error), key="num_puzzles") from None
    return _rows_of(_tables(task), task)


def check_head(task: TaskConfig) -> Mapping[str, Any]:
    """Try the first rows of what is on this machine, and return the columns of the first.

    Raises:
        InputError: as `load_rows`, or a row cannot be asked.
    """
    train, heldout = _rows_of(_tables(task, head=True), task)
    rows = {row.item.key: row for row in (*train, *heldout)}
    further, template = _further_columns(rows, task.columns or {}), task.template
    asked = [row_columns(row.item, further) for row in rows.values()]
    for columns in asked:
        template.question(columns)
    return asked[0]


def puzzles_of(items: Iterable[Item]) -> list[Puzzle]:
    """Those of a part that can only be puzzles.

    Raises:
        InputError: they are the rows of another task.
    """
    items = list(items)
    puzzles = [item for item in items if isinstance(item, Puzzle)]
    if len(puzzles) < len(items):
        raise InputError(
            "this is for number puzzles only, and the recipe asks something else",
            key="prompt_template",
        )
    return puzzles


def row_columns(
    item: Item, further: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """All columns of a puzzle or question, which prompt and rewards are made of.

    Args:
        further: `Split.columns`.
    """
    return {**(further or {}).get(item.key, {}), **item.columns}


def prompt_dataset(
    puzzles: Sequence[Item],
    template: PromptTemplate,
    tokenizer: "PreTrainedTokenizerBase",
    max_prompt_length: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    columns: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple["Dataset", int]:
    """What the trainer draws from.

    Args:
        puzzles: or questions.
        max_prompt_length: in tokens; today's TRL neither truncates nor drops prompts by itself.
        chat_template_kwargs: see `PromptTemplate.renderer`.
        columns: further ones for the rewards, by the puzzle's key: `Split.columns`.

    Returns:
        a dataset with the column prompt (str) and those of the rows: of puzzles target (int) and
        nums (list of int), and the further ones; and how many prompts were too long for it.

    Raises:
        InputError: this model cannot be asked so, or all prompts are too long.
    """
    from datasets import Dataset

    rows = [row_columns(puzzle, columns) for puzzle in puzzles]
    render = template.renderer(tokenizer, chat_template_kwargs, rows[0])
    rows = [{"prompt": render(row), **row} for row in rows]
    lengths = [len(ids) for ids in tokenizer([row["prompt"] for row in rows])["input_ids"]]
    kept = [row for row, length in zip(rows, lengths, strict=True) if length <= max_prompt_length]
    if not kept:
        raise InputError(
            f"all prompts are longer than {max_prompt_length} tokens; "
            f"the shortest has {min(lengths)}",
            key="max_prompt_length",
        )
    return Dataset.from_list(kept), len(rows) - len(kept)


def write_puzzles(puzzles: Sequence[Puzzle], path: Path) -> None:
    """Write puzzles as .jsonl or .parquet with the columns nums and target, whole or not at all.

    Raises:
        InputError: another suffix, or the file cannot be written.
    """
    rows = [{"nums": list(puzzle.nums), "target": puzzle.target} for puzzle in puzzles]
    partial = path.with_name(path.name + ".partial")
    try:
        if path.suffix == ".jsonl":
            partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        elif path.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), partial)
        else:
            raise InputError(
                f"want a name that ends in .jsonl or .parquet, got {path}", where="--output"
            )
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}", where="--output") from None


def audit(puzzles: Iterable[Puzzle], heldout: Sequence[Puzzle] = ()) -> dict[str, Any]:
    """What is in a data set: how many puzzles are solvable, doubled, and how hard they are.

    Args:
        heldout: those that their author held out; how many of the others are among them?
    """
    found: dict[str, Difficulty | None] = {}
    count = 0
    for puzzle in puzzles:
        count += 1
        if puzzle.key not in found:
            found[puzzle.key] = difficulty(puzzle.nums, puzzle.target)
    solvable = [d for d in found.values() if d is not None]
    keys = {puzzle.key for puzzle in heldout}
    leaks = {"heldout": len(heldout), "also_in_heldout": len(found.keys() & keys)}
    return {
        "puzzles": count,
        "distinct": len(found),
        "solvable": len(solvable),
        "plus_minus_only_share": sum(d.plus_minus_only for d in solvable) / max(1, len(solvable)),
        "by_numbers": dict(sorted(Counter(str(d.numbers) for d in solvable).items())),
        "by_operator_kinds": dict(sorted(Counter(str(d.operator_kinds) for d in solvable).items())),
        "unsolvable_examples": [key for key, d in found.items() if d is None][:5],
        **(leaks if heldout else {}),
    }


# ---- Rows -----------------------------------------------------------------------------------


def _tables(task: TaskConfig, head: bool = False) -> Parts:
    parts = task.dataset_split, task.heldout_split
    return load_tables(task.dataset_id_or_path, *parts, task.dataset_revision, head)


def _rows_of(parts: Parts, task: TaskConfig) -> tuple[list[Row], list[Row]]:
    """What the rows of both parts are: puzzles, or the questions of another task."""
    columns = task.columns or {}
    if task.is_countdown:
        train, heldout = (
            [row for table in part for row in _rows(table, columns)] for part in parts
        )
    else:
        tables = [*parts.train, *parts.heldout]
        train, heldout = (list(_questions(part, columns, tables)) for part in parts)
        rows = [row.item.columns for row in (*train, *heldout)]
        for name in rows[0]:
            _check_column(name, [row[name] for row in rows])
    return train, heldout


def _questions(
    part: Sequence[Table], columns: Mapping[str, str], tables: Sequence[Table]
) -> Iterator[Row]:
    """A question of each row, all with the same columns: those of the recipe, then the others."""
    hidden = {*RESERVED_COLUMNS, *columns.values()}
    if reserved := sorted(RESERVED_COLUMNS.intersection(columns)):
        raise InputError(f"'{reserved[0]}' is a name of TRL's; choose another", key="columns")
    names = [*columns, *(name for table in tables for name in table.columns if name not in hidden)]
    names = list(dict.fromkeys(names))
    if not names:
        raise InputError(
            f"no column of {tables[0].source} can be used: {', '.join(tables[0].columns)}; TRL "
            "takes these names for itself; write columns: {question: NAME}",
            key=KEY,
        )
    for table in part:
        values = {
            name: table.column(name, columns.get(name))
            for name in names
            if name in columns or name in table.columns
        }
        for index in range(len(table)):
            row = {name: values[name][index] if name in values else None for name in names}
            yield Row(Question(row))


def _rows(table: Table, columns: Mapping[str, str]) -> Iterator[Row]:
    """The Countdown step: a puzzle of each row.

    Raises:
        InputError: a row that is no puzzle is not skipped; its author should know.
    """
    all_nums, targets = (table.column(name, columns.get(name)) for name in ("nums", "target"))
    for index, (nums, target) in enumerate(zip(all_nums, targets, strict=True)):
        try:
            puzzle = Puzzle(_numbers(nums), _target(target))
        except ValueError as error:
            raise InputError(f"{table.place(index)}: {error}", key=KEY) from None
        yield Row(puzzle, table, index)


def _numbers(value: Any) -> tuple[int, ...]:
    try:
        items = _items(value) if isinstance(value, str) else value
        while isinstance(items, list) and len(items) == 1 and isinstance(items[0], list):
            items = items[0]
        if _is_missing(items):
            raise ValueError("missing")
        if not isinstance(items, list):
            raise ValueError(f"want a list such as [19, 36, 55, 7], got {_shown(value)}")
        numbers = tuple(map(_whole, items))
        check_numbers(numbers)
    except ValueError as error:
        raise ValueError(f"nums: {error}") from None
    return numbers


def _target(value: Any) -> int:
    try:
        return _whole(value)
    except ValueError as error:
        raise ValueError(f"target: {error}") from None


def _items(text: str) -> list[str]:
    """The items of a list written as text: `[44.0, 19.0]`, `(44, 19)`, `[44 19]`, `44,19`."""
    inner = text.strip()
    while inner[:1] + inner[-1:] in ("[]", "()"):
        inner = inner[1:-1].strip()
    return [QUOTED.sub(r"\2", item) for item in BETWEEN_ITEMS.split(inner)] if inner else []


def _whole(value: Any) -> int:
    """An integer, also one that is written as `65.0` or as text.

    Raises:
        ValueError: anything else.
    """
    if type(value) is int and abs(value) < 2**63:
        return value
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if _is_missing(value):
        raise ValueError("missing")
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        return int(value)
    match = WHOLE.fullmatch(str(value))
    if match is None:
        raise ValueError(f"want a whole number, got {_shown(value)}")
    if abs(int(match[1])) >= 2**63:
        raise ValueError(f"want a number of at most 63 bits, got {_shown(value)}")
    return int(match[1])


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or value != value  # NaN


def _shown(value: Any) -> str:
    return one_line(repr(value), 60)


def _further_columns(
    rows: Mapping[str, Row], columns: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """What else is in the rows, by key: every row with the same columns.

    Raises:
        InputError: a column mixes what no data set can hold together, such as text and numbers.
    """
    by_table = defaultdict(list)
    for key, row in rows.items():
        if row.table is not None:
            by_table[row.table].append((key, row.index))
    if not by_table:
        return {}
    # Those of the recipe under their names here, the others under their own; the same order in
    # every process.
    hidden = {*RESERVED_COLUMNS, "nums", "target", *columns.values()}
    names = dict.fromkeys(name for name in columns if name not in ("nums", "target"))
    names |= dict.fromkeys(
        name for table in by_table for name in table.columns if name not in hidden
    )
    found = {key: dict(names) for key in rows} if names else {}
    for name in names:
        for table, places in by_table.items():
            if name in columns or name in table.columns:
                values = table.column(name, columns.get(name))
                for key, index in places:
                    found[key][name] = values[index]
        _check_column(name, [each[name] for each in found.values()])
    return found


def _check_column(name: str, values: Sequence[Any]) -> None:
    import pyarrow

    try:
        pyarrow.array([name])
        pyarrow.array(values)
    except UnicodeEncodeError as error:  # as JSON may spell it, "\\ud800"
        raise InputError(
            f"the column '{name}' holds text that is none: {one_line(error, 120)}", key=KEY
        ) from None
    except (pyarrow.ArrowException, OverflowError) as error:
        raise InputError(
            f"the column '{name}' cannot go to the rewards, its values differ in kind: "
            f"{one_line(error, 120)}",
            key=KEY,
        ) from None
