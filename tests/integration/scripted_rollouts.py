"""Runs `run_r1_grpo.py` on completions that depend on the prompt alone: scripted_rollouts.py --config RECIPE [--key value ...]

Sampled completions depend on how many processes sample them, so a run of one process and a run of two cannot be compared. Here each
prompt gets searches with differing patience, the same ones in every layout; rewards, advantages, loss, gradients, their
averaging or sharding, and the optimizer are the real ones.
"""

import random
import re
import sys
from collections import Counter

from trl import GRPOTrainer

from mini_r1.cli import train_script
from mini_r1.cold_start import COLD_STARTS, search_trace
from mini_r1.countdown.puzzles import Puzzle


def scripted(self, prompt_ids, *args, **kwargs):
    """In place of sampling: completion ids, and no log-probabilities."""
    seen: Counter[str] = Counter()
    completions = []
    for text in self.processing_class.batch_decode(prompt_ids):
        target, *nums = map(int, re.findall(r"\d+", text))
        rng = random.Random(f"{text} {seen[text]}")
        seen[text] += 1
        trace = search_trace(Puzzle(tuple(nums), target), rng, COLD_STARTS["tiny_base"], patient=False)
        completions.append(self.processing_class(trace.completion + self.processing_class.eos_token)["input_ids"])
    return completions, None


if __name__ == "__main__":
    GRPOTrainer._generate_single_turn = scripted
    sys.exit(train_script())
