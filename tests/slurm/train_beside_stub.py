"""The training script beside a stub of vLLM: the real one, but transformers generates."""

import sys

from mini_r1.cli import train_script

if __name__ == "__main__":
    kept = []
    for position, argument in enumerate(sys.argv):
        of_vllm = argument.startswith("--vllm") or sys.argv[position - 1].startswith("--vllm")
        kept += [] if of_vllm else [argument]
    sys.argv = [*kept, "--use_vllm", "false"]
    sys.exit(train_script())
