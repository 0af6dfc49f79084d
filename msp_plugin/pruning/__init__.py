"""Masks and pruning methods as pure tensor functions."""
