"""Native code: loops in numba, and what lends them tensors."""
