"""Allocators choose one level per unit. They never import torch; the measured loss is passed in as a callable."""
