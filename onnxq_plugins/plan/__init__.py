"""From a recipe to a plan: what is requested, graph and plan and target seen together, and what is wrong with an entry."""
