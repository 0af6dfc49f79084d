"""Coupled heads, channels and half-blocks: where they are, which ones do nothing, a model without them."""
