"""Train a model on Countdown with GRPO, alone or under accelerate launch: run_r1_grpo.py --config RECIPE [--key value ...]"""

import sys

from mini_r1.cli import train_script

if __name__ == "__main__":
    sys.exit(train_script())
