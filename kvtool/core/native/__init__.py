"""Native code: loops compiled by numba, and the functions that hand tensors to them."""
