"""A float graph and a solved plan become files: the only makers of QuantizeLinear and DequantizeLinear."""
