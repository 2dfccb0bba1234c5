"""How good a network is: metrics of its outputs."""
