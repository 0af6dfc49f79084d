"""Estimators of what pruning a layer costs the model."""
