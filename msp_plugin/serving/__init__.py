"""Serving pruned checkpoints: the 2:4 kernels of torch, and what a server needs to use them."""
