"""Keys that exclude each other: told by us at once, by the libraries late or never."""

import pytest
import yaml

from mini_r1 import InputError
from mini_r1.recipe import load_recipe

MODEL = "model_name_or_path: tiny_base\n"
VLLM = "use_vllm: true|"
NO_BOUND = "vllm_importance_sampling_clip_max: null"
# Lines apart by |, and what must be said about them.
CONFLICTS = {
    "load_in_4bit: true": "load_in_4bit: quantized weights cannot be trained themselves; write use",
    "load_in_8bit: true|load_in_4bit: true|use_peft: true": "load_in_8bit: load_in_4bit is true, t",
    "bf16: true|fp16: true": "line 3: fp16: bf16 is true, too; choose one",
    "dtype: float16|fp16: true": "dtype: float16 weights cannot be trained with fp16: true, whose",
    "bf16_full_eval: true|fp16_full_eval: true": "fp16_full_eval: bf16_full_eval is true, too",
    "use_cpu: true|use_liger_kernel: true": "use_liger_kernel: needs a GPU",
    "remove_unused_columns: true": "remove_unused_columns: the rewards need the other columns",
    "sync_ref_model: true": "sync_ref_model: without beta there is no reference model",
    "sync_ref_model: true|beta: 0.1|use_peft: true": "with use_peft there is no reference model",
    "use_adaptive_entropy: true|entropy_coef_min: 2": "entropy_coef_min: 2 is more than",
    "lr_scheduler_type: cosine_with_min_lr": "needs lr_scheduler_kwargs: {min_lr: ...}",
    "lr_scheduler_type: cosine_warmup_with_min_lr": "needs lr_scheduler_kwargs: {min_lr: ...}",
    "lr_scheduler_type: warmup_stable_decay": "needs lr_scheduler_kwargs: {num_decay_steps: ...}",
    "optim: galore_adamw": "optim: needs optim_target_modules",
    "auto_find_batch_size: true": "auto_find_batch_size: would cut groups",
    "dataloader_prefetch_factor: 2": "dataloader_prefetch_factor: needs dataloader_num_workers",
    "dataloader_persistent_workers: true": "needs dataloader_num_workers",
    "eval_strategy: steps": "eval_strategy: write 'no', or 'steps' together with eval_steps",
    "eval_on_start: true": "eval_on_start: leave it out: every run starts with an evaluation",
    "load_best_model_at_end: true": "load_best_model_at_end: leave it out",
    "log_completions_hub_repo: a/b": "log_completions_hub_repo: needs log_completions: true",
    "push_to_hub: true|hub_strategy: checkpoint": "checkpoint would make pickles public; write eve",
    "trust_remote_code: true": "trust_remote_code: code that a model brings is never run; leave",
    "model_init_kwargs: {trust_remote_code: true}": "code that a model brings is never run",
    "model_init_kwargs: {use_safetensors: false}": "pickles are never loaded; leave use_safetens",
    "model_init_kwargs: {weights_only: false}": "pickles are never loaded; leave weights_only out",
    VLLM + "vllm_mode: server|vllm_enable_sleep_mode: true": "a server never sleeps; write false",
    VLLM + "load_in_8bit: true|use_peft: true": "load_in_8bit: vLLM cannot share 8-bit weights",
    VLLM + "use_transformers_continuous_batching: true": "use_vllm is true, too; choose one",
    VLLM + "vllm_server_base_url: localhost:8000": "want http://HOST:PORT, got 'localhost:8000'",
    VLLM + "vllm_max_model_length: 500": "vllm_max_model_length: 500 tokens cannot hold "
    "max_prompt_length: 256 and max_completion_length: 1024; write 1280, or leave it out",
    VLLM + "vllm_importance_sampling_clip_min: 3": "3 is not less than vllm_importance_sampling_",
    f"{VLLM}vllm_importance_sampling_mode: token_truncate|{NO_BOUND}": (
        "token_truncate needs vllm_importance_sampling_clip_min or _clip_max"
    ),
    VLLM + "loss_type: vespo": "loss_type: vespo needs token_truncate or token_mask",
}


@pytest.mark.parametrize("lines", CONFLICTS)
def test_conflicts_are_explained_in_one_line(tmp_path, lines):
    path = tmp_path / "r.yaml"
    path.write_text(MODEL + lines.replace("|", "\n") + "\n")
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    assert CONFLICTS[lines] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "lines",
    [
        "lr_scheduler_type: cosine_with_min_lr|lr_scheduler_kwargs: {min_lr_rate: 0.1}",
        "load_in_4bit: true|use_peft: true",
        "use_cpu: true|use_liger_kernel: false",
        "dataloader_persistent_workers: true|dataloader_num_workers: 2",
        "vllm_max_model_length: 500",  # without vLLM it says nothing
        "vllm_enable_sleep_mode: true|vllm_mode: server",
        VLLM + "vllm_max_model_length: 1280",
        VLLM + "vllm_max_model_length: 500|vllm_server_base_url: http://gpu:8000",
        VLLM + "vllm_importance_sampling_correction: false|loss_type: vespo",
    ],
)
def test_what_is_no_conflict(tmp_path, lines):
    (tmp_path / "r.yaml").write_text(MODEL + lines.replace("|", "\n") + "\n")
    assert load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    "lines",
    [
        "bf16: true|fp16: true",
        "bf16_full_eval: true|fp16_full_eval: true",
        "auto_find_batch_size: true",
        "dataloader_prefetch_factor: 2",
        "load_best_model_at_end: true",
        "log_completions_hub_repo: a/b",
        "vllm_importance_sampling_clip_min: 3",
        f"vllm_importance_sampling_mode: token_truncate|{NO_BOUND}",
    ],
)
def test_the_arguments_refuse_these_too(tmp_path, lines):
    from trl import GRPOConfig

    values = yaml.safe_load(lines.replace("|", "\n"))
    with pytest.raises(ValueError):
        GRPOConfig(**{"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, **values})
