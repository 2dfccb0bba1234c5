"""From a recipe to a plan: requests, what follows from graph, plan and target together, checks of entries."""
