"""The Hugging Face hub: does it answer, and what of it lies in the cache.

Without network huggingface_hub asks five times for every file and waits in between, which takes
two minutes for a model that lies in the cache. So this is decided once per process, before anything
is loaded: `require`.
"""

import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

from mini_r1 import InputError, one_line, quirks

TIMEOUT = 3.0  # seconds that the hub has to answer; a mistake is told in less than five
Kind = Literal["model", "dataset"]
KEYS = {"model": "model_name_or_path", "dataset": "dataset_id_or_path"}
INSTEAD = {
    "model": "write a local folder or tiny_base",
    "dataset": "write a local file or generated",
}


@cache
def unreachable() -> str | None:
    """Why the hub does not answer; None if it does.

    Asked once per process. A proxy and another address of the hub (HF_ENDPOINT) are respected.
    """
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"

    def ask() -> str | None:
        try:
            get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
        except Exception as error:  # no route, no name, a proxy, a certificate: all the same here
            return type(error).__name__
        return None

    return _answer(ask, TIMEOUT, f"no answer within {TIMEOUT:.0f} s")


def token_refusal(token: str) -> str | None:
    """Why the hub does not know the owner of a token; None if it does."""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    def ask() -> str | None:
        try:
            who = f"{constants.ENDPOINT}/api/whoami-v2"
            headers = build_hf_headers(token=token)
            hf_raise_for_status(get_session().get(who, headers=headers, timeout=TIMEOUT))
        except errors.HfHubHTTPError as error:
            return f"the hub refuses the token ({one_line(error, 120)}); run 'hf auth login'"
        except Exception as error:  # offline mode, no route, a proxy
            return f"the hub cannot be reached ({type(error).__name__})"
        return None

    return _answer(ask, TIMEOUT + 1, "the hub cannot be reached (no answer)")


def _answer(ask: Callable[[], str | None], patience: float, silence: str) -> str | None:
    """What `ask` returns, or `silence` if that takes longer than so many seconds.

    Looking up a name knows no time-out of its own.
    """
    answers: list[str | None] = []
    asking = threading.Thread(target=lambda: answers.append(ask()), daemon=True)
    asking.start()
    asking.join(patience)
    return answers[0] if answers else silence


def cached(name: str, kind: Kind = "model", revision: str | None = None) -> Path | None:
    """The folder of the local cache that holds a model or data set, whole or in part.

    Raises:
        InputError: no name that the hub could have.
    """
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(name, repo_type=kind, revision=revision, local_files_only=True)
    except errors.LocalEntryNotFoundError:
        return None
    except errors.HFValidationError as error:
        raise InputError(one_line(error), key=KEYS[kind]) from None
    return Path(folder)


def require(name: str, kind: Kind = "model", revision: str | None = None) -> None:
    """See to it that what follows finds a model or data set of the hub, or does so at once.

    Where the hub does not answer, this process and those it starts are told to work offline: they
    take what is in the cache without asking.

    Raises:
        InputError: it is neither in the cache nor can the hub be reached.
    """
    why = unreachable()
    if why is None:
        return
    quirks.go_offline()
    if cached(name, kind, revision) is None:
        raise InputError(
            f"'{name}' is not in the cache and the hub cannot be reached ({why}); without network "
            + INSTEAD[kind],
            key=KEYS[kind],
        )


def fetch(name: str, revision: str | None = None) -> None:
    """Have the weights of a model of the hub in the cache, however long the download takes.

    For vLLM, which does not say whether it is still downloading.

    Raises:
        InputError: they cannot be had.
    """
    require(name, "model", revision)
    import httpx
    from huggingface_hub import constants, snapshot_download

    if constants.is_offline_mode():
        return
    try:  # what vLLM would, and of a model in several files the list
        snapshot_download(name, revision=revision, allow_patterns=["*.safetensors", "*.json"])
    except (httpx.HTTPError, OSError) as error:
        raise InputError(
            f"'{name}' cannot be downloaded ({one_line(error, 200)}); the same command goes on "
            "with what has come",
            key=KEYS["model"],
        ) from error


def refusal(name: str, kind: Kind = "model", revision: str | None = None) -> InputError | None:
    """Why a model or data set can be had neither from the cache nor from the hub; None if it can.

    Offline as `require` says.
    """
    try:
        require(name, kind, revision)
        if cached(name, kind, revision) is not None:
            return None
    except InputError as error:
        return error
    import httpx  # what huggingface_hub talks with
    from huggingface_hub import HfApi, errors

    ask: Any = HfApi().model_info if kind == "model" else HfApi().dataset_info
    try:
        ask(name, revision=revision, timeout=TIMEOUT)
    except errors.HfHubHTTPError as error:
        return InputError(
            f"the hub refuses the {kind} '{name}' ({one_line(error, 120)}); check its name and "
            f"your access, or {INSTEAD[kind]}",
            key=KEYS[kind],
        )
    except httpx.HTTPError:
        return None  # it has just answered: the download itself may be more patient
    return None


if __name__ == "__main__":
    try:
        fetch(*sys.argv[1:])
    except InputError as problem:
        sys.exit(f"error: {problem}")
