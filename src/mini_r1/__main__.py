import sys

if not sys.flags.safe_path:
    del sys.path[0]  # the current folder: a random.py there must not stand in for Python's

from mini_r1.cli import entry_point

entry_point()
