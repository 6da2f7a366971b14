"""Every metric of a run: its name in the log, its title, what it means, where evaluations have it.

The trainer's log, TensorBoard (as `train/<key>`), the report's charts, the terminal's panel, the
tables of sweeps and the documents all take it from here. The short names are also the columns of
a reference CSV.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# What held-out evaluations add to the trainer's log; TensorBoard has them as eval/success, ...
EVAL_SUCCESS, EVAL_TOKENS = "eval_success", "eval_mean_completion_tokens"
# Success in training where another reward than equation tells it.
SUCCESS = "success"
# The share of groups whose completions are all the same text.
SAME_TEXT = "same_text"
# Between vLLM's log-probabilities and the trainer's: TRL's alarm for stale weights.
LOGP_DIFFERENCE = "sampling/sampling_logp_difference/mean"


@dataclass(frozen=True)
class Metric:
    """One figure.

    Attributes:
        key: its name in the trainer's log.
        title: of its chart.
        meaning: one sentence: what is counted.
        shown: how the panel and the plain lines print it.
        held_out: the path to the same figure in an evaluation, where it has one.
        instead: its name in the log of another task.
    """

    key: str
    title: str
    meaning: str
    shown: str = "{:.3g}"
    held_out: tuple[str, ...] = ()
    instead: str | None = None

    def logged(self, entry: Mapping[str, Any]) -> float | None:
        """The figure in an entry of the trainer's log."""
        value = entry.get(self.key)
        return entry.get(self.instead or "") if value is None else value

    def of(self, evaluation: Mapping[str, Any]) -> float | None:
        """The figure in an evaluation."""
        value: Any = evaluation
        for step in self.held_out:
            value = (value or {}).get(step)
        return value


METRICS = {
    "reward": Metric(
        "reward", "Reward", "The weighted sum of all rewards, per completion.", "{:.2f}"
    ),
    "success": Metric(
        "rewards/equation_reward/mean",
        "Success: sampled completions that are right",
        "The share of completions whose answer uses every number once and hits the target.",
        "{:.0%}",
        ("success",),
        SUCCESS,
    ),
    "format": Metric(
        "rewards/format_reward/mean",
        "Format reward",
        "The share of completions of one think block and one answer block.",
        "{:.0%}",
        ("format",),
    ),
    "tokens": Metric(
        "completions/mean_length",
        "Completion length, tokens",
        "The mean length of a completion.",
        "{:.0f}",
        ("mean_completion_tokens",),
    ),
    "truncated": Metric(
        "completions/clipped_ratio",
        "Truncated completions, share",
        "The share of completions that were cut at max_completion_length.",
        "{:.0%}",
        ("truncated",),
    ),
    "tries": Metric(
        "behaviors/tries",
        "Tries per completion",
        "Claims in the thinking that use every given number exactly once.",
        "{:.1f}",
        ("behaviors", "tries"),
    ),
    "gave_up": Metric(
        "behaviors/gave_up",
        "Gave up, share",
        "The share of completions that answer although no try reached the target.",
        "{:.0%}",
        ("behaviors", "gave_up"),
    ),
    "verified": Metric(
        "behaviors/verified",
        "Worked out before answering, share",
        "The share of completions in which a true try has the answer's value.",
        "{:.1%}",
        ("behaviors", "verified"),
    ),
    "true_arithmetic": Metric(
        "behaviors/true_arithmetic",
        "True arithmetic claims, share",
        "The share of true ones among all arithmetic claims in the thinking.",
        "{:.1%}",
        ("behaviors", "true_arithmetic"),
    ),
    "kl": Metric("kl", "KL divergence from the base", "Estimated per token, in nats."),
    "entropy": Metric("entropy", "Entropy per token, nats", "Of the distribution sampled from."),
    "no_signal": Metric(
        "frac_reward_zero_std",
        "Groups without signal, share",
        "The share of groups whose completions all got the same reward: they teach nothing.",
        "{:.0%}",
    ),
    "step_time": Metric("step_time", "Seconds per step", "Sampling and learning."),
}

CHARTS = (  # of the report, in its order
    "success",
    "format",
    "tokens",
    "truncated",
    "tries",
    "gave_up",
    "verified",
    "true_arithmetic",
    "kl",
    "entropy",
    "no_signal",
    "step_time",
)
PANEL = ("reward", "success", "tokens", "truncated", "no_signal")  # of the terminal
SWEEP_COLUMNS = ("tokens", "tries", "verified", "true_arithmetic", "gave_up")  # of its tables
SWEEP_CURVE = ("success", "tokens")  # what a record keeps step by step
