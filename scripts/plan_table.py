"""The table of docs/guide.md: every recipe for GPUs on several numbers and sizes of them.

    python scripts/plan_table.py            # prints it
    python scripts/plan_table.py --write    # puts it into docs/guide.md

Each cell is a dry run: how it is launched where several processes train, the phase that holds the
most and its GiB per GPU; or why it is refused.
"""

import re
import sys
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from mini_r1 import InputError
from mini_r1.catalog import markdown_table
from mini_r1.launch.machine import Machine
from mini_r1.launch.memory import peak
from mini_r1.launch.plan import make_plan
from mini_r1.recipe import Recipe, load_recipe
from mini_r1.run import write_section

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "guide.md"
BEGIN = "<!-- written by scripts/plan_table.py -->"
GPUS, SIZES = (1, 2, 4, 8), (16, 24, 40, 80, 141)
LAUNCHED = {None: "", "ddp": "DDP, ", "deepspeed_zero2": "ZeRO-2, ", "deepspeed_zero3": "ZeRO-3, "}
TOO_LARGE = re.compile(r"needs about (\d+) GiB on each GPU for (\w+)")
REASONS = {"vllm_mode": "no GPU for vLLM", "vllm_gpu_memory_utilization": "vLLM's share too small"}


def main() -> None:
    if sys.argv[1:] != ["--write"]:
        print(table())
        return
    write_section(GUIDE, BEGIN, table())


def table() -> str:
    heading = ["recipe", "GPUs", *(f"{size} GB" for size in SIZES)]
    rows = []
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        recipe = load_recipe(path)
        if recipe.get("use_cpu"):
            continue
        cells = [(gpus, [cell(recipe, gpus, size) for size in SIZES]) for gpus in GPUS]
        name = f"`{recipe.name}`"
        for same, group in groupby(cells, itemgetter(1)):
            rows.append([name, ", ".join(str(gpus) for gpus, _ in group), *same])
            name = ""
    return markdown_table(heading, rows)


def cell(recipe: Recipe, gpus: int, size: float) -> str:
    try:
        plan = make_plan(recipe, Machine(gpus, size))
    except InputError as error:
        if too_large := TOO_LARGE.search(error.problem):
            return f"no: {too_large[2]} {too_large[1]}"
        return f"no: {REASONS.get(error.key or '', error.key)}"
    phase, needed = peak(plan.memory) if plan.memory else ("not estimated", 0.0)
    return f"{LAUNCHED[plan.launcher]}{phase} {needed:.0f}"


if __name__ == "__main__":
    main()
