"""Load models, find their layers, identify them by content."""
