"""Checkpoints: read, load, pack and export them, write the records beside them, and count their zeros."""
