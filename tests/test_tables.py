import codecs
import gzip
import json
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from huggingface_hub import constants

from mini_r1 import InputError, hub
from mini_r1.tables import commit, load_tables, locate, read_table

ROWS = [{"nums": [19, 36, 55], "target": 98}, {"nums": [44, 19, 35, 7], "target": 65}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = 'nums,target\n"[19, 36, 55]",98\n"[44, 19, 35, 7]",65\n'


def write(path, content=LINES):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows_of(table):
    names = list(table.columns)
    return [
        dict(zip(names, row, strict=True)) for row in zip(*map(table.column, names), strict=True)
    ]


# ---- Formats --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", LINES),
        ("x.json", LINES),  # lines under the name of an array
        ("x.jsonl", json.dumps(ROWS)),  # and the other way round
        ("x.json", json.dumps(ROWS, indent=2)),
        ("x.json", "\n".join(json.dumps(row, indent=2) for row in ROWS)),  # as jq prints them
        ("x.json", json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]})),
        (
            "x.json",  # as pandas writes a frame
            json.dumps(
                {name: {str(i): row[name] for i, row in enumerate(ROWS)} for name in ROWS[0]}
            ),
        ),
        ("x.JSONL", LINES.replace("\n", "\r\n\r\n")),
        ("x.jsonl", codecs.BOM_UTF8 + LINES.encode()),
        ("x.json", codecs.BOM_UTF8 + json.dumps(ROWS).encode()),
        ("x.jsonl.gz", gzip.compress(LINES.encode())),
        ("x.json.gz", gzip.compress(json.dumps(ROWS).encode())),
        ("x.jsonl.gz", LINES),  # what a browser has unpacked
        ("x.jsonl", gzip.compress(LINES.encode())),
    ],
)
def test_json_however_it_is_written(tmp_path, name, content):
    for head in (False, True):
        assert rows_of(read_table(write(tmp_path / name, content), head)) == ROWS


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", CSV),
        ("x.CSV", codecs.BOM_UTF8 + CSV.encode()),
        ("x.csv.gz", gzip.compress(CSV.encode())),
        ("x.csv", CSV.replace("\n", "\r\n")),
        ("x.csv", CSV.replace('",', '";').replace("s,t", "s;t")),
        ("x.csv", CSV.replace('",', '"\t').replace("s,t", "s\tt")),
        ("x.csv", CSV.replace(",98", ", 98").replace("\n", "\n\n")),
    ],
)
def test_csv_however_it_is_written(tmp_path, name, content):
    expected = [{**row, "nums": str(row["nums"])} for row in ROWS]
    assert rows_of(read_table(write(tmp_path / name, content))) == expected


def test_a_column_of_a_csv_holds_numbers_only_if_nothing_is_lost(tmp_path):
    path = write(tmp_path / "x.csv", "a,b,c,d,e\n1,007,1.5,x,\n2,010,2,3,4\n")
    assert rows_of(read_table(path)) == [
        {"a": 1, "b": "007", "c": 1.5, "d": "x", "e": None},
        {"a": 2, "b": "010", "c": 2.0, "d": "3", "e": 4},
    ]


def test_one_row_is_not_taken_for_columns(tmp_path):
    row = {"truth": {"nums": [19, 36, 55], "target": 98}}
    assert rows_of(read_table(write(tmp_path / "x.json", json.dumps(row)))) == [row]


def test_rows_are_counted_and_lines_are_told(tmp_path):
    path = write(tmp_path / "x.csv", 'a,b\n\n1,"two\nlines"\n3,4\n')
    table = read_table(path)
    assert [table.place(i) for i in range(2)] == [f"{path} line 3", f"{path} line 5"]
    path = write(tmp_path / "x.json", json.dumps(ROWS, indent=1))
    assert read_table(path).place(1) == f"{path} line 10"
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "x.parquet")
    assert read_table(tmp_path / "x.parquet").place(1).endswith("x.parquet row 2")


BROKEN = [
    ("x.jsonl", "", "holds no rows"),
    ("x.jsonl", "\n \n", "holds no rows"),
    ("x.json", "[]", "holds no rows"),
    ("x.json", '{"nums": [], "target": []}', "holds no rows"),
    ("x.csv", "", "holds no rows"),
    ("x.csv", "nums,target\n", "holds no rows"),
    ("x.parquet", "", "cannot be read: Parquet file size is 0 bytes"),
    ("x.parquet", "PAR1 no more", "cannot be read: "),
    ("x.jsonl", "not json\n", "cannot be read: line 1: Expecting value"),
    ("x.jsonl", LINES + '{"nums": [1, 2]', "cannot be read: line 3: Expecting ',' delimiter"),
    ("x.jsonl", LINES + "[1, 2]\n", "line 3: want named columns in braces, got [1, 2]"),
    ("x.json", json.dumps(ROWS)[:-1], "cannot be read: line 1: no comma and no ]"),
    ("x.json", json.dumps(ROWS)[:-1] + ",", "cannot be read: the array has no end"),
    ("x.json", json.dumps(ROWS) + LINES, "cannot be read: text after the array"),
    ("x.json", "[" * 100_000, "cannot be read: "),
    ("x.json", '["nums", "target"]', "line 1: want named columns in braces, got 'nums'"),
    ("x.jsonl", f'{{"target": {"9" * 5000}}}', "cannot be read: line 1: Exceeds the limit"),
    ("x.jsonl", LINES.encode("utf-16"), "want text in UTF-8; this is UTF-16"),
    ("x.csv", CSV.encode("utf-16-le"), "want text in UTF-8; this is UTF-16"),
    ("x.csv", "nums,target,né\n".encode("latin-1"), "'utf-8' codec can't decode byte 0xe9"),
    ("x.csv", "nums,target\n[44, 19, 35],98\n", "line 2: 4 fields, the header has 2; a list"),
    ("x.csv", "nums,target\n44 19\n", "line 2: 1 fields, the header has 2"),
    ("x.csv", "nums,nums\n1 2,3\n", "two columns are called 'nums'"),
    ("x.csv", 'nums,target\n"[44, 19],98\n', "line 2: unexpected end of data"),
    ("x.csv", "nums,target\n" + "x" * 200_000 + ",98\n", "line 2: field larger than field limit"),
    ("x.jsonl.gz", gzip.compress(LINES.encode())[:-9], "cannot be read: Compressed file ended"),
    ("x.jsonl", "version https://git-lfs.github.com/spec/v1\noid", "run git lfs pull"),
    ("x.parquet", "version https://git-lfs.github.com/spec/v1\noid", "run git lfs pull"),
    ("x.txt", LINES, "cannot be read: want .parquet, .jsonl, .json, .csv, or these with .gz"),
    ("x.jsonl.zst", LINES, "cannot be read: want .parquet"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_what_cannot_be_read_is_one_line(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    for head in (False, True):
        with pytest.raises(InputError) as caught:
            read_table(path, head)
        assert message in str(caught.value)
        assert str(caught.value).startswith(f"dataset_id_or_path: {path} ")
        assert len(str(caught.value).replace(str(path), "")) < 300
        assert "\n" not in str(caught.value)


def test_the_head_of_a_large_file_takes_no_time(tmp_path):
    write(tmp_path / "x.jsonl", LINES * 100_000)
    write(tmp_path / "x.json", "[" + (json.dumps(ROWS[0]) + ",") * 200_000)  # an array without end
    write(tmp_path / "x.csv", CSV + CSV.partition("\n")[2] * 100_000)
    write(tmp_path / "x.jsonl.gz", gzip.compress(LINES.encode() * 100_000, 1))
    pq.write_table(pa.Table.from_pylist(ROWS * 100_000), tmp_path / "x.parquet")
    started = time.perf_counter()
    for path in sorted(tmp_path.iterdir()):
        assert len(read_table(path, head=True)) in (99, 100)  # the header of a CSV counts
    assert time.perf_counter() - started < 1


# ---- Parts ----------------------------------------------------------------------------------


def parts(folder, *arguments):
    """The files of both parts, relative to the folder."""
    return tuple(
        [str(Path(table.source).relative_to(folder)) for table in part]
        for part in load_tables(str(folder), *arguments)
    )


@pytest.mark.parametrize(
    ("files", "train", "heldout"),
    [
        (["train.jsonl", "test.jsonl"], ["train.jsonl"], ["test.jsonl"]),
        (
            ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "README.md"],
            ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
            [],
        ),
        (
            ["data/train-00000-of-00001-0a1b2c.jsonl", "data/test-00000-of-00001-0a1b2c.jsonl"],
            ["data/train-00000-of-00001-0a1b2c.jsonl"],
            ["data/test-00000-of-00001-0a1b2c.jsonl"],
        ),
        (
            ["train/0.jsonl", "train/1.jsonl", "test/0.jsonl"],
            ["train/0.jsonl", "train/1.jsonl"],
            ["test/0.jsonl"],
        ),
        (["train.jsonl", "validation.jsonl"], ["train.jsonl"], ["validation.jsonl"]),
        (["train.jsonl", "val.jsonl", "test.jsonl"], ["train.jsonl"], ["test.jsonl"]),
        (["a/TRAIN/x.jsonl", "a/Dev/x.jsonl"], ["a/TRAIN/x.jsonl"], ["a/Dev/x.jsonl"]),
        (
            ["countdown_train_v2.jsonl", "countdown-test.jsonl"],
            ["countdown_train_v2.jsonl"],
            ["countdown-test.jsonl"],
        ),
        (["trainset.jsonl", "testset.jsonl"], ["trainset.jsonl"], ["testset.jsonl"]),
        (
            ["CountdownTrain.jsonl", "CountdownTest.jsonl"],
            ["CountdownTrain.jsonl"],
            ["CountdownTest.jsonl"],
        ),
        (["train2.jsonl", "test2.jsonl"], ["train2.jsonl"], ["test2.jsonl"]),
        (["training.jsonl", "held_out.jsonl"], ["training.jsonl"], ["held_out.jsonl"]),
        (["puzzles.jsonl", "test.jsonl"], ["puzzles.jsonl"], ["test.jsonl"]),
        (["train.jsonl", "all.jsonl"], ["train.jsonl"], []),
        (["latest.jsonl", "contest.jsonl"], ["contest.jsonl", "latest.jsonl"], []),
        (["train_test/a.jsonl", "b.jsonl"], ["b.jsonl", "train_test/a.jsonl"], []),
        (["test/train.jsonl", "test/test.jsonl"], ["test/train.jsonl"], ["test/test.jsonl"]),
        (
            ["train.parquet/part-0.jsonl", "test.parquet/part-0.jsonl"],
            ["train.parquet/part-0.jsonl"],
            ["test.parquet/part-0.jsonl"],
        ),
        (
            [
                "train.jsonl",
                "._train.jsonl",
                ".DS_Store",
                ".git/x.jsonl",
                "__MACOSX/._train.jsonl",
                "dataset_infos.json",
                "LICENSE",
                ".cache/huggingface/train.jsonl",
            ],
            ["train.jsonl"],
            [],
        ),
    ],
)
def test_the_parts_of_a_folder(tmp_path, files, train, heldout):
    for file in files:
        write(tmp_path / file, LINES if file.endswith(".jsonl") and "._" not in file else b"\0\1")
    assert parts(tmp_path) == (train, heldout)


def test_parts_can_be_named(tmp_path):
    for name in ("train", "test", "validation", "hard-00000-of-00001", "easy-00000-of-00001"):
        write(tmp_path / f"{name}.jsonl")
    assert parts(tmp_path, "train", "validation") == (["train.jsonl"], ["validation.jsonl"])
    assert parts(tmp_path, "easy", "hard") == (
        ["easy-00000-of-00001.jsonl"],
        ["hard-00000-of-00001.jsonl"],
    )
    assert parts(tmp_path, "train", "train") == (["train.jsonl"], [])
    for arguments, key in ((("trian",), "dataset_split"), (("train", "tset"), "heldout_split")):
        message = (
            rf"^{key}: .* has no part '{arguments[-1]}'; it has easy, hard, test, train, valid"
        )
        with pytest.raises(InputError, match=message):
            parts(tmp_path, *arguments)
    with pytest.raises(InputError, match=r"heldout_split: .*train.jsonl has no part 'test'"):
        load_tables(str(tmp_path / "train.jsonl"), "train", "test")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no .parquet, .jsonl, .json, .csv file in the folder"),
        (["notes.txt", "train.py"], "no .parquet, .jsonl, .json, .csv file in the folder"),
        (["test.jsonl"], "has no part 'train'; it has test"),
        (["data/train-00001-of-00003.jsonl"], "1 of 3 files"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, files, message):
    for file in files:
        write(tmp_path / file)
    with pytest.raises(InputError, match=message):
        load_tables(str(tmp_path))


def test_an_empty_file_of_a_folder_is_refused(tmp_path):
    write(tmp_path / "a.jsonl")
    write(tmp_path / "b.jsonl", "")
    with pytest.raises(InputError, match=r"b\.jsonl holds no rows"):
        load_tables(str(tmp_path))


def test_what_save_to_disk_wrote(tmp_path):
    data = Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    DatasetDict({"train": data.select([1]), "test": data.select([0])}).save_to_disk(
        tmp_path / "two"
    )
    for head in (False, True):
        train, heldout = load_tables(str(tmp_path / "one"), head=head)
        assert (rows_of(train[0]), heldout) == (ROWS, [])
        train, heldout = load_tables(str(tmp_path / "two"), head=head)
        assert (rows_of(train[0]), rows_of(heldout[0])) == (ROWS[1:], ROWS[:1])
    Dataset.from_dict({"nums": []}).save_to_disk(tmp_path / "none")
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"x")
    for name, message in (("none", "cannot be read: .*without rows"), ("one", "cannot be read: ")):
        with pytest.raises(InputError, match=message):
            load_tables(str(tmp_path / name))


# ---- The hub --------------------------------------------------------------------------------


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A data set in the cache, as `hf download` leaves it: links into a folder of blobs."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "datasets--owner--name"
    write(repository / "refs" / "main", "0" * 40)
    for part in ("train", "test"):
        blob = write(repository / "blobs" / part)
        link = repository / "snapshots" / ("0" * 40) / "data" / f"{part}-00000-of-00001.jsonl"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return repository


def test_a_cached_data_set_is_read_without_network(cached):
    train, heldout = load_tables("owner/name")
    assert rows_of(train[0]) == rows_of(heldout[0]) == ROWS
    assert load_tables("owner/name", "train", "train")[1] == []
    assert commit("owner/name") == commit("owner/name", "0" * 40) == "0" * 40
    (cached / "blobs" / "train").unlink()
    with pytest.raises(InputError, match="cannot be read: No such file"):
        load_tables("owner/name")


def test_a_revision_is_read_and_no_other(cached):
    write(cached / "snapshots" / ("1" * 40) / "train.jsonl", '{"nums": [1, 2], "target": 3}\n')
    for revision, rows in (("1" * 40, [{"nums": [1, 2], "target": 3}]), (None, ROWS)):
        assert rows_of(load_tables("owner/name", revision=revision).train[0]) == rows
    with pytest.raises(InputError, match="is not in the cache"):
        load_tables("owner/name", revision="2" * 40)


def test_what_is_not_of_the_hub_has_no_commit(tmp_path):
    file = write(tmp_path / "train.jsonl")
    assert commit("generated") is commit(str(file)) is None


def test_a_hub_that_does_not_answer_is_told_soon(cached, online, listening, monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT", 0.2)
    online(listening)
    started = time.perf_counter()
    assert rows_of(load_tables("owner/name").train[0]) == ROWS
    with pytest.raises(InputError, match="not in the cache, and the hub cannot be reached"):
        load_tables("owner/other")
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such.jsonl", "no file or folder 'no/such.jsonl'"),
        ("no/such.csv.gz", "no file or folder 'no/such.csv.gz'"),
        ("./nothing", "no file or folder"),
        (
            "generatd",
            "no file or folder 'generatd'; write a path, a hub id such as owner/name, or generated",
        ),
        (
            "owner/offline-data-set",
            "'owner/offline-data-set' is no file or folder here, is not in the cache, and the hub "
            "cannot be reached; without network write 'dataset_id_or_path: generated'",
        ),
        ("own er/name", "'own er/name' cannot be loaded from the hub"),
    ],
)
def test_missing_data_is_explained(source, message):
    with pytest.raises(InputError, match=message):
        load_tables(source)


def test_what_is_here_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "owner" / "name" / "train.jsonl")
    assert locate("owner/name") == Path("owner/name")
