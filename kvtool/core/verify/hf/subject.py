"""Models of transformers with its own caches as subjects.

The way to call them is known, so nothing is guessed: the uncached arm is one pass with
use_cache=False, the cached one is given a cache as `generate` would make it. Only what keeps its
state in another way (xlnet, rwkv) is called as kvtool.core.verify.target.fitting finds it out.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from kvtool.core.checkpoint.checkpoint import WithoutWeights
from kvtool.core.verify.hf.caches import attention_limits, make_cache
from kvtool.core.verify.hf.library import quiet_transformers
from kvtool.core.verify.precision import Promote
from kvtool.core.verify.schedules import BRIEF
from kvtool.core.verify.subject import Same
from kvtool.core.verify.target.adapter import ModuleDecoder, State
from kvtool.core.verify.target.changes import NEGATIVE, Change
from kvtool.core.verify.target.fitting import adapt
from kvtool.core.verify.target.limits import Limits
from kvtool.core.verify.target.plans import Plan
from kvtool.core.verify.target.subject import NEEDED, TargetSubject
from kvtool.core.verify.widened import Room, copy_crowds, twin
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
    word_ids: Tensor = field(default_factory=lambda: torch.empty(0))  # of those that mean no more
    mask_length: int = 0  # that a mask is filled up to

    def full(self, ids: Tensor, padding: Tensor | None = None) -> Tensor:
        """Whole sequences (B,T) in one pass that no cache takes part in -> logits (B,T,V)."""
        self.mask_length = 0
        return super().full(self.word_ids[ids], padding)

    def step(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        """The next tokens (B,n) -> their logits (B,n,V), and the next state."""
        # As `generate` does it: where positions come from the mask, it is as long as the cache.
        by_mask = self.kind == "static" and hasattr(self.module.base_model, "build_alibi_tensor")
        self.mask_length = state.room if by_mask else 0
        return super().step(self.word_ids[ids], state)

    def _initial_cache(self, batch: int, capacity: int) -> Any:
        if self.kind == "own":
            return super()._initial_cache(batch, capacity)
        return make_cache(self.kind, self.module.config, capacity)

    def _position_arguments(self, ids: Tensor, past: int, padding: Tensor | None) -> dict[str, Any]:
        found = super()._position_arguments(ids, past, padding)
        if past and self.plan.cache == "cache_params":  # `generate` gives it to the prompt alone
            found.pop("attention_mask", None)
        if (mask := found.get("attention_mask")) is not None:
            missing = max(self.mask_length - mask.shape[1], 0)
            found["attention_mask"] = nn.functional.pad(mask, (0, missing))
        return found

    def to(self, dtype: torch.dtype) -> HubDecoder:
        """The same decoder with a copy of the model in another format."""
        return replace(self, module=converted(self.module, dtype))


def changes(kind: str) -> dict[str, Change]:
    """How a cache of transformers is cropped, selected from as beam search does it, and reset."""
    found = (
        # Since transformers 5 it takes how many tokens to remove, as a negative number.
        Change("crop", "crop", "cache", NEGATIVE),
        Change("select", "reorder_cache", "cache"),
        Change("reset", "reset", "cache"),
    )
    return {change.op: change for change in found if (change.op, kind) != ("crop", "static")}


class TransformersSubject(TargetSubject):
    """A model of transformers with one kind of its caches.

    Raises CacheOpUnsupported if the model does not take that kind, UsageError if it does not run.
    """

    level = BRIEF  # many types and kinds of caches are judged

    def __init__(self, model: Any, kind: str) -> None:
        self.formats: dict[tuple[Same, torch.dtype], nn.Module] = {}  # each is converted once
        word_ids = ordinary_ids(model.config)
        with quiet_transformers(), torch.inference_mode():
            decoder = self.made(hub_decoder(model, kind, word_ids.to(model.device)))
            super().__init__(decoder, kind, len(word_ids), context(model.config))
        if kind != "own":
            self.find_limits(model.config, kind)

    def made(self, decoder: HubDecoder) -> HubDecoder:
        """The decoder that is judged."""
        return decoder

    def find_limits(self, config: Any, kind: str) -> None:
        """Find out whether its layers see all, and whether its room ends."""
        windows, full = attention_limits(config)
        if windows and max(windows) <= LONGEST_WINDOW:
            self.window = max(windows)
            self.abilities |= {"window"}
        if kind == "static" and full:
            self.abilities |= {"capacity"}

    def find_special_ids(self, given: Any) -> tuple[int, ...]:
        """None: they are not among `word_ids`."""
        return ()

    def step_limits(self) -> Limits:
        """None: its caches take steps of any size."""
        return Limits()

    @property
    def not_judged(self) -> str:
        """What of the cache something else stands in for: see `disable_rounding`."""
        return CODES if self.decoder.kind == QUANTIZED else ""

    def remark(self) -> str:
        """What is to be known beside the verdicts."""
        return ""

    def to(self, dtype: torch.dtype) -> TransformersSubject:
        """The same mathematics in another format."""
        key = (Same(self.decoder.module), dtype)
        if key not in self.formats:
            self.formats[key] = self.decoder.to(dtype).module
        other = copy.copy(self)
        other.decoder, other.dtype = replace(self.decoder, module=self.formats[key]), dtype
        return other

    @property
    def pass_key(self) -> Hashable:
        """What an uncached pass depends on, beside its arguments and the format."""
        plan = replace(self.decoder.plan, initial="")  # of a cache, which takes no part
        return (Same(self.decoder.module), repr(plan), self.decoder.takes_padding)


def require_static(model: Any, kind: str) -> None:
    """Raise CacheOpUnsupported for a static cache where transformers declares none."""
    if kind == "static" and not getattr(model, "_can_compile_fullgraph", True):
        why = "transformers declares none for this model (_can_compile_fullgraph is False)"
        raise CacheOpUnsupported(kind, "be used", why)


def hub_decoder(model: Any, kind: str, word_ids: Tensor) -> HubDecoder:
    """The way to call a model with a kind of cache. Raises CacheOpUnsupported if it takes none."""
    names = inspect.signature(model.forward).parameters
    parameter = next((name for name in PARAMETERS if name in names), "")
    takes_caches = bool(parameter) and model._supports_default_dynamic_cache()
    if kind == "own":
        if takes_caches:
            raise CacheOpUnsupported(kind, "be checked", "the model takes DynamicCache, as given")
        return HubDecoder(**vars(adapted(model)), kind=kind, word_ids=word_ids)
    if not takes_caches:
        why = "the model keeps its state in another way" if parameter else "forward takes no cache"
        raise CacheOpUnsupported(kind, "be used", why)
    require_static(model, kind)
    _require_made(model, kind)
    plan = Plan(
        cache=parameter,
        initial=f"a {kind} cache",
        flags=("use_cache",) if "use_cache" in names or takes_any_keyword(model.forward) else (),
        position="position_ids" if "position_ids" in names else "",
        form="rows",
    )
    padded = "attention_mask" in names
    return HubDecoder(model, plan, changes(kind), padded, kind=kind, word_ids=word_ids)


def _require_made(model: Any, kind: str) -> None:
    """Raise CacheOpUnsupported for a kind of cache that transformers cannot make for a model."""
    try:
        make_cache(kind, model.config, NEEDED)
    except Exception as error:  # a backend that is missing, layers of which it has no kind
        pass_on_shortage(error)
        raise CacheOpUnsupported(kind, "be made", first_line(error)) from error


def converted(model: Any, dtype: torch.dtype) -> Any:
    """A copy of a model in another format; in float64 its tables too are computed in float64, and
    where a copy of its weights crowds memory, each is widened as it is read.

    Rotary frequencies and decays that were rounded to float32 may enter the two arms in different
    ways, and differ in what looks like a bug.
    """
    if dtype == torch.float64:
        try:
            return _widened(model) if copy_crowds(model) else _copied_in_float64(model)
        except Exception as error:  # a model that is not made from its configuration alone
            pass_on_shortage(error)
    return copy.deepcopy(model).to(dtype)


def _copied_in_float64(model: Any) -> Any:
    other = _spread_as(built_in_float64(model), model)
    weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    with torch.no_grad():
        for name, weight in other.named_parameters():
            weight.copy_(weights[name])
        for name, table in other.named_buffers():
            known = buffers[name]
            if _is_another(table, known):
                table.resize_(known.shape).copy_(known)
    return other.to(torch.float64).eval()


def _widened(model: Any) -> Any:
    """The model with tables in float64, whose weights are those of `model`, widened as they are
    read. Raises RuntimeError if it does not run."""
    with WithoutWeights():
        other = built_in_float64(model)
    owners = dict(other.named_modules())
    for name, weight in model.named_parameters(remove_duplicate=False):
        where, _, leaf = name.rpartition(".")
        owners[where]._parameters[leaf] = weight
    tables(other, model, torch.float64)
    if any(weight.is_meta for weight in (*other.parameters(), *other.buffers())):
        raise RuntimeError("a weight of it has another name")
    found = twin(model, Room(), _spread_as(other, model).eval())
    with quiet_transformers(), torch.inference_mode():
        ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        found(ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
    return found


def _spread_as(other: Any, model: Any) -> Any:
    """A model on the devices of another, which --device-map may have spread over several."""
    places = getattr(model, "hf_device_map", {})
    if len(set(places.values())) < 2:
        return other.to(model.device)
    from accelerate import dispatch_model

    return dispatch_model(other, device_map=places)


def tables(other: Any, model: Any, dtype: torch.dtype) -> None:
    """Give a model that was built without weights its tables in `dtype`: those that it computed
    itself, unless they are others than `model` has."""
    owners = dict(other.named_modules())
    for name, known in model.named_buffers(remove_duplicate=False):
        where, _, leaf = name.rpartition(".")
        made = owners[where]._buffers.get(leaf)
        own = made is not None and not made.is_meta and not _is_another(made, known)
        given = made if own and dtype == torch.float64 else known
        wide = dtype == torch.float64 and known.is_floating_point()
        owners[where]._buffers[leaf] = given.to(known.device, dtype if wide else known.dtype)


def built_in_float64(model: Any) -> Any:
    """A new model of the same configuration, built in float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Promote(), quiet_transformers(), torch.random.fork_rng(devices=[]):
            return type(model)(copy.deepcopy(model.config))
    finally:
        torch.set_default_dtype(default)


def _is_another(table: Tensor, known: Tensor) -> bool:
    """Whether a table is not the known one, but for its format."""
    same = table.shape == known.shape
    return not same or not torch.equal(table.to(known.device, known.dtype), known)


def adapted(model: Any) -> ModuleDecoder:
    """A model that keeps its state in a way of its own, called as its signature suggests.

    Raises CacheOpUnsupported if no way to call it so runs.
    """
    try:
        return adapt(model, "own", model.device)
    except UsageError as error:
        raise CacheOpUnsupported("own", "be found", error.message) from error


def takes_any_keyword(forward: Callable[..., Any]) -> bool:
    """Whether a function takes any keyword."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(forward).parameters.values())


def ordinary_ids(config: Any, size: int = 0) -> Tensor:
    """The ids (N,) that are word_ids: images, padding and the like would change what a model does.

    size: of the vocabulary, if it is not the one of what the model writes.
    """
    parts = [config, *(p for p in vars(config).values() if hasattr(p, "get_text_config"))]
    special = set(itertools.chain.from_iterable(map(_special_ids, parts)))
    size = size or config.get_text_config(decoder=True).vocab_size
    return torch.tensor([i for i in range(size) if i not in special])


def _special_ids(config: Any) -> Iterator[Any]:
    """The ids that a configuration, but none in it, gives a meaning of their own."""
    for name, value in vars(config).items():
        if name.endswith(("_token_id", "_token_index")):
            yield from value if isinstance(value, (list, tuple)) else [value]


def context(config: Any) -> int:
    """How many tokens a model takes."""
    text = config.get_text_config(decoder=True)
    found = (getattr(text, name, None) for name in CONTEXT_NAMES)
    return next((n for n in found if isinstance(n, int) and n > 0), CONTEXT)
