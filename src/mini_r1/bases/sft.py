"""Supervised fine-tuning on search traces: which tokens are learned, by which arguments."""

from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer


def labelled(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    completions: Sequence[str],
    hidden_after: Sequence[Set[object]] | None = None,
) -> Dataset:
    """The columns input_ids and labels; what is learned are the completions.

    Args:
        completions: with the token that ends them.
        hidden_after: for each completion the tokens after which the next one is not learned.

    Returns:
        a row per completion; a label is -100 where nothing is learned.
    """
    hidden_after = hidden_after or [frozenset()] * len(completions)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    prompt_ids, completion_ids = (
        tokenizer(list(texts))["input_ids"] for texts in (prompts, completions)
    )
    for prompt, completion, hiding in zip(prompt_ids, completion_ids, hidden_after, strict=True):
        before = [None, *completion[:-1]]
        labels = [
            -100 if last in hiding else token
            for last, token in zip(before, completion, strict=True)
        ]
        columns["input_ids"].append(prompt + completion)
        columns["labels"].append([-100] * len(prompt) + labels)
    return Dataset.from_dict(columns)


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    folder: Path,
    **settings: Any,
) -> None:
    """Train on every row once, and save model and tokenizer as a folder that loads like any other.

    Args:
        dataset: of `labelled`.
        settings: TRL's `SFTConfig`'s, beside those that all traces want.
    """
    arguments = SFTConfig(
        output_dir=str(folder),
        num_train_epochs=1,
        lr_scheduler_type="cosine",
        train_sampling_strategy="group_by_length",  # half of all tokens would be padding otherwise
        max_length=None,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        **settings,
    )
    SFTTrainer(
        model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer
    ).train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
