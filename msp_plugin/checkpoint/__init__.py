"""Checkpoints: read, load, pack and export them, write their records, and count their zeros."""
