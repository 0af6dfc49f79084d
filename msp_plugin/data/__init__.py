"""Text: read it from any source, tokenize it, split it into samples."""
