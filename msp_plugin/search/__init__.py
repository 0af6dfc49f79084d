"""Find an allocation: resolve the options, measure the model, search, and record every measurement."""
