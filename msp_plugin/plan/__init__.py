"""Pure planning: levels, units, budgets and allocations. No torch, no files but JSON."""
