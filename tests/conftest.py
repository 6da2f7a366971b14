"""Quick tests first; the same examples on every run; no network."""

import os
import signal

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for a hub must fail, not hang
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job hands down its deafness

settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
