"""The run folder: the names of its files, what they mean, when a run goes on, and how it is read.

    runs/NAME/
      recipe.yaml           the recipe as resolved; a folder without it is no run
      manifest.json         what produced it; manifest-from-checkpoint-N.json: a resume
      checkpoint-N/         after step N; torn unless the file `complete` is in it, which has the
                            sizes and hashes of the others
      set-aside-checkpoint-N/  damaged or not of this run, found in the place of a checkpoint
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import file_digest
from itertools import chain, count
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import yaml

from mini_r1 import InputError, one_line
from mini_r1.lock import LOCK_FILE, holder, in_use
from mini_r1.manifest import RunManifest
from mini_r1.model import EMBEDDED_BASES, is_local, model_path
from mini_r1.model_files import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS,
    CONFIG_FILE,
    SAFETENSORS,
    TOKENIZER_FILES,
    is_model,
)
from mini_r1.recipe import Recipe, TaskConfig, default_of, load_recipe
from mini_r1.rollouts import ALL_FILE, Rollout, read_samples

SECTION_END = "<!-- end -->"  # of what a program writes into a document
RECIPE_FILE = "recipe.yaml"
MANIFEST_FILE = "manifest.json"
SUMMARY_FILE = "summary.json"
STATE_FILE = "trainer_state.json"
REPORT_FILE = "report.html"
EVAL_FOLDER, SAMPLES_FOLDER, LOGS_FOLDER = "eval", "samples", "logs"
TENSORBOARD_FOLDER = "tensorboard"
FAILED_BATCH_FILE = "failed-batch.json"
MERGED_FOLDER = "start"  # the adapter that a run starts from, merged, until it is loaded
BEFORE, AFTER = "before", "after"  # the first and the last evaluation
DIAGNOSIS = "diagnosis"  # in an entry of the trainer's log: why nothing was learned up to it
# In a checkpoint until it is whole, and once every rank has finished its part: with the first a
# kill tore it, with neither the run did not write it.
BEGUN_MARKER, COMPLETE_MARKER = "begun", "complete"
# Whose files only grow, until a resume takes them back to where its checkpoint was.
GROWING_FOLDERS = (SAMPLES_FOLDER, TENSORBOARD_FOLDER)
STOP_FILE, PAUSED_MARKER = "STOP", "PAUSED"
# What of a run folder push_to_hub makes public: no logs, no checkpoints, no pickles.
PUBLISHED = (
    *(CONFIG_FILE, "generation_config.json", SAFETENSORS, f"{SAFETENSORS}.index.json"),
    "model-[0-9]*-of-[0-9]*.safetensors",
    *(ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS),
    *(*TOKENIZER_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("merges.txt", "chat_template.jinja"),
    *("README.md", REPORT_FILE, RECIPE_FILE, MANIFEST_FILE),
    *(f"{EVAL_FOLDER}/*.json", f"{SAMPLES_FOLDER}/*.txt"),
)
# The variables by which trackers are told to keep their files in the run folder.
TRACKER_FOLDERS = {
    "TENSORBOARD_LOGGING_DIR": TENSORBOARD_FOLDER,
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

    `success` is the mean of the success reward, `pass_at` the best of k, keyed by k. `generator` is
    what wrote the completions, `seconds` the time the evaluation took.
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
    generator: NotRequired[str]
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


def write_section(document: Path, begin: str, text: str) -> None:
    """Put what a program has found out into a document, between the line `begin` and SECTION_END.

    Raises:
        InputError: the document has no such lines.
    """
    before, found, rest = document.read_text(encoding="utf-8").partition(begin)
    _, end, after = rest.partition(SECTION_END)
    if not found or not end:
        raise InputError(f"it has no lines '{begin}' and '{SECTION_END}'", where=document)
    inside = text.strip("\n")
    write_text(document, f"{before}{begin}\n\n{inside}\n\n{end}{after}")


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
    found = (path for path in run_dir.glob("checkpoint-*") if path.is_dir())
    numbered = (path for path in found if path.name.removeprefix("checkpoint-").isdecimal())
    return sorted(numbered, key=checkpoint_step, reverse=True)


def checkpoint_step(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def mark_begun(run_dir: Path, step: int) -> None:
    """Say that what lies in the checkpoint of this step is ours, whole or not."""
    checkpoint = run_dir / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / BEGUN_MARKER).touch()


def mark_complete(run_dir: Path, step: int) -> None:
    """Say that every rank has written its part of the checkpoint of this step.

    The marker holds the size and the SHA-256 of each of its files, and how far those files of the
    run were that only grow: see `damage` and `rewind`.
    """
    checkpoint = run_dir / f"checkpoint-{step}"
    paths = [path for path in _files(checkpoint) if path.name != BEGUN_MARKER]
    with ThreadPoolExecutor() as pool:  # hashlib lets go of the interpreter
        hashes = list(pool.map(_sha256, paths))
    files = {
        str(path.relative_to(checkpoint)): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, hashes, strict=True)
    }
    growing = {
        str(path.relative_to(run_dir)): path.stat().st_size
        for folder in GROWING_FOLDERS
        for path in _files(run_dir / folder)
    }
    write_json(checkpoint / COMPLETE_MARKER, {"files": files, "growing": growing})
    (checkpoint / BEGUN_MARKER).unlink(missing_ok=True)


def discard_old_checkpoints(run_dir: Path, limit: int | None) -> None:
    """Remove all but the newest ones, `limit` of them.

    Not by transformers, which does it before the newest one is complete: a kill then would leave
    none.
    """
    for old in checkpoints(run_dir)[limit:] if limit else ():
        _remove(old)


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    return _marker(checkpoint) is not None


def last_complete_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    return next(filter(is_complete, checkpoints(run_dir)), None)


def damage(checkpoint: Path) -> str | None:
    """What has happened to a complete checkpoint since it was written; None for nothing."""
    marker = _marker(checkpoint)
    assert marker is not None
    for name, file in marker["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != file["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {file['bytes']}"
        if _sha256(path) != file["sha256"]:
            return f"{name} has changed"
    return None


def checkpoint_to_resume(run_dir: Path) -> Path | None:
    """The newest checkpoint that is as it was written; None to begin. For the main process.

    Of the others, those that training writes again are removed. What may be somebody's only copy
    of something is set aside: a damaged one, or a folder that this run did not write.

    Raises:
        InputError: all are damaged.
    """
    intact, torn, strange = None, [], []
    for checkpoint in checkpoints(run_dir):
        if not is_complete(checkpoint):
            ours = (checkpoint / BEGUN_MARKER).exists() or not any(checkpoint.iterdir())
            (torn if ours else strange).append((checkpoint, "is not whole"))
        elif intact is None:
            if what := damage(checkpoint):
                strange.append((checkpoint, f"is damaged ({what})"))
            else:
                intact = checkpoint
    damaged = [(path, what) for path, what in strange if is_complete(path)]
    if damaged and intact is None:
        (path, what), *_ = damaged
        raise InputError(
            f"{path} {what}, and there is no other to go on from; restore it, or remove {run_dir} "
            "to start anew",
            key="output_dir",
        )
    for checkpoint, _ in torn:
        print(f"removing {checkpoint}: it was not written to its end")
        _remove(checkpoint)
    for checkpoint, what in strange:
        name = f"set-aside-{checkpoint.name}"
        names = chain([name], (f"{name}-{number}" for number in count(2)))
        aside = next(path for path in map(run_dir.joinpath, names) if not path.exists())
        checkpoint.rename(aside)
        print(f"{checkpoint} {what}: set aside as {aside.name}")
    return intact


def rewind(run_dir: Path, checkpoint: Path | None) -> None:
    """Take back what was recorded after a checkpoint, or all, and what a kill left half-written.

    Then the samples, TensorBoard's events and the scheduled evaluations end up as if the run had
    never been interrupted.
    """
    marker = _marker(checkpoint) if checkpoint else None
    growing = marker["growing"] if marker else {}
    for folder in GROWING_FOLDERS:
        for path in _files(run_dir / folder):
            size = growing.get(str(path.relative_to(run_dir)))
            if size is None:
                path.unlink()
            elif size < path.stat().st_size:
                os.truncate(path, size)
    last = evaluation_file(run_dir, f"step-{checkpoint_step(checkpoint) if checkpoint else 0:06d}")
    for path in (run_dir / EVAL_FOLDER).glob("step-*.json"):
        if path.name > last.name:
            path.unlink()
    for folder in (run_dir, run_dir / EVAL_FOLDER):
        for path in folder.glob("*.partial"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, or leave what `rewind` will."""
    partial = checkpoint.with_name(f"{checkpoint.name}.partial")
    checkpoint.rename(partial)
    shutil.rmtree(partial)


def _marker(checkpoint: Path) -> dict[str, Any] | None:
    """What the marker of a complete checkpoint says; None if it says nothing, or is not there."""
    try:
        marker = _json(checkpoint / COMPLETE_MARKER)
    except (OSError, InputError):
        return None
    return marker if marker.keys() == {"files", "growing"} else None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def run_weights(run_dir: Path) -> Path:
    """Where a run's newest weights are: in the folder once it has finished, else in a checkpoint.

    Raises:
        InputError: the run has saved nothing yet.
    """
    finished = (run_dir / SUMMARY_FILE).exists()  # else a kill may have left half a model
    checkpoint = None if finished else last_complete_checkpoint(run_dir)
    if checkpoint is None and is_model(run_dir):
        return run_dir
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
    except (OSError, ValueError):
        return None


def unmark_paused(run_dir: Path) -> None:
    """The run goes on."""
    (run_dir / PAUSED_MARKER).unlink(missing_ok=True)


def failed_step(run_dir: Path) -> int | None:
    """The step whose batch an earlier attempt kept, since it ended there; None if there is none."""
    try:
        return _json(run_dir / FAILED_BATCH_FILE).get("step", 0)
    except OSError:
        return None
    except InputError:  # nobody can read it
        return 0


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


def check_same_start(run_dir: Path, manifest: RunManifest) -> None:
    """Whether a run that goes on has the very weights and data that it started with.

    A reference model, or the base of an adapter, would silently be another one; and so would the
    puzzles, those held out among them.

    Raises:
        InputError: they have changed.
    """
    earlier = _json(run_dir / MANIFEST_FILE)
    instead = f"have changed since {run_dir} began; restore them, or choose another --output_dir"
    for kind in ("sha256", "revision"):
        was, now = earlier["model"][kind], manifest["model"][kind]
        if None not in (was, now) and was != now:
            what = f"the weights of '{manifest['model']['name']}'"
            raise InputError(f"{what} {instead}", key="model_name_or_path")
    if earlier["data"]["sha256"] != manifest["data"]["sha256"]:
        raise InputError(f"the data {instead}", key="dataset_id_or_path")


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
    # A server that did not start leaves its log, a start that was killed a merged model or half a
    # recipe.
    left_over = {LOGS_FOLDER, MERGED_FOLDER, LOCK_FILE, f"{RECIPE_FILE}.partial"}
    if ancestor != run_dir or {path.name for path in run_dir.iterdir()} <= left_over:
        return
    try:
        earlier = _yaml(run_dir / RECIPE_FILE)
        if last_complete_checkpoint(run_dir):  # what a resume reads
            _json(run_dir / MANIFEST_FILE)
            load_evaluation(run_dir, BEFORE)
    except InputError as error:
        yield error
        return
    except OSError as error:
        missing = Path(str(error.filename)).name
        what = "is no run of ours" if missing == RECIPE_FILE else f"has lost its {missing}"
        yield InputError(
            f"{run_dir} exists and {what}; choose another --output_dir", key="output_dir"
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
    samples_file = folder / SAMPLES_FOLDER / ALL_FILE
    try:
        samples = read_samples(samples_file)
    except ValueError as error:
        raise InputError(f"damaged ({one_line(error, 100)})", where=samples_file) from None
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
    start = os.path.expanduser(start)
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
    return _record(path, yaml.safe_load)


def _json(path: Path) -> Any:
    return _record(path, json.loads)


def _record(path: Path, parse: Callable[[str], Any]) -> Any:
    """A mapping that was written whole.

    Raises:
        InputError: something has happened to it since.
        OSError: there is none.
    """
    try:
        content = parse(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"{type(content).__name__} where a mapping was written")
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(
            f"damaged ({one_line(error, 100)}); restore it, or choose another folder", where=path
        ) from None
    return content
