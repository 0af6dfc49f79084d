"""Text: read it from many sources, tokenize it, cut it into samples."""
