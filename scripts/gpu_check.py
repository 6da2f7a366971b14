"""One command for a machine with one GPU and no internet: does GRPO run, how fast, how large?

    make gpu-check          # or: python scripts/gpu_check.py --output gpu-check.json

Says how long a step is and how much memory it takes. Runs the real training entry point with
generation by transformers and, where vLLM is installed, by colocated vLLM: on the embedded base in
bf16, and on random weights in the shape of Qwen2.5-3B, for which nothing is downloaded. Random
weights write noise, so every completion runs to its full length: the worst case. Without a GPU the
second shape is tiny and the figures mean nothing, but all of it runs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from mini_r1.launch.memory import QWEN, Shape
from mini_r1.manifest import hardware, versions
from mini_r1.metrics import METRICS
from mini_r1.model import model_path
from mini_r1.run import load_run, load_summary, write_json

ROOT = Path(__file__).parents[1]
STEPS = 4  # the first one warms up and does not count
TINY = Shape(1024, 64, 2, 2, 1, 128, True)  # heads of 32, the smallest that vLLM takes
COMMON = {
    "dataset_id_or_path": "generated",
    "num_puzzles": 2000,
    "num_numbers": [3, 4],
    "prompt_template": "compact",
    "max_prompt_length": 36,
    "max_steps": STEPS,
    "save_strategy": "no",
    "num_eval_puzzles": 8,
    "num_eval_samples": 1,
    "logging_steps": 1,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--output", default="gpu-check.json", type=Path, help="default: %(default)s"
    )
    output = parser.parse_args().output
    on_gpu = torch.cuda.is_available()
    generators = ["transformers", *(["vllm"] if on_gpu and find_spec("vllm") else [])]
    result = {"versions": versions(), "hardware": hardware(), "steps": STEPS, "runs": []}
    with tempfile.TemporaryDirectory(prefix="mini-r1-gpu-check-") as folder:
        work = Path(folder)
        random_model = make_random_model(work / "random", QWEN["3B"] if on_gpu else TINY)
        for name, recipe, changes in (
            ("tiny_base", "tiny-cpu.yaml", {"bf16": on_gpu, "use_cpu": not on_gpu}),
            ("Qwen2.5-3B shape" if on_gpu else "tiny shape", *random_case(random_model, on_gpu)),
        ):
            for generator in generators:
                run = measure(
                    ROOT / "recipes" / recipe,
                    {**COMMON, **changes, "use_vllm": generator == "vllm"},
                    work / f"run-{len(result['runs'])}",
                )
                result["runs"].append({"model": name, "generation": generator, **run})
                print(json.dumps(result["runs"][-1]), flush=True)
                write_json(output, result)
    print(f"everything is in {output}")
    sys.exit(any("failed" in run for run in result["runs"]))


def make_random_model(folder: Path, shape: Shape) -> Path:
    """Random weights in a shape, with the tokenizer of an embedded base.

    Its ids are the first of the vocabulary.
    """
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_path("tiny_base_hard"))
    config = Qwen2Config(
        **{key: value for key, value in vars(shape).items() if value is not None},
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()  # the runs to come want the whole GPU
    return folder


def random_case(model: Path, on_gpu: bool) -> tuple[str, dict]:
    """The recipe for one 80 GB GPU with a third of its batch.

    On a CPU the default recipe with a tiny batch.
    """
    if on_gpu:
        return "grpo-qwen-2.5-3b-1gpu.yaml", {
            "model_name_or_path": model,
            "gradient_accumulation_steps": 8,
        }
    return "tiny-cpu.yaml", {
        "model_name_or_path": model,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 2,
        "num_generations": 8,
        "max_completion_length": 32,
    }


def measure(recipe: Path, changes: dict, run_dir: Path) -> dict:
    """Seconds per step, tokens per completion and peak memory of a short run, or why it failed."""
    arguments = []
    for key, value in {**changes, "output_dir": run_dir}.items():
        arguments += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    script = str(ROOT / "scripts" / "run_r1_grpo.py")
    command = [sys.executable, script, "--config", str(recipe), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-5:]}
    seconds, length = METRICS["step_time"].key, METRICS["tokens"].key
    steps = [entry for entry in load_run(run_dir).history if seconds in entry]
    tokens = fmean(entry[length] for entry in steps if length in entry)
    return {
        "seconds_per_step": round(fmean(entry[seconds] for entry in steps[1:]), 3),
        "mean_completion_tokens": round(tokens, 1),
        "peak_gpu_memory_gib": load_summary(run_dir).get("peak_gpu_memory_gib"),
    }


if __name__ == "__main__":
    main()
