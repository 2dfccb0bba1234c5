"""One layer at a time: what it reads, the problem to solve, the default solution."""
