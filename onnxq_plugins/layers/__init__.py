"""One layer at a time: what it sees, the problem that poses, its default solution."""
