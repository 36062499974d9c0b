"""Attention over the keys and values of a cache: the usual kernels, and the exact ones."""
