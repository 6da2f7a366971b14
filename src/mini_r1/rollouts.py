"""What was sampled in training: the recorder, and the two text files that keep one in ten of it.

The files have the same names and lots as the original's. Imports no ML library.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

from mini_r1 import RunFailed, one_line, restored, visible
from mini_r1.behaviors import behavior, summarize_behaviors
from mini_r1.completion import THINK_OPEN
from mini_r1.countdown.puzzles import uniform_hash
from mini_r1.metrics import SAME_TEXT, SUCCESS
from mini_r1.recipe import TaskConfig
from mini_r1.rewards import TRL_COLUMNS, RewardFunction, completion_text

ALL_FILE, SOLVED_FILE = "completion_samples.txt", "success_completion_samples.txt"
SHARE = 0.1  # of the completions, and of the solved ones, that is kept: the original's
NO_JUDGE = "-"
PUZZLE = {"nums", "target"}
_HEAD = re.compile(
    r"^==== step (\d+) (?:nums (\[.*?\]) target (\S+)|row (\{.*\}))(?: judge (\S+))? "
    r"rewards (\{.*\})\n",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Rollout:
    """One completion of a training step.

    Attributes:
        step: the optimizer step that learns from it first.
        row: what was asked: nums and target of a puzzle, or the columns of another task's row.
        rewards: by the name of the reward function; None where it does not apply.
        text: what follows the prompt.
        judge: the name of the reward that is success; None if it is not among them.
    """

    step: int
    row: Mapping[str, Any]
    rewards: Mapping[str, float | None]
    text: str
    judge: str | None = "equation_reward"

    @property
    def score(self) -> float | None:
        """What the judge says."""
        return self.rewards.get(self.judge or "")

    @property
    def solved(self) -> bool:
        return self.score == 1.0

    @property
    def verdict(self) -> str:
        return "solved" if self.solved else "failed"

    @property
    def question(self) -> str:
        """What was asked, in one line."""
        if self.row.keys() == PUZZLE:
            return f"make {self.row['target']} from {', '.join(map(str, self.row['nums']))}"
        return one_line(", ".join(f"{name} {value}" for name, value in self.row.items()), 80)


class RolloutRecorder:
    """Logs how the model behaves, and keeps some of its completions.

    It watches the reward functions, so it sees exactly what was judged. Behaviours are logged over
    the completions of all ranks; rank 0 keeps completions of its own.

    Attributes:
        latest: a fresh completion, on the main process.
        fault: what a reward must not return, and did. Not raised, for then the other ranks would
            wait for this one's rewards for ever; whoever ends the run must look.
        scored: of the newest generation on this rank: the prompt, the completion's tokens, rewards.
    """

    def __init__(self, folder: Path, task: TaskConfig | None = None):
        self.folder = folder
        self._task = task or TaskConfig()
        self._judge: str | None = None
        self.latest: Rollout | None = None
        self.fault: RunFailed | None = None
        self.scored: list[tuple[str, list[int], dict[str, float | None]]] = []
        self._names: list[str] = []
        self._scores: dict[str, list[float | None]] = {}
        self._told_unscored = False

    def watch(self, rewards: Sequence[RewardFunction]) -> list[Callable[..., Any]]:
        """The same rewards as functions of those names, observed.

        They return plain numbers; None in place of what a reward must not return, see `fault`.
        """
        self._names = [reward.name for reward in rewards]
        judges = (each.name for each in rewards if each.path == self._task.success_reward)
        self._judge = next(judges, None)
        return [self._watched(reward) for reward in rewards]

    def _watched(self, reward: RewardFunction) -> Callable[..., Any]:
        async def watched_coroutine(**columns: Any) -> list[float | None]:
            with reward.blamed(_step(columns)):
                returned = await reward.call(**columns)
            return self._note(reward, returned, columns)

        def watched(**columns: Any) -> list[float | None]:
            with reward.blamed(_step(columns)):
                returned = reward.call(**columns)
            return self._note(reward, returned, columns)

        function = watched_coroutine if reward.is_async else watched
        function.__name__ = reward.name  # which TRL calls its metrics by
        return function

    def _note(
        self, reward: RewardFunction, returned: Any, columns: dict[str, Any]
    ) -> list[float | None]:
        completions = columns["completions"]
        scores: list[float | None] = [None] * len(completions)
        try:
            scores = reward.scores(returned, completions, _step(columns))
        except RunFailed as fault:
            self.fault = self.fault or fault
        self._scores[reward.name] = scores
        if len(self._scores) == len(self._names):
            rows = zip(*(self._scores[name] for name in self._names), strict=True)
            rewards = (dict(zip(self._names, row, strict=True)) for row in rows)
            asked = columns["prompts"], columns["completion_ids"]
            self.scored = list(zip(*asked, rewards, strict=True))
            self._log(columns)
            if columns["trainer_state"].is_world_process_zero and self.fault is None:
                self._tell_unscored(_step(columns))
                rollouts = self._rollouts(columns)
                self.latest = rollouts[0]
                append_samples(self.folder, rollouts)
            self._scores = {}
        return scores

    def _tell_unscored(self, step: int) -> None:
        unscored = sum(set(rewards.values()) == {None} for _, _, rewards in self.scored)
        if unscored and not self._told_unscored:
            self._told_unscored = True
            print(
                f"step {step}: every reward was None for {unscored} of {len(self.scored)} "
                "completions; nothing is learned from such ones, and this is not said again",
                flush=True,
            )

    def _log(self, columns: dict[str, Any]) -> None:
        scores = [score for score in self._scores.get(self._judge or "", ()) if score is not None]
        if scores and self._judge != "equation_reward":
            columns["log_metric"](SUCCESS, fmean(scores))
        groups = groupby(
            zip(columns["prompts"], columns["completions"], strict=True), itemgetter(0)
        )
        groups = [[completion_text(text) for _, text in group] for _, group in groups]
        alike = [len(set(texts)) == 1 for texts in groups if len(texts) > 1]
        if alike:  # else they are spread over the ranks
            columns["log_metric"](SAME_TEXT, fmean(alike))
        if not self._task.is_countdown:
            return
        texts = map(completion_text, columns["completions"])
        puzzles = zip(texts, columns["target"], columns["nums"], strict=True)
        for name, value in summarize_behaviors([behavior(*each) for each in puzzles]).items():
            if value is not None:
                columns["log_metric"](f"behaviors/{name}", value)

    def _rollouts(self, columns: dict[str, Any]) -> list[Rollout]:
        texts = map(completion_text, columns["completions"])
        asked = [name for name in columns if name not in TRL_COLUMNS]
        if self._task.is_countdown:
            asked = sorted(PUZZLE)
        rollouts = []
        for index, text in enumerate(texts):
            rewards = self.scored[index][2]
            row = {name: columns[name][index] for name in asked}
            rollouts.append(Rollout(_step(columns), row, rewards, text, self._judge))
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
        step, nums, target, row, judge, rewards = head.groups()
        text = restored(content[head.end() : end - 2])
        if row:
            asked = json.loads(row)
        else:
            asked, text = {"nums": json.loads(nums), "target": int(target)}, text[len(THINK_OPEN) :]
        judge = {None: "equation_reward", NO_JUDGE: None}.get(judge, judge)
        rollouts.append(Rollout(int(step), asked, json.loads(rewards), text, judge))
    return rollouts


def _entry(rollout: Rollout) -> str:
    row, text = rollout.row, f"\n{visible(rollout.text)}"
    asked = f"row {json.dumps(row, default=str)}"
    if row.keys() == PUZZLE:
        asked = f"nums {json.dumps(row['nums'])} target {row['target']}"
        text = f"\n{THINK_OPEN}{visible(rollout.text)}"
    # A completion cannot forge an entry: what looks like a head is told apart, and restored, too.
    text = text.replace("\n==== step ", f"\n<U+{ord('='):04X}>=== step ")
    judge = "" if rollout.judge == "equation_reward" else f" judge {rollout.judge or NO_JUDGE}"
    rewards = json.dumps(rollout.rewards)
    return f"==== step {rollout.step} {asked}{judge} rewards {rewards}{text}\n\n"
