"""A second implementation in NumPy, and the logits that it vouches for."""
