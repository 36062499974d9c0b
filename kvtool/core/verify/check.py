"""The whole check of a model of ours: kinds of cache, kernels, scenarios, and a planted control."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from kvtool import registry
from kvtool.core.cache import Cache, CacheSpec, Step, cache_class, make_cache
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.core.decoding.engine import check_context, first_input, generate
from kvtool.core.decoding.sampling import Sampler
from kvtool.core.kernels.default import DEFAULT, make_kernels
from kvtool.core.models import Model
from kvtool.core.verify.arms import Case
from kvtool.core.verify.by_layer import ByLayer, can_go_by_layer
from kvtool.core.verify.depth import cut, layers_for
from kvtool.core.verify.diagnosis.doctor import examine
from kvtool.core.verify.finding import Finding
from kvtool.core.verify.judge import Judge
from kvtool.core.verify.model_subject import Formats, ModelSubject
from kvtool.core.verify.outcome import ROUNDING, Outcome, outcome
from kvtool.core.verify.passes import Passes
from kvtool.core.verify.scenarios import SCENARIOS
from kvtool.core.verify.subject import Source, Subject

MAIN = "decode"  # the scenario that is fed the prompt and its continuation
LONG_SCENARIO = "long"  # the scenario that comes furthest
MAX_REACH = 4200  # tokens that our kinds are fed at most
CONTROL_STEPS = 24  # enough to see a planted bug
FEW_STEPS = 3  # of a large model
EXACT = "exact"


@dataclass(frozen=True)
class Checked:
    """The finding for a kind of cache, with some kernels, in one scenario."""

    cache: str
    kernels: str
    stores: bool  # a kind that stores nothing is there to be compared with
    finding: Finding
    exact: bool = False  # equality to the last bit was promised
    not_judged: str = ""  # the part of the cache that was not judged, replaced by exact values
    usable: bool = True  # False: the finding says why no scenario could be run
    layers: int = 0  # the first ones of a large model that were judged alone; 0: all
    planted: bool = False  # not a result, but the bug that tests the check

    @property
    def right(self) -> bool:
        """Whether the cache kept its promise."""
        return self.finding.right and not (self.exact and self.finding.verdict == ROUNDING)

    @property
    def outcome(self) -> Outcome:
        """The verdict's meaning for the cache."""
        return outcome(self.finding.verdict, self.right, self.stores)


def planted_bug(finding: Finding, kernels: str) -> Checked:
    """The finding for the planted bug, as a check like the others."""
    return Checked("planted bug", kernels, True, finding, planted=True)


def main_case(model: Model, prompt: Tensor, n_new: int) -> Case:
    """The scenario `decode` on a prompt (1,P) and the likeliest N tokens after it.

    An encoder-decoder reads `prompt` as its source. All arms are fed the same ids, so where they
    come from has no influence on the verdict. Raises CapacityError and CheckFailed.
    """
    ids, source = first_input(model, prompt)
    n_prompt = ids.shape[1]
    check_context(n_prompt, n_new, model.config.context)
    weight = next(model.parameters())
    spec = CacheSpec.of(model.config, 1, n_prompt + n_new, weight.dtype, weight.device)
    steps = generate(model, ids, make_cache("dynamic", spec), n_new - 1, Sampler(), source)
    given = torch.cat([ids, *(token[:, None] for token in steps)], dim=1)
    read = None if source is None else Source(prompt, torch.ones_like(prompt, dtype=torch.bool))
    return Case(SCENARIOS[MAIN], given, n_prompt, read)


def small(kind: str) -> Callable[[CacheSpec, Tensor | None], Cache]:
    """A maker of a registered kind, with small sizes so that a short check uses all of it. Settings
    of the kind stay."""
    found: Any = cache_class(kind)
    settings = {**found.small, **registry.split_kind(kind)[1]}
    return partial(found, **settings) if settings else found


def check_model(
    formats: Formats,
    caches: Sequence[str],
    kernels: Sequence[str],
    scenarios: Sequence[str],
    main: Case,
    progress: Callable[[str], None] = lambda text: None,
    skip: Container[tuple[str, str, str]] = (),
    thorough: bool = False,
) -> Iterator[Checked]:
    """Judge every kind with all kernels in all scenarios, in that order; of a large model all kinds
    in one scenario after the other, since they share most of the work.

    skip: kind, kernels and scenario of what is not judged. progress: is called before each with a
    few words. thorough: feed all that can be fed in some minutes, through all layers of a large
    model. Raises CheckFailed.
    """
    parts = parts_of(formats, caches, kernels, scenarios, thorough)
    plan = [turn for turn in parts if turn not in skip]
    is_large = goes_by_layer(formats)
    if is_large:
        plan.sort(key=lambda turn: (scenarios.index(turn[2]), kernels.index(turn[1])))
    # After the last of those that share passes these are let go.
    sharing = {
        turn: (*turn[1:], parts[turn]) if is_large else parts[turn].subjects[turn[0]].seen
        for turn in plan
    }
    left: Counter[Any] = Counter(sharing.values())
    cases = {name: Case(SCENARIOS[name], thorough=thorough) for name in scenarios} | {MAIN: main}
    for turn in plan:
        kind, name, scenario = turn
        part = parts[turn]
        progress(f"{kind}, {name} kernels, {scenario}")
        finding = _judged(part.judge(kind, name), cases[scenario])
        stores = part.subjects[kind].stores
        yield Checked(kind, name, stores, finding, name == EXACT, layers=part.layers)
        left[sharing[turn]] -= 1
        if not left[sharing[turn]]:
            part.passes.clear()


class Part:
    """A model, or its first layers, and what its judges share.

    layers: how many layers it has, if they are not all; else 0.
    """

    def __init__(
        self, formats: Formats, caches: Sequence[str], thorough: bool, layers: int = 0
    ) -> None:
        self.formats = formats
        self.layers = layers
        self.subjects, self.passes = subjects_of(formats, caches, thorough)
        shares = goes_by_layer(formats)
        self._evidence = ByLayer(formats, self.subjects.values()) if shares else None
        self._judges: dict[tuple[str, str], Judge] = {}

    def judge(self, kind: str, kernels: str) -> Judge:
        """The judge of a kind of cache with these kernels."""
        if (kind, kernels) not in self._judges:
            subject = self.subjects[kind].with_kernels(make_kernels(kernels))
            subject.evidence = self._evidence if kernels == DEFAULT.name else None
            self._judges[kind, kernels] = Judge(subject, examine)
        return self._judges[kind, kernels]


Turn = tuple[str, str, str]  # the kind of a cache, the kernels, the scenario


def parts_of(
    formats: Formats,
    caches: Sequence[str],
    kernels: Sequence[str],
    scenarios: Sequence[str],
    thorough: bool,
) -> dict[Turn, Part]:
    """What each turn is played on: the model, or of a large one the first layers."""
    config, cuts = formats.model.config, goes_by_layer(formats) and not thorough
    both = {DEFAULT.name, EXACT} <= set(kernels)
    first = next((kind for kind in caches if cache_class(kind).stores), "")
    made: dict[int, Part] = {}
    found = {}
    for turn in product(caches, kernels, scenarios):
        kind, name, scenario = turn
        alike = both and name == EXACT and kind != first
        n = layers_for(config, scenario, alike) if cuts else config.n_layers
        if n not in made:
            made[n] = Part(cut(formats, n), caches, thorough, n if n < config.n_layers else 0)
        found[turn] = made[n]
    return found


def _judged(judge: Judge, case: Case) -> Finding:
    subject: Any = judge.subject
    thorough = case.scenario.name == MAIN and subject.kernels.name == DEFAULT.name
    thorough = thorough and subject.stores
    return with_reach(judge.judge(fed_of(subject, case), thorough=thorough), subject)


def fed_of(subject: ModelSubject, case: Case) -> Case:
    """What a kind is fed of a case: ids of its vocabulary, which may be a part of the model's. One
    that stores nothing proves nothing, and its time grows with the square."""
    if case.given is not None and int(case.given.max()) >= subject.vocab_size:
        case = replace(case, given=case.given % subject.vocab_size)
    if subject.stores:
        return case
    return beginning(case, FEW_STEPS if subject.formats.is_large else CONTROL_STEPS)


def goes_by_layer(formats: Formats) -> bool:
    """Whether the float64 evidence of all kinds is found together, layer by layer: of a model that
    is so large that it is worth it."""
    return formats.is_large and can_go_by_layer(formats.model)


def subjects_of(
    formats: Formats, caches: Sequence[str], thorough: bool
) -> tuple[dict[str, ModelSubject], Passes]:
    """Each kind as a subject. Kinds with the same uncached pass share it."""
    passes, subjects = Passes(), dict[str, ModelSubject]()
    for kind in caches:
        subjects[kind] = subject = ModelSubject(formats.model, small(kind), kind, formats=formats)
        if thorough and subject.stores:
            subject.reach = min(subject.context, MAX_REACH)
    alike = Counter(subject.seen for subject in subjects.values())
    for subject in subjects.values():
        subject.passes = passes if alike[subject.seen] > 1 else None
    return subjects, passes


def with_reach(finding: Finding, subject: Subject) -> Finding:
    """A finding of the long histories, and which tokens of the context they did not reach."""
    reach = subject.reach
    if not finding.right or finding.scenario != LONG_SCENARIO:
        return finding
    beyond = f"beyond {reach:,} tokens" if 0 < reach < subject.context else ""
    sizes = "most sizes of steps" if subject.fed_little else ""
    return replace(finding, not_fed=" and ".join(filter(None, [sizes, beyond])))


def control(formats: Formats, main: Case) -> Finding:
    """Judge a cache with a planted bug: a check that calls this right is worth nothing."""
    make = partial(LostKey, seen=formats.model.config.window)
    subject = ModelSubject(formats.model, make, "planted bug", formats=formats)
    if formats.is_large:  # to find out where a known bug is would take minutes
        return Judge(subject).judge(beginning(main, FEW_STEPS))
    return Judge(subject, examine).judge(beginning(main))


def beginning(case: Case, n_steps: int = CONTROL_STEPS) -> Case:
    """The case with only the first few of the ids that it was given."""
    if case.given is None:
        return case
    return replace(case, given=case.given[:, : case.n_prompt + n_steps])


class LostKey(DynamicCache):
    """A cache that loses the first token's key in its last layer: small, and wrong.

    seen: in a model with a window, the first token that the next one sees.
    """

    def __init__(self, spec: CacheSpec, left_padding: Tensor | None = None, seen: int = 0) -> None:
        super().__init__(spec, left_padding)
        self.seen = seen

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        keys, values = super().write(layer, k, v, step)
        if self.length > 0 and layer == self.spec.n_layers - 1:
            keys = keys.clone()
            keys[:, :, max(self.length + 1 - self.seen, 0) if self.seen else 0] = 0.0
        return keys, values
