"""What the package itself says: text that may leave the program."""

import pytest
from hypothesis import given

from mini_r1 import one_line, restored, visible
from tests.hostile import HOSTILE, TEXTS, fuzz, is_inert


@given(HOSTILE)
@fuzz
def test_what_is_visible_is_inert_and_can_be_restored(text):
    assert is_inert(visible(text))
    assert restored(visible(text)) == text
    assert is_inert(one_line(text))
    assert "\n" not in one_line(text)


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_the_corpus_is_visible_and_can_be_restored(text):
    assert is_inert(visible(text))
    assert restored(visible(text)) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("5€ × 3\n\t\x1b[2J\x07\r\x9bok", "5€ × 3\n\t<U+001B>[2J<U+0007><U+000D><U+009B>ok"),
        ("\u202eevil \ud800 \U000e0041", "<U+202E>evil <U+D800> <U+E0041>"),
        ("你好 👨\u200d👩 مرحبا <b> <U+1>", "你好 👨\u200d👩 مرحبا <b> <U+1>"),  # as it is
        ("<U+001B>", "<U+003C>U+001B>"),
    ],
)
def test_what_is_visible(text, shown):
    assert visible(text) == shown


def test_one_line_is_short_and_inert():
    assert one_line(ValueError("a\r\n\x1b[31m b\u2028c"), 14) == "a <U+001B>[31m"
