"""Kernels for layers and attention: the default ones, and exact ones, independent of shapes."""
