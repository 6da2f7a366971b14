"""Starts trainings that can be killed at any file operation, each in a second instead of six.

All that is slow to import is imported once; every training is a fork of that process, which
behaves as `mini-r1 train` would: it takes its arguments and environment, and dies of SIGKILL.

    python -m tests.faults.zygote    reads one JSON request per line, answers with one line each
"""

import gc
import json
import os
import signal
import sys
import time
import warnings

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink"}


def watch(
    folder: str,
    kill_at: int | None = None,
    kill_by: int = signal.SIGKILL,
    operations: str | None = None,
) -> None:
    """Count the operations that change something below a folder.

    Args:
        kill_at: before which of them to get the signal `kill_by`, counted from 0.
        operations: a file to write what they are, one per line.
    """
    names: list[str] = []

    def hook(event: str, args: tuple) -> None:
        if event == "open":
            path, _, flags = args
            if isinstance(path, int) or not flags & WRITING:
                return
        elif event in CHANGES:
            path = args[0]
        else:
            return
        path = os.path.abspath(os.fsdecode(path))
        if not path.startswith(folder) or (event == "os.mkdir" and os.path.exists(path)):
            return
        name = f"{event} {os.path.relpath(path, folder)}"
        if name in names[-1:]:  # TensorBoard opens its file for every line
            return
        if len(names) == kill_at:
            os.kill(os.getpid(), kill_by)
        names.append(name)
        if operations:
            recorded = os.open(operations, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(recorded, f"{name}\n".encode())
            os.close(recorded)

    if kill_at is not None or operations:
        sys.addaudithook(hook)


def train(request: dict) -> None:
    """Be the training that a request asks for; never returns."""
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for fd in (1, 2):
        os.dup2(log, fd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == 2 else signal.SIG_DFL)
    os.environ.update(request["env"])
    sys.argv = ["mini-r1", *request["arguments"]]
    from mini_r1.cli import exit_code, train_here
    from mini_r1.recipe import load_recipe

    recipe, *overrides = request["arguments"]
    watches = ("kill_at", "kill_by", "operations")
    watch(request["folder"], **{name: request[name] for name in watches if name in request})
    code = exit_code(lambda: train_here(load_recipe(recipe, overrides)))
    sys.stdout.flush()
    os._exit(code)


def main() -> None:
    warnings.simplefilter("ignore")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import torch

    import mini_r1.report.page
    import mini_r1.train  # noqa: F401
    from mini_r1.launch.doctor import problems
    from mini_r1.recipe import load_recipe

    torch.set_num_threads(1)
    list(problems(load_recipe("tiny-cpu", [])))  # what it reads is kept
    gc.freeze()  # nor need it be looked through in every fork
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        ranks: dict[int, int] = {}
        for rank, each in enumerate(request["ranks"]):
            pid = os.fork()
            if pid == 0:
                train(each)
            ranks[pid] = rank
        began, codes = time.monotonic(), [0] * len(ranks)
        deadline = began + request.get("kill_after", float("inf"))
        while ranks:
            pid, status = os.waitpid(-1, os.WNOHANG)
            failed = False
            if pid:
                rank = ranks.pop(pid)
                codes[rank] = os.waitstatus_to_exitcode(status)
                failed = codes[rank] < 0 or codes[rank] in (1, 2)
            # The first that dies takes the others with it, as a launcher has it.
            if failed or time.monotonic() > deadline:
                for other in ranks:
                    os.kill(other, signal.SIGKILL)
                deadline = float("inf")
            time.sleep(0.002)
        print(json.dumps({"codes": codes, "seconds": time.monotonic() - began}), flush=True)


if __name__ == "__main__":
    main()
