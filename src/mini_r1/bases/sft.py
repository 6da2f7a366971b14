"""Supervised fine-tuning on searches: one way for a base from nothing and a pretrained model.

    mini-r1 base sft MODEL --recipe RECIPE --output DIR

teaches a pretrained model the form that the rewards ask for, by searches in plain English
(`english.py`) for the recipe's puzzles and with its prompt. Held-out puzzles never appear. The
recipe then trains what this leaves in DIR.
"""

from collections.abc import Sequence, Set
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer

from mini_r1 import InputError
from mini_r1.bases.english import searches
from mini_r1.data import load_split, puzzles_of
from mini_r1.manifest import versions, weights_hash
from mini_r1.model import load_merged, load_tokenizer, model_path
from mini_r1.recipe import load_recipe
from mini_r1.run import MANIFEST_FILE, new_folder, weights_of, write_json, write_recipe

# The form is learned in 25 such steps (docs/log.md); no other values were tried.
BATCH_SIZE = 8
LEARNING_RATE = 3e-4


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
    prompt_ids = tokenizer(list(prompts))["input_ids"]
    completion_ids = tokenizer(list(completions), add_special_tokens=False)["input_ids"]
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


def teach(name: str, recipe_path: str, output: Path, num_traces: int) -> None:
    """Fine-tune a model on searches in plain English, and save it as a new folder.

    Args:
        name: a run folder, an embedded base, a model folder, or a model id of the hub.
        recipe_path: says puzzles, prompt, seed and the most tokens of a completion.

    Raises:
        InputError: no such model, data or recipe, a model that is not whole, no search that is
            short enough, or the folder exists.
    """
    recipe, weights = load_recipe(recipe_path, to_train=False), weights_of(name)
    task, seed = recipe.task, recipe.get("seed")
    max_completion_length = recipe.get("max_completion_length")
    kwargs = recipe.get("chat_template_kwargs")
    with new_folder(output) as folder:
        # what to learn: searches that the recipe's completions have room for
        tokenizer = load_tokenizer(weights)
        render = task.template.renderer(tokenizer, kwargs)
        examples = searches(
            puzzles_of(load_split(task).train),
            num_traces,
            seed,
            fits=lambda text: len(tokenizer(text)["input_ids"]) < max_completion_length,
        )
        prompts = [render(puzzle.columns) for puzzle, _ in examples]
        completions = [f"{completion}{tokenizer.eos_token}" for _, completion in examples]

        # every search once; the weights in float32, where small updates are not rounded away
        set_seed(seed)
        model = load_merged(weights)
        if getattr(model, "is_quantized", False):
            raise InputError("quantized; teach the whole model that it comes from", where=name)
        model.requires_grad_(True)  # what was merged was frozen
        has_gpu = torch.cuda.is_available()
        fine_tune(
            model.float(),
            tokenizer,
            labelled(tokenizer, prompts, completions),
            folder,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            warmup_steps=0.05,
            bf16=has_gpu,
            use_cpu=not has_gpu,
            seed=seed,
            logging_steps=10,
        )

        # what `mini-r1 eval` and `play` need to know of it, and what it was made from
        own_recipe = {
            "model_name_or_path": name,
            **task.as_dict(),
            "max_completion_length": max_completion_length,
            **({"chat_template_kwargs": dict(kwargs)} if kwargs else {}),
        }
        write_recipe(folder, own_recipe)
        manifest = {
            "made_by": "mini-r1 base sft",
            "model": {"name": name, "sha256": weights_hash(model_path(weights))},
            "seed": seed,
            "num_traces": num_traces,
            "batch_size": BATCH_SIZE,
            "learning_rate": LEARNING_RATE,
            "data_sha256": sha256("".join(prompts + completions).encode()).hexdigest(),
            "weights_sha256": weights_hash(folder),
            "versions": versions(),
        }
        write_json(folder / MANIFEST_FILE, manifest)
    print(f"{output}: {name}, taught on {num_traces} searches")
