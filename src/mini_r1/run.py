"""The run folder: the names of its files, what they mean, when a run goes on, and how it is read.

    runs/NAME/
      recipe.yaml           the recipe as resolved; a folder without it is no run
      manifest.json         what produced it; manifest-from-checkpoint-N.json: a resume
      checkpoint-N/         after step N; torn unless the file `complete` is in it
      config.json, ...      the trained model, once the run has finished
      eval/*.json           held-out evaluations: before, step-N, after
      samples/              completions of the training, as text
      tensorboard/  logs/   events; the output of servers and nodes
      trainer_state.json    every logged scalar
      summary.json          there once the run has finished
      report.html
      failed-batch.json     what a step was made of that ended the run with NaN or infinity
      STOP                  asks the run to save and stop
      PAUSED                it did, after this step

Every other module asks here. Imports no ML library: a mistake is told in well under a second.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import yaml

from mini_r1 import InputError
from mini_r1.lock import LOCK_FILE, holder, in_use
from mini_r1.manifest import ModelRecord, RunManifest
from mini_r1.model import EMBEDDED_BASES, is_local, model_path
from mini_r1.model_files import is_model
from mini_r1.recipe import Recipe, TaskConfig, default_of, load_recipe
from mini_r1.rollouts import ALL_FILE, Rollout, read_samples

RECIPE_FILE = "recipe.yaml"
MANIFEST_FILE = "manifest.json"
SUMMARY_FILE = "summary.json"
STATE_FILE = "trainer_state.json"
REPORT_FILE = "report.html"
EVAL_FOLDER, SAMPLES_FOLDER, LOGS_FOLDER = "eval", "samples", "logs"
FAILED_BATCH_FILE = "failed-batch.json"
MERGED_FOLDER = "start"  # the adapter that a run starts from, merged, until it is loaded
BEFORE, AFTER = "before", "after"  # the first and the last evaluation
DIAGNOSIS = "diagnosis"  # in an entry of the trainer's log: why nothing was learned up to it
# Written into a checkpoint once every rank has finished its part: without it a kill tore it.
COMPLETE_MARKER = "complete"
STOP_FILE, PAUSED_MARKER = "STOP", "PAUSED"
# The variables by which trackers are told to keep their files in the run folder.
TRACKER_FOLDERS = {
    "TENSORBOARD_LOGGING_DIR": "tensorboard",
    "TRACKIO_DIR": "trackio",
    "WANDB_DIR": "",
}
# Keys that may change when a run is continued: they do not touch what the earlier steps computed.
CONTINUABLE_KEYS = {
    "max_steps",
    "num_train_epochs",
    "report_to",
    "push_to_hub",
    "vllm_group_port",
    "output_dir",
}
CONTINUABLE_PREFIXES = (
    "save_",
    "logging_",
    "log_",
    "hub_",
    "num_eval_",
    "eval_",
    "vllm_server_",
)


# ---- Records --------------------------------------------------------------------------------


class Group(TypedDict):
    """Held-out success within one group of puzzles."""

    success: float
    ci95: Sequence[float]
    num_puzzles: int


class Example(TypedDict):
    """One held-out puzzle, or the row of another task, with one completion."""

    nums: NotRequired[Sequence[int]]
    target: NotRequired[int]
    row: NotRequired[Mapping[str, Any]]
    completion: str
    solved: bool


class OfPuzzles(TypedDict, total=False):
    """What evaluations know of number puzzles only.

    `by_difficulty` is keyed by measure and then by value, `behaviors` as
    `behaviors.summarize_behaviors` says.
    """

    by_difficulty: dict[str, dict[str, Group]]
    plus_minus_only_share: float
    format: float
    behaviors: dict[str, float | None]


class Evaluation(OfPuzzles):
    """What `eval/*.json` holds; shares are 0 to 1.

    `success` is the mean of the success reward, `pass_at` the best of k, keyed by k. `seconds` is
    the time the evaluation took.
    """

    success: float
    ci95: Sequence[float]
    pass_at: dict[str, float]
    mean_completion_tokens: float
    truncated: float
    num_puzzles: int
    num_samples: int
    temperature: float
    split: str
    rule: str
    examples: list[Example]
    max_completion_length: NotRequired[int]
    step: NotRequired[int]
    seconds: NotRequired[float]
    model: NotRequired[str]
    seed: NotRequired[int]


class Summary(TypedDict):
    """What `summary.json` holds: the two evaluations side by side, and how long training took."""

    run_dir: str
    steps: int
    train_seconds: float
    success_before: float
    ci95_before: Sequence[float]
    mean_completion_tokens_before: float
    success_after: float
    ci95_after: Sequence[float]
    mean_completion_tokens_after: float
    num_puzzles: int
    num_samples: int
    temperature: float
    split: str
    rule: str
    plus_minus_only_share: NotRequired[float]
    peak_gpu_memory_gib: NotRequired[float]


# ---- Writing --------------------------------------------------------------------------------


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a record whole or not at all: a killed process leaves the old file."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all, its folder included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


@contextmanager
def new_folder(output: Path) -> Generator[Path]:
    """A folder that gets its name only once it is whole; fill the one that this yields.

    Raises:
        InputError: the name is taken, or nothing can be written there.
    """
    if output.exists():
        raise InputError(f"{output} exists; choose a new folder or remove it")
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an attempt that was killed
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error.strerror}") from None
    try:
        yield partial
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_recipe(run_dir: Path, recipe: Mapping[str, Any]) -> None:
    """Keep the recipe as resolved; from here on the folder is a run."""
    write_text(run_dir / RECIPE_FILE, yaml.safe_dump(dict(recipe), sort_keys=False))


def evaluation_file(run_dir: Path, name: str) -> Path:
    """Where the evaluation of a name such as `before` lies."""
    return run_dir / EVAL_FOLDER / f"{name}.json"


# ---- Checkpoints ----------------------------------------------------------------------------


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, newest first, torn ones included."""
    return sorted(run_dir.glob("checkpoint-*"), key=checkpoint_step, reverse=True)


def checkpoint_step(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def mark_complete(run_dir: Path, step: int) -> None:
    """Say that every rank has written its part of the checkpoint of this step."""
    (run_dir / f"checkpoint-{step}" / COMPLETE_MARKER).touch()


def last_complete_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    whole = (path for path in checkpoints(run_dir) if (path / COMPLETE_MARKER).exists())
    return next(whole, None)


def checkpoint_to_resume(run_dir: Path, is_main: bool) -> Path | None:
    """The newest complete checkpoint.

    The main process removes torn ones after it, since training writes them again.
    """
    complete = last_complete_checkpoint(run_dir)
    for torn in checkpoints(run_dir):
        if torn == complete:
            break
        if is_main:
            print(f"removing {torn}: it was not written to its end")
            shutil.rmtree(torn)
    return complete


def run_weights(run_dir: Path) -> Path:
    """Where a run's newest weights are: in the folder once it has finished, else in a checkpoint.

    Raises:
        InputError: the run has saved nothing yet.
    """
    if is_model(run_dir):
        return run_dir
    checkpoint = last_complete_checkpoint(run_dir)
    if checkpoint is None:
        raise InputError(
            f"{run_dir}: this run has no model and no complete checkpoint yet",
            key="model_name_or_path",
        )
    return checkpoint


def weights_of(name: str) -> str:
    """A run's newest weights; any other name of a model as it is.

    Raises:
        InputError: a run that has saved nothing yet.
    """
    is_embedded = name in EMBEDDED_BASES  # which brings a recipe of its own, like a run
    return name if is_embedded or not is_run(Path(name)) else str(run_weights(Path(name)))


# ---- Going on, pausing, ending --------------------------------------------------------------


def request_stop(run_dir: Path) -> None:
    """Ask a running training to save and stop; see `callbacks.PauseOnRequest`."""
    (run_dir / STOP_FILE).touch()


def stop_requested(run_dir: Path) -> bool:
    """Whether somebody asked."""
    return (run_dir / STOP_FILE).exists()


def withdraw_stop(run_dir: Path) -> None:
    """Take a request back: it was meant for an earlier attempt, or has been met."""
    (run_dir / STOP_FILE).unlink(missing_ok=True)


def mark_paused(run_dir: Path, step: int) -> None:
    """Say that the run has saved and stopped after this step, as asked."""
    withdraw_stop(run_dir)
    write_text(run_dir / PAUSED_MARKER, f"{step}\n")


def paused_step(run_dir: Path) -> int | None:
    """After which step the run has paused; None if it has not."""
    try:
        return int((run_dir / PAUSED_MARKER).read_text(encoding="utf-8"))
    except OSError:
        return None


def unmark_paused(run_dir: Path) -> None:
    """The run goes on."""
    (run_dir / PAUSED_MARKER).unlink(missing_ok=True)


def failed_step(run_dir: Path) -> int | None:
    """The step whose batch an earlier attempt kept, since it ended there; None if there is none."""
    try:
        return _json(run_dir / FAILED_BATCH_FILE)["step"]
    except OSError:
        return None


def finished_summary(recipe: Recipe) -> Summary | None:
    """The summary of a run that has nothing left to do, None for a new or an extended one."""
    try:
        earlier = _yaml(recipe.run_dir / RECIPE_FILE)
        summary = _json(recipe.run_dir / SUMMARY_FILE)
    except OSError:
        return None
    now = recipe.as_dict()
    extended = any(earlier.get(key) != now.get(key) for key in ("max_steps", "num_train_epochs"))
    return None if extended else summary


def check_same_start(run_dir: Path, model: ModelRecord) -> None:
    """Whether a run that goes on starts from the very weights that it started from.

    A reference model, or the base of an adapter, would silently be another one.

    Raises:
        InputError: they have changed.
    """
    earlier = _json(run_dir / MANIFEST_FILE)["model"]["sha256"]
    if earlier is not None and model["sha256"] not in (earlier, None):
        raise InputError(
            f"the weights of '{model['name']}' have changed since {run_dir} began; restore them, "
            "or choose another --output_dir",
            key="model_name_or_path",
        )


def folder_problems(recipe: Recipe) -> Iterator[InputError]:
    """Whether the folder can be written, and holds nothing but earlier steps of this very run."""
    run_dir = recipe.run_dir
    ancestor = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if who := holder(run_dir):
        yield InputError(in_use(run_dir, who), key="output_dir")
        return
    try:
        tempfile.TemporaryFile(dir=ancestor).close()
    except OSError as error:
        yield InputError(
            f"{run_dir} cannot be written ({error.strerror}: {ancestor}); "
            "choose another --output_dir",
            key="output_dir",
        )
        return
    # A server that did not start leaves its log, a start that was killed a merged model.
    left_over = {LOGS_FOLDER, MERGED_FOLDER, LOCK_FILE}
    if ancestor != run_dir or {path.name for path in run_dir.iterdir()} <= left_over:
        return
    try:
        earlier = _yaml(run_dir / RECIPE_FILE)
    except OSError:
        yield InputError(
            f"{run_dir} exists and is no run of ours; choose another --output_dir", key="output_dir"
        )
        return
    now = recipe.as_dict()
    for key in sorted(earlier.keys() | now.keys()):
        continuable = key in CONTINUABLE_KEYS or key.startswith(CONTINUABLE_PREFIXES)
        if earlier.get(key) != now.get(key) and not continuable:
            yield InputError(
                f"{run_dir} holds a run with {key}: {earlier.get(key)}, this recipe says "
                f"{now.get(key)}; choose another --output_dir, or remove the folder to start anew",
                key="output_dir",
            )


# ---- Reading --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What a run folder records; `evaluations` are (step, name, content), in order."""

    folder: Path
    recipe: Mapping[str, Any]
    manifest: RunManifest
    history: Sequence[Mapping[str, Any]]
    evaluations: Sequence[tuple[int, str, Evaluation]]
    samples: Sequence[Rollout]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def diagnosis(self) -> str | None:
        """Why nothing was learned for some steps."""
        return next((entry[DIAGNOSIS] for entry in self.history if DIAGNOSIS in entry), None)

    @property
    def first(self) -> Evaluation:
        return self.evaluations[0][2]

    @property
    def last(self) -> Evaluation:
        return self.evaluations[-1][2]

    @property
    def finished(self) -> bool:
        return self.evaluations[-1][1] == AFTER


def is_run(folder: Path) -> bool:
    """Whether a folder is a run, or a base, which brings a recipe of its own."""
    return (folder / RECIPE_FILE).is_file()


def recipe_of(folder: Path) -> dict[str, Any]:
    """The recipe of a run as it was resolved.

    Raises:
        InputError: the folder is no run.
    """
    return _of_run(folder, RECIPE_FILE, _yaml)


def load_run(folder: Path) -> Run:
    """Read a run folder, finished or not.

    Raises:
        InputError: it is no run, or has recorded nothing yet.
    """
    recipe = recipe_of(folder)
    manifest = _of_run(folder, MANIFEST_FILE, _json)
    states = [folder / STATE_FILE, *(path / STATE_FILE for path in checkpoints(folder))]
    state = next((path for path in states if path.exists()), None)
    history = _json(state)["log_history"] if state else []
    evaluations = []
    for path in (folder / EVAL_FOLDER).glob("*.json"):
        content = _json(path)
        evaluations.append((content.get("step", 0), path.stem, content))
    if not evaluations:
        raise InputError(
            "nothing recorded yet; the first evaluation is still under way", where=folder
        )
    evaluations.sort(key=lambda entry: (entry[0], entry[1] == AFTER))
    samples = read_samples(folder / SAMPLES_FOLDER / ALL_FILE)
    return Run(folder, recipe, manifest, history, evaluations, samples)


def load_evaluation(run_dir: Path, name: str) -> Evaluation:
    """One evaluation of a run."""
    return _json(evaluation_file(run_dir, name))


def load_summary(run_dir: Path) -> Summary:
    """The summary of a finished run."""
    return _json(run_dir / SUMMARY_FILE)


def weights_and_task(
    name: str, recipe_path: str | None = None
) -> tuple[str, TaskConfig, int, Mapping[str, Any] | None]:
    """What a name such as `runs/tiny-cpu` stands for: its weights, its task, a completion's length.

    Args:
        name: a run folder, an embedded base, a model folder, or a model id of the hub.
        recipe_path: else the recipe beside the weights counts, else the defaults.

    Returns:
        the folder or hub id of the weights, the task, the most tokens of a completion, and the
        chat_template_kwargs.

    Raises:
        InputError: no such recipe, or a run that has saved nothing yet.
    """
    folder, weights = Path(model_path(name)), weights_of(name)
    if recipe_path is None and not is_run(folder):
        return weights, TaskConfig(), default_of("max_completion_length"), None
    recipe = load_recipe(recipe_path or folder / RECIPE_FILE, to_train=False)
    task = recipe.task
    if recipe_path is None:
        task = _from_start(folder, task)
    length, kwargs = map(recipe.get, ("max_completion_length", "chat_template_kwargs"))
    return weights, task, length, kwargs


def _from_start(run_dir: Path, task: TaskConfig) -> TaskConfig:
    """A run's task, its files where they were: relative paths count from where the run was started.

    From the current folder, where the run does not say, or they are not there any more.
    """
    manifest = run_dir / MANIFEST_FILE
    start = _json(manifest).get("folder") if manifest.exists() else None
    if start is None:
        return task
    data, template = task.dataset_id_or_path, task.prompt_template
    if data != "generated":
        there, here = Path(start, data), Path(data)
        lost = is_local(data) and not here.exists()
        data = str(there) if there.exists() or lost else data
    if Path(start, template).is_file():
        template = str(Path(start, template))
    # The only reward that an evaluation needs.
    module, colon, function = task.success_reward.partition(".py:")
    if not colon:
        module, _, function = task.success_reward.rpartition(".")
        module = module.replace(".", "/")
    file = Path(start, f"{module}.py")
    reward = f"{file}:{function}" if module and file.is_file() else task.success_reward
    return replace(task, dataset_id_or_path=data, prompt_template=template, eval_reward=reward)


def _of_run(folder: Path, name: str, read: Callable[[Path], Any]) -> Any:
    """A file that every run has from its start."""
    try:
        return read(folder / name)
    except OSError:
        raise InputError("no run; want a folder such as runs/tiny-cpu", where=folder) from None


def _yaml(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
