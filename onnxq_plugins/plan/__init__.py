"""From a recipe to a plan: what is asked for, and what is wrong with an entry."""
