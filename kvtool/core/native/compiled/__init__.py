"""The functions that numba compiles; nothing here uses PyTorch."""
