"""The dispatch of decoding steps: `DecodingForm.step` alone chooses how a step is computed.

There are five ways: one compiled call for all layers, native code layer by layer, the replay of a
CUDA graph, the flat form in PyTorch, and the model's modules. Any two of them give the same bits
for a step that both can do. A way that cannot do a step is refused once, with a reason in words.
"""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvtool.core.cache import Cache, CacheSpec, Step
from kvtool.core.cache.cross import CrossCache
from kvtool.core.cache.direct_access import DirectAccess
from kvtool.core.decoding import cuda_graphs as graphs
from kvtool.core.decoding.flat import FlatDecoder
from kvtool.core.decoding.native_decoder import NO_SOURCE, NativeDecoder
from kvtool.core.kernels.default import DefaultKernels, Kernels
from kvtool.core.kernels.exact import ExactKernels
from kvtool.core.models.attention import CrossAttention, SelfAttention
from kvtool.core.models.base import Model
from kvtool.core.models.decoder import Block, Decoder
from kvtool.core.models.layers import (
    MLP,
    Dropout,
    LayerNorm,
    Linear,
    RMSNorm,
    Table,
    TokenEmbedding,
)
from kvtool.core.models.rope import Rotary
from kvtool.core.models.seq2seq import Seq2Seq
from kvtool.core.native import arrays as native
from kvtool.core.native import context
from kvtool.core.native.arrays import Array

# The modules that faster ways may replace, with their forward. A subclass or a patched forward may
# compute something else, so it is called as it is.
KNOWN: dict[type, Any] = {
    kind: kind.forward
    for kind in (
        Seq2Seq, Decoder, Block, SelfAttention, CrossAttention, Linear, LayerNorm, RMSNorm, MLP,
        Dropout, Rotary, Table, TokenEmbedding, nn.Embedding, nn.ModuleList,
    )
}  # fmt: skip
KERNELS: dict[type, Any] = {
    kind: (kind.per_token, kind.attention) for kind in (DefaultKernels, ExactKernels)
}
IDS = (torch.int64, torch.int32)


class Route(NamedTuple):
    """How a step was decoded, and why no faster way was taken."""

    name: str
    why: str = ""


ONE_CALL, GRAPH = Route("one compiled call"), Route("the replay of a CUDA graph")
LAYERWISE, FLAT, MODULES = "native code layer by layer", "the flat form in PyTorch", "modules"
CHANGED_KERNELS = "the kernels have been changed, or are not kvtool's"
OTHER_KERNELS = "the cache asks for other kernels than its spec has"


def decoding_form(model: Model | DecodingForm) -> DecodingForm:
    """The decoding form of `model`, or `model` if it is one."""
    return model if isinstance(model, DecodingForm) else DecodingForm(model)


class DecodingForm:
    """A model with all ways to decode its steps, for one decode loop.

    It keeps the weights that the model has at the first step, and captured CUDA graphs. A model
    with hooks, a compiled one, or one with modules that are not kvtool's does every step itself.
    """

    def __init__(self, model: Model) -> None:
        self.model, self.config = model, model.config
        self.taken: Counter[Route] = Counter()  # the number of steps decoded in each way
        self._foreign = _why_foreign(model)
        self._graphs: graphs.Graphs | None = None
        self._flat: FlatDecoder | None = None
        self._native: NativeDecoder | str | None = None  # a str: why there is none
        self._spec: CacheSpec | None = None  # the last one that native code accepted
        if not self._foreign:
            decoder = model.decoder if isinstance(model, Seq2Seq) else model
            assert isinstance(decoder, Decoder)
            self.decoder, device = decoder, decoder.head.weight.device
            capture = graphs.capture_for(device)
            self._graphs = None if capture is None else graphs.Graphs(decoder, capture, device)

    def step(
        self, new: Tensor | Array, cache: Cache, source: CrossCache | None, last: bool
    ) -> Tensor | Array:
        """Decode a whole step, from the cache's `begin` to its `commit`, in the fastest way.

        new (B,n): the ids after those that the cache holds -> logits (B,n,V), or (B,1,V) of the
        last token with `last`. The compiled call returns an array, in float32 for half formats; the
        other ways return a tensor. An array of ids needs no gradients, so callers need not enter
        inference mode for it.
        Raises CapacityError, and IndexError for a token or position that does not exist. Nothing is
        committed then.
        """
        why = self._foreign or _why_modules(new, cache, source, self.config.n_encoder_layers > 0)
        if not why:
            found: Tensor | Array | str
            if slow := self._why_pytorch(new, cache):
                with _mode_for(new):
                    found = self._pytorch_step(slow, torch.as_tensor(new), cache, source)
            else:
                found = self._native_step(new, cache, source, last)
            if not isinstance(found, str):
                return found
            why = found
        self.taken[Route(MODULES, why)] += 1
        with _mode_for(new):
            return by_modules(self.model, torch.as_tensor(new), cache, source, last)

    def captures(self, cache: Cache) -> bool:
        """Whether single-token steps with this cache are captured as CUDA graphs; then the first
        steps take longer than later ones."""
        usual = self._graphs is not None and _are_usual(cache.spec.kernels)
        return usual and not _why_not_captured(cache)

    def summary(self) -> str:
        """One line: how many steps were decoded in each way, and why in no faster one."""
        return "; ".join(
            f"{n} step{'s' * (n != 1)} by {way.name}" + (f" ({way.why})" if way.why else "")
            for way, n in self.taken.most_common()
        )

    def _why_pytorch(self, new: Tensor | Array, cache: Cache) -> str:
        """Why native code computes no layer of a step; empty if it computes them."""
        if self._graphs is not None:
            return "the weights are on a GPU"
        # Exact kernels leave any number of tokens to native code.
        dtype = self.decoder.head.weight.dtype
        batch, n = new.shape
        if type(cache.spec.kernels) is not ExactKernels and batch * n > native.MAX_STEP_TOKENS:
            with _context_of(cache):
                few, most = native.is_few(batch, n, dtype), native.most_rows(dtype)
            if not few:
                most = native.MAX_STEP_TOKENS if n > 1 else most
                return f"PyTorch is as fast for more than {most} tokens at once"
        if why := native.why_away():
            return why
        if self._native is None:
            with torch.no_grad():  # else weights with requires_grad would count as unreadable
                if why := native.why_unreadable(self.decoder.head.weight):
                    return why
                self._native = NativeDecoder.of(self.decoder)
        return ""

    def _pytorch_step(
        self, why: str, new: Tensor, cache: Cache, source: CrossCache | None
    ) -> Tensor | str:
        """`step` for one token a row by a CUDA graph, or else the flat form; a str says why not."""
        if new.shape[1] != 1:
            return why
        if not _are_usual(cache.spec.kernels):
            return CHANGED_KERNELS
        self._flat = self._flat or FlatDecoder(self.decoder)
        if self._graphs is not None:
            found = _why_not_captured(cache) or self._graphs.step(self._flat, new, cache, source)
            if not isinstance(found, str):
                self.taken[GRAPH] += 1
                return found
            why = found
        step = cache.begin(1)
        if step.kernels is not cache.spec.kernels:
            return OTHER_KERNELS
        logits = self._flat(new, step, cache, source)
        cache.commit(1)
        self.taken[Route(FLAT, why)] += 1
        return logits

    def _native_step(
        self, new: Tensor | Array, cache: Cache, source: CrossCache | None, last: bool
    ) -> Tensor | Array | str:
        """`step` in native code; a str says why not."""
        asked, (batch, n) = new, new.shape
        form = self._native_form(cache.spec)
        if isinstance(form, str):
            return form
        if isinstance(new, Tensor):
            if new.dtype not in IDS or not new.is_cpu:
                return f"native code reads no ids of {new.dtype} on {new.device}"
            new = new.numpy()
        read = NO_SOURCE if source is None else source.step_addresses(cache.spec, batch)
        if read is None:
            return "the source is not stored as native code expects"
        memory = cache.step_addresses(n) if isinstance(cache, DirectAccess) else None
        if memory is not None and not (memory.window and self.config.window):
            logits: Array = form.one_call_step(new, memory, read, last)
            cache.commit(n)
            self.taken[ONE_CALL] += 1
            return logits
        why = "the cache and the model have a window each"
        if memory is None:
            why = f"compiled code cannot store and read in this {cache.kind} cache by itself"
        if n > 1:
            return why
        with _mode_for(asked):
            step = cache.begin(1)
            if step.kernels is not cache.spec.kernels:
                return OTHER_KERNELS
            found = form.layerwise_step(new, step, cache, read)
            cache.commit(1)
        self.taken[Route(LAYERWISE, why)] += 1
        return found

    def _native_form(self, spec: CacheSpec) -> NativeDecoder | str:
        """The model in native code for a cache of that spec; a str says why there is none."""
        assert self._native is not None, "ask _why_pytorch first"
        if isinstance(self._native, str) or spec is self._spec:
            return self._native
        if not _are_usual(spec.kernels):
            return CHANGED_KERNELS
        if not self._native.stores_in(spec):
            return "the cache is made for another model, format or device"
        self._spec = spec
        return self._native


def by_modules(
    model: Model, new: Tensor, cache: Cache, source: CrossCache | None, last: bool
) -> Tensor:
    """`DecodingForm.step` by the model itself: new (B,n) -> logits (B,n,V) or (B,1,V).

    Raises CapacityError; nothing is committed if the model raises.
    """
    step: Step = cache.begin(new.shape[1])
    with _context_of(cache):
        logits: Tensor = model(new, step, cache, source, last)
    cache.commit(new.shape[1])
    return logits


def _context_of(cache: Cache) -> AbstractContextManager[object]:
    """What layers have to know of a cache, for all ways to leave as many rows to native code."""
    return nullcontext() if cache.exact else context.within(coded=True)


def _mode_for(new: Tensor | Array) -> AbstractContextManager[object]:
    """The mode for PyTorch's operations: the caller's for a tensor, inference mode for an array."""
    return nullcontext() if isinstance(new, Tensor) else torch.inference_mode()


def _why_modules(
    new: Tensor | Array, cache: Cache, source: CrossCache | None, reads_source: bool
) -> str:
    """Why only the model's modules can do this step; empty if other ways may."""
    if isinstance(new, Tensor) and torch.is_grad_enabled():
        return "gradients are asked for"
    if not new.shape[0] == cache.batch > 0:
        return "the cache has another number of rows"
    if (source is not None) != reads_source:
        return "a source is missing" if reads_source else "the model reads no source"
    return ""


def _why_not_captured(cache: Cache) -> str:
    """Why steps with a cache are not captured as CUDA graphs; empty if they are."""
    if type(cache.spec.kernels) is not DefaultKernels:
        # Exact kernels read from the GPU which keys are seen, and a capture cannot wait for that.
        return "only default kernels can be captured in a CUDA graph"
    return "" if cache.compilable else f"the memory of a {cache.kind} cache moves"


def _are_usual(kernels: Kernels) -> bool:
    """Whether these are kvtool's kernels, unchanged: with them modules use native code as well."""
    kind = type(kernels)
    return KERNELS.get(kind) == (kind.per_token, kind.attention) and not vars(kernels)


def _why_foreign(model: Model) -> str:
    """Why no other code may replace the modules of a model; empty if it may."""
    if nn.modules.module._has_any_global_hook():  # as torch's FlopCounterMode does
        return "hooks watch every module of this process"
    decoder = model.decoder if isinstance(model, Seq2Seq) else model
    return next(filter(None, map(_why_unknown, (model, *decoder.modules()))), "")


def _why_unknown(module: nn.Module) -> str:
    kind = type(module).__name__
    if isinstance(module, Model) and type(module) not in KNOWN:
        return f"the settings of the family {module.config.kind} are known to modules alone"
    if KNOWN.get(type(module)) is not type(module).forward:
        return f"{kind} is no module of kvtool's, or has been changed"
    hooks = module._forward_hooks or module._forward_pre_hooks
    if hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"hooks watch a {kind}"
    if module.training:
        return "the model is in training mode"
    if any(map(callable, vars(module).values())):
        return f"a method of a {kind} has been replaced"
    return ""
