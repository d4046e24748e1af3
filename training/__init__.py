"""Decides what is learned: configuration, networks, the loop, evaluation and checkpoints."""
