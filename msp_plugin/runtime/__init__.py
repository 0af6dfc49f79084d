"""Files, locks, journals, memory and ranks: this room knows no model and no pruning."""
