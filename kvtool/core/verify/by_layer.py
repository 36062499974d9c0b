"""The float64 evidence of a large model of ours: attention by attention, in one pass for all kinds.

All tokens are known beforehand, and only attention looks at more than one. So one uncached pass
goes through the model layer by layer, over every history of a scenario and for every kind of cache.
At each layer the caches are fed, step by step as the scenario says, the queries, keys and values of
that pass, and have to answer what it answers. If they do in every layer, at the same positions, the
logits are the same: nothing else of a model of ours knows of a cache.

So each layer is widened to float64 once a scenario (see `widened`), products are shared by all
kinds and steps, and what is held is a few layers' queries, keys and values. Where an answer is not
the same, nothing is decided here: the model is then run step by step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvtool.core.cache import CacheSpec, Step
from kvtool.core.kernels.default import DEFAULT, Kernels
from kvtool.core.models import Model
from kvtool.core.models.attention import SelfAttention
from kvtool.core.models.decoder import Decoder
from kvtool.core.verify.arms import Arms, Case, sharing
from kvtool.core.verify.compare import Gap
from kvtool.core.verify.model_subject import Formats, ModelSession, ModelSubject
from kvtool.core.verify.scenario_run import Segment
from kvtool.core.verify.subject import Start
from kvtool.errors import pass_on_shortage

HELD = 2**28  # bytes of queries, keys, values and answers after which the caches are fed
MAX_ROWS = 1024  # tokens of a pass for several kinds; a longer one is for those that share it
FLOAT64 = torch.float64


def can_go_by_layer(model: Model) -> bool:
    """Whether only attention uses the cache in a model, as in kvtool's plain decoder."""
    return type(model) is Decoder and all(
        type(block.attn) is SelfAttention and block.cross is None  # type: ignore[union-attr]
        for block in model.layers
    )


class HistorySlice(NamedTuple):
    """The columns that a step answers: n columns of a history from `first` on."""

    history: int
    first: int
    n: int


@dataclass
class History:
    """Rows (B,T) of one uncached pass, which stand in it from `begin` on, one after the other."""

    segment: Segment
    begin: int
    step: Step
    _steps: dict[int, Step] = field(default_factory=dict)  # by the window of a layer

    @property
    def end(self) -> int:
        return self.begin + self.segment.history.numel()

    def rows(self, x: Tensor) -> Tensor:
        """Its part of (1,H,N,D) -> (B,H,T,D)"""
        batch, n = self.segment.history.shape
        part = x[0, :, self.begin : self.end]
        return part.unflatten(1, (batch, n)).transpose(0, 1)

    def seen_by(self, layer: AllRows) -> Step:
        """Its own step, as a layer of the model sees it."""
        return _seen(self.step, layer, self._steps)


@dataclass(frozen=True)
class AllRows(Step):
    """The model's step: the rows of all histories, each at its own position.

    Each history's own step has its mask; `layer_window` and `kernels` hold what the model sets for
    a layer.
    """

    layer_window: int = 0

    @classmethod
    def of(cls, histories: Sequence[History], kernels: Kernels) -> AllRows:
        q_pos = torch.cat([history.step.q_pos.reshape(1, -1) for history in histories], dim=1)
        slots = torch.arange(q_pos.shape[1], device=q_pos.device)
        return cls(q_pos, q_pos, slots, None, False, kernels)

    def within(self, window: int) -> AllRows:
        return replace(self, layer_window=window) if window else self


def _seen(step: Step, layer: AllRows, known: dict[int, Step]) -> Step:
    """A step as a layer sees it: within the layer's window, by its kernels."""
    window = layer.layer_window
    if window not in known:
        known[window] = step.within(window)
    return replace(known[window], kernels=layer.kernels)


class LayerAttention(NamedTuple):
    """A layer's attention for a history: q, k, v and y (B,.,T,D)"""

    q: Tensor
    k: Tensor
    v: Tensor
    y: Tensor


@dataclass
class Fed:
    """A kind of cache in a scenario: the place of its steps, and the gaps of its answers."""

    subject: ModelSubject
    case: Case
    places: dict[int, HistorySlice]
    segments: list[Segment]  # that have the steps
    gaps: dict[int, float]

    @classmethod
    def of(cls, subject: ModelSubject, case: Case, histories: Histories) -> Fed | None:
        """None if the scenario cannot be played."""
        run = case.run(subject.with_session(Unanswered))
        try:
            case.scenario.play(run)
        except Exception as error:
            pass_on_shortage(error)
            return None
        places: dict[int, HistorySlice] = {}
        for segments in sharing(run.segments):
            number = histories.number(segments[0], subject)
            for segment in segments:
                for answer in segment.answers:
                    places[answer.step] = HistorySlice(number, answer.first, answer.logits.shape[1])
        places = {step: places[step] for step in sorted(places)}
        return cls(subject, case, places, run.segments, dict.fromkeys(places, 0.0))

    def feed(self, block: Block) -> None:
        """Feed the layers of a block to caches, as the scenario says."""
        # Steps are numbered in the order in which they are fed.
        session = partial(LayerSession, fed=self, block=block, numbers=iter(self.places))
        subject = self.subject.with_session(session)
        try:
            self.case.scenario.play(self.case.run(subject))
        except Exception as error:  # the run in the working format did not raise
            pass_on_shortage(error)
            self.gaps = dict.fromkeys(self.gaps, math.inf)

    def is_off_by(self, step: int, gap: float) -> None:
        """Note the gap of a layer."""
        self.gaps[step] = max(self.gaps[step], math.inf if math.isnan(gap) else gap)

    def arms(self, logits: Sequence[Tensor]) -> Arms:
        """The uncached float64 logits by step, and the gaps in place of the cached ones."""
        of_step = {answer.step: segment for segment in self.segments for answer in segment.answers}
        expected = []
        for step in self.gaps:
            place = self.places[step]
            part = logits[place.history][:, place.first : place.first + place.n]
            expected.append(of_step[step].zero_padding(part, place.first))
        gaps = tuple(self.gaps.values())
        same = [gap == 0 for gap in gaps]
        first = same.index(False) if False in same else None
        gap = Gap(len(gaps), sum(same), first, max(gaps, default=0.0), 0.0, gaps)
        return Arms(expected, expected, by_attention=gap)


@dataclass
class Block:
    """Layers whose queries, keys, values and answers are held, to be fed to caches."""

    positions: list[Tensor]  # (B,T) of each history, negative = padding
    steps: list[AllRows] = field(default_factory=list)  # by layer, as the model gave them
    held: list[list[LayerAttention]] = field(default_factory=list)  # by layer and history
    largest: list[list[float]] = field(default_factory=list)  # of the answers
    nbytes: int = 0

    def add(self, step: AllRows, held: list[LayerAttention]) -> None:
        """Hold one more layer."""
        self.steps.append(step)
        self.held.append(held)
        self.largest.append([float(h.y.nan_to_num(0.0).abs().max()) or 1.0 for h in held])
        self.nbytes += sum(x.numel() * x.itemsize for h in held for x in h)


class Unanswered(ModelSession):
    """A session without tokens and answers: it shows what a scenario feeds."""

    def __init__(self, subject: ModelSubject, start: Start) -> None:
        self.subject = subject

    def feed(self, ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, 1)

    def crop(self, length: int) -> None: ...

    def select(self, rows: Tensor) -> None: ...

    def reset(self, start: Start) -> None: ...

    def fork(self) -> ModelSession:
        return self


class LayerSession(ModelSession):
    """A session that feeds some layers of a pass to its cache, and compares the answers."""

    def __init__(
        self,
        subject: ModelSubject,
        start: Start,
        fed: Fed,
        block: Block,
        numbers: Iterator[int],
    ) -> None:
        self.subject, self.fed, self.block, self.numbers = subject, fed, block, numbers
        self.source = None
        config = subject.model.config
        spec = CacheSpec.of(config, start.batch, start.capacity, FLOAT64, subject.device)
        spec = replace(spec, n_layers=len(block.held), kernels=subject.kernels)
        self.cache = subject.make(spec, start.padding)
        self.ids = torch.empty(start.batch, 0, dtype=torch.long, device=subject.device)

    def feed(self, ids: Tensor) -> Tensor:
        """One step of all layers of the block. Raises CapacityError as the cache does."""
        step, known = self.cache.begin(ids.shape[1]), dict[int, Step]()
        number = next(self.numbers)
        history, first, n = self.fed.places[number]
        columns = slice(first, first + n)
        if not torch.equal(step.q_pos, self.block.positions[history][:, columns]):
            self.fed.is_off_by(number, math.inf)  # the model would embed, or rotate, otherwise
        real = step.q_pos >= 0
        for layer, (seen, held) in enumerate(zip(self.block.steps, self.block.held, strict=True)):
            q, k, v, y = (x[:, :, columns] for x in held[history])
            found = self.cache.attend(layer, q, k, v, _seen(step, seen, known))
            off = (found - y).abs().amax(dim=(1, 3)).masked_fill(~real, 0.0)
            gap = float(off.max()) / self.block.largest[layer][history]
            self.fed.is_off_by(number, gap)
        self.cache.commit(n)
        self.ids = torch.cat([self.ids, ids], dim=1)
        return torch.zeros(*ids.shape, 1)


class Histories:
    """The histories of an uncached pass; those that several kinds share are in it once."""

    def __init__(self, kernels: Kernels = DEFAULT) -> None:
        self.all: list[History] = []
        self.kernels = kernels
        self.n_rows = 0
        self._known: dict[Any, int] = {}

    def number(self, segment: Segment, subject: ModelSubject) -> int:
        """The number of a segment's history, as a subject's cache lets it be seen."""
        ids, padding = segment.history, segment.start.padding
        key = (subject.seen, ids.shape, *(None if x is None else _bytes(x) for x in (ids, padding)))
        if key not in self._known:
            batch, n = ids.shape
            step = Step.full(batch, n, ids.device, padding, self.kernels, *subject.seen)
            self._known[key] = len(self.all)
            self.all.append(History(segment, self.n_rows, step))
            self.n_rows += ids.numel()
        return self._known[key]


def _bytes(x: Tensor) -> bytes:
    return x.cpu().numpy().tobytes()


class AllCaches:
    """The model's cache in the pass: it computes each layer's attention for all histories, and
    hands queries, keys, values and answers to the judged caches."""

    def __init__(self, histories: Histories, fed: Sequence[Fed], n_layers: int) -> None:
        self.histories, self.fed, self.n_layers = histories.all, fed, n_layers
        self.block = self._new_block()

    def _new_block(self) -> Block:
        return Block([history.step.q_pos for history in self.histories])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: AllRows) -> Tensor:
        """q (1,H,N,D), k, v (1,Hkv,N,D) -> (1,H,N,D)"""
        held, answers = [], []
        for history in self.histories:
            asked = [history.rows(x) for x in (q, k, v)]
            y = history.seen_by(step).attend(*asked)
            held.append(LayerAttention(asked[0], asked[1], asked[2], y))
            answers.append(y.transpose(0, 1).flatten(1, 2))
        self.block.add(step, held)
        if self.block.nbytes >= HELD or layer == self.n_layers - 1:
            for each in self.fed:
                each.feed(self.block)
            self.block = self._new_block()
        return torch.cat(answers, dim=1)[None]


class ByLayer:
    """The float64 evidence of the kinds of cache of a model, by scenario.

    What was found of a scenario is kept until the next one is asked for.
    """

    def __init__(self, formats: Formats, subjects: Iterable[ModelSubject]) -> None:
        self.formats = formats
        self.subjects = [subject for subject in subjects if subject.stores]
        self.n_passes = 0
        self._case: Case | None = None
        self._found: dict[tuple[str, bool], Arms] = {}

    def arms(self, subject: ModelSubject, case: Case, plain: bool = False) -> Arms | None:
        """The float64 evidence of a subject, or None. plain: the uncached logits alone, of the same
        subject with a cache that rounds nothing."""
        if case is not self._case:
            self._found.clear()
            self._case = case
            self._find(case)
        return self._found.get((subject.name, plain))

    @torch.inference_mode()
    def _find(self, case: Case) -> None:
        able = [s for s in self.subjects if case.scenario.lacking(s) is None]
        alike: dict[Any, list[ModelSubject]] = {}
        for subject in able:
            alike.setdefault((subject.window, subject.sinks), []).append(subject)
        for group in self._packed(case, list(alike.values())):
            self._pass(case, group)

    def _packed(
        self, case: Case, groups: Sequence[list[ModelSubject]]
    ) -> Iterator[list[ModelSubject]]:
        """The groups that one pass serves, of MAX_ROWS or fewer unless a single one has more."""
        together: list[ModelSubject] = []
        for group in groups:
            if together and self._planned(case, [*together, *group])[0].n_rows > MAX_ROWS:
                yield together
                together = []
            together = [*together, *group]
        if together:
            yield together

    def _planned(
        self, case: Case, subjects: Sequence[ModelSubject]
    ) -> tuple[Histories, dict[tuple[str, bool], Fed]]:
        histories, planned = Histories(), dict[tuple[str, bool], Fed]()
        for subject in subjects:
            for plain, each in ((False, subject), (True, subject.unrounded())):
                fed = None if each is None else Fed.of(each, case, histories)
                if fed is not None and fed.places:
                    planned[subject.name, plain] = fed
        return histories, planned

    def _pass(self, case: Case, subjects: Sequence[ModelSubject]) -> None:
        histories, planned = self._planned(case, subjects)
        if not planned:
            return
        self.n_passes += 1
        ids = torch.cat([h.segment.history.reshape(1, -1) for h in histories.all], dim=1)
        fed = [each for (_, plain), each in planned.items() if not plain]
        model = self.formats.to(FLOAT64)
        caches: Any = AllCaches(histories, fed, model.config.n_layers)
        logits = model(ids, AllRows.of(histories.all, histories.kernels), caches)
        of_each = [
            logits[0, h.begin : h.end].view(*h.segment.history.shape, -1) for h in histories.all
        ]
        for key, each in planned.items():
            self._found[key] = each.arms(of_each)
