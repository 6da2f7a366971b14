"""The training script beside a stub of vLLM: the real one, but transformers generates."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    kept = []
    for position, argument in enumerate(sys.argv):
        of_vllm = argument.startswith("--vllm") or sys.argv[position - 1].startswith("--vllm")
        kept += [] if of_vllm else [argument]
    sys.argv = [*kept, "--use_vllm", "false"]
    script = Path(__file__).parents[2] / "scripts" / "run_r1_grpo.py"
    runpy.run_path(str(script), run_name="__main__")
