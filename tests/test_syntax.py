"""Files that are no recipe, or hold YAML's traps: one line each, at once."""

import os
import sys
import time

import pytest

from mini_r1 import InputError
from mini_r1.files import MAX_BYTES
from mini_r1.recipe import load_recipe
from mini_r1.syntax import take_hub_token

MODEL = "model_name_or_path: tiny_base\n"
NOT_READ = "anchors, aliases and tags (&, *, !) are not read"
TRAPS = {
    "empty": ("", ": an empty file; want lines of the form 'key: value'"),
    "only a comment": ("# nothing\n", ": an empty file"),
    "a list": ("- a list\n", ": not a recipe; want lines of the form"),
    "a text": ("just text\n", ": not a recipe"),
    "not closed": (MODEL + "seed: [1", "not valid YAML: while parsing a flow sequence, expected"),
    "tab": (
        MODEL + "\tseed: 1\n",
        " line 2: not valid YAML: while scanning for the next token, "
        "found character '\\t' that cannot start any token; write spaces",
    ),
    "two documents": (
        MODEL + "---\nseed: 1\n",
        " line 2: not valid YAML: expected a single document",
    ),
    "bytes": (b"seed: \xff\n", ": cannot be read: 'utf-8' codec can't decode byte"),
    "control character": (MODEL + "seed: \x07\n", "not valid YAML: unacceptable character"),
    "mapping as key": (MODEL + "? {a: 1}\n: 2\n", " line 2: a key is a word, not a mapping"),
    "list as key": (
        MODEL + "model_init_kwargs:\n  ? [1]\n  : 3\n",
        " line 3: a key is a word, not a list",
    ),
    "number as key": (MODEL + "1: 2\n", " line 2: unknown key '1'"),
    "true as key": (MODEL + "true: 2\n", " line 2: unknown key 'true'"),
    "null as key": (MODEL + "~: 2\n", " line 2: unknown key '~'"),
    "merge key": (MODEL + "<<: {seed: 1}\n", " line 2: merge keys (<<) are not read"),
    "anchor": (MODEL + "seed: &a 1\n", f" line 2: {NOT_READ}"),
    "alias": (MODEL + "seed: *a\n", f" line 2: {NOT_READ}"),
    "tag": (MODEL + "seed: !!python/object/apply:os.system [ls]\n", f" line 2: {NOT_READ}"),
    "bomb": ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", f" line 1: {NOT_READ}"),
    "twice within": (
        MODEL + "model_init_kwargs:\n  a: 1\n  a: 2\n",
        " line 4: a is set twice; first in 3",
    ),
    "huge integer": (MODEL + f"seed: {'1' * 5000}\n", "... (5000 characters)"),
    "huge integer within": (
        MODEL + f"model_init_kwargs: {{a: {'1' * 5000}}}\n",
        "want less than 2^63",
    ),
    "huge float": (MODEL + f"beta: {'1' * 5000}.0\n", "want a finite number"),
    "long key": (
        MODEL + f"? {'k' * 5000}\n: 1\n",
        "... (5000 characters)'; see 'mini-r1 recipes --keys'",
    ),
    "deep list": (MODEL + f"seed: {'[' * 5000}{']' * 5000}\n", " line 2: nested too deeply"),
    "deep mapping": (MODEL + f"seed: {'{a: ' * 5000}1{'}' * 5000}\n", " line 2: nested too deeply"),
    "deep block": (MODEL + f"seed:\n {'- ' * 5000}1\n", " line 3: nested too deeply"),
    "large": ("a: b\n" * 300_000, ": cannot be read: more than 128 KiB"),
    "many keys": (
        "".join(f"k{n}: 1\n" for n in range(11_000)),
        " line 2500: more than 5000 keys and values",
    ),
    "many values": (
        MODEL + f"seed: [{'1,' * 60_000}]\n",
        " line 2: more than 5000 keys and values",
    ),
    "NUL": (MODEL + r'output_dir: "a\0b"', " line 2: output_dir: no text may hold U+0000"),
    "surrogate": (MODEL + r'reward_funcs: ["\ud800.py:f"]', "no text may hold U+D800"),
    "as large as may be": ("a: b\n" * (MAX_BYTES // 5), " line 2500: more than 5000 keys"),
}


@pytest.fixture(scope="module", autouse=True)
def _keys_are_read():
    """The libraries' source, once for all recipes."""
    load_recipe("tiny-cpu")


@pytest.mark.parametrize("trap", TRAPS)
def test_traps_are_told_in_one_line_at_once(tmp_path, trap):
    content, message = TRAPS[trap]
    path = tmp_path / "r.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    started = time.process_time()
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    assert time.process_time() - started < 1.5  # on a busy machine, too
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 300


def test_a_byte_order_mark_is_no_matter(tmp_path):
    (tmp_path / "r.yaml").write_text(MODEL + "seed: 3\n", encoding="utf-8-sig")
    assert load_recipe(tmp_path / "r.yaml").get("seed") == 3


@pytest.mark.parametrize(
    ("words", "kept", "token"),
    [
        (
            ["--seed", "3", "--hub_token", "x y", "--push_to_hub"],
            ["--seed", "3", "--push_to_hub"],
            "x y",
        ),
        (["--hub-token=a=b"], [], "a=b"),
        (["--hub_token", "a", "--hub_token=b", "--seed=3"], ["--seed=3"], "b"),
        (["--hub_token_x", "a"], ["--hub_token_x", "a"], None),
    ],
)
def test_a_token_is_taken_from_the_command_line_whatever_it_looks_like(
    monkeypatch, words, kept, token
):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(sys, "argv", ["mini-r1", *words])
    monkeypatch.setattr(sys, "orig_argv", ["python", "mini-r1", *words])
    assert take_hub_token(words) == kept
    assert os.environ.get("HF_TOKEN") == token
    shown = ["mini-r1", *kept, *(["--hub_token", "***"] if token else [])]
    assert (sys.argv, sys.orig_argv) == (shown, ["python", *shown])


@pytest.mark.parametrize("words", [["--hub_token"], ["--hub_token="], ["--hub_token", "--seed=1"]])
def test_a_token_without_a_value_is_refused(words):
    with pytest.raises(InputError, match="--hub_token: no value"):
        take_hub_token(words)
