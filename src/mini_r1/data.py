"""hub | local file | generated -> leak-free split -> prompt dataset.

What is taken and what is held out is decided for each puzzle by a hash of `split_seed` and its
canonical key, and by nothing else: every rank, every resume and every order of the rows gives the
same parts, and no puzzle can stand in both.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mini_r1 import InputError, one_line
from mini_r1.countdown.puzzles import Puzzle, generate, uniform_hash
from mini_r1.countdown.solver import check_numbers, difficulty
from mini_r1.model import is_local
from mini_r1.prompts import PromptTemplate
from mini_r1.recipe import TaskConfig

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

FILE_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")


@dataclass(frozen=True)
class Split:
    """The two parts of a task's puzzles, each in the order of its hashes.

    Of equal puzzles the first is kept; `duplicates` counts those that were dropped.
    """

    train: tuple[Puzzle, ...]
    heldout: tuple[Puzzle, ...]
    duplicates: int

    @property
    def hash(self) -> str:
        """SHA-256 of both parts.

        Equal exactly when two runs learn from and are judged on the same puzzles.
        """
        parts = ("\n".join(puzzle.key for puzzle in part) for part in (self.train, self.heldout))
        return sha256("\n\n".join(parts).encode()).hexdigest()


def load_split(task: TaskConfig) -> Split:
    """Load the task's puzzles and part them.

    Raises:
        InputError: the data cannot be had or read, or hold fewer puzzles than the recipe needs.
    """
    source = task.dataset_id_or_path
    if source == "generated":
        try:
            puzzles = list(generate(task.num_puzzles, task.split_seed, task.space))
        except ValueError as error:
            raise InputError(str(error), key="num_puzzles") from None
    else:
        puzzles = load_puzzles(source, task.dataset_split)
    distinct = {puzzle.key: puzzle for puzzle in reversed(puzzles)}  # the first of equal ones
    ordered = sorted(distinct, key=lambda key: uniform_hash("take", task.split_seed, key))
    taken = ordered[: task.num_puzzles]
    heldout = {key for key in taken if is_heldout(key, task)}
    split = Split(
        train=tuple(distinct[key] for key in taken if key not in heldout),
        heldout=tuple(distinct[key] for key in taken if key in heldout),
        duplicates=len(puzzles) - len(distinct),
    )
    if not split.train or not split.heldout:
        raise InputError(
            f"{len(taken)} puzzles in {source} leave {len(split.train)} to train on and "
            f"{len(split.heldout)} held out; use more puzzles or another test_share",
            key="dataset_id_or_path",
        )
    return split


def is_heldout(key: str, task: TaskConfig) -> bool:
    """Whether the puzzle with this canonical key belongs to the held-out part.

    Asks the task for split_seed and test_share only.
    """
    return uniform_hash("split", task.split_seed, key) < task.test_share * 2**64


def load_puzzles(source: str, split: str = "train") -> list[Puzzle]:
    """The puzzles of a local file or folder, or of a data set of the hub, in their order.

    Raises:
        InputError: it cannot be had, or a row is no puzzle; names the source and the row.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in FILE_SUFFIXES)
        if not files:
            suffixes = ", ".join(FILE_SUFFIXES)
            raise InputError(f"no {suffixes} file in the folder {source}", key="dataset_id_or_path")
        return [puzzle for file in files for puzzle in _puzzles(_read_file(file), str(file))]
    if path.is_file():
        return _puzzles(_read_file(path), source)
    if path.suffix in FILE_SUFFIXES or is_local(source):
        raise InputError(
            f"no file or folder '{source}'; write a path, a hub id such as owner/name, or "
            "generated",
            key="dataset_id_or_path",
        )
    return _puzzles(_read_hub(source, split), source)


def prompt_dataset(
    puzzles: Iterable[Puzzle],
    template: PromptTemplate,
    tokenizer: "PreTrainedTokenizerBase",
    max_prompt_length: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple["Dataset", int]:
    """What the trainer draws from.

    Args:
        max_prompt_length: in tokens; today's TRL neither truncates nor drops prompts by itself.
        chat_template_kwargs: see `PromptTemplate.renderer`.

    Returns:
        a dataset with the columns prompt (str), target (int) and nums (list of int), and how many
        prompts were too long for it.

    Raises:
        InputError: this model cannot be asked so, or all prompts are too long.
    """
    from datasets import Dataset

    render = template.renderer(tokenizer, chat_template_kwargs)
    rows = []
    for puzzle in puzzles:
        prompt = render(puzzle.nums, puzzle.target)
        rows.append({"prompt": prompt, "target": puzzle.target, "nums": list(puzzle.nums)})
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


def audit(puzzles: Sequence[Puzzle]) -> dict[str, Any]:
    """What is in a data set: how many puzzles are solvable, doubled, and how hard they are."""
    found = {puzzle.key: difficulty(puzzle.nums, puzzle.target) for puzzle in puzzles}
    solvable = [d for d in found.values() if d is not None]
    return {
        "puzzles": len(puzzles),
        "distinct": len(found),
        "solvable": len(solvable),
        "plus_minus_only_share": sum(d.plus_minus_only for d in solvable) / max(1, len(solvable)),
        "by_numbers": dict(sorted(Counter(str(d.numbers) for d in solvable).items())),
        "by_operator_kinds": dict(sorted(Counter(str(d.operator_kinds) for d in solvable).items())),
        "unsolvable_examples": [key for key, d in found.items() if d is None][:5],
    }


# ---- Reading --------------------------------------------------------------------------------


def _read_file(path: Path) -> Iterable[Mapping[str, Any]]:
    import pandas

    try:
        if path.suffix == ".parquet":
            frame = pandas.read_parquet(path)
        elif path.suffix == ".csv":
            frame = pandas.read_csv(path)
        else:
            frame = pandas.read_json(path, lines=path.suffix == ".jsonl")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read: {one_line(error)}", key="dataset_id_or_path"
        ) from None
    return frame.to_dict("records")


def _read_hub(dataset_id: str, split: str) -> Iterable[Mapping[str, Any]]:
    from datasets import load_dataset

    try:
        return iter(load_dataset(dataset_id, split=split))
    except (OSError, ValueError, RuntimeError) as error:
        # Offline, unknown id, unknown split: the hub's own words follow.
        raise InputError(
            f"'{dataset_id}' cannot be loaded from the hub ({one_line(error, 200)}); without "
            "network write 'dataset_id_or_path: generated'",
            key="dataset_id_or_path",
        ) from error


def _puzzles(rows: Iterable[Mapping[str, Any]], source: str) -> list[Puzzle]:
    puzzles = []
    for number, row in enumerate(rows, start=1):
        try:
            nums = row["nums"]
            if isinstance(nums, str):  # csv has no lists: "[19, 36, 55]" or "19 36 55"
                nums = re.findall(r"-?\d+", nums)
            puzzle = Puzzle(tuple(_integer(n) for n in nums), _integer(row["target"]))
            check_numbers(puzzle.nums)
        except KeyError as error:
            raise InputError(
                f"{source}: no column {error}; want the columns nums and target, got {list(row)}"
            ) from None
        except (TypeError, ValueError) as error:
            raise InputError(f"{source} row {number}: no puzzle: {error}") from None
        puzzles.append(puzzle)
    return puzzles


def _integer(value: Any) -> int:
    integer = int(value)
    if integer != float(value):
        raise ValueError(f"want an integer, got {value!r}")
    return integer
