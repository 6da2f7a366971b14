"""What there is to run on, and which process this one is. Imports no ML library.

GPUs are counted as CUDA counts them. A launch is known by all the variables that accelerate and
torchrun set: some of them lie about in the environments of containers and clusters.
"""

import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

from mini_r1 import InputError

# What CUDA talks to, on Linux and on WSL: where one of them is, there may be GPUs.
DRIVERS = ("/dev/nvidiactl", "/dev/dxg")
ASK_TORCH = (
    "from torch import cuda\n"
    "for index in range(cuda.device_count()):\n"
    "    print(cuda.get_device_properties(index).total_memory)"
)
ANSWER_TIMEOUT = 60.0  # seconds; torch is imported, perhaps from the disk of a network
LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PR_SET_PDEATHSIG = 1  # linux/prctl.h
# What accelerate's PartialState takes for a launch, each by itself: the largest harmless value.
TAKEN_FOR_A_LAUNCH = {
    "LOCAL_RANK": -1,
    "WORLD_SIZE": 1,
    "PMI_SIZE": 1,
    "OMPI_COMM_WORLD_SIZE": 1,
    "MV2_COMM_WORLD_SIZE": 1,
}


# ---- The GPUs ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """The GPUs a run may use.

    Attributes:
        gpus: how many.
        gpu_memory: of the smallest one, in GiB, which is what cards call GB; 0 if it is not known.
        is_here: whether it is this machine, whose disk can be looked at.
    """

    gpus: int
    gpu_memory: float = 0.0
    is_here: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        if not self.gpus:
            return "no GPU"
        memory = f"of {self.gpu_memory:.0f} GiB" if self.gpu_memory else "of a size not known"
        return f"{self.gpus} GPU{'s' if self.gpus > 1 else ''} {memory}"


def this_machine() -> Machine:
    """The GPUs of this machine that CUDA_VISIBLE_DEVICES leaves to us."""
    visible = _visible()
    memory = min((device.memory for device in visible), default=0.0)
    return Machine(len(visible), memory, is_here=True)


def visible_gpus() -> list[str]:
    """The names, as CUDA_VISIBLE_DEVICES takes them, of the GPUs this process may use."""
    return [device.name for device in _visible()]


@dataclass(frozen=True)
class _Device:
    """A card or a MIG slice: its name as CUDA_VISIBLE_DEVICES takes it, its GiB, 0 if not known."""

    name: str
    memory: float


def _visible() -> list[_Device]:
    """The devices that CUDA will count.

    It reads CUDA_VISIBLE_DEVICES up to the first entry that names no device or is of another kind
    than the first one. A device named twice leaves none: so has it torch, which was tried against
    the driver and counts for the training (`torch.cuda._parse_visible_devices`). One MIG slice
    hides every other device (NVIDIA's MIG User Guide, CUDA Device Enumeration). Where nvidia-smi
    does not list them, torch is asked, which is slower.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    kind = next((kind for kind in ("GPU-", "MIG-") if (chosen or "").startswith(kind)), "")
    named = _devices(kind)
    if not named and any(map(os.path.exists, DRIVERS)):
        return _as_torch_counts(chosen)
    taken: list[str] = []
    for entry in named if chosen is None else chosen.split(","):
        if kind:  # a UUID may be cut short
            found = [name for name in named if name.startswith(entry) and entry.startswith(kind)]
        else:  # as strtoul reads it
            index = re.match(r"\s*([+-]?[0-9]+)", entry)
            found = [name for name in named if index and int(name) == int(index[1])]
        if len(found) != 1:
            break
        if found[0] in taken:
            return []
        taken += found
    devices = [device for name in taken for device in named[name]]
    return [device for device in devices if device.name.startswith("MIG-")][:1] or devices


def _devices(kind: str) -> dict[str, list[_Device]]:
    """What nvidia-smi lists: each name of a kind, and the devices that CUDA finds under it.

    Args:
        kind: how the names begin: `GPU-` and `MIG-` are UUIDs, nothing is the index of a card.
    """
    query = "--query-gpu=index,memory.total,mig.mode.current"
    sizes: dict[str, float] = {}
    sliced = set()
    for line in _printed("nvidia-smi", query, "--format=csv,noheader,nounits"):
        if card := re.match(r"(\d+), (\d+)?", line):  # of shared memory it says [N/A]
            sizes[card[1]] = float(card[2] or 0) / 1024
            sliced |= {card[1]} if line.endswith(", Enabled") else set()
    # The UUIDs, and the slices with their GB as their profile says: 3g.20gb.
    uuids: dict[str, str] = {}
    slices: dict[str, list[_Device]] = {index: [] for index in sliced}
    for line in _printed("nvidia-smi", "-L") if kind or sliced else []:
        if card := re.match(r"GPU (\d+): .*\(UUID: (\S+)\)", line):
            uuids[card[1]] = card[2]
        elif part := re.match(r"\s+MIG \S*?(\d+)gb.*\(UUID: (\S+)\)", line):
            slices.setdefault([*uuids][-1], []).append(_Device(part[2], float(part[1])))
    if kind == "MIG-":
        return {part.name: [part] for parts in slices.values() for part in parts}
    names = {index: uuids.get(index, "") if kind else index for index in sizes}
    return {name: slices.get(index, [_Device(name, sizes[index])]) for index, name in names.items()}


@cache
def _as_torch_counts(chosen: str | None) -> list[_Device]:
    """The devices that torch counts: containers may lack nvidia-smi, or its right to see slices.

    In a process of its own: CUDA reads CUDA_VISIBLE_DEVICES once, and this one may still set it.
    """
    sizes = _printed(sys.executable, "-P", "-c", ASK_TORCH)
    names = map(str, range(len(sizes))) if chosen is None else chosen.split(",")
    return [_Device(name, int(size) / 2**30) for name, size in zip(names, sizes, strict=False)]


def _printed(*command: str) -> list[str]:
    """The lines that a command prints; none where there is no such command, or it fails."""
    try:
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=ANSWER_TIMEOUT
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line for line in done.stdout.splitlines() if line.strip()]


# ---- The launch -------------------------------------------------------------------------------


def launched() -> bool:
    """Whether accelerate or torchrun started this process: they set all these variables."""
    return all(variable in os.environ for variable in LAUNCH_VARIABLES)


def is_main_process() -> bool:
    """Whether this process speaks for its launch, or is alone."""
    return not launched() or os.environ["RANK"] == "0"


def num_processes() -> int:
    """How many processes the launch has started; 1 without a launch."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def processes_here() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", num_processes())) if launched() else 1


def end_with_launcher() -> None:
    """Have this process of a launch killed when its launcher dies, even of kill -9. Linux only.

    Else it would go on unseen, and be in the way of the next attempt.
    """
    _on_launcher_death(signal.SIGKILL)


def outlive_launcher() -> None:
    """Have this process of a launch save and stop as it was asked, whatever its launcher does."""
    _on_launcher_death(0)


def _on_launcher_death(number: int) -> None:
    if launched() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def leftover_variables() -> Iterator[InputError]:
    """What another launch has left in the environment and would be taken for one of this run."""
    if launched():
        return
    given = {name: os.environ[name] for name in TAKEN_FOR_A_LAUNCH if name in os.environ}
    harmful = [
        name
        for name, value in given.items()
        if not re.fullmatch(r"-?\d+", value) or int(value) > TAKEN_FOR_A_LAUNCH[name]
    ]
    if harmful:
        names = " ".join(harmful)
        yield InputError(
            f"'{given[harmful[0]]}' is left from another launch, and no launcher has started this "
            f"process; run 'unset {names}'",
            where=harmful[0],
        )
