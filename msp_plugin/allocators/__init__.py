"""Allocators: they choose one level per unit. No torch here; the true loss arrives as a callable."""
