"""Models: load them, find their layers, read and swap their weights, identify them by content."""
