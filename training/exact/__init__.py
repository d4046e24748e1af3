"""Exact mode: a global batch is computed grain by grain, and the grains are added up along one fixed tree."""
