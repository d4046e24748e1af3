"""Decides where it runs: the `lockstep` command."""
