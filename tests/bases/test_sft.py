from mini_r1.bases.sft import labelled
from mini_r1.model import load_tokenizer


def test_the_completion_is_learned_and_what_is_hidden_is_not():
    tokenizer = load_tokenizer("tiny_base")
    completion = f"\n4+4=8, 8+6=14 high\n4*4=16, 16-6=10 yes\n</think>{tokenizer.eos_token}"
    prompt_ids, ids = (tokenizer(text)["input_ids"] for text in ("Make 10<think>", completion))
    newline = tokenizer("\n")["input_ids"][0]
    plain, hiding = labelled(
        tokenizer, ["Make 10<think>"] * 2, [completion] * 2, [set(), {newline}]
    )
    for row in (plain, hiding):
        assert row["input_ids"] == prompt_ids + ids
        assert row["labels"][: len(prompt_ids)] == [-100] * len(prompt_ids)
    assert plain["labels"][len(prompt_ids) :] == ids
    shown = hiding["labels"][len(prompt_ids) :]
    for position, token in enumerate(ids):
        after_newline = position > 0 and ids[position - 1] == newline
        assert shown[position] == (-100 if after_newline else token)
