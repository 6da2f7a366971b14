import re

import pytest
from tokenizers.normalizers import Lowercase, Replace

from mini_r1 import InputError
from mini_r1.completion import THINK_CLOSE, THINK_OPEN
from mini_r1.model import EMBEDDED_BASES, load_tokenizer
from mini_r1.prompts import (
    MINI_R1_SYSTEM,
    PROMPT_TEMPLATES,
    THINK_PREFILL,
    PromptTemplate,
    get_prompt_template,
)
from tests.tiny_models import CHAT_TEMPLATES, CHATML, build_tokenizer, trl_template

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
    tokenizer = build_tokenizer("gpt2", chat_template=None)
    prompt = PROMPT_TEMPLATES["tinyzero"].render([1, 2], 3, tokenizer)
    assert prompt.startswith("A conversation between User and Assistant.")
    with pytest.raises(InputError, match=r"prompt_template: .* write tinyzero for base models"):
        PROMPT_TEMPLATES["mini-r1"].render([1, 2], 3, tokenizer)


# ---- The gate -------------------------------------------------------------------------------

NUMS, TARGET = [44, 19, 35], 98
ROW = {"nums": NUMS, "target": TARGET}
# All that TRL ships, those that it changes for its own training aside.
TRL_TEMPLATES = sorted(
    path.stem for path in CHAT_TEMPLATES.glob("*.jinja") if "_training" not in path.stem
)
FOR_IMAGES = {  # they want a message in parts, and print no plain text
    "idefics3": "drops or rewrites the user's text",
    "llava_next": "drops or rewrites the user's text",
    "smolvlm": "drops or rewrites the user's text",
}


def with_template(chat_template, **changes):
    changes = {"bos": "<bos>", "special": ("<|im_start|>",), **changes}
    return build_tokenizer("qwen2", chat_template=chat_template, **changes)


def rendered(name, tokenizer, **kwargs):
    return PROMPT_TEMPLATES[name].renderer(tokenizer, kwargs)(ROW)


def refusal(tokenizer, name="mini-r1", **kwargs):
    with pytest.raises(InputError) as caught:
        rendered(name, tokenizer, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_trl_ships_as_many_templates_as_were_looked_at():
    assert len(TRL_TEMPLATES) == 41


@pytest.mark.parametrize("chat_template", sorted({*TRL_TEMPLATES} - {*FOR_IMAGES}))
def test_whatever_the_chat_template_the_turn_is_the_prefill(chat_template):
    tokenizer = with_template(trl_template(chat_template), adds="<bos> $A")
    for name, template in PROMPT_TEMPLATES.items():
        prompt = rendered(name, tokenizer)
        question = template.question(ROW)
        before, _, turn = prompt.partition(question)
        assert (template.system or "") in before
        header = turn.removesuffix(template.prefill or "")
        assert header != turn or template.prefill is None
        assert THINK_OPEN not in header
        assert THINK_CLOSE not in header
        assert tokenizer(prompt)["input_ids"].count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("chat_template", FOR_IMAGES)
def test_a_chat_template_for_images_is_refused(chat_template):
    fault = refusal(with_template(trl_template(chat_template)))
    assert f"prompt_template: the model's chat template {FOR_IMAGES[chat_template]}" in fault


@pytest.mark.parametrize("name", [name for name in PROMPT_TEMPLATES if name != "tinyzero"])
@pytest.mark.parametrize("model", [*EMBEDDED_BASES, "qwen2_5", "llama3"])
def test_nothing_is_changed_in_what_is_right(model, name):
    """Byte for byte what the library makes of a message that is to be continued."""
    is_base, template = model in EMBEDDED_BASES, PROMPT_TEMPLATES[name]
    tokenizer = load_tokenizer(model) if is_base else with_template(trl_template(model))
    messages = [{"role": "system", "content": template.system}] if template.system else []
    messages += [
        {"role": "user", "content": template.question(ROW)},
        {"role": "assistant", "content": template.prefill},
    ]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert rendered(name, tokenizer) == expected


CONVERSATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
HEADER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "assistant",
    [
        "",  # dropped
        "{{ m.content | upper }}",
        "{{ m.content | replace('<think>', '') }}",
        "<think>\nWell.\n</think>\n{{ m.content }}",
        "{{ raise_exception('no such role') }}",
    ],
)
def test_a_template_that_spoils_the_assistants_message_still_has_its_header(assistant):
    chat_template = CONVERSATION.replace(
        "{{ m.content }}",
        "{% if m.role == 'assistant' %}" + assistant + "{% else %}{{ m.content }}{% endif %}",
    )
    prompt = rendered("mini-r1", with_template(chat_template + HEADER))
    assert prompt.endswith(f"Think step by step inside <think> tags.{ASSISTANT}{THINK_PREFILL}")


@pytest.mark.parametrize(
    "opening",
    ["<think>\n", "<think>\n\n</think>\n\n", "<think></think>", "</think>", "<think>\n<think>\n"],
)
def test_a_think_block_of_the_templates_own_gives_way_to_the_prefill(opening):
    turn = f"<|im_start|>assistant\n{opening}"
    always = CONVERSATION.replace(
        "{{ m.content }}", "{{ '" + opening + "' if m.role == 'assistant' }}{{ m.content }}"
    )
    generated = CONVERSATION + HEADER.replace("<|im_start|>assistant\n", turn)
    for chat_template in (always, generated):
        prompt = rendered("compact", with_template(chat_template))
        assert prompt.endswith(f" once.{ASSISTANT}<think>")


@pytest.mark.parametrize(
    "system",
    [
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}",
        "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}",
    ],
)
def test_the_system_text_goes_to_the_user_where_it_has_no_turn(system):
    prompt = rendered("mini-r1", with_template(system + CONVERSATION + HEADER))
    assert prompt.startswith(f"<|im_start|>user\n{MINI_R1_SYSTEM}\n\nUsing the numbers")


@pytest.mark.parametrize(
    ("chat_template", "fault"),
    [
        ("{% for m in messages %}{{ m.content }}", "fails (Unexpected end of template"),
        ("{{ messages[0].nothing.at_all }}", "fails ('dict object' has no attribute 'nothing')"),
        ("{{ 1 / 0 }}", "fails (division by zero)"),
        ("{{ raise_exception('Roles must\nalternate') }}", "fails (Roles must alternate)"),
        ("<|im_start|>user\nHi!" + HEADER, "drops or rewrites the user's text"),
        (CONVERSATION.replace("m.content", "m.content | upper"), "drops or rewrites the user's"),
        (CONVERSATION.replace("m.content", "m.content | e"), "drops or rewrites the user's text"),
        (CONVERSATION.replace("m.content", "m.content[:60]"), "drops or rewrites the user's text"),
        (CONVERSATION.replace("m.content", "m.content * 2"), "repeats the user's text"),
        (
            CONVERSATION.replace("{{ m.role }}\n", "{{ m.role }}\n<think>\nI know.\n</think>\n")
            + HEADER.replace("assistant\n", "assistant\n<think>\nI know.\n</think>\n"),
            "thinks in the assistant's place",
        ),
        (
            "{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}",
            "opens no turn for the assistant",
        ),
        (
            (CONVERSATION + HEADER).replace("<|im_start|>", "<|im_start|>a\n<|im_start|>"),
            "opens the assistant's turn twice",
        ),
        ("<bos><bos>" + CONVERSATION + HEADER, "prints <bos> twice"),
    ],
)
def test_what_a_chat_template_does_wrong_is_said_in_one_line(chat_template, fault):
    assert f"prompt_template: the model's chat template {fault}" in refusal(
        with_template(chat_template)
    )


def test_the_recipe_speaks_to_the_chat_template():
    tokenizer = with_template(trl_template("qwen3_8"))
    silent = rendered("compact", tokenizer)
    assert "Reasoning effort is set to xhigh" in silent
    assert "xhigh" not in rendered("compact", tokenizer, reasoning_effort="low")
    assert "xhigh" not in rendered("compact", tokenizer, enable_thinking=False)
    typo = refusal(tokenizer, enable_thinkin=False)
    assert typo.startswith("chat_template_kwargs: the model's chat template knows no '")
    unused = refusal(tokenizer, name="tinyzero", enable_thinking=False)
    assert "this prompt_template uses no chat template" in unused
    assert "knows no" in refusal(tokenizer, add_generation_prompt=True)


# ---- Special tokens around a text -----------------------------------------------------------


@pytest.mark.parametrize("printed", ["", "{{ bos_token }}", "<bos>", "\n {{ bos_token }}"])
@pytest.mark.parametrize("adds", ["$A", "<bos> $A"])
def test_one_bos_if_any(adds, printed):
    tokenizer = with_template(printed + CONVERSATION + HEADER, adds=adds)
    ids = tokenizer(rendered("mini-r1", tokenizer))["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == (1 if printed or adds != "$A" else 0)


def test_several_tokens_that_are_printed_and_added_stand_there_once():
    tokenizer = with_template(
        trl_template("glm4moe"), bos=None, special=("[gMASK]", "<sop>"), adds="[gMASK] <sop> $A"
    )
    prompt = tokenizer.decode(tokenizer(rendered("mini-r1", tokenizer))["input_ids"])
    assert (prompt.count("[gMASK]"), prompt.count("<sop>")) == (1, 1)


def test_a_bos_that_opens_every_turn_may_do_so():
    """As SmolLM2's: its BOS is <|im_start|>."""
    tokenizer = with_template(CHATML, bos="<|im_start|>")
    ids = tokenizer(rendered("mini-r1", tokenizer))["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 3


def test_a_tokenizer_that_ends_every_text_is_refused():
    fault = refusal(with_template(CHATML, adds="<bos> $A <|im_end|>"))
    assert "model_name_or_path: its tokenizer ends every text with <|im_end|>" in fault


@pytest.mark.parametrize("normalizer", [Lowercase(), Replace("equals", ""), Replace("solve", "")])
def test_a_tokenizer_that_cannot_spell_the_prompt_is_refused(normalizer):
    tokenizer = with_template(CHATML)
    tokenizer.backend_tokenizer.normalizer = normalizer
    assert "model_name_or_path: its tokenizer cannot spell the prompt" in refusal(tokenizer)


# ---- Templates of one's own -----------------------------------------------------------------

CHAT_FILE = """
- role: system
  content: You say things.
- role: user
  content: |
    Say backwards: {{ words | join(' ') }}
- role: assistant
  content: |
    Well.
    <think>
"""


def test_a_chat_in_a_file_passes_the_same_gate(tmp_path):
    (tmp_path / "p.yaml").write_text(CHAT_FILE)
    template = get_prompt_template(str(tmp_path / "p.yaml"))
    assert template == PromptTemplate(
        "Say backwards: {{ words | join(' ') }}\n", "You say things.", "Well.\n<think>"
    )
    assert template.opens_think
    row = {"words": ["a", "b"], "other": 1}
    render = template.renderer(build_tokenizer("qwen3"), None, row)
    assert render(row) == (
        "<|im_start|>system\nYou say things.<|im_end|>\n"
        "<|im_start|>user\nSay backwards: a b<|im_end|>\n"
        "<|im_start|>assistant\nWell.\n<think>"
    )
    assert "Say backwards: c<|im_end|>" in render({"words": ["c"]})


@pytest.mark.parametrize("chat_template", sorted({*TRL_TEMPLATES} - {*FOR_IMAGES}))
def test_without_a_message_of_the_assistant_the_model_opens_its_turn(tmp_path, chat_template):
    (tmp_path / "p.yaml").write_text("- {role: user, content: 'Say backwards: {{ words }}'}\n")
    template = get_prompt_template(str(tmp_path / "p.yaml"))
    assert not template.opens_think
    tokenizer, row = with_template(trl_template(chat_template)), {"words": "a b"}
    prompt = template.renderer(tokenizer, None, row)(row)
    assert prompt.count("Say backwards: a b") == 1
    assert not re.search(r"</?think>\s*$", prompt)


def test_a_text_in_a_file_is_the_whole_prompt(tmp_path):
    (tmp_path / "p.jinja").write_text("Q: {{ a }} + {{ b }}\nA: <think>\n")
    template = get_prompt_template(str(tmp_path / "p.jinja"))
    assert template.opens_think
    row = {"a": 1, "b": 2.5}
    tokenizer = build_tokenizer("llama")
    render = template.renderer(tokenizer, None, row)
    assert render(row) == "Q: 1 + 2.5\nA: <think>"


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("none.yaml", None, "none.yaml cannot be read: No such file or directory"),
        ("p.yaml", "- [", "p.yaml: line 1: not valid YAML"),
        ("p.yaml", "user: hello", "want a list of messages"),
        ("p.yaml", "- {role: user}", "want a list of messages"),
        ("p.yaml", "- {role: user, content: 3}", "want a list of messages"),
        ("p.yaml", "- {role: assistant, content: a}", "of which user alone is needed"),
        (
            "p.yaml",
            "[{role: user, content: a}, {role: system, content: b}]",
            "system, user and assistant in this order",
        ),
        (
            "p.yaml",
            "[{role: user, content: a}, {role: user, content: b}]",
            "system, user and assistant in this order",
        ),
        (
            "p.yaml",
            "[{role: system, content: '{{ a }}'}, {role: user, content: b}]",
            "the columns of the data go into the user's content only",
        ),
        ("p.yaml", "- {role: user, content: ' '}", "asks nothing"),
        ("p.jinja", "", "asks nothing"),
        ("p.jinja", "a\n{{ b }\n", "unexpected '}', in '{{ b }'"),
        ("p.jinja", f"{{{{ {'(' * 5000} }}}}", "p.jinja is nested too deeply"),
    ],
)
def test_a_file_that_cannot_be_used_is_explained(tmp_path, monkeypatch, name, text, problem):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as caught:
        get_prompt_template(name)
    assert str(caught.value).startswith("prompt_template: ")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{{ wrods }}", "'wrods' is undefined; the row has the columns words, none"),
        ("{{ words.x.y }}", "the row has the columns words, none"),
        ("{{ none }}", "a column that is filled in holds nothing"),
        ("{{ cycler.__init__.__globals__.os.name }}", "access to attribute '__init__'"),
        ("{{ words.__class__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ words / 0 }}", "cannot be filled in"),
    ],
)
def test_a_row_that_cannot_be_filled_in_is_explained(text, problem):
    with pytest.raises(InputError, match=r"^prompt_template: ") as caught:
        PromptTemplate(text).question({"words": "a", "none": None})
    assert problem in str(caught.value)
