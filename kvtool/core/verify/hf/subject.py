"""Models of transformers with its own caches as subjects.

The way to call them is known, so nothing is guessed: the uncached arm is one pass with
use_cache=False, the cached one is given a cache as `generate` would make it. Only what keeps its
state in another way (xlnet, rwkv) is called as kvtool.core.verify.target.adapter finds it out.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from kvtool.core.verify.hf.caches import make_cache, reach
from kvtool.core.verify.hf.library import quiet_transformers
from kvtool.core.verify.precision import Promote
from kvtool.core.verify.scenarios import PREFILL as PREFILL
from kvtool.core.verify.target.adapter import ModuleDecoder, Plan, State, adapt
from kvtool.core.verify.target.subject import NEEDED, TargetSubject
from kvtool.errors import CacheOpUnsupported, UsageError, first_line, pass_on_shortage

PARAMETERS = ("past_key_values", "cache_params")  # of a forward, that take these caches
LONGEST_WINDOW = 512  # tokens: a longer one is not passed, since every scenario would have to
CONTEXT = 4096  # tokens, where a configuration does not say
CONTEXT_NAMES = (
    "max_decoder_position_embeddings", "max_position_embeddings", "n_positions",
    "max_target_positions", "max_seq_len", "n_ctx", "context_length",
)  # fmt: skip
QUANTIZED = "quantized"  # the kind whose codes are replaced, so that they are not judged
CODES = "codes"


@dataclass
class HubDecoder(ModuleDecoder):
    """A model of transformers and a kind of cache: a decoder of the protocol of ../target."""

    kind: str = "dynamic"
    words: Tensor = field(default_factory=lambda: torch.empty(0))  # the ids that mean no more
    mask_length: int = 0  # that a mask is filled up to

    def full(self, ids: Tensor, padding: Tensor | None = None) -> Tensor:
        self.mask_length = 0
        return super().full(self.words[ids], padding)

    def step(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        # As `generate` does it: where positions come from the mask, it is as long as the cache.
        by_mask = self.kind == "static" and hasattr(self.module.base_model, "build_alibi_tensor")
        self.mask_length = state.room if by_mask else 0
        return super().step(self.words[ids], state)

    def _initial(self, batch: int, capacity: int) -> Any:
        if self.kind == "own":
            return super()._initial(batch, capacity)
        return make_cache(self.kind, self.module.config, capacity)

    def _places(self, ids: Tensor, past: int, padding: Tensor | None) -> dict[str, Any]:
        found = super()._places(ids, past, padding)
        if past and self.plan.cache == "cache_params":  # `generate` gives it to the prompt alone
            found.pop("attention_mask", None)
        if (mask := found.get("attention_mask")) is not None:
            missing = max(self.mask_length - mask.shape[1], 0)
            found["attention_mask"] = nn.functional.pad(mask, (0, missing))
        return found

    def to(self, dtype: torch.dtype) -> HubDecoder:
        return replace(self, module=converted(self.module, dtype))

    def _change(self, op: str, cache: Any, *args: Any) -> Any:
        if op == "select" and self.kind != "own":  # as beam search does
            cache.reorder_cache(*args)
            return cache
        return super()._change(op, cache, *args)


class TransformersSubject(TargetSubject):
    """A model of transformers with one kind of its caches.

    Raises CacheOpUnsupported if the model does not take that kind, UsageError if it does not run.
    """

    def __init__(self, model: Any, kind: str) -> None:
        words = ordinary_ids(model.config)
        with quiet_transformers(), torch.inference_mode():
            decoder = hub_decoder(model, kind, words.to(model.device))
            super().__init__(decoder, kind, len(words), context(model.config))
        if kind != "own":
            self.limit(model.config, kind)

    def limit(self, config: Any, kind: str) -> None:
        """Find out whether its layers see all, and whether its room ends."""
        windows, full = reach(config)
        if windows and max(windows) <= LONGEST_WINDOW:
            self.window = max(windows)
            self.abilities |= {"window"}
        if kind == "static" and full:
            self.abilities |= {"capacity"}

    @property
    def not_judged(self) -> str:
        """What of the cache something else stands in for: see `hold_exactly`."""
        return CODES if self.decoder.kind == QUANTIZED else ""

    def remark(self) -> str:
        """What is to be known beside the verdicts."""
        return ""

    def to(self, dtype: torch.dtype) -> TransformersSubject:
        other = copy.copy(self)
        other.decoder, other.dtype = self.decoder.to(dtype), dtype
        return other


def require_static(model: Any, kind: str) -> None:
    """Raise CacheOpUnsupported for a static cache where transformers declares none."""
    if kind == "static" and not getattr(model, "_can_compile_fullgraph", True):
        why = "transformers declares none for this model (_can_compile_fullgraph is False)"
        raise CacheOpUnsupported(kind, "be used", why)


def hub_decoder(model: Any, kind: str, words: Tensor) -> HubDecoder:
    """The way to call a model with a kind of cache. Raises CacheOpUnsupported if it takes none."""
    names = inspect.signature(model.forward).parameters
    parameter = next((name for name in PARAMETERS if name in names), "")
    takes = bool(parameter) and model._supports_default_dynamic_cache()
    if kind == "own":
        if takes:
            raise CacheOpUnsupported(kind, "be checked", "the model takes DynamicCache, as given")
        found = vars(adapted(model))
        return HubDecoder(**found, kind=kind, words=words)
    if not takes:
        why = "the model keeps its state in another way" if parameter else "forward takes no cache"
        raise CacheOpUnsupported(kind, "be used", why)
    require_static(model, kind)
    try:
        make_cache(kind, model.config, NEEDED)
    except Exception as error:  # a backend that is missing, layers of which it has no kind
        pass_on_shortage(error)
        raise CacheOpUnsupported(kind, "be made", first_line(error)) from error
    plan = Plan(
        cache=parameter,
        initial=f"a {kind} cache",
        flag="use_cache" if "use_cache" in names or takes_any(model.forward) else "",
        position="position_ids" if "position_ids" in names else "",
        form="rows",
    )
    unable = ("crop",) if kind == "static" else ()
    return HubDecoder(model, plan, unable, "attention_mask" in names, kind=kind, words=words)


def converted(model: Any, dtype: torch.dtype) -> Any:
    """A copy of a model in another format; in float64 its tables too are computed in float64.

    Rotary frequencies and decays that were rounded to float32 may enter the two arms in different
    ways, and differ in what looks like a bug.
    """
    if dtype == torch.float64:
        try:
            return _built_in_float64(model)
        except Exception as error:  # a model that is not made from its configuration alone
            pass_on_shortage(error)
    return copy.deepcopy(model).to(dtype)


def _built_in_float64(model: Any) -> Any:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Promote(), quiet_transformers(), torch.random.fork_rng(devices=[]):
            other = type(model)(copy.deepcopy(model.config)).to(model.device)
    finally:
        torch.set_default_dtype(default)
    given, tables = dict(model.named_parameters()), dict(model.named_buffers())
    with torch.no_grad():
        for name, weight in other.named_parameters():
            weight.copy_(given[name])
        for name, table in other.named_buffers():
            known = tables[name]
            if table.shape != known.shape or not torch.equal(table.to(known.dtype), known):
                table.resize_(known.shape).copy_(known)
    return other.to(torch.float64).eval()


def adapted(model: Any) -> ModuleDecoder:
    """Raises CacheOpUnsupported if no way to call it with a state of its own runs."""
    try:
        return adapt(model, "own", model.device)
    except UsageError as error:
        raise CacheOpUnsupported("own", "be found", error.message) from error


def takes_any(forward: Callable[..., Any]) -> bool:
    """Whether a function takes any keyword."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(forward).parameters.values())


def ordinary_ids(config: Any, size: int = 0) -> Tensor:
    """The ids (N,) that are words: images, padding and the like would change what a model does.

    size: of the vocabulary, if it is not the one of what the model writes.
    """
    special = {
        value
        for part in (config, *(p for p in vars(config).values() if hasattr(p, "get_text_config")))
        for name, given in vars(part).items()
        if name.endswith(("_token_id", "_token_index"))
        for value in (given if isinstance(given, (list, tuple)) else [given])
    }
    size = size or config.get_text_config(decoder=True).vocab_size
    return torch.tensor([i for i in range(size) if i not in special])


def context(config: Any) -> int:
    """How many tokens a model takes."""
    text = config.get_text_config(decoder=True)
    found = (getattr(text, name, None) for name in CONTEXT_NAMES)
    return next((n for n in found if isinstance(n, int) and n > 0), CONTEXT)


# The model, and the check
