"""A decoding step on a GPU as one recording, played again at each token.

A step of one token is a hundred small kernels, and to launch them one by one takes longer than they
do. A CUDA graph launches all of them in one call. But it plays what it has seen: the addresses, the
shapes and every number and branch of Python are those of the step that was recorded. So a recording
is kept for each set of these, and is played only for a step that has the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvtool.core import native
from kvtool.core.cache import Cache, Step
from kvtool.core.cache.cross import CrossCache
from kvtool.core.kernels import DefaultKernels

Decode = Callable[[Tensor, Step, Cache, "CrossCache | None"], Tensor]
Replay = Callable[[], Tensor]  # -> the result, in memory that is written to again by the next one
# Records what a function does to fixed memory, having run it or not: it may be run twice.
Capture = Callable[[Callable[[], Tensor]], Replay]

MOST = 8  # sets of memory, such as caches in turns, whose recordings are kept


class CudaCapture:
    """Records CUDA graphs. They share their intermediate memory, and so must run one by one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # One for all: each stream that cuBLAS meets gets a workspace of its own.
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], Tensor]) -> Replay:
        with torch.cuda.device(self.device):
            # Kernels are loaded and workspaces made by a run, since a recording can do neither.
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                step()
            torch.cuda.current_stream().wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            # "global" would fail where another thread allocates memory meanwhile.
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                result = step()

        def play() -> Tensor:
            graph.replay()
            return result

        return play


def capture_for(device: torch.device) -> Capture | None:
    """How steps on a device are recorded; None: they are not."""
    return CudaCapture(device) if device.type == "cuda" else None


class Recording(NamedTuple):
    inputs: list[Tensor]  # where it reads the tokens, and the tensors of a Step
    play: Replay


class Graphs:
    """The steps of one new token a row, for caches that are `compilable`: recorded when the first
    of a kind comes, then played. In other cases, and while anything watches what PyTorch does, the
    step is done as it is written.

    A cache of another place, a source, weights that were exchanged, and numbers of the step that
    differ all have recordings of their own. Memory is compared as it is at each step, so none is
    played that would touch what is not the cache's any more. For one loop at a time.
    """

    def __init__(self, decoder: nn.Module, capture: Capture, device: torch.device) -> None:
        self.capture, self.device = capture, device
        # Where tensors stand that a step may read, since others may be put there.
        self._places = [
            (owner, name)
            for module in decoder.modules()
            for owner in (module._parameters, module._buffers, vars(module))
            for name, value in owner.items()
            if isinstance(value, Tensor)
        ]
        self._kept: dict[tuple[Any, ...], dict[tuple[Any, ...], Recording]] = {}
        self._memory: list[Tensor] = []  # of the last step, with its addresses and recordings
        self._addresses: list[int] = []
        self._recordings: dict[tuple[Any, ...], Recording] = {}
        self._failed = False

    def __call__(
        self, decode: Decode, tokens: Tensor, step: Step, cache: Cache, source: CrossCache | None
    ) -> Tensor:
        """tokens (B,1) -> logits (B,1,V), as `decode` gives"""
        memory = self._memory_of(tokens, step, cache, source)
        if memory is None:
            return decode(tokens, step, cache, source)
        recordings, key = self._recordings_on(memory), _key(tokens, step)
        if key not in recordings:
            try:
                recordings[key] = self._record(decode, tokens, step, cache, source)
            except RuntimeError as error:
                logits = decode(tokens, step, cache, source)  # if it is to blame, it says so itself
                self._failed = True
                reason = str(error).splitlines()[0]
                native.LOG.warning("decoding without CUDA graphs, which failed: %s", reason)
                return logits
        recording = recordings[key]
        for held, new in zip(recording.inputs, _inputs(tokens, step), strict=True):
            held.copy_(new)
        return recording.play().clone()

    def _memory_of(
        self, tokens: Tensor, step: Step, cache: Cache, source: CrossCache | None
    ) -> list[Tensor] | None:
        """All that the step reads and writes beside its inputs; None if it cannot be recorded."""
        # Other kernels ask the device which keys are seen, and wait for the answer.
        usual = type(step.kernels) is DefaultKernels and not self._failed
        watched = native.watched() or torch.is_autocast_enabled(self.device.type)
        if not usual or watched or tokens.device != self.device:
            return None
        held, read = cache.memory(), [] if source is None else source.memory()
        if held is None or read is None:
            return None
        weights = (owner.get(name) for owner, name in self._places)
        return [*(x for x in weights if x is not None), *held, *read]

    def _recordings_on(self, memory: list[Tensor]) -> dict[tuple[Any, ...], Recording]:
        """Those that touch just this memory, by the step's key."""
        addresses = [x.data_ptr() for x in memory]
        if addresses != self._addresses or not all(map(is_, memory, self._memory)):
            # The same addresses may by now be another tensor's, of another form.
            layout = tuple((x.data_ptr(), x.shape, x.stride(), x.dtype) for x in memory)
            if layout not in self._kept and len(self._kept) == MOST:
                del self._kept[next(iter(self._kept))]
            self._recordings = self._kept.setdefault(layout, {})
            self._memory, self._addresses = memory, addresses
        return self._recordings

    def _record(
        self, decode: Decode, tokens: Tensor, step: Step, cache: Cache, source: CrossCache | None
    ) -> Recording:
        with torch.inference_mode(False):  # or they could be written to in that mode alone
            inputs = [x.clone(memory_format=torch.contiguous_format) for x in _inputs(tokens, step)]
        names = [name for name, value in vars(step).items() if isinstance(value, Tensor)]
        changes: dict[str, Any] = dict(zip(names, inputs[1:], strict=True))
        fixed = replace(step, **changes)
        return Recording(inputs, self.capture(lambda: decode(inputs[0], fixed, cache, source)))


def _inputs(tokens: Tensor, step: Step) -> list[Tensor]:
    return [tokens, *(value for value in vars(step).values() if isinstance(value, Tensor))]


def _key(tokens: Tensor, step: Step) -> tuple[Any, ...]:
    """What a step depends on beside numbers in memory: forms, Python's numbers, and by which
    kernels PyTorch computes."""
    cuda = torch.backends.cuda
    return (
        type(step),
        *(
            (name, value.shape, value.dtype) if isinstance(value, Tensor) else (name, value)
            for name, value in (("tokens", tokens), *vars(step).items())
        ),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()),
        (cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
    )
