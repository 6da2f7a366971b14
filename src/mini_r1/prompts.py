"""The prompt templates, as constants, and the one gate that every rendered prompt has passed.

A recipe chooses a template by name (`prompt_template`), or brings one in a file. What a row of data
puts into it is Jinja's: `{{ target }}` is the row's column target. Our prompts end inside an open
`<think>`, so a completion is what the model writes after it. Chat prompts are rendered by the
model's own chat template, whose author did not think of us: `PromptTemplate.renderer` makes the
best of it, and refuses what would ask another question than ours. `tinyzero` is plain text for base
models, which have no chat template.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mini_r1 import InputError, one_line
from mini_r1.completion import THINK_CLOSE, THINK_OPEN
from mini_r1.files import load_yaml, read_text, reason

if TYPE_CHECKING:
    from jinja2 import Template
    from transformers import PreTrainedTokenizerBase

THINK_PREFILL = "Let me solve this step by step.\n<think>"

# Word for word the English script of the original Mini-R1. It says "can only be used once", while
# its reward, like ours, demands every number exactly once.
MINI_R1_SYSTEM = (
    "You are a helpful assistant. You first thinks about the reasoning process in the mind "
    "and then provides the user with the answer."
)
MINI_R1_USER = (
    "Using the numbers {{ nums }}, create an equation that equals {{ target }}. "
    "You can use basic arithmetic operations (+, -, *, /) one or multiple times "
    "but each number can only be used once. Show your work in <think> </think> tags. "
    "And return the final equation in <answer> </answer> tags, "
    "for example <answer> (1 + 2) / 3 </answer>. Think step by step inside <think> tags."
)

# The same, with the judged rule stated.
EXACT_USER = (
    "Using the numbers {{ nums }}, create an equation that equals {{ target }}. "
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
    "User: Using the numbers {{ nums }}, create an equation that equals {{ target }}. "
    "You can use basic arithmetic operations (+, -, *, /) "
    "and each number can only be used once. Show your work in <think> </think> tags. "
    "And return the final answer in <answer> </answer> tags, "
    "for example <answer> (1 + 2) / 3 </answer>.\n"
    "Assistant: " + THINK_PREFILL
)

# For the embedded base: a handful of tokens, since a laptop pays for each of them.
COMPACT_USER = "Make {{ target }} using each of {{ nums | join(', ') }} once."


# The columns of a row of data -> its prompt as one string, special tokens of the chat included.
Render = Callable[[Mapping[str, Any]], str]
Chat = list[dict[str, str]]

SAMPLE = {"nums": [19, 36, 55, 7], "target": 65}  # the puzzle whose prompt is checked
CHAT_FILES = (".yaml", ".yml")
ROLES = "want a list of messages, each a role and a content: system, user and assistant in this "
ROLES += "order, of which user alone is needed"
# What the renderer itself says to a chat template.
OURS = {"add_generation_prompt", "continue_final_message", "messages", "tokenize"}
# A think block that the chat template opens, or opens and closes, where the prefill has to stand.
_THINK_TAGS = re.compile(rf"(?:(?:{THINK_OPEN}|{THINK_CLOSE})\s*)+$")


@dataclass(frozen=True)
class PromptTemplate:
    """One way to ask.

    Attributes:
        user: what the user says, in Jinja.
        system: stands before it.
        prefill: opens the assistant's turn. Without it, if that is None, the user's text is the
            whole prompt and no chat template is used.
    """

    user: str
    system: str | None = None
    prefill: str | None = None

    @property
    def opens_think(self) -> bool:
        """Whether a completion begins inside a think block, as the format reward has it."""
        return (self.user if self.prefill is None else self.prefill).endswith(THINK_OPEN)

    def question(self, columns: Mapping[str, Any]) -> str:
        """What the user says.

        Raises:
            InputError: the row has no such column, or nothing in it.
        """
        from jinja2 import UndefinedError

        try:
            text = _compiled(self.user).render(columns)
        except UndefinedError as error:
            there = ", ".join(columns)
            raise _error(f"{one_line(error)}; the row has the columns {there}") from None
        except Exception as error:  # of a filter, or in an expression
            raise _error(f"cannot be filled in: {one_line(error, 120)}") from None
        return text if self.prefill is None else text.strip()

    def render(self, nums: Sequence[int], target: int, tokenizer: "PreTrainedTokenizerBase") -> str:
        """The prompt of one puzzle; for several, or with chat_template_kwargs, see `renderer`."""
        return self.renderer(tokenizer)({"nums": list(nums), "target": target})

    def renderer(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        sample: Mapping[str, Any] = SAMPLE,
    ) -> Render:
        """Pass the gate: how this tokenizer's model is asked, wherever it is asked.

        A prompt holds our texts word for word and ends in exactly the prefill, which stands
        directly after one header of the assistant's turn. Tokenized with special tokens, as TRL
        does, it begins with one BOS if the model uses any. Needs no weights.

        Args:
            chat_template_kwargs: what else the chat template is given, such as enable_thinking.
            sample: the row whose prompt is checked.

        Raises:
            InputError: chat template or tokenizer make something else of it; says what.
        """
        kwargs, question = dict(chat_template_kwargs or {}), self.question(sample)
        head, tail = self._around_question(question, tokenizer, kwargs)
        before, after = _added_around(tokenizer)
        if after:
            raise InputError(
                f"its tokenizer ends every text with {after}, where the model has to go on; "
                "write add_eos_token: false into its tokenizer_config.json",
                key="model_name_or_path",
            )
        if before and head.lstrip().startswith(before):
            head = head.lstrip().removeprefix(before)

        self._check_tokens(question, head + question + tail, tokenizer)
        return lambda columns: head + self.question(columns) + tail

    def _around_question(
        self, question: str, tokenizer: "PreTrainedTokenizerBase", kwargs: Mapping[str, Any]
    ) -> tuple[str, str]:
        """What the chat template puts before the user's text, and after it up to the prefill."""
        if self.prefill is None:
            if kwargs:
                raise InputError(
                    "this prompt_template uses no chat template; leave it out",
                    key="chat_template_kwargs",
                )
            return "", ""
        if not tokenizer.chat_template:
            raise InputError(
                "this model has no chat template; write tinyzero for base models",
                key="prompt_template",
            )
        for key in kwargs:
            if key in OURS or not re.search(
                rf"\b{re.escape(str(key))}\b", str(tokenizer.chat_template)
            ):
                raise InputError(
                    f"the model's chat template knows no '{key}'; leave it out",
                    key="chat_template_kwargs",
                )

        def apply(chat: Chat, **ours: Any) -> str:
            try:
                rendered = tokenizer.apply_chat_template(chat, tokenize=False, **ours, **kwargs)
            except Exception as error:  # a template is a stranger's program, and may raise anything
                raise _Fault(f"fails ({one_line(error, 120)})") from error
            return cast(str, rendered)

        # The system text has a turn of its own, unless the template has none for it.
        chats: list[Chat] = [[{"role": "user", "content": question}]]
        if self.system:
            chats[0].insert(0, {"role": "system", "content": self.system})
            chats.append([{"role": "user", "content": f"{self.system}\n\n{question}"}])
        fault = None
        for chat in chats:
            for render in (_as_message, _after_header) if self.prefill else (_after_header,):
                try:
                    prompt = render(apply, chat, self.prefill)
                    return self._split(prompt, question, tokenizer)
                except _Fault as error:
                    fault = error
        raise InputError(
            f"the model's chat template {fault}; mend it, choose another model, or write "
            "tinyzero, which needs none",
            key="prompt_template",
        )

    def _split(
        self, prompt: str, question: str, tokenizer: "PreTrainedTokenizerBase"
    ) -> tuple[str, str]:
        """A prompt without its question: what stands before it, and after it.

        Raises:
            _Fault: it does not hold what it has to.
        """
        prefill, system = self.prefill or "", self.system or ""
        head, *tails = prompt.split(question)
        if not tails:
            raise _Fault("drops or rewrites the user's text")
        if len(tails) > 1:
            raise _Fault("repeats the user's text")
        if system not in head:
            raise _Fault("drops or rewrites the system text")
        if not tails[0].endswith(prefill):
            raise _Fault("rewrites the assistant's text")
        header = _THINK_TAGS.sub("", tails[0].removesuffix(prefill))
        if THINK_OPEN in header or THINK_CLOSE in header:
            raise _Fault("thinks in the assistant's place")
        markers = filter(str.strip, tokenizer.get_added_vocab())
        if any(header.count(marker) > 1 for marker in markers):
            raise _Fault("opens the assistant's turn twice")
        return head, header + prefill

    def _check_tokens(
        self, question: str, prompt: str, tokenizer: "PreTrainedTokenizerBase"
    ) -> None:
        """Whether the prompt is the same once it is tokenized."""
        ids = tokenizer(prompt)["input_ids"]
        bos = tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise InputError(
                f"the model's chat template prints {tokenizer.bos_token} twice",
                key="prompt_template",
            )
        # Blanks aside, which some tokenizers add or join.
        read = "".join(cast(str, tokenizer.decode(ids)).split())
        texts = (self.system, question, self.prefill)
        ours = ["".join(text.split()) for text in texts if text is not None]
        if not all(text in read for text in ours) or not read.endswith(ours[-1]):
            raise InputError(
                f"its tokenizer cannot spell the prompt, which it reads as '...{read[-80:]}'; "
                "choose another model",
                key="model_name_or_path",
            )


class _Fault(Exception):
    """What a chat template does to a prompt, as it goes on after "the chat template"."""


def _as_message(apply: Callable[..., str], chat: Chat, prefill: str) -> str:
    """The prefill as a message that is to be continued: it gets the header of a message."""
    chat = [*chat, {"role": "assistant", "content": prefill}]
    return apply(chat, continue_final_message=True)


def _after_header(apply: Callable[..., str], chat: Chat, prefill: str) -> str:
    """The prefill after the header of a new message.

    For templates that rewrite the assistant's messages, or call that role otherwise.
    """
    prompt = apply(chat, add_generation_prompt=True)
    if prompt == apply(chat) and prompt.count(chat[-1]["content"]) == 1:
        raise _Fault("opens no turn for the assistant")
    return prompt + prefill


def _added_around(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str]:
    """The special tokens that the tokenizer itself puts before every text and after it."""
    plain, whole = (
        tokenizer("x", add_special_tokens=special)["input_ids"] for special in (False, True)
    )
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    before, after = whole[:start], whole[start + len(plain) :]
    return (
        "".join(tokenizer.convert_ids_to_tokens(before)),
        "".join(tokenizer.convert_ids_to_tokens(after)),
    )


PROMPT_TEMPLATES = {
    "mini-r1": PromptTemplate(MINI_R1_USER, system=MINI_R1_SYSTEM, prefill=THINK_PREFILL),
    "mini-r1-exact": PromptTemplate(EXACT_USER, system=MINI_R1_SYSTEM, prefill=THINK_PREFILL),
    "tinyzero": PromptTemplate(TINYZERO_TEXT),
    "compact": PromptTemplate(COMPACT_USER, prefill=THINK_OPEN),
}


# ---- Templates of one's own -----------------------------------------------------------------


def get_prompt_template(name: str) -> PromptTemplate:
    """One of the templates above, or that of a file.

    A YAML file holds a chat, a list of messages with role and content; the user's content is Jinja
    with the columns of the data. Any other file is a plain text in Jinja, the whole prompt.

    Raises:
        InputError: no such file, or none that can be used.
    """
    if name in PROMPT_TEMPLATES:
        return PROMPT_TEMPLATES[name]
    try:
        text = read_text(Path(name)).removesuffix("\n")
    except (OSError, ValueError) as error:
        raise _error(f"{name} cannot be read: {reason(error)}") from None
    template = _chat(name, text) if name.endswith(CHAT_FILES) else PromptTemplate(text)
    if not template.user.strip():
        raise _error(f"{name} asks nothing")
    from jinja2 import TemplateSyntaxError

    try:
        _compiled(template.user)
    except RecursionError:
        raise _error(f"{name} is nested too deeply") from None
    except TemplateSyntaxError as error:
        line = template.user.splitlines()[error.lineno - 1].strip()
        raise _error(f"{name}: {error.message}, in '{one_line(line, 60)}'") from None
    return template


def _chat(name: str, text: str) -> PromptTemplate:
    try:
        messages = load_yaml(text)
    except ValueError as error:
        raise _error(f"{name}: {one_line(error, 200)}") from None
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise _error(f"{name}: {ROLES}")
    contents = {message["role"]: message["content"] for message in messages}
    roles = [message["role"] for message in messages]
    in_order = [role for role in ("system", "user", "assistant") if role in roles]
    if roles != in_order or "user" not in roles:
        raise _error(f"{name}: {ROLES}")
    for role in ("system", "assistant"):
        if re.search(r"{[{%#]", contents.get(role, "")):
            raise _error(f"{name}: the columns of the data go into the user's content only")
    prefill = contents.get("assistant", "").rstrip("\n")
    return PromptTemplate(contents["user"], contents.get("system"), prefill)


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict)
        and message.keys() == {"role", "content"}
        and all(isinstance(value, str) for value in message.values())
    )


@cache
def _compiled(text: str) -> "Template":
    from jinja2 import StrictUndefined, UndefinedError
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # a file may come from anywhere

    def present(value: Any) -> Any:
        if value is None:
            raise UndefinedError("a column that is filled in holds nothing")
        return value

    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True, finalize=present
    )
    return environment.from_string(text)


def _error(problem: str) -> InputError:
    return InputError(problem, key="prompt_template")
