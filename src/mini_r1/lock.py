"""One process at a time writes into a run folder.

The lock is the kernel's (flock): it ends with the process that holds it, however that ends, and
most network file systems know it, too. What stands in the file is for the message alone.
"""

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO

from mini_r1 import InputError

LOCK_FILE = "lock"
PATIENCE = 0.3  # seconds; whoever only asks who holds a lock holds it for a moment


class FolderLock:
    """Holds a run folder from `with` to its end; the folder is made, and removed if it stays empty.

    Raises:
        InputError: another process holds it, which is named.
    """

    def __init__(self, folder: Path):
        self._folder, self._file = folder, folder / LOCK_FILE
        self._open: IO[str] | None = None
        self._made: list[Path] = []

    def __enter__(self) -> "FolderLock":
        above = (self._folder, *self._folder.absolute().parents)
        self._made = [path for path in above if not path.exists()]
        deadline = time.monotonic() + PATIENCE
        while self._open is None:
            last = time.monotonic() > deadline
            try:
                self._open = self._try(last)
            except FileNotFoundError:  # the one who held it has just removed the folder
                if last:
                    break
            except OSError:
                break  # nothing can be written here: run.folder_problems says so
        return self

    def _try(self, last: bool) -> IO[str] | None:
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._file.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            if last:
                who = holder(self._folder) or "another process"
                raise InputError(in_use(self._folder, who), key="output_dir") from None
            time.sleep(PATIENCE / 10)
            return None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            print(f"this file system knows no locks: see that nobody else trains in {self._folder}")
        # Was it removed by the one who held it, after it was opened here?
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), self._file.stat()):
                os.register_at_fork(after_in_child=file.close)  # a child may outlive this process
                since = datetime.now(UTC).isoformat(timespec="seconds")
                file.truncate(0)
                json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": since}, file)
                file.flush()
                return file
        file.close()
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._open is None:
            return
        self._file.unlink(missing_ok=True)
        with suppress(OSError):  # it holds something by now
            for path in self._made:
                path.rmdir()
        self._open.close()
        self._open = None


def holder(folder: Path) -> str | None:
    """Who holds a run folder, in words; None if nobody else than this process does."""
    try:
        with (folder / LOCK_FILE).open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
            except BlockingIOError:
                pass
            who = json.loads(file.read() or "{}")
    except (OSError, ValueError):
        return None
    if (who.get("host"), who.get("pid")) == (socket.gethostname(), os.getpid()):
        return None
    return f"process {who.get('pid')} on {who.get('host')}, since {who.get('since')}"


def in_use(folder: Path, who: str) -> str:
    """Why a run cannot start in a folder."""
    return (
        f"{folder} is in use by {who}; wait for it, pause it with 'mini-r1 pause {folder}', or "
        "choose another --output_dir"
    )
