"""The prompt templates, as constants; a recipe chooses one by name (`prompt_template`).

Every prompt ends inside an open `<think>`, so a completion is what the model writes after it. Chat
prompts are rendered by the model's own chat template; `tinyzero` is plain text for base models,
which have none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from mini_r1 import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINK_PREFILL = "Let me solve this step by step.\n<think>"

# Word for word the English script of the original Mini-R1. It says "can only be used once", while
# its reward, like ours, demands every number exactly once.
MINI_R1_SYSTEM = (
    "You are a helpful assistant. You first thinks about the reasoning process in the mind "
    "and then provides the user with the answer."
)
MINI_R1_USER = (
    "Using the numbers {nums}, create an equation that equals {target}. "
    "You can use basic arithmetic operations (+, -, *, /) one or multiple times "
    "but each number can only be used once. Show your work in <think> </think> tags. "
    "And return the final equation in <answer> </answer> tags, "
    "for example <answer> (1 + 2) / 3 </answer>. Think step by step inside <think> tags."
)

# The same, with the judged rule stated.
EXACT_USER = (
    "Using the numbers {nums}, create an equation that equals {target}. "
    "You can use basic arithmetic operations (+, -, *, /) one or multiple times "
    "and each number must be used exactly once. Show your work in <think> </think> tags. "
    "And return the final equation in <answer> </answer> tags, "
    "for example <answer> (1 + 2) / 3 </answer>. Think step by step inside <think> tags."
)

# TinyZero's prompt for base models.
TINYZERO_TEXT = (
    "A conversation between User and Assistant. "
    "The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind "
    "and then provides the user with the answer.\n"
    "User: Using the numbers {nums}, create an equation that equals {target}. "
    "You can use basic arithmetic operations (+, -, *, /) "
    "and each number can only be used once. Show your work in <think> </think> tags. "
    "And return the final answer in <answer> </answer> tags, "
    "for example <answer> (1 + 2) / 3 </answer>.\n"
    "Assistant: " + THINK_PREFILL
)

# For the embedded base: a handful of tokens, since a laptop pays for each of them.
COMPACT_USER = "Make {target} using each of {nums} once."


@dataclass(frozen=True)
class PromptTemplate:
    """One way to ask.

    `user` holds the fields {nums} and {target}; `prefill` opens the assistant's turn. Without
    `prefill` the `user` text is the whole prompt and no chat template is used.
    """

    user: str
    system: str | None = None
    prefill: str | None = None
    bare_numbers: bool = False

    def render(self, nums: Sequence[int], target: int, tokenizer: "PreTrainedTokenizerBase") -> str:
        """The prompt as one string, ready to be tokenized, special tokens of the chat included.

        Raises:
            InputError: the tokenizer has no chat template, which this prompt needs.
        """
        numbers = ", ".join(map(str, nums)) if self.bare_numbers else str(list(nums))
        user = self.user.format(nums=numbers, target=target)
        if self.prefill is None:
            return user
        if not tokenizer.chat_template:
            raise InputError(
                "this model has no chat template; write tinyzero for base models",
                key="prompt_template",
            )
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages += [
            {"role": "user", "content": user},
            {"role": "assistant", "content": self.prefill},
        ]
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, continue_final_message=True
        )
        return cast(str, rendered)


PROMPT_TEMPLATES = {
    "mini-r1": PromptTemplate(MINI_R1_USER, system=MINI_R1_SYSTEM, prefill=THINK_PREFILL),
    "mini-r1-exact": PromptTemplate(EXACT_USER, system=MINI_R1_SYSTEM, prefill=THINK_PREFILL),
    "tinyzero": PromptTemplate(TINYZERO_TEXT),
    "compact": PromptTemplate(COMPACT_USER, prefill="<think>", bare_numbers=True),
}
