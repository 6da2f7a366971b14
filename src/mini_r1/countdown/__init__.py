"""The Countdown game: reach a target from given numbers with + - * /, every number used exactly once.

Pure Python; imports no machine-learning library and nothing else of this project.
"""
