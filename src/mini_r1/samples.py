"""Sampled completions of a run, and the two text files that keep one in ten of them. The same names and lots as the original's."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mini_r1.countdown.puzzles import uniform_hash

ALL_FILE, SOLVED_FILE = "completion_samples.txt", "success_completion_samples.txt"
SHARE = 0.1  # of the completions, and of the solved ones, that is kept: the original's
_HEAD = re.compile(r"^==== step (\d+) nums (\[.*?\]) target (\S+) rewards (\{.*\})\n<think>", re.MULTILINE)


@dataclass(frozen=True)
class Sample:
    """One completion of a training step: its puzzle, its rewards by name, and the text after the prompt's `<think>`."""

    step: int
    nums: tuple[int, ...]
    target: int
    rewards: Mapping[str, float]
    text: str

    @property
    def solved(self) -> bool:
        return self.rewards.get("equation_reward") == 1.0

    @property
    def verdict(self) -> str:
        return "solved" if self.solved else "failed"

    @property
    def puzzle(self) -> str:
        return f"make {self.target} from {', '.join(map(str, self.nums))}"


def append_samples(folder: Path, samples: Iterable[Sample]) -> None:
    """Keep one in ten; which ones depends on step and position alone."""
    kept: dict[str, list[str]] = {ALL_FILE: [], SOLVED_FILE: []}
    for index, sample in enumerate(samples):
        if uniform_hash("sample", sample.step, index) < SHARE * 2**64:
            kept[ALL_FILE].append(_entry(sample))
        if sample.solved and uniform_hash("success", sample.step, index) < SHARE * 2**64:
            kept[SOLVED_FILE].append(_entry(sample))
    folder.mkdir(parents=True, exist_ok=True)
    for name, entries in kept.items():
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write("".join(entries))


def read_samples(file: Path) -> list[Sample]:
    """The samples of one of the two files, in order; none if there is no file yet."""
    if not file.exists():
        return []
    content = file.read_bytes().decode()  # as it is: read_text makes lines of a lone \r
    heads = list(_HEAD.finditer(content))
    ends = [head.start() for head in heads[1:]] + [len(content)]
    return [
        Sample(int(head[1]), tuple(json.loads(head[2])), int(head[3]), json.loads(head[4]), content[head.end() : end - 2])
        for head, end in zip(heads, ends, strict=True)
    ]


def rewind_samples(folder: Path, step: int) -> None:
    """Drop the samples of later steps than the one to resume from."""
    for name in (ALL_FILE, SOLVED_FILE):
        if (path := folder / name).exists():
            content = path.read_bytes().decode()
            later = next((head.start() for head in _HEAD.finditer(content) if int(head[1]) > step), len(content))
            path.write_bytes(content[:later].encode())


def _entry(sample: Sample) -> str:
    # A completion cannot forge an entry: a line of its own that looks like a head is indented.
    text = sample.text.replace("\n==== step ", "\n ==== step ")
    head = f"==== step {sample.step} nums {json.dumps(sample.nums)} target {sample.target} rewards {json.dumps(sample.rewards)}"
    return f"{head}\n<think>{text}\n\n"
