"""Widths of groups of quantizers: what may be chosen, what it costs, what it does."""
