"""Frameworks that own pruning methods; each is imported in one package, inside functions."""
