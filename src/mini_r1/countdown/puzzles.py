"""Seeded generation of solvable puzzles, and a puzzle's canonical key.

Candidate i of a seed is a function of (seed, i) alone: every draw is a SHA-256 of the seed, the
index and a counter, so the same seed gives the same bytes on any machine, Python version and
chunking. (Adding seed and index instead makes neighbouring seeds share almost all their puzzles.)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import count, islice
from math import comb
from typing import Any

from mini_r1.countdown.solver import MAX_NUMBERS, MIN_NUMBERS, reachable

# Give up when this many candidates in a row brought no new puzzle: the described space is then all
# but used up.
MAX_MISSES = 20_000


@dataclass(frozen=True)
class Puzzle:
    """Reach `target` with all of `nums`; the schema of Jiayi-Pan/Countdown-Tasks-3to4."""

    nums: tuple[int, ...]
    target: int

    @property
    def key(self) -> str:
        """The canonical key, e.g. `7,19,36,55=65`: the order of the numbers makes no difference."""
        return f"{','.join(map(str, sorted(self.nums)))}={self.target}"

    @property
    def columns(self) -> dict[str, Any]:
        """The puzzle as a row of data has it."""
        return {"nums": list(self.nums), "target": self.target}


class PuzzleSpaceError(ValueError):
    """A range or a count that describes no puzzles; `name` is the attribute it is about."""

    def __init__(self, name: str, problem: str):
        self.name = name
        super().__init__(problem)


@dataclass(frozen=True)
class PuzzleSpace:
    """Which puzzles to generate. Ranges include both ends.

    Attributes:
        num_numbers: how many numbers a puzzle may give, each count equally likely.
        number_range: the smallest and the largest number.
        target_range: the smallest and the largest target. The target is drawn evenly from the
            reachable integers in this range.

    Raises:
        PuzzleSpaceError: an empty range, one out of reach, or a count the solver does not take.
    """

    num_numbers: tuple[int, ...] = (3, 4)
    number_range: tuple[int, int] = (1, 99)
    target_range: tuple[int, int] = (10, 99)

    def __post_init__(self):
        counts_fit = all(MIN_NUMBERS <= n <= MAX_NUMBERS for n in self.num_numbers)
        if not self.num_numbers or not counts_fit:
            raise PuzzleSpaceError(
                "num_numbers",
                f"each count is {MIN_NUMBERS} to {MAX_NUMBERS}, got {list(self.num_numbers)}",
            )
        if len(set(self.num_numbers)) < len(self.num_numbers):
            raise PuzzleSpaceError("num_numbers", f"each count once, got {list(self.num_numbers)}")
        for name in ("number_range", "target_range"):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                raise PuzzleSpaceError(
                    name, f"want [low, high] with 0 <= low <= high, got {[low, high]}"
                )
        # No result has a numerator of more than this: each of the operations doubles it at most,
        # beyond the product of the numbers.
        most = (2 * self.number_range[1]) ** max(self.num_numbers)
        if self.target_range[0] > most:
            raise PuzzleSpaceError(
                "target_range",
                f"no puzzle: {max(self.num_numbers)} numbers up to {self.number_range[1]} cannot "
                f"make {self.target_range[0]} or more",
            )

    def check_size(self, num_puzzles: int) -> None:
        """Refuse to look for more puzzles than each choice of numbers with each target would make.

        Raises:
            PuzzleSpaceError: there are fewer; fewer still may be solvable.
        """
        numbers = self.number_range[1] - self.number_range[0] + 1
        targets = self.target_range[1] - self.target_range[0] + 1
        most = sum(comb(numbers + size - 1, size) for size in self.num_numbers) * targets
        if num_puzzles > most:
            raise PuzzleSpaceError(
                "num_puzzles",
                f"at most {most} different puzzles are like this, got {num_puzzles}; ask for fewer "
                "or widen num_numbers, number_range or target_range",
            )


def uniform_hash(*parts: object) -> int:
    """An evenly distributed 64-bit integer that depends on `parts` alone."""
    return int.from_bytes(sha256("/".join(map(str, parts)).encode()).digest()[:8], "big")


def generate(num_puzzles: int, seed: int, space: PuzzleSpace) -> Iterator[Puzzle]:
    """The first `num_puzzles` distinct solvable puzzles of a seed, in order.

    Asked for more, it starts with the same puzzles.

    Raises:
        ValueError: the space holds fewer distinct puzzles than asked for.
    """
    space.check_size(num_puzzles)
    return islice(_distinct(num_puzzles, seed, space), num_puzzles)


def _distinct(num_puzzles: int, seed: int, space: PuzzleSpace) -> Iterator[Puzzle]:
    seen: set[str] = set()
    misses = 0
    for index in count():
        puzzle = candidate(seed, index, space)
        if puzzle is not None and puzzle.key not in seen:
            seen.add(puzzle.key)
            misses = 0
            yield puzzle
            continue
        misses += 1
        if misses == MAX_MISSES:
            raise ValueError(
                f"found {len(seen)} different puzzles of {num_puzzles} asked for, "
                f"and no new one in {MAX_MISSES} tries; "
                "ask for fewer or widen num_numbers, number_range or target_range"
            )


def candidate(seed: int, index: int, space: PuzzleSpace) -> Puzzle | None:
    """The candidate at `index`, or None when its numbers reach no target in range."""
    draws = (uniform_hash("puzzle", seed, index, draw) for draw in count())
    low, high = space.number_range
    size = space.num_numbers[next(draws) % len(space.num_numbers)]
    nums = tuple(low + next(draws) % (high - low + 1) for _ in range(size))
    smallest, largest = space.target_range
    targets = sorted(value for value in reachable(nums) if smallest <= value <= largest)
    return Puzzle(nums, targets[next(draws) % len(targets)]) if targets else None
