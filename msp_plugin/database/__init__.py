"""The level database: for each layer and level, the pruned weight and its error, on disk."""
