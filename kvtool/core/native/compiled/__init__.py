"""The functions that numba compiles; nothing here knows PyTorch."""
