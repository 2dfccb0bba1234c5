"""What a result is worth and why: the diagnosis, remedies, plots, the page."""
