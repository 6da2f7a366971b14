"""What a recipe holds on one GPU, simulated beside planned: no GPU, no download, half a minute.

    python scripts/simulate_memory.py recipes/grpo-qwen-2.5-3b-1gpu.yaml [--key value ...]

The real Qwen2 in the recipe's shape, TRL's head, checkpointing, autocast, PEFT and AdamW run on
fake tensors, which have shapes and dtypes but no memory; the bytes that would be alive are counted.
What launch/memory.py plans must come close.

It cannot see fragmentation, the CUDA context, NCCL, workspaces within kernels, vLLM and ZeRO's
sharding. Attention is a CPU's, which keeps what a GPU's keeps with a mask; prompts are scored, too;
4-bit weights count as 16-bit ones, experts not at all.
"""

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from peft import get_peft_model
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM
from trl import ModelConfig, get_peft_config
from trl.kernels import chunked_logprob
from trl.trainer.utils import add_fused_lm_head

from mini_r1 import BAD_INPUT, InputError
from mini_r1.launch.memory import (
    GIB,
    Shape,
    computes_in_16_bit,
    evaluation_batch,
    has_16_bit_weights,
    model_shape,
    phases,
)
from mini_r1.recipe import Recipe, load_recipe

GPU_MEMORY = 80.0  # GiB; only the batch of an evaluation depends on it


def main() -> None:
    path, *overrides = sys.argv[1:] or ["--help"]
    if path in ("-h", "--help"):
        print((__doc__ or "").rstrip())
        return
    recipe = load_recipe(path, overrides)
    shape = model_shape(recipe.model["model_name_or_path"])
    planned = phases(recipe, 1, GPU_MEMORY)
    if shape is None or planned is None or shape.moe_layers:
        raise recipe.error("no shape that could be simulated", "model_name_or_path")
    sampled = 0 if recipe.get("use_vllm") else evaluation_batch(recipe, 1, GPU_MEMORY)
    seen = simulate(recipe, shape, sampled)
    print(f"{'GiB':<12} simulated  planned")
    for purpose, size in seen.items():
        print(f"{purpose:<12} {size:9.2f} {as_planned(planned, purpose):8.2f}")


def as_planned(planned: dict[str, dict[str, float]], purpose: str) -> float:
    """What is planned for something simulated."""
    if purpose != "evaluation":
        return planned["training"][purpose]
    return sum(planned[purpose].get(part, 0.0) for part in ("KV cache", "cast weights"))


class Alive(TorchDispatchMode):
    """Counts the bytes of the storages that are alive.

    Attributes:
        now: bytes.
        peak: the most there were since it was set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _gone(self, key: int, size: int) -> None:
        self._known.remove(key)
        self.now -= size


def simulate(recipe: Recipe, shape: Shape, sampled: int) -> dict[str, float]:
    """GiB by purpose: what is always there, a micro-batch, and a step of an evaluation.

    Args:
        sampled: completions that the evaluation samples at once; 0 leaves it out.
    """
    batch = recipe.get("per_device_train_batch_size")
    length = recipe.task.max_prompt_length + recipe.get("max_completion_length")
    computing = torch.autocast("cpu", torch.bfloat16, enabled=computes_in_16_bit(recipe))
    seen: dict[str, int] = {}
    model = _model(recipe, shape)  # on no device, since PEFT cannot swap fake weights
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with _as_on_a_gpu(recipe), fake, Alive() as alive:
        model.to_empty(device="cpu")
        model.get_base_model().tie_weights() if recipe.get("use_peft") else model.tie_weights()
        model.train()
        seen["weights"] = alive.now

        # What training holds all the time.
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        for weight in trained:
            weight.grad = torch.zeros_like(weight)
        seen["gradients"] = alive.now - sum(seen.values())
        optimizer = torch.optim.AdamW(trained, fused=True)
        optimizer.step()
        seen["optimizer"] = alive.now - sum(seen.values())

        # A micro-batch, forward and backward.
        ids = torch.zeros(batch, length, dtype=torch.long)
        before = alive.peak = alive.now
        with computing:
            scored = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True
            )
        scored.log_probs.sum().backward()
        seen["activations"] = alive.peak - before
        del scored
        optimizer.zero_grad()

        # The last token of so many completions: a cache as one token leaves it, filled up.
        if sampled:
            model.eval()
            before = alive.now
            cache = DynamicCache()

            def step(tokens: int) -> None:
                last = torch.zeros(sampled, 1, dtype=torch.long)
                mask = torch.ones(sampled, tokens, dtype=torch.long)
                with torch.no_grad(), computing:
                    model(input_ids=last, attention_mask=mask, past_key_values=cache)

            step(1)
            for layer in cache.layers:
                heads, size = layer.keys.shape[1], layer.keys.shape[3]
                more = torch.zeros(sampled, heads, length - 2, size, dtype=layer.keys.dtype)
                layer.update(more, more)
            del more
            alive.peak = alive.now
            step(length)
            seen["evaluation"] = alive.peak - before
    return {purpose: size / GIB for purpose, size in seen.items()}


def _model(recipe: Recipe, shape: Shape) -> Any:
    config = Qwen2Config(
        **{key: getattr(shape, key) for key in Shape.__annotations__ if hasattr(Qwen2Config, key)},
        max_position_embeddings=32_768,
        dtype="bfloat16" if has_16_bit_weights(recipe) else "float32",
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config).to(config.dtype)
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))  # as TRL's trainer has it
        if recipe.get("gradient_checkpointing"):
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if recipe.get("use_peft"):
            adapter = get_peft_config(ModelConfig(**recipe.model))
            model.enable_input_require_grads()
            return get_peft_model(model, adapter)
    return model


@contextmanager
def _as_on_a_gpu(recipe: Recipe) -> Iterator[None]:
    """Let go of what only a CPU holds.

    There TRL's head folds tiles in place, by Triton, and dropout keeps a mask of bytes.
    """
    if recipe.get("use_cpu"):
        yield
        return
    folds = "_forward_tile", "_backward_tile", "_addmm_fp32"
    nothing = dict.fromkeys(folds, lambda *tensors, **options: None)

    def dropout(x: torch.Tensor, p: float, training: bool, inplace: bool = False) -> torch.Tensor:
        return torch.native_dropout(x, p, training)[0]

    with patch.multiple(chunked_logprob, **nothing), patch("torch.nn.functional.dropout", dropout):
        yield


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
