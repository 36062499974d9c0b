"""A decoding step on a GPU as a captured CUDA graph, replayed at each token.

A step of one token is a hundred small kernels, and to launch them one by one takes longer than they
do. A CUDA graph launches all of them in one call. But it replays what it has seen: the addresses,
the shapes and every number and branch of Python are those of the step that was captured. So a graph
is kept for each set of these, and is replayed only for a step that has the same. What differs at
each step, such as the number of tokens before it, is read from memory.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvtool.core.cache import Cache, Step
from kvtool.core.cache.cross import CrossCache
from kvtool.core.cache.direct_access import DirectAccess, GraphStep
from kvtool.core.native import arrays as native
from kvtool.core.native import compiling

Decode = Callable[[Tensor, Step, Cache, "CrossCache | None"], Tensor]
Replay = Callable[[], Tensor]  # -> the result, in memory that is written to again by the next one
# Captures what a function does to fixed memory, having run it or not: it may be run twice.
Capture = Callable[[Callable[[], Tensor]], Replay]

MOST = 8  # sets of memory, such as caches in turns, whose captured are kept


class CudaCapture:
    """Captures CUDA graphs. They share their intermediate memory, and so must run one by one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # One for all: each stream that cuBLAS meets gets a workspace of its own.
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], Tensor]) -> Replay:
        with torch.cuda.device(self.device):
            # Kernels are loaded and workspaces made by a run, since a graph can do neither.
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                step()
            torch.cuda.current_stream().wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            # "global" would fail where another thread allocates memory meanwhile.
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                result = step()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def capture_for(device: torch.device) -> Capture | None:
    """How steps on a device are captured; None: they are not."""
    return CudaCapture(device) if device.type == "cuda" else None


class CapturedStep(NamedTuple):
    """A CUDA graph, and the memory that it reads what differs from."""

    # Where it reads how many tokens stand before, (1,), then the tokens, and the step's tables.
    inputs: list[Tensor]
    replay: Replay


class Graphs:
    """The steps of one new token a row, for caches that are `compilable`: captured when the first
    of a kind comes, then replayed. In other cases, and while anything watches what PyTorch does,
    the step is left to be done as it is written.

    A cache at other addresses, a source, weights that were exchanged, and numbers of the step that
    differ all have graphs of their own. Memory is compared as it is at each step, so none is
    replayed that would touch what is not the cache's any more. For one loop at a time.
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
        self._kept: dict[tuple[Any, ...], dict[tuple[Any, ...], CapturedStep]] = {}
        self._memory: list[Tensor] = []  # of the last step, with its addresses and graphs
        self._addresses: list[int] = []
        self._captured: dict[tuple[Any, ...], CapturedStep] = {}
        self._failed = False

    def step(
        self, decode: Decode, tokens: Tensor, cache: Cache, source: CrossCache | None
    ) -> Tensor | str:
        """A whole step, `begin` and `commit` included: tokens (B,1) -> logits (B,1,V), as `decode`
        gives, or why it cannot be captured. Raises CapacityError."""
        if self._failed:
            return "CUDA graphs have failed"
        if native.watched() or torch.is_autocast_enabled(self.device.type):
            return "something watches what PyTorch does"
        if tokens.device != self.device:
            return f"the tokens are on {tokens.device}"
        read = [] if source is None else source.memory()
        if read is None:
            return "the source attends in a way of its own"
        fixed = cache.graph_step() if isinstance(cache, DirectAccess) else None
        if fixed is None:
            return f"the {cache.kind} cache has no step that is like others"
        captured, key = self._captured_on([*fixed.memory, *read]), _key(tokens, cache, fixed)
        if key not in captured:
            try:
                captured[key] = self._capture_step(decode, tokens, cache, fixed, source)
            except RuntimeError as error:
                # If the step is to blame, it says so itself.
                logits = decode(tokens, cache.begin(1), cache, source)
                cache.commit(1)
                self._failed = True
                reason = str(error).splitlines()[0]
                compiling.LOG.warning("decoding without CUDA graphs, which failed: %s", reason)
                return logits
        graph = captured[key]
        start, *inputs = graph.inputs
        start.fill_(fixed.start)
        for held, new in zip(inputs, (tokens, *fixed.tables), strict=True):
            held.copy_(new)
        logits = graph.replay().clone()
        cache.commit(1)
        return logits

    def _captured_on(self, held: list[Tensor]) -> dict[tuple[Any, ...], CapturedStep]:
        """The graphs that touch just the weights and this memory, by the step's key."""
        memory = [x for owner, name in self._places if (x := owner.get(name)) is not None]
        memory += held
        addresses = list(map(Tensor.data_ptr, memory))
        if addresses != self._addresses or not all(map(is_, memory, self._memory)):
            # The same addresses may by now be another tensor's, of another form.
            layout = tuple((x.data_ptr(), x.shape, x.stride(), x.dtype) for x in memory)
            if layout not in self._kept and len(self._kept) == MOST:
                del self._kept[next(iter(self._kept))]
            self._captured = self._kept.setdefault(layout, {})
            self._memory, self._addresses = memory, addresses
        return self._captured

    def _capture_step(
        self,
        decode: Decode,
        tokens: Tensor,
        cache: Cache,
        fixed: GraphStep,
        source: CrossCache | None,
    ) -> CapturedStep:
        assert isinstance(cache, DirectAccess), "it gave the step"
        with torch.inference_mode(False):  # or they could be written to in that mode alone
            start = torch.full((1,), fixed.start, device=self.device)
            changing = (tokens, *fixed.tables)
            own = [x.clone(memory_format=torch.contiguous_format) for x in changing]

        def step() -> Tensor:
            placed = cache.step_at(start, tuple(own[1:]), fixed.form)
            return decode(own[0], placed, cache, source)

        return CapturedStep([start, *own], self.capture(step))


def _key(tokens: Tensor, cache: Cache, fixed: GraphStep) -> tuple[Any, ...]:
    """What a step depends on beside numbers in memory: shapes, Python's numbers, and the kernels
    that PyTorch takes."""
    cuda, products = torch.backends.cuda, torch.backends.cuda.matmul
    return (
        type(cache),
        fixed.form,
        *((x.shape, x.dtype) for x in (tokens, *fixed.tables)),
        products.fp32_precision == "tf32",
        products.allow_bf16_reduced_precision_reduction,
        products.allow_fp16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()),
        (cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
    )
