"""Run a model: observe its layers, run it block by block, take gradients and losses."""
