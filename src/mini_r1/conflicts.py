"""What several keys of a recipe may not be together.

The libraries refuse these after the model is loaded, at the first step, or not at all. Left out:
what depends on the machine (launch/plan.py) or on the model and data (launch/doctor.py).
"""

import difflib
from collections.abc import Callable, Iterator
from typing import Any

from mini_r1.keys import TRAINING_CLASSES, generation_keys, keys_of, shortened

# What stops TRL 1.16 at the first sampling or has a key of its own: reason -> generation_kwargs.
REFUSED_IN_GENERATION = {
    "it wants the tokenizer, which TRL does not give to generate; leave it out, a completion ends "
    "with the model's eos_token": {"stop_strings", "token_healing"},
    "write num_generations, a key of the recipe": {"num_return_sequences", "n"},
    "write max_completion_length, a key of the recipe": {"max_new_tokens", "max_tokens"},
    "TRL wants the tokens alone; leave it out": {"return_dict_in_generate"},
    "TRL does not compile; leave it out": {"compile_config", "disable_compile"},
    "it takes one completion at a time; leave it out": {
        *("assistant_early_exit", "is_assistant", "prompt_lookup_num_tokens", "use_mtp")
    },
    "transformers has it no longer; leave it out": {
        *("constraints", "dola_layers", "force_words_ids", "num_beam_groups")
    },
}


def conflicts(get: Callable[[str], Any]) -> Iterator[tuple[Any, str, str]]:
    """What the libraries refuse late or get wrong: whether it is so, at which key, what to do.

    Args:
        get: the value of any key, a recipe's or its default.
    """

    # The model.
    yield (
        not get("model_name_or_path"),
        "model_name_or_path",
        "missing; write tiny_base, a folder, or a model id of the hub",
    )
    both = "{} is true, too; choose one"
    yield get("load_in_8bit") and get("load_in_4bit"), "load_in_8bit", both.format("load_in_4bit")
    for key in ("load_in_8bit", "load_in_4bit"):
        yield (
            get(key) and not get("use_peft"),
            key,
            "quantized weights cannot be trained themselves; write use_peft: true",
        )
    given = get("model_init_kwargs") or {}
    untrusted = "trust_remote_code"
    yield (
        get(untrusted) or given.get(untrusted),
        untrusted if get(untrusted) else "model_init_kwargs",
        "code that a model brings is never run; leave trust_remote_code out",
    )
    for key, safe in (("use_safetensors", True), ("weights_only", True)):
        yield (
            given.get(key, safe) is not safe,
            "model_init_kwargs",
            f"pickles are never loaded; leave {key} out",
        )
    yield get("bf16") and get("fp16"), "fp16", both.format("bf16")
    narrow = get("dtype") in ("float16", "bfloat16")
    yield (
        get("fp16") and narrow and not get("use_peft"),
        "dtype",
        f"{get('dtype')} weights cannot be trained with fp16: true, whose loss scale wants wider "
        "gradients; write float32",
    )
    full = "bf16_full_eval"
    yield get(full) and get("fp16_full_eval"), "fp16_full_eval", both.format(full)
    liger = "use_liger_kernel"
    yield get(liger) and get("use_cpu"), liger, f"needs a GPU; write {liger}: false"

    # The rewards.
    weights = get("reward_weights")
    if weights is not None:
        count = len(get("reward_funcs"))
        yield (
            len(weights) != count,
            "reward_weights",
            f"{len(weights)} weights for {count} reward_funcs",
        )
        yield not any(weights), "reward_weights", "all are 0, so nothing would be learned"
    yield (
        get("remove_unused_columns"),
        "remove_unused_columns",
        "the rewards need the other columns; leave it out",
    )

    # The loss.
    for wrong, problem in (
        (get("beta") == 0, "without beta there is no reference model"),
        (get("use_peft"), "with use_peft there is no reference model of its own"),
    ):
        yield get("sync_ref_model") and wrong, "sync_ref_model", f"{problem}; leave it out"
    low, high = get("entropy_coef_min"), get("entropy_coef_max")
    yield (
        get("use_adaptive_entropy") and low > high,
        "entropy_coef_min",
        f"{low} is more than entropy_coef_max: {high}",
    )

    # The schedule.
    yield (
        get("resume_from_checkpoint") is not None,
        "resume_from_checkpoint",
        "a run resumes by itself; to start from another model, write its folder as "
        "model_name_or_path",
    )
    wanted = {
        "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
        "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
        "warmup_stable_decay": ("num_decay_steps",),
    }.get(get("lr_scheduler_type"))
    yield (
        wanted and not any(key in (get("lr_scheduler_kwargs") or {}) for key in wanted),
        "lr_scheduler_type",
        f"needs lr_scheduler_kwargs: {{{wanted and wanted[0]}: ...}}",
    )
    yield (
        (get("optim") or "").startswith(("galore", "apollo")) and not get("optim_target_modules"),
        "optim",
        "needs optim_target_modules",
    )
    yield (
        get("auto_find_batch_size"),
        "auto_find_batch_size",
        "would cut groups; write a smaller per_device_train_batch_size",
    )
    for key in ("dataloader_prefetch_factor", "dataloader_persistent_workers"):
        yield get(key) and not get("dataloader_num_workers"), key, "needs dataloader_num_workers"

    # The evaluation, which is ours and not the Trainer's.
    yield (
        get("eval_strategy") == "steps" and not get("eval_steps"),
        "eval_strategy",
        "write 'no', or 'steps' together with eval_steps",
    )
    yield get("eval_on_start"), "eval_on_start", "leave it out: every run starts with an evaluation"
    yield (
        get("load_best_model_at_end"),
        "load_best_model_at_end",
        "leave it out: the Trainer evaluates nothing here, so it knows no best model",
    )
    trackers = get("report_to")
    yield (
        isinstance(trackers, list) and len(trackers) > 1 and {"all", "none"} & set(trackers),
        "report_to",
        "all and none stand alone",
    )
    yield (
        get("log_completions_hub_repo") and not get("log_completions"),
        "log_completions_hub_repo",
        "needs log_completions: true",
    )
    strategy = get("hub_strategy")
    yield (
        strategy in ("checkpoint", "all_checkpoints"),
        "hub_strategy",
        f"{strategy} would make pickles public; write every_save or end",
    )

    # Sampling.
    for key, problem in _refused_in_generation(get):
        yield True, "generation_kwargs", f"{key}: {problem}"
    if get("use_vllm"):
        yield from _vllm_conflicts(get)


def _refused_in_generation(get: Callable[[str], Any]) -> Iterator[tuple[str, str]]:
    """The generation_kwargs that would stop the first sampling, or be passed over in silence.

    Without vLLM they go into transformers' GenerationConfig.
    """
    given = get("generation_kwargs") or {}
    known = generation_keys() if given and not get("use_vllm") else frozenset()
    for key in given:
        reason = next((why for why, keys in REFUSED_IN_GENERATION.items() if key in keys), None)
        if reason:
            yield key, reason
        elif key in known and key in keys_of(TRAINING_CLASSES):
            yield key, "write it as a key of the recipe"
        elif known and key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            yield key, f"unknown; did you mean '{near[0]}'?" if near else "unknown"


def _vllm_conflicts(get: Callable[[str], Any]) -> Iterator[tuple[Any, str, str]]:
    served = get("vllm_mode") == "server"
    yield (
        served and get("vllm_enable_sleep_mode"),
        "vllm_enable_sleep_mode",
        "a server never sleeps; write false, or vllm_mode: colocate",
    )
    yield (
        not served and get("load_in_8bit"),
        "load_in_8bit",
        "vLLM cannot share 8-bit weights; write load_in_4bit",
    )
    yield (
        get("use_transformers_continuous_batching"),
        "use_transformers_continuous_batching",
        "use_vllm is true, too; choose one",
    )
    url = get("vllm_server_base_url")
    yield (
        url and not url.startswith(("http://", "https://")),
        "vllm_server_base_url",
        f"want http://HOST:PORT, got '{shortened(url or '')}'",
    )
    length, completion = get("vllm_max_model_length"), get("max_completion_length")
    prompt = get("max_prompt_length")
    needed = prompt + completion
    yield (
        not url and length and length < needed,  # of a server that is given, it says nothing
        "vllm_max_model_length",
        f"{length} tokens cannot hold max_prompt_length: {prompt} and "
        f"max_completion_length: {completion}; write {needed}, or leave it out",
    )
    if get("vllm_importance_sampling_correction"):
        mode = get("vllm_importance_sampling_mode")
        low = get("vllm_importance_sampling_clip_min")
        high = get("vllm_importance_sampling_clip_max")
        bounded = low is not None and high is not None
        yield (
            bounded and low >= high,
            "vllm_importance_sampling_clip_min",
            f"{low} is not less than vllm_importance_sampling_clip_max: {high}",
        )
        yield (
            mode.endswith("truncate") and low is None and high is None,
            "vllm_importance_sampling_mode",
            f"{mode} needs vllm_importance_sampling_clip_min or _clip_max",
        )
        yield (
            get("loss_type") == "vespo" and not mode.startswith("token"),
            "vllm_importance_sampling_mode",
            "loss_type: vespo needs token_truncate or token_mask",
        )
