"""Runs `run_r1_grpo.py`, with its arguments, on completions that depend on the prompt alone.

Sampled completions depend on how many processes sample them, so a run of one process and a run of
two cannot be compared. Here each prompt gets searches with differing patience, the same ones in
every layout; rewards, advantages, loss, gradients, their averaging or sharding, and the optimizer
are the real ones.
"""

import random
import re
import runpy
from collections import Counter
from pathlib import Path

from trl import GRPOTrainer

from mini_r1.bases.cold_start import COLD_STARTS, search_trace
from mini_r1.countdown.puzzles import Puzzle

SCRIPT = Path(__file__).parents[2] / "scripts" / "run_r1_grpo.py"
SETTINGS = COLD_STARTS["tiny_base"]


def scripted(self, prompt_ids, *args, **kwargs):
    """In place of sampling: completion ids, and no log-probabilities."""
    tokenizer = self.processing_class
    seen: Counter[str] = Counter()
    completions = []
    for text in tokenizer.batch_decode(prompt_ids):
        target, *nums = map(int, re.findall(r"\d+", text))
        rng = random.Random(f"{text} {seen[text]}")
        seen[text] += 1
        trace = search_trace(Puzzle(tuple(nums), target), rng, SETTINGS, patient=False)
        completions.append(tokenizer(trace.completion + tokenizer.eos_token)["input_ids"])
    return completions, None


if __name__ == "__main__":
    GRPOTrainer._generate_single_turn = scripted
    runpy.run_path(str(SCRIPT), run_name="__main__")
