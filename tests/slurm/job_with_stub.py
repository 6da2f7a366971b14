"""The batch process, with `train_beside_stub.py` as the training script."""

import sys
from pathlib import Path

from mini_r1.launch import slurm

if __name__ == "__main__":
    slurm.TRAINING_SCRIPT = Path(__file__).with_name("train_beside_stub.py")
    sys.exit(slurm.main(sys.argv[1:]))
