"""The files that describe a run: their schemas, written and read by the same classes."""
