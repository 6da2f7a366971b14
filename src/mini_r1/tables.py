"""A file, a folder or a data set of the hub -> tables of rows, in the parts that its author made.

    puzzles.parquet          also .jsonl, .json and .csv, each with or without gzip: one part
    folder/                  its files, those in its folders, too, and what save_to_disk wrote
    owner/name               a data set of the hub; without network, from the cache

The parts of a folder are told by names: a file belongs to the part that its own name says, such as
`train-00000-of-00001.parquet` or `countdown_test.jsonl`, else to that of its nearest folder, as in
`test/0.csv`. Files that say none are the part `train` if no other file is. A data set of the hub is
the folder that `hf download` makes of it, with network or without: the same rows either way.

What the rows mean is not known here; `data.py` makes puzzles of them.
"""

import codecs
import csv
import difflib
import gzip
import io
import json
import os
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

from mini_r1 import InputError, hub, one_line
from mini_r1.files import refuse_special
from mini_r1.model import is_local

KEY = "dataset_id_or_path"
FORMATS = (".parquet", ".jsonl", ".json", ".csv")
COMPRESSION = ".gz"
# Files of the datasets library and of models that hold no rows.
NO_ROWS = {
    *("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json"),
    *("metadata.json", "package.json", "state.json"),
}
# How files and folders tell their part: by the hub's three names, or by other words for them.
PARTS = {
    "train": r"train(ing)?",
    "validation": r"valid(ation)?|val|dev",
    "test": r"tests?|testing|evals?|evaluation|h[eo]ld[-_ ]?out",
}
WORDS = {
    part: re.compile(rf"(?<![a-z])({words})[-_ ]?(set|data|split)?(?![a-z])")
    for part, words in PARTS.items()
}
# As the hub names them, with a hash in older data sets.
SHARD = re.compile(r"(?P<part>.+)-\d{5}-of-(?P<of>\d{5})(-[0-9a-f]+)?\.\w+")
# How much is read to see whether it can be read.
HEAD_FILES = 8  # of a part
HEAD_ROWS = 100
HEAD_BYTES = 2**20


@dataclass(frozen=True, eq=False)
class Table:
    """The rows of one file.

    Attributes:
        source: the file, for messages.
        columns: by name, all of one length, as lists or as pyarrow's chunked arrays. A value that
            a row does not have is None.
        lines: where each row stands in a file of text; None where rows can only be counted.
    """

    source: str
    columns: Mapping[str, Any] = field(repr=False)
    lines: Sequence[int] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def place(self, row: int) -> str:
        """Where a row stands, such as `train.csv line 3`."""
        if self.lines is not None:
            return f"{self.source} line {self.lines[row]}"
        return f"{self.source} row {row + 1}"

    def column(self, name: str, path: str | None = None) -> list[Any]:
        """The values of a column.

        Args:
            name: what it is called here.
            path: what it is called in the data, if something else. A dotted path leads into a
                column of mappings, or of JSON text.

        Raises:
            InputError: there is none; names those that there are, and the nearest.
        """
        path = path or name
        keys = path.split(".")
        for end in range(len(keys), 0, -1):  # a column's own name may hold dots
            head, rest = ".".join(keys[:end]), keys[end:]
            if head in self.columns:
                values = _python(self.columns[head])
                if not rest:
                    return values
                inner = [_inside(value, rest) for value in values]
                if any(value is not None for value in inner):
                    return inner
        raise self._no_column(name, path)

    def _no_column(self, name: str, path: str) -> InputError:
        there = _paths({each: _python(values[:1])[0] for each, values in self.columns.items()})
        by_last_key = {each.rpartition(".")[2]: each for each in reversed(there)}
        near = difflib.get_close_matches(path.rpartition(".")[2], by_last_key, n=1, cutoff=0.5)
        write = by_last_key[near[0]] if near else "its name"
        listed = shorten(", ".join(there), 160, placeholder=" ...")
        return InputError(
            f"no column '{path}' in {self.source}; it has {listed}; "
            f"write columns: {{{name}: {write}}}",
            key="columns",
        )


class Parts(NamedTuple):
    """The rows to train on, and those that their author held out, if any."""

    train: list[Table]
    heldout: list[Table]


def load_tables(
    source: str,
    split: str = "train",
    heldout_split: str | None = None,
    revision: str | None = None,
    head: bool = False,
) -> Parts:
    """Read a file, a folder, or a data set of the hub.

    Args:
        split: the part to train on.
        heldout_split: the part to hold out; None for `test`, or else `validation`, where there is
            one. The same as `split`: the author's other parts are left alone.
        revision: of a data set of the hub.
        head: only the first rows of each file, and nothing is downloaded.

    Raises:
        InputError: it cannot be had or read, holds no rows, or has no such part.
    """
    path = locate(source, revision, download=not head)
    if path is None:
        raise InputError(
            f"'{source}' is no file or folder here, is not in the cache, and the hub cannot be "
            f"reached; without network write '{KEY}: generated'",
            key=KEY,
        )
    train, heldout = (
        files[: HEAD_FILES if head else None] for files in _choose(path, split, heldout_split)
    )
    return Parts(
        [read_table(file, head) for file in train], [read_table(file, head) for file in heldout]
    )


# ---- Finding --------------------------------------------------------------------------------


def locate(source: str, revision: str | None = None, download: bool = False) -> Path | None:
    """The file or folder, or the cached folder of a data set of the hub; None if it is not cached.

    Args:
        download: what the cache lacks, if there is network.

    Raises:
        InputError: a path that is not there, or what the hub refuses.
    """
    path = Path(source)
    if path.exists():
        return path
    if _format(path.name) or is_local(source):
        raise InputError(
            f"no file or folder '{source}'; write a path, a hub id such as owner/name, or "
            "generated",
            key=KEY,
        )
    return _snapshot(source, revision, download and hub.unreachable() is None)


def commit(source: str, revision: str | None = None) -> str | None:
    """Which commit of a data set of the hub lies in the cache; None for what is not of the hub."""
    path = None if source == "generated" else locate(source, revision)
    return path.name if path is not None and path != Path(source) else None


def _snapshot(dataset_id: str, revision: str | None, download: bool) -> Path | None:
    import httpx  # what huggingface_hub talks with
    from huggingface_hub import errors, snapshot_download

    patterns = [f"*{each}*" for each in (*FORMATS, ".arrow")]
    try:
        return Path(
            snapshot_download(
                dataset_id,
                repo_type="dataset",
                revision=revision,
                allow_patterns=patterns,
                local_files_only=not download,
            )
        )
    except errors.IncompleteSnapshotError as error:
        problem = f"is not wholly in the cache ({one_line(error, 200)})"
    except errors.LocalEntryNotFoundError:
        return None
    except (OSError, ValueError, httpx.HTTPError) as error:
        problem = f"cannot be loaded from the hub ({one_line(error, 160)})"
    raise InputError(f"'{dataset_id}' {problem}; without network write '{KEY}: generated'", key=KEY)


# ---- Parts ----------------------------------------------------------------------------------


def _choose(path: Path, split: str, heldout_split: str | None) -> tuple[list[Path], list[Path]]:
    """The files to train on, and those to hold out.

    Raises:
        InputError: the folder has no such part, or not all of it.
    """
    parts = _parts(path) if path.is_dir() else {split: [path]}
    if heldout_split is None:
        heldout_split = next((part for part in ("test", "validation") if part in parts), split)
    for key, part in (("dataset_split", split), ("heldout_split", heldout_split)):
        if part not in parts:
            there = ", ".join(sorted(parts))
            raise InputError(f"{path} has no part '{part}'; it has {there}", key=key)
    return parts[split], parts[heldout_split] if heldout_split != split else []


def _parts(folder: Path) -> dict[str, list[Path]]:
    """The files of each part."""
    parts = defaultdict(list)
    for file in _files(folder):
        parts[_part(file.relative_to(folder))].append(file)
    if not parts:
        formats = ", ".join(FORMATS)
        raise InputError(f"no {formats} file in the folder {folder}", key=KEY)
    unnamed = parts.pop(None, [])
    if "train" not in parts and unnamed:
        parts["train"] = unnamed
    for files in parts.values():
        _check_shards(files)
    return parts


def _files(folder: Path) -> Iterator[Path]:
    """Every file of a folder that may hold rows, and every data set that was saved into it."""
    for place, folders, names in os.walk(folder):
        if {"state.json", "dataset_info.json"} <= set(names):
            folders.clear()
            yield Path(place)
            continue
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        for name in sorted(names):
            if _format(name) and name not in NO_ROWS and not name.startswith("."):
                yield Path(place, name)


def _part(path: Path) -> str | None:
    """The part that a file's name tells, or else that of its nearest folder."""
    shard = SHARD.fullmatch(path.name)
    for name in (path.name, *(parent.name for parent in path.parents)):
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
        told = [part for part, pattern in WORDS.items() if pattern.search(words)]
        if len(told) == 1:  # a name such as train_test tells nothing
            return told[0]
    return shard["part"] if shard else None


def _check_shards(files: Sequence[Path]) -> None:
    """A clone or a download that was cut off lacks some of `train-00003-of-00008.parquet`."""
    shards = [(file.parent, SHARD.fullmatch(file.name)) for file in files]
    found = Counter((parent, m["part"], m["of"]) for parent, m in shards if m)
    for (parent, part, of), count in found.items():
        if count != int(of):
            raise InputError(
                f"{count} of {int(of)} files {parent / part}-*-of-{of} are here; fetch the others",
                key=KEY,
            )


# ---- Reading --------------------------------------------------------------------------------


def read_table(path: Path, head: bool = False) -> Table:
    """The rows of a file, or of a folder that save_to_disk wrote.

    Args:
        head: only the first ones.

    Raises:
        InputError: it cannot be read, or holds no rows.
    """
    from pyarrow import ArrowException

    file_format = _format(path.name)
    if path.is_dir():
        read = _read_saved
    elif file_format is None:
        raise _unreadable(path, f"want {', '.join(FORMATS)}, or these with {COMPRESSION}")
    else:
        read = {".parquet": _read_parquet, ".csv": _read_csv}.get(file_format, _read_json)
    try:
        if not path.is_dir():
            refuse_special(path)
        _refuse_pointer(path)
        table = read(path, head)
    except OSError as error:
        raise _unreadable(path, error.strerror or error) from None
    except (ValueError, EOFError, RecursionError, ArrowException, zlib.error) as error:
        if head:  # where it was cut off, or elsewhere?
            return read_table(path)
        raise _unreadable(path, error) from None
    if not len(table):
        raise InputError(f"{path} holds no rows", key=KEY)
    return table


def _unreadable(path: Path, reason: object) -> InputError:
    return InputError(f"{path} cannot be read: {one_line(reason, 160)}", key=KEY)


def _format(name: str) -> str | None:
    name = name.lower().removesuffix(COMPRESSION)
    return next((suffix for suffix in FORMATS if name.endswith(suffix)), None)


def _refuse_pointer(path: Path) -> None:
    if path.is_file():
        with path.open("rb") as file:
            if file.read(40).startswith(b"version https://git-lfs"):
                raise ValueError("a pointer of git-lfs, not the data; run git lfs pull")


def _read_parquet(path: Path, head: bool) -> Table:
    import pyarrow
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        if head:
            batches = list(islice(file.iter_batches(HEAD_ROWS), 1))
            return _from_arrow(path, pyarrow.Table.from_batches(batches, file.schema_arrow))
        return _from_arrow(path, file.read())


def _read_saved(path: Path, head: bool) -> Table:
    from datasets import load_from_disk

    try:
        data = load_from_disk(str(path))
    except LookupError:
        raise ValueError("not as save_to_disk writes it, or without rows") from None
    rows = range(min(HEAD_ROWS, len(data))) if head else range(len(data))
    return _from_arrow(path, data.with_format("arrow")[rows])


def _from_arrow(path: Path, table: Any) -> Table:
    _refuse_twins(table.column_names)
    return Table(str(path), dict(zip(table.column_names, table.columns, strict=True)))


def _read_csv(path: Path, head: bool) -> Table:
    text = _read_text(path, head)
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True
    )
    header, rows, lines = [], [], []
    line = 1
    try:
        for fields in islice(reader, HEAD_ROWS if head else None):
            if fields and not header:
                header = [name.strip() for name in fields]
                _refuse_twins(header)
            elif fields and len(fields) != len(header):
                raise ValueError(
                    f"line {line}: {len(fields)} fields, the header has {len(header)}; "
                    "a list with commas wants quotes"
                )
            elif fields:
                rows.append(fields)
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"line {line}: {error}") from None
    columns = zip(*rows, strict=True) if rows else [()] * len(header)
    return Table(str(path), dict(zip(header, map(_guessed, columns), strict=True)), lines)


# No leading zeros, which a number would lose, and no more digits than it can hold exactly.
INTEGER = r"[+-]?(0|[1-9][0-9]{0,17})"
NUMBER = r"[+-]?(0|[1-9][0-9]{0,14})(\.[0-9]*)?(e[+-]?[0-9]+)?"


def _guessed(values: Sequence[str]) -> list[Any]:
    """A column of text as integers or numbers, if all of it is; an empty field is None."""
    for kind, looks in ((int, INTEGER), (float, NUMBER)):
        if all(re.fullmatch(looks, value) or not value for value in values):
            return [kind(value) if value else None for value in values]
    return [value or None for value in values]


def _read_json(path: Path, head: bool) -> Table:
    rows, lines = [], []
    for line, row in islice(_json_values(_read_text(path, head)), HEAD_ROWS if head else None):
        if not isinstance(row, dict):
            raise ValueError(f"line {line}: want named columns in braces, got {_short(row)}")
        rows.append(row)
        lines.append(line)
    if len(rows) == 1 and (columns := _as_columns(rows[0])):
        return Table(str(path), columns)
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(str(path), {name: [row.get(name) for row in rows] for name in names}, lines)


def _json_values(text: str) -> Iterator[tuple[int, Any]]:
    """Every value with the line where it begins: of lines, of one array, or one after another.

    Raises:
        ValueError: with the line.
    """
    decoder, blank = json.JSONDecoder(), re.compile(r"\s*")

    def after_blanks(position: int) -> int:
        return blank.match(text, position).end()  # ty: ignore

    at = after_blanks(0)
    is_array = text.startswith("[", at)
    at = after_blanks(at + is_array)
    line, counted = 1, 0
    while at < len(text) and not (is_array and text[at] == "]"):
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {error.lineno}: {error.msg}") from None
        except ValueError as error:  # an integer of thousands of digits
            raise ValueError(f"line {line}: {error}") from None
        yield line, value
        at = after_blanks(at)
        if is_array and text.startswith(",", at):
            at = after_blanks(at + 1)
        elif is_array and not text.startswith("]", at):
            raise ValueError(f"line {line}: no comma and no ] after this row")
    if is_array and text[at:].strip() != "]":
        raise ValueError("the array has no end" if at == len(text) else "text after the array")


def _as_columns(row: Mapping[str, Any]) -> dict[str, list[Any]] | None:
    """A file that is one mapping of columns, each a list, or a mapping as pandas writes it."""
    kinds = {type(value) for value in row.values()}
    if kinds == {dict}:
        indices = {tuple(value) for value in row.values()}
        if len(indices) == 1 and all(index.isdigit() for index in indices.pop()):
            return {name: list(value.values()) for name, value in row.items()}
    if kinds == {list} and len({len(value) for value in row.values()}) == 1:
        return dict(row)
    return None


def _read_text(path: Path, head: bool) -> str:
    with path.open("rb") as file:
        opener = gzip.open if file.read(2) == b"\x1f\x8b" else open  # whatever it is called
    with opener(path, "rb") as file:
        data = file.read(HEAD_BYTES if head else -1)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:1000]:
        raise ValueError("want text in UTF-8; this is UTF-16, or no text")
    whole = not head or len(data) < HEAD_BYTES
    return codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=whole)


# ---- Values ---------------------------------------------------------------------------------


def _python(column: Any) -> list[Any]:
    return column.to_pylist() if hasattr(column, "to_pylist") else column


def _inside(value: Any, keys: Sequence[str]) -> Any:
    """What is under the keys, one after another; None if there is nothing."""
    for key in keys:
        value = _opened(value).get(key)
    return value


def _opened(value: Any) -> Mapping[str, Any]:
    """A mapping, also one written as JSON; empty for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        with suppress(ValueError):
            value = json.loads(value)
    return value if isinstance(value, dict) else {}


def _paths(row: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The names of a row's columns, with those of the mappings in them."""
    found = []
    for name, value in row.items():
        inner = _opened(value)
        found += _paths(inner, f"{prefix}{name}.") if inner else [prefix + name]
    return found


def _refuse_twins(names: Sequence[str]) -> None:
    twins = [name for name, count in Counter(names).items() if count > 1]
    if twins:
        raise ValueError(f"two columns are called '{twins[0]}'")


def _short(value: Any) -> str:
    return one_line(repr(value), 60)
