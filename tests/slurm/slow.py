"""A reward that changes nothing but takes its time.

With it a run outlasts SLURM's clock, which ticks every 30 seconds.
"""

import time


def nothing(completions, **columns):
    time.sleep(1.5)
    return [0.0] * len(completions)
