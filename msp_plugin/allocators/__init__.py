"""Allocators choose one level per unit. They never import torch; the loss is a callable."""
