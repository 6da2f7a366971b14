from mini_r1.cli import entry_point

entry_point()
