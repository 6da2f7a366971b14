"""What we do behind a library's back, one function each: why, since which version, until when.

Nothing else in the package touches a private name of a library. For every function
tests/test_quirks.py has a test that fails once the library no longer needs it: then the function
goes. Imports are late, since most of these libraries are slow to import.
"""

import logging
import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.tensorboard import SummaryWriter
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from trl import GRPOConfig, GRPOTrainer


def quiet_cpu_imports() -> None:
    """Keep two libraries from complaining at import that they find no GPU and no hub kernels.

    DeepSpeed 0.19.8 probes for accelerators and warns, unless DS_ACCELERATOR says cpu;
    bitsandbytes 0.50.2 warns that its CPU kernels are not in the cache.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def go_offline() -> None:
    """Tell the libraries of this process, and the processes it starts, to ask the hub for nothing.

    huggingface_hub 1.33 and datasets 5.2 read HF_HUB_OFFLINE once, when they are imported.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    for module in ("huggingface_hub.constants", "datasets.config"):
        if module in sys.modules:
            setattr(sys.modules[module], "HF_HUB_OFFLINE", True)  # noqa: B010


def unnumber_cpu(args: "GRPOConfig") -> None:
    """Name the CPU of a process plainly.

    accelerate 1.15 numbers the CPUs of several processes ("cpu:1"), and torch 2.13's torch.load,
    which restores the random state on resuming, knows no such device.
    """
    import torch

    if args.device.type == "cpu":
        args._setup_devices = torch.device("cpu")


def keep_4bit_trainable(model: "nn.Module | None") -> None:
    """Keep 4-bit weights in the layout that can be trained.

    bitsandbytes 0.50 packs them anew at their first evaluation on CPUs with AVX512-BF16, and its
    backward pass cannot read that layout.
    """
    for module in model.modules() if model is not None else ():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010


def keep_adapters_wide(model: "nn.Module | None") -> None:
    """Train adapters in 32 bit, whatever the weights are that they go with.

    TRL 1.16 casts those of quantized weights to bf16, which rounds an update of 1e-5 away. To be
    called before the optimizer is made.
    """
    for weight in model.parameters() if model is not None else ():
        if weight.requires_grad:
            weight.data = weight.data.float()


def seed_colocated_vllm(args: "GRPOConfig") -> None:
    """Let colocated vLLM sample by the recipe's seed, each rank its own.

    vLLM 0.31 draws from this process's generators, which it seeds with what TRL 1.16 gives it: the
    number of the rank, or of the group of ranks that share an engine and must draw alike.
    """
    from transformers import set_seed

    if args.use_vllm and args.vllm_mode == "colocate":
        set_seed(args.seed + args.process_index // args.vllm_tensor_parallel_size)


def unmerge_exactly(model: "nn.Module | None") -> None:
    """Have an adapter that was merged for a while leave its base as it was.

    TRL 1.16 merges it in place whenever it sends the weights to vLLM, and PEFT 0.21 takes it out
    by subtraction: rounded to 16 bit, the base drifts from the one that the adapter is saved for.
    The copy that is put back is in the memory of the CPU.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(model, PeftModel):
        return
    merge, unmerge = model.merge_adapter, model.unmerge_adapter
    kept: list[tuple[Any, Any, torch.Tensor]] = []  # a layer, its weight, and what was in it

    def keep_and_merge() -> None:
        if not kept:
            adapted = (each for each in model.modules() if isinstance(each, BaseTunerLayer))
            for layer in (each.get_base_layer() for each in adapted):
                kept.append((layer, layer.weight, layer.weight.detach().to("cpu", copy=True)))
        merge()

    def unmerge_and_restore() -> None:
        unmerge()
        for layer, weight, was in kept:
            layer.weight = weight  # which that of 4-bit weights has replaced
            weight.data.copy_(was)

    setattr(model, "merge_adapter", keep_and_merge)  # noqa: B010
    setattr(model, "unmerge_adapter", unmerge_and_restore)  # noqa: B010


def end_colocated_vllm(trainer: "GRPOTrainer") -> None:
    """End the engine that TRL 1.16 holds.

    vLLM 0.31 ends it at exit, when the process group that it uses is gone, with a traceback.
    """
    generation = getattr(trainer, "vllm_generation", None)
    if generation is not None and generation.mode == "colocate":
        generation.llm.llm_engine.engine_core.shutdown()


@contextmanager
def vllm_with_current_weights(trainer: "GRPOTrainer") -> Generator[Any]:
    """The vLLM of a training, awake, with the weights as they are now; all processes must call it.

    TRL 1.16 sends the weights and wakes colocated engines amid its own sampling only. What it
    notes about both is kept true, so that it sends nothing twice.
    """
    vllm = trainer.vllm_generation
    sleeps = vllm.mode == "colocate" and vllm.enable_sleep_mode
    if trainer.state.global_step != trainer._last_loaded_step or (
        sleeps and vllm._llm_weights_sleeping
    ):
        vllm.sync_weights()
        trainer._last_loaded_step = trainer.state.global_step
    if sleeps:
        vllm.llm.wake_up(tags=["kv_cache"])
    try:
        yield vllm
    finally:
        if sleeps:
            vllm.llm.sleep(level=2)
            vllm._llm_weights_sleeping = True


def vllm_batch(wanted: int, prompt_length: int) -> int:
    """How many completions vLLM can be asked for at once, each with a seed of its own.

    vLLM 0.31 reads at most so many tokens of prompts in a step. One that is cut in two makes it put
    back the generator of its seed, which no generator on a CPU can.
    """
    import torch

    tokens_of_a_step = 4096
    return wanted if torch.cuda.is_available() else max(1, tokens_of_a_step // prompt_length)


def show_key(address: str, header: Mapping[str, str]) -> None:
    """Have this process bring a header in every request to the vLLM server at an address.

    TRL 1.16's client can be told of none. It sends with requests, whose adapters are asked for
    further headers of each request; in the address the key would stand in the client's errors.
    """
    from urllib.parse import urlsplit

    from requests.adapters import HTTPAdapter

    def add_headers(self: HTTPAdapter, request: Any, **_: Any) -> None:
        if urlsplit(request.url).netloc == urlsplit(address.lower()).netloc:
            request.headers.update(header)

    HTTPAdapter.add_headers = add_headers


def watch_transfer(failed: Callable[[Exception], None]) -> None:
    """Call `failed` at once when the vLLM server could not take weights that this process sends.

    TRL 1.16 asks the server in a thread, and looks at its answer once everything is sent: never, if
    a worker has failed, since NCCL waits for the worker. And it asks again after an error, to which
    the server says something else.
    """
    from copy import copy

    import requests
    from trl.generation.vllm_client import VLLMClient

    post = VLLMClient._post

    def watched(self: VLLMClient, url: str, **options: Any) -> dict:
        if not url.endswith(("/init_weight_transfer_engine", "/update_weights")):
            return post(self, url, **options)
        asks_once = copy(self)
        asks_once.session = requests.Session()
        try:
            return post(asks_once, url, **options)
        except Exception as error:
            failed(error)
            raise

    VLLMClient._post = watched


def upload_only(patterns: Sequence[str]) -> None:
    """Have a Trainer upload those files of a run folder, and nothing else.

    transformers 5.17 uploads the whole folder but for checkpoints, by either of its two ways, at
    the end and at a save; both ask one object of huggingface_hub's for it.
    """
    from functools import partial

    from transformers.utils.hub import hf_api

    api = hf_api()
    only = partial(type(api).upload_folder, api, allow_patterns=[*patterns])
    setattr(api, "upload_folder", only)  # noqa: B010


def quiet_unscored_completions() -> None:
    """Drop the warning of a completion for which every reward is None; the recorder tells of it.

    TRL 1.16 repeats it in every step, with all columns of the completion.
    """
    warning = "All reward functions returned None"
    logging.getLogger("trl.trainer.grpo_trainer").addFilter(
        lambda record: warning not in record.getMessage()
    )


def make_logged_completions_visible() -> None:
    """Let no text act on the terminal that log_completions prints.

    TRL 1.16 hands it to rich 15, which lets escape sequences through.
    """
    from trl.trainer import grpo_trainer, utils

    from mini_r1 import visible

    def print_visibly(prompts: Any, completions: Any, *others: Any, extra: Any = None) -> None:
        prompts = [visible(str(text)) for text in prompts]
        completions = [visible(str(text)) for text in completions]
        extra = {name: [visible(str(each)) for each in column] for name, column in extra.items()}
        utils.print_prompt_completions_sample(prompts, completions, *others, extra=extra)

    setattr(grpo_trainer, "print_prompt_completions_sample", print_visibly)  # noqa: B010


def hub_commit(model: "nn.Module | None") -> str | None:
    """The commit of the hub that a model was loaded from; transformers 5.17 keeps it privately."""
    return getattr(getattr(model, "config", None), "_commit_hash", None)


def forget_gguf(model: "PreTrainedModel") -> None:
    """Let a model be saved that was unpacked from a GGUF file.

    transformers 5.17 takes it for a quantized one, which it refuses to save.
    """
    del model.config.quantization_config
    setattr(model, "hf_quantizer", None)  # noqa: B010


def end_as_config_says(tokenizer: "PreTrainedTokenizerBase", config: "PreTrainedConfig") -> None:
    """Give a tokenizer from a GGUF file the tokens for end and padding that the file names.

    transformers 5.17 names the first token of a text as its last one, too, and no padding; only
    the model's config has both.
    """
    end, padding = config.eos_token_id, config.pad_token_id
    if end is not None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    if padding is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
    elif tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def add_hparams(writer: "SummaryWriter", values: dict[str, Any], metrics: dict[str, float]) -> None:
    """Add hyper-parameters to the event file that is open.

    SummaryWriter.add_hparams of torch 2.13 opens one of its own in a folder below, and TensorBoard
    then shows a second run.
    """
    from torch.utils.tensorboard.summary import hparams

    for summary in hparams(values, metrics):
        writer._get_file_writer().add_summary(summary, 0)


def log_plainly(trainer: "GRPOTrainer", logs: dict[str, float]) -> None:
    """Log without what the training has noted since its last line.

    TRL 1.16's GRPOTrainer.log adds those means to whatever is logged and forgets them.
    """
    from transformers import Trainer

    Trainer.log(trainer, logs)


def watch_step(
    trainer: "GRPOTrainer",
    on_loss: Callable[["torch.Tensor", Mapping[str, Any]], None],
    on_norm: Callable[[Any], None],
) -> None:
    """Hand over each micro-batch's loss with its inputs, and the norm of each step's gradient.

    transformers 5.17 gives callbacks none of them, replaces a loss of NaN by earlier ones, and logs
    the norm only where logging_steps says so. accelerate 1.15 has it from DeepSpeed, too.
    """
    compute_loss, clip = trainer.compute_loss, trainer.accelerator.clip_grad_norm_

    def compute(model, inputs, *args, **kwargs):
        loss = compute_loss(model, inputs, *args, **kwargs)
        on_loss(loss, inputs)
        return loss

    def clip_and_note(*args, **kwargs):
        norm = clip(*args, **kwargs)
        on_norm(norm)
        return norm

    trainer.compute_loss, trainer.accelerator.clip_grad_norm_ = compute, clip_and_note


def watch_fresh_log_probabilities(
    trainer: "GRPOTrainer",
    on_log_probabilities: Callable[["torch.Tensor", Mapping[str, Any]], None],
) -> None:
    """Hand over the log-probabilities that a loss is made of, [batch, completion], with its inputs.

    Only while the weights are still those that the inputs were sampled with. TRL 1.16 compares the
    two for its importance sampling alone, and spends a pass through the model on it.
    """
    compute_loss, score = trainer.compute_loss, trainer._get_per_token_logps_and_entropies
    scored: list[Any] = []
    given: Any = trainer.args

    def remember(*args, **kwargs):
        result = score(*args, **kwargs)
        scored[:] = [result[0]]
        return result

    def compute(model, inputs, *args, **kwargs):
        shared_by = given.steps_per_generation * trainer.num_iterations
        fresh = trainer._step % shared_by < given.gradient_accumulation_steps
        loss = compute_loss(model, inputs, *args, **kwargs)
        if fresh and scored:
            on_log_probabilities(scored[0].detach(), inputs)
        scored.clear()
        return loss

    trainer.compute_loss, trainer._get_per_token_logps_and_entropies = compute, remember


def log_with_step(trainer: "GRPOTrainer", name: str, value: float) -> None:
    """Add a figure to the line of the step under way.

    TRL 1.16 takes them from rewards only, and gathers them before the loss is known.
    """
    trainer._metrics["train"][name].append(value)


def own_part(weight: "torch.Tensor") -> "torch.Tensor":
    """A weight, or what this process has of it under ZeRO-3.

    DeepSpeed 0.19.8 leaves the parameter itself empty and keeps the shard in an attribute.
    """
    return getattr(weight, "ds_tensor", weight).detach()


def stream_handlers() -> Iterator[logging.StreamHandler]:
    """The handlers of all loggers that write to a stream.

    logging has logging.getHandlerNames() since Python 3.12, but handlers without a name, which
    the libraries use, are found through their loggers only.
    """
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        if isinstance(logger, logging.Logger):
            yield from (h for h in logger.handlers if isinstance(h, logging.StreamHandler))
