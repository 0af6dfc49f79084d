"""Products with packed weights on a CPU: C++ that is built at first use, one operator, and who gets which kernel."""
