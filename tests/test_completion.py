import pytest

from mini_r1.completion import claims, marked, parse_completion, printable


def test_takes_a_completion_apart():
    parsed = parse_completion(" 1+2=3 </think>\n<answer> 1+2 </answer>")
    assert (parsed.think, parsed.answer, parsed.well_formed) == (" 1+2=3 ", " 1+2 ", True)


@pytest.mark.parametrize(
    ("text", "answer", "well_formed"),
    [
        ("a</think><answer>1</answer>", "1", True),
        ("a</think>\n\n <answer>\n1\n</answer>\n ", "\n1\n", True),
        ("</think><answer>1</answer>", "1", True),
        ("a <answer>2</answer> b</think><answer>1</answer>", "1", True),
        ("a</think><answer> </answer>", " ", False),
        ("a</think><answer></answer>", "", False),
        ("a</think> so <answer>1</answer>", "1", False),
        ("a</think><answer>1</answer> done", "1", False),
        ("<think>a</think><answer>1</answer>", "1", False),
        ("a</think><answer>1</answer><answer>1</answer>", None, False),
        ("a</think><answer><answer>1</answer>", None, False),
        ("a</think><answer>1</answer></answer>", None, False),
        ("a</think></answer>1<answer>", None, False),
        ("a</think><answer>1", None, False),
        ("a</think>b</think><answer>1</answer>", None, False),
        ("<answer>1</answer></think>", None, False),
        ("<answer>1</answer>", None, False),
        ("", None, False),
    ],
)
def test_one_think_block_one_answer(text, answer, well_formed):
    parsed = parse_completion(text)
    assert (parsed.answer, parsed.well_formed) == (answer, well_formed)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8 + 13 = 21, 24-13=12 low", [("8 + 13", "21", True), ("24-13", "12", False)]),
        (
            "- 99 - 75 + 62 = 24 + 62 = 86",
            [("99 - 75 + 62", "24 + 62", True), ("24 + 62", "86", True)],
        ),
        ("so (8 + 13 = 21), (2+3)*4=20 (yes)", [("8 + 13", "21", True), ("(2+3)*4", "20", True)]),
        ("4 / 3 = 1.33 and 4 / 2 = 2.", [("4 / 2", "2", True)]),
        ("61 - 94 = -33", [("61 - 94", "-33", True)]),
        ("x = 5, -5 = -5, = , 1/0 = 3, 2**2 = 4", []),
        ("no arithmetic at all", []),
    ],
)
def test_finds_the_arithmetic_claims(text, expected):
    found = list(claims(text))
    assert [(claim.left, claim.right, claim.true) for claim in found] == expected
    for claim in found:
        spelt_out = text[claim.start : claim.end]
        assert spelt_out.startswith(claim.left)
        assert spelt_out.endswith(claim.right)


def test_marked_parts_make_the_whole():
    text = "so 1 + 1 = 3\n99 - 75 + 62 = 24 + 62 = 86, and that is it"
    parts = list(marked(text))
    assert "".join(part for part, _ in parts) == text
    assert [(part, true) for part, true in parts if true is not None] == [
        ("1 + 1 = 3", False),
        ("99 - 75 + 62 = 24 + 62", True),
    ]


def test_printable_keeps_a_terminal_safe():
    assert printable("5€ × 3\n\t\x1b[2J\x07\r\x9bok") == "5€ × 3\n\t[2Jok"
