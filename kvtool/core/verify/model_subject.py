"""A model of kvtool with one of its caches, as a subject."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from kvtool.core.cache import Cache, CacheSpec, Step
from kvtool.core.cache.cross import CrossCache
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.core.cache.quantization import Float8, Quantization
from kvtool.core.decoding.dispatch import decoding_form
from kvtool.core.decoding.engine import feed
from kvtool.core.kernels.default import DEFAULT, Kernels
from kvtool.core.models import Model
from kvtool.core.verify.copies import moved
from kvtool.core.verify.schedules import BRIEF
from kvtool.core.verify.subject import Evidence, Feeding, Same, Session, SharedPasses, Start
from kvtool.core.verify.widened import Room, copy_crowds, is_large, twin
from kvtool.errors import CacheOpUnsupported

REACH = 200  # tokens of the longest history that each kind of cache is fed by default
UNCACHED_REACH = 24  # and of a kind that stores nothing

Make = Callable[[CacheSpec, "Tensor | None"], Cache]


class ModelSession:
    """A model of ours with one of our caches."""

    def __init__(self, subject: ModelSubject, start: Start) -> None:
        self.subject = subject
        model = subject.model
        spec = CacheSpec.of(
            model.config,
            start.batch,
            start.capacity,
            subject.dtype,
            subject.device,
            subject.kernels,
        )
        self.cache = subject.make(spec, start.padding)
        self.decode = decoding_form(model)
        self.source = self.encode(start)
        self.ids = torch.empty(start.batch, 0, dtype=torch.long, device=subject.device)

    def encode(self, start: Start) -> CrossCache | None:
        """The encoded source that the session reads, if any."""
        return self.subject.encode(start)

    def feed(self, ids: Tensor) -> Tensor:
        self.ids = torch.cat([self.ids, ids], dim=1)
        logits = feed(self.decode, self.cache, self.ids, self.source)
        return logits[:, -ids.shape[1] :]

    def crop(self, length: int) -> None:
        self.cache.crop(length)
        self.ids = self.ids[:, :length]

    def select(self, rows: Tensor) -> None:
        self.cache.select(rows)
        self.ids = self.ids[rows]
        if self.source is not None:
            self.source = self.source.select(rows)

    def reset(self, start: Start) -> None:
        self.cache.reset(start.padding)
        self.source = self.encode(start)
        self.ids = self.ids.new_empty(start.batch, 0)

    def fork(self) -> ModelSession:
        other = copy.copy(self)
        other.cache = self.cache.fork()
        return other

    def reload(self) -> None:
        raise CacheOpUnsupported(self.subject.name, "be saved and loaded", "it has no way to")

    def vacuous(self) -> str | None:
        return self.cache.vacuous()


class Formats:
    """A model in other formats. Each copy is made once and shared.

    widens: whether float64 is no copy, but weights that are widened as they are read; None: where
    a copy would take more than a good part of the memory that there is. large: whether a copy in
    float64 is worth doing without; of a part of a model it is said of the whole.
    """

    def __init__(self, model: Model, widens: bool | None = None, large: bool | None = None) -> None:
        self.model = model
        self.is_large = is_large(model) if large is None else large
        self._widens = widens
        self._made = {next(model.parameters()).dtype: model}
        self.room: Room | None = None  # where weights are widened, if they are

    @property
    def widens(self) -> bool:
        """Whether float64 is no copy."""
        if self._widens is None:
            self._widens = copy_crowds(self.model)
        return self._widens

    def to(self, dtype: torch.dtype) -> Model:
        if dtype not in self._made:
            if dtype == torch.float64 and self.widens:
                self.room = Room()
                self._made[dtype] = twin(self.model, self.room)
            else:
                self._made[dtype] = copy.deepcopy(self.model).to(dtype)
        return self._made[dtype]


class ModelSubject(Feeding):
    """A model of ours with a kind of cache and kernels; `make` builds the cache.

    formats: the model's copies, shared with other subjects of it.
    """

    converts = True

    rounds_alike = True
    lossy = False
    pure = True
    passes: SharedPasses | None = None
    evidence: Evidence | None = None  # in float64, where the model is large

    def __init__(
        self,
        model: Model,
        make: Make,
        name: str,
        kernels: Kernels = DEFAULT,
        session: Callable[[ModelSubject, Start], Session] = ModelSession,
        formats: Formats | None = None,
    ) -> None:
        self.model = model
        self.formats = formats or Formats(model)
        self.make = make
        self.name = name
        self.kernels = kernels
        self.session = session
        weight = next(model.parameters())
        self.dtype, self.device = weight.dtype, weight.device
        self.vocab_size = model.config.vocab_size
        self.source_vocab_size = model.config.source_vocab_size
        self.context = model.config.context
        probe = make(CacheSpec.of(model.config, 1, 1, self.dtype, self.device), None)
        self.stores = probe.stores
        self.window, self.sinks = probe.window, probe.sinks
        self.quantization, self.page = probe.quantization, probe.page
        self.sizes = tuple(n for n in (self.page, model.config.window) if n)
        self.level = BRIEF  # there are many kinds, and each is played by several kernels
        # A kind that recomputes everything proves nothing, and its time grows with the square.
        self.reach = min(self.context, REACH if self.stores else UNCACHED_REACH)
        abilities = {"batch", "padding", "crop", "select", "reset", "fork", "capacity"}
        if model.config.n_encoder_layers:
            abilities = (abilities - {"padding"}) | {"source"}
        if self.window:
            abilities.add("window")
        if self.quantization is not None and not self.quantization.in_place:
            abilities.add("quantized")
        if self.page:
            abilities.add("pages")
        self.abilities = frozenset(abilities)

    @property
    def pass_key(self) -> Hashable:
        """The key of an uncached pass: all that it depends on apart from its arguments and the
        format."""
        return (Same(self.model), type(self.kernels), *self.seen)

    @property
    def seen(self) -> tuple[int, int, Quantization | Float8 | None]:
        """The cache's window, sinks and quantization, which the uncached pass has to share."""
        return self.window, self.sinks, self.quantization

    def encode(self, start: Start) -> CrossCache | None:
        """The encoded source of a session, for a model that reads one."""
        if start.source is None:
            return None
        return self.model.encode(start.source.ids, start.source.mask, self.kernels)

    def full(self, ids: Tensor, start: Start) -> Tensor:
        batch, n = ids.shape
        step = Step.full(batch, n, ids.device, start.padding, self.kernels, *self.seen)
        return self.model(ids, step, source=self.encode(start))

    def start(self, start: Start) -> Session:
        return self.session(self, start)

    def with_kernels(self, kernels: Kernels) -> ModelSubject:
        """The same subject, computed by other kernels."""
        return self._varied(kernels=kernels)

    def with_session(self, session: Callable[[ModelSubject, Start], Session]) -> ModelSubject:
        """The same subject, decoding in another way."""
        return self._varied(session=session)

    def moved(self, by: float, seed: int = 0, tables: bool = False) -> ModelSubject:
        if tables:
            raise NotImplementedError("its tables are computed, and none is held")
        model = moved(self.model, by, seed)
        return ModelSubject(model, self.make, self.name, self.kernels, self.session)

    def unrounded(self) -> ModelSubject | None:
        if self.quantization is None:
            return None
        plain = ModelSubject(self.model, DynamicCache, self.name, self.kernels)
        plain.context, plain.reach, plain.sizes = self.context, self.reach, self.sizes
        return plain

    def to(self, dtype: torch.dtype) -> ModelSubject:
        return self._varied(model=self.formats.to(dtype), dtype=dtype)

    def _varied(self, **changes: Any) -> ModelSubject:
        """A copy with other attributes: it is fed what this one is."""
        other = copy.copy(self)
        vars(other).update(changes)
        return other
