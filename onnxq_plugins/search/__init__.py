"""Searches over plans: groups of quantizers and their widths, what a choice costs, how accurate it is."""
