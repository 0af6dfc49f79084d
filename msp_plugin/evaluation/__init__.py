"""Evaluate checkpoints: perplexity, KL divergence and lm-eval tasks."""
