"""Models proven in the runtimes that they are made for: audits by running them, and matrices of runtimes and recipes."""
