"""Whole runs: prune a model, compare allocators."""
