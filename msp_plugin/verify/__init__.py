"""Checks which prove that a checkpoint is what was planned, stored, measured and served."""
