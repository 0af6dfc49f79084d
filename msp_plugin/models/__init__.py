"""Models: load them, find their layers, read and exchange their weights, identify them by content."""
