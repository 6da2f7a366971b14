"""Texts that want to be more than text: a corpus and a strategy, for every test that needs some.

Judge, parser, claims, samples, page and terminal have to stand both. The same examples on every
run; `FUZZ=100 pytest` tries a hundred times as many.
"""

import json
import os
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st

# {"name", "text"}; completions of a puzzle also have {"nums", "target", "solved"}.
with (Path(__file__).parent / "data" / "hostile_texts.jsonl").open(encoding="utf-8") as file:
    CORPUS = [json.loads(line) for line in file]
TEXTS = [entry["text"] for entry in CORPUS]

# Any text at all, surrogates too, and texts of what our own formats are made of.
PARTS = ["<think>", "</think>", "<answer>", "</answer>", "1+2", "=", "(", ")", " ", "\n", "\r"]
PARTS += ["\n==== step 3 ", 'nums [1] target 1 rewards {"a": 1.0}\n', "<U+001B>", "<U+", "\x1b[2J"]
PARTS += ["\u202e", "\ud800", "\udfff", "&lt;", "<script>", "\u2028", "\x00", "\n- ", ".5", "**"]
ANY = st.text(st.characters(exclude_categories=()), max_size=200)
MADE = st.lists(st.sampled_from(PARTS) | ANY.map(lambda text: text[:5]), max_size=30).map("".join)
HOSTILE = st.one_of(st.sampled_from(TEXTS), ANY, MADE)

fuzz = settings(max_examples=50 * int(os.environ.get("FUZZ", "1")))


def is_inert(text: str) -> bool:
    """Whether nothing in a text acts, hides or turns the order around; and UTF-8 can hold it."""
    text.encode()
    bidi = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    unseen = "\xad\u200b\u2060\ufeff\u2028\u2029"
    controls = {chr(code) for code in (*range(32), *range(127, 160))} - {"\n", "\t"}
    return not controls.intersection(text) and not set(bidi + unseen).intersection(text)
