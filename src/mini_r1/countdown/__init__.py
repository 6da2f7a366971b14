"""The Countdown game: reach a target with + - * / from given numbers, each used exactly once.

Pure Python; imports no machine-learning library and nothing else of this project.
"""
