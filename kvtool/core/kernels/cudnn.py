"""A switch that keeps PyTorch from choosing cuDNN's attention on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch


class CudnnSwitch:
    """Turns off cuDNN's attention, which PyTorch may choose for half formats on a GPU.

    cuDNN makes a new plan for each number of keys. So with a growing cache each token took 27 ms on
    an H200.
    """

    def __init__(self) -> None:
        self._lock, self._n_users, self._was_on = Lock(), 0, True

    @contextmanager
    def off(self) -> Iterator[None]:
        """Turn cuDNN's attention off inside a `with` block, unless it is the only fused attention
        that is on.

        The setting belongs to the process. It is restored when the last of several threads leaves.
        """
        cuda = torch.backends.cuda
        with self._lock:
            if not self._n_users:
                self._was_on = cuda.cudnn_sdp_enabled()
                others = cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled()
                cuda.enable_cudnn_sdp(self._was_on and not others)
            self._n_users += 1
        try:
            yield
        finally:
            with self._lock:
                self._n_users -= 1
                if not self._n_users:
                    cuda.enable_cudnn_sdp(self._was_on)


CUDNN = CudnnSwitch()
