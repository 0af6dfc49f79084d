"""Hosts run a pruning method over a model. Each host framework is imported in one package, inside functions."""
