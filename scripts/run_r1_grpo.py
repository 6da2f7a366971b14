"""Train a model on Countdown with GRPO, alone or under accelerate launch.

python scripts/run_r1_grpo.py --config RECIPE [--key value ...]
"""

import argparse
import sys

from mini_r1.cli import exit_code, train_here
from mini_r1.recipe import load_recipe
from mini_r1.syntax import take_hub_token

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="RECIPE", help="a YAML recipe")
    args, overrides = parser.parse_known_args()
    sys.exit(exit_code(lambda: train_here(load_recipe(args.config, take_hub_token(overrides)))))
