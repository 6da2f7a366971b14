import pytest

from mini_r1 import InputError
from mini_r1.model import load_tokenizer
from mini_r1.prompts import PROMPT_TEMPLATES

ORIGINAL = """<|im_start|>system
You are a helpful assistant. You first thinks about the reasoning process in the mind and then \
provides the user with the answer.<|im_end|>
<|im_start|>user
Using the numbers [19, 36, 55, 7], create an equation that equals 65. You can use basic arithmetic \
operations (+, -, *, /) one or multiple times but each number can only be used once. Show your \
work in <think> </think> tags. And return the final equation in <answer> </answer> tags, for \
example <answer> (1 + 2) / 3 </answer>. Think step by step inside <think> tags.<|im_end|>
<|im_start|>assistant
Let me solve this step by step.
<think>"""


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny_base")


def test_the_original_word_for_word(tokenizer):
    assert PROMPT_TEMPLATES["mini-r1"].render([19, 36, 55, 7], 65, tokenizer) == ORIGINAL


def test_the_corrected_variant_states_the_judged_rule(tokenizer):
    original, exact = (
        PROMPT_TEMPLATES[name].render([1, 2], 3, tokenizer) for name in ("mini-r1", "mini-r1-exact")
    )
    original_rule = "but each number can only be used once"
    assert original_rule in original
    assert exact == original.replace(original_rule, "and each number must be used exactly once")


@pytest.mark.parametrize("name", PROMPT_TEMPLATES)
def test_every_prompt_states_the_puzzle_and_ends_in_an_open_think(name, tokenizer):
    prompt = PROMPT_TEMPLATES[name].render([19, 36, 55], 72, tokenizer)
    assert prompt.endswith("<think>")
    assert "19, 36, 55" in prompt
    assert "72" in prompt


def test_base_models_need_no_chat_template():
    class Bare:
        chat_template = None

    prompt = PROMPT_TEMPLATES["tinyzero"].render([1, 2], 3, Bare())
    assert prompt.startswith("A conversation between User and Assistant.")
    with pytest.raises(InputError, match=r"prompt_template: .* write tinyzero for base models"):
        PROMPT_TEMPLATES["mini-r1"].render([1, 2], 3, Bare())
