"""Saves the training state so that a kill at any instruction leaves a whole checkpoint."""
