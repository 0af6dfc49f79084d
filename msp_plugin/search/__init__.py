"""Find an allocation: resolve the options, measure the model, search, and keep what was measured."""
