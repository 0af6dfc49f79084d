"""Whole runs: prune or recover a model, compare allocators, measure sensitivities."""
