"""What was sampled in training: the recorder, and the two text files that keep one in ten of it.

The files have the same names and lots as the original's. Imports no ML library.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mini_r1.behaviors import behavior, summarize_behaviors
from mini_r1.countdown.puzzles import uniform_hash
from mini_r1.rewards import RewardFunction, completion_text

ALL_FILE, SOLVED_FILE = "completion_samples.txt", "success_completion_samples.txt"
SHARE = 0.1  # of the completions, and of the solved ones, that is kept: the original's
_HEAD = re.compile(
    r"^==== step (\d+) nums (\[.*?\]) target (\S+) rewards (\{.*\})\n<think>", re.MULTILINE
)


@dataclass(frozen=True)
class Rollout:
    """One completion of a training step.

    Attributes:
        step: the optimizer step that learns from it first.
        nums, target: its puzzle.
        rewards: by the name of the reward function; None where it does not apply.
        text: what follows the prompt's `<think>`.
    """

    step: int
    nums: tuple[int, ...]
    target: int
    rewards: Mapping[str, float | None]
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


class RolloutRecorder:
    """Logs how the model behaves, and keeps some of its completions.

    It watches the reward functions, so it sees exactly what was judged. Behaviours are logged over
    the completions of all ranks; rank 0 keeps completions of its own. With `rewind_samples` before
    a resume the files end up as if never interrupted.

    Attributes:
        latest: a fresh completion, on the main process.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.latest: Rollout | None = None
        self._names: list[str] = []
        self._scores: dict[str, list[float | None]] = {}
        self._told_unscored = False

    def watch(self, rewards: Sequence[RewardFunction]) -> list[Callable[..., Any]]:
        """The same rewards as functions of those names, observed.

        They return plain numbers; what a reward must not return ends the run: `RunFailed`.
        """
        self._names = [reward.name for reward in rewards]
        return [self._watched(reward) for reward in rewards]

    def _watched(self, reward: RewardFunction) -> Callable[..., Any]:
        async def watched_coroutine(**columns: Any) -> list[float | None]:
            with reward.blamed(_step(columns)):
                returned = await reward.function(**columns)
            return self._note(reward, returned, columns)

        def watched(**columns: Any) -> list[float | None]:
            with reward.blamed(_step(columns)):
                returned = reward.function(**columns)
            return self._note(reward, returned, columns)

        function = watched_coroutine if reward.is_async else watched
        function.__name__ = reward.name  # which TRL calls its metrics by
        return function

    def _note(
        self, reward: RewardFunction, returned: Any, columns: dict[str, Any]
    ) -> list[float | None]:
        scores = reward.scores(returned, columns["completions"], _step(columns))
        self._scores[reward.name] = scores
        if len(self._scores) == len(self._names):
            self._log_behaviors(columns)
            if columns["trainer_state"].is_world_process_zero:
                self._tell_unscored(_step(columns))
                rollouts = self._rollouts(columns)
                self.latest = rollouts[0]
                append_samples(self.folder, rollouts)
            self._scores = {}
        return scores

    def _tell_unscored(self, step: int) -> None:
        rows = list(zip(*self._scores.values(), strict=True))
        unscored = sum(set(row) == {None} for row in rows)
        if unscored and not self._told_unscored:
            self._told_unscored = True
            print(
                f"step {step}: every reward was None for {unscored} of {len(rows)} completions; "
                "nothing is learned from such ones, and this is not said again",
                flush=True,
            )

    @staticmethod
    def _log_behaviors(columns: dict[str, Any]) -> None:
        texts = map(completion_text, columns["completions"])
        puzzles = zip(texts, columns["target"], columns["nums"], strict=True)
        for name, value in summarize_behaviors([behavior(*each) for each in puzzles]).items():
            if value is not None:
                columns["log_metric"](f"behaviors/{name}", value)

    def _rollouts(self, columns: dict[str, Any]) -> list[Rollout]:
        texts = map(completion_text, columns["completions"])
        rollouts = []
        for index, text in enumerate(texts):
            rewards = {name: self._scores[name][index] for name in self._names}
            nums, target = tuple(columns["nums"][index]), columns["target"][index]
            rollouts.append(Rollout(_step(columns), nums, target, rewards, text))
        return rollouts


def _step(columns: Mapping[str, Any]) -> int:
    """The optimizer step that learns first from what the columns hold."""
    return columns["trainer_state"].global_step + 1


# ---- The files ------------------------------------------------------------------------------


def append_samples(folder: Path, rollouts: Iterable[Rollout]) -> None:
    """Keep one in ten; which ones depends on step and position alone."""
    kept: dict[str, list[str]] = {ALL_FILE: [], SOLVED_FILE: []}
    for index, rollout in enumerate(rollouts):
        if uniform_hash("sample", rollout.step, index) < SHARE * 2**64:
            kept[ALL_FILE].append(_entry(rollout))
        if rollout.solved and uniform_hash("success", rollout.step, index) < SHARE * 2**64:
            kept[SOLVED_FILE].append(_entry(rollout))
    folder.mkdir(parents=True, exist_ok=True)
    for name, entries in kept.items():
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write("".join(entries))


def read_samples(file: Path) -> list[Rollout]:
    """What one of the two files keeps, in order; nothing if there is no file yet."""
    if not file.exists():
        return []
    content = file.read_bytes().decode()  # as it is: read_text makes lines of a lone \r
    heads = list(_HEAD.finditer(content))
    ends = [*(head.start() for head in heads[1:]), len(content)]
    rollouts = []
    for head, end in zip(heads, ends, strict=False):  # an empty file has an end, but no head
        step, nums, target, rewards = head.groups()
        text = content[head.end() : end - 2]
        puzzle = tuple(json.loads(nums)), int(target)
        rollouts.append(Rollout(int(step), *puzzle, json.loads(rewards), text))
    return rollouts


def rewind_samples(folder: Path, step: int) -> None:
    """Drop what was sampled in later steps than the one to resume from."""
    for name in (ALL_FILE, SOLVED_FILE):
        if (path := folder / name).exists():
            content = path.read_bytes().decode()
            starts = (head.start() for head in _HEAD.finditer(content) if int(head[1]) > step)
            path.write_bytes(content[: next(starts, len(content))].encode())


def _entry(rollout: Rollout) -> str:
    # A completion cannot forge an entry: a line of its own that looks like a head is indented.
    text = rollout.text.replace("\n==== step ", "\n ==== step ")
    nums, rewards = json.dumps(rollout.nums), json.dumps(rollout.rewards)
    head = f"==== step {rollout.step} nums {nums} target {rollout.target} rewards {rewards}"
    return f"{head}\n<think>{text}\n\n"
