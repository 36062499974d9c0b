"""A decoding step on a GPU as a captured CUDA graph, replayed at each token.

A step of one token launches about a hundred small kernels, and launching takes longer than running
them. A CUDA graph launches all of them in one call. But a replay repeats the addresses, the shapes,
the Python numbers and the branches of the captured step. So each combination of these gets its own
graph, which is replayed only for steps with the same combination. The graph reads from memory what
changes at each step, such as the number of tokens before it.
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
Replay = Callable[[], Tensor]  # -> the result, in memory that the next replay overwrites
# Captures what a function does to fixed memory. The function may be run more than once.
Capture = Callable[[Callable[[], Tensor]], Replay]

MAX_LAYOUTS = 8  # sets of memory, such as caches used in turns, whose graphs are kept


class CudaCapture:
    """Captures CUDA graphs. They share their intermediate memory, so they must not run at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # One stream for all graphs: cuBLAS allocates a workspace for each stream.
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], Tensor]) -> Replay:
        with torch.cuda.device(self.device):
            # A first run loads kernels and allocates workspaces, which a capture cannot do.
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                step()
            torch.cuda.current_stream().wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            # In mode "global" an allocation by another thread would make the capture fail.
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                result = step()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def capture_for(device: torch.device) -> Capture | None:
    """The capture for steps on `device`; None if it is no GPU."""
    return CudaCapture(device) if device.type == "cuda" else None


class CapturedStep(NamedTuple):
    """A CUDA graph and the memory of its inputs."""

    # The number of tokens before the step (1,), the tokens (B,1), and the step's tables.
    inputs: list[Tensor]
    replay: Replay


class Graphs:
    """Captures single-token steps with `compilable` caches, and replays them.

    Another cache, source or weight tensor, and another form of the step, get graphs of their own.
    The addresses are compared at each step, so no replay touches memory that was freed since. For
    one decode loop at a time.
    """

    def __init__(self, decoder: nn.Module, capture: Capture, device: torch.device) -> None:
        self.capture, self.device = capture, device
        # The dictionaries that hold the decoder's tensors, since these may be replaced.
        self._places = [
            (owner, name)
            for module in decoder.modules()
            for owner in (module._parameters, module._buffers, vars(module))
            for name, value in owner.items()
            if isinstance(value, Tensor)
        ]
        self._kept: dict[tuple[Any, ...], dict[tuple[Any, ...], CapturedStep]] = {}
        self._memory: list[Tensor] = []  # of the last step, as the next two
        self._addresses: list[int] = []
        self._captured: dict[tuple[Any, ...], CapturedStep] = {}
        self._failed = False

    def step(
        self, decode: Decode, tokens: Tensor, cache: Cache, source: CrossCache | None
    ) -> Tensor | str:
        """A whole step with the cache's `commit`: tokens (B,1) -> logits (B,1,V), the same as from
        `decode`, or the reason why the step cannot be captured. Raises CapacityError.

        If a capture fails, `decode` does this step and no later step is captured.
        """
        if self._failed:
            return "CUDA graphs have failed"
        if native.is_intercepted() or torch.is_autocast_enabled(self.device.type):
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
                # If the step itself is wrong, this call raises its error.
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
        """The graphs of the present weights and the memory `held`, by the key of the step."""
        memory = [x for owner, name in self._places if (x := owner.get(name)) is not None]
        memory += held
        addresses = list(map(Tensor.data_ptr, memory))
        if addresses != self._addresses or not all(map(is_, memory, self._memory)):
            # By now a tensor of another shape or dtype may have the same address.
            layout = tuple((x.data_ptr(), x.shape, x.stride(), x.dtype) for x in memory)
            if layout not in self._kept and len(self._kept) == MAX_LAYOUTS:
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
        with torch.inference_mode(False):  # inference tensors are read-only outside that mode
            start = torch.full((1,), fixed.start, device=self.device)
            changing = (tokens, *fixed.tables)
            own = [x.clone(memory_format=torch.contiguous_format) for x in changing]

        def step() -> Tensor:
            placed = cache.step_at(start, tuple(own[1:]), fixed.form)
            return decode(own[0], placed, cache, source)

        return CapturedStep([start, *own], self.capture(step))


def _key(tokens: Tensor, cache: Cache, fixed: GraphStep) -> tuple[Any, ...]:
    """What a graph depends on besides its memory: shapes, Python's numbers, PyTorch's settings."""
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
