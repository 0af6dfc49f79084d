"""Hosts, which run a pruning method over a model; each framework is imported in one package, inside functions."""
