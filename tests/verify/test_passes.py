"""Uncached passes that several runs share."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvtool.core.kernels.default import make_kernels
from kvtool.core.verify.arms import Case, play
from kvtool.core.verify.check import check_model, main_case, small
from kvtool.core.verify.finding import Diagnosis
from kvtool.core.verify.model_subject import Formats, ModelSubject
from kvtool.core.verify.passes import Passes, uncached
from kvtool.core.verify.precision import Promote
from kvtool.core.verify.scenarios import SCENARIOS
from kvtool.core.verify.subject import Start
from kvtool.core.verify.target.doctor import MAX_SECONDS, NOT_LOOKED, Examiner
from kvtool.core.verify.target.subject import TargetSubject
from small_models import random_model

IDS = torch.tensor([[1, 5, 2, 7, 3]])
START = Start(1, 8)
MODEL = random_model()


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the ids of all passes that are computed from now on."""
    shapes: list[tuple[int, ...]] = []
    right = ModelSubject.full

    def full(subject: ModelSubject, ids: Tensor, start: Start) -> Tensor:
        shapes.append(tuple(ids.shape))
        return right(subject, ids, start)

    monkeypatch.setattr(ModelSubject, "full", full)
    return shapes


def subject(kind: str = "dynamic", passes: Passes | None = None) -> ModelSubject:
    made = ModelSubject(MODEL, small(kind), kind)
    made.passes = passes
    return made


def another_model(one: ModelSubject) -> ModelSubject:
    """The same weights in another object: that it is the same model is not known."""
    made = ModelSubject(random_model(), small("dynamic"), "dynamic")
    made.passes = one.passes
    return made


class Decoder:
    """A decoder of the protocol of a target, whose pass answers with `drift` more each time."""

    def __init__(self, drift: float = 0.0) -> None:
        self.drift, self.n_passes = drift, 0
        self.table = torch.randn(11, 11, generator=torch.Generator().manual_seed(0))
        self.out = torch.zeros(1, 5, 11)

    def full(self, ids: Tensor) -> Tensor:
        self.n_passes += 1
        return self.table[ids].cumsum(1) + self.drift * self.n_passes

    def step(self, ids: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = self.table[ids].cumsum(1)
        logits = logits if state is None else logits + state
        return logits, logits[:, -1:]


def target(decoder: Decoder) -> TargetSubject:
    made = TargetSubject(decoder, "own", 11, 64)
    made.passes, decoder.n_passes = Passes(), 0
    return made


def test_kinds_that_are_compared_with_the_same_pass_compute_it_once(monkeypatch):
    model = random_model()
    main = main_case(model, IDS, 4)
    shapes = counted(monkeypatch)
    counts = []
    for kinds in (["static"], ["dynamic", "static", "paged"]):
        shapes.clear()
        list(check_model(Formats(model), kinds, ["exact"], ["decode", "padded", "crop"], main))
        counts.append(len(shapes))
    assert counts[0] == counts[1] > 0


def test_findings_are_the_same_to_the_last_bit_whether_passes_are_shared_or_not():
    model = random_model()
    main = main_case(model, IDS, 6)
    names = ["decode", "padded", "rows", "crop", "fork"]
    kinds = ["dynamic", "static", "sliding", "int8", "paged"]
    together = list(check_model(Formats(model), kinds, ["default"], names, main))
    alone = [
        found
        for kind in kinds
        for found in check_model(Formats(model), [kind], ["default"], names, main)
    ]
    assert together == alone


@pytest.mark.parametrize(
    "other",
    [
        lambda one: one.with_kernels(make_kernels("exact")),
        lambda one: one.to(torch.float64),
        lambda one: subject("sliding", one.passes),
        another_model,
    ],
    ids=["kernels", "format", "window", "model"],
)
def test_what_may_answer_otherwise_is_not_shared(other):
    passes = Passes()
    one = subject(passes=passes)
    for asked in (one, other(one), one):
        uncached(asked, IDS, START)
    assert (passes.n_computed, passes.n_shared) == (2, 1)


def test_other_padding_and_other_ids_and_a_promoted_pass_are_computed():
    passes = Passes()
    one = subject(passes=passes).to(torch.float64)
    uncached(one, IDS, START)
    uncached(one, IDS, replace(START, padding=torch.tensor([2])))
    uncached(one, IDS + 1, START)
    uncached(one, IDS[:, :4], START)
    with Promote():
        uncached(one, IDS, START)
    assert (passes.n_computed, passes.n_shared) == (5, 0)


def test_what_does_not_fit_is_computed_again_and_what_is_kept_stays():
    one = subject(passes=Passes())
    nbytes = uncached(one, IDS, START).nbytes
    passes = one.passes = Passes(most=nbytes)
    for ids in (IDS, IDS + 1, IDS + 1, IDS):
        uncached(one, ids, START)
    assert passes.nbytes == nbytes
    assert (passes.n_computed, passes.n_shared) == (3, 1)


def test_nothing_is_kept_of_kinds_that_are_done(monkeypatch):
    model = random_model()
    made: list[Passes] = []
    monkeypatch.setattr("kvtool.core.verify.check.Passes", lambda: made.append(Passes()) or made[0])
    main = main_case(model, IDS, 4)
    found = check_model(Formats(model), ["dynamic", "static", "int8"], ["exact"], ["decode"], main)
    held = [made[0].nbytes for _ in found]
    assert held[0] > 0 and held[2] == 0


def test_a_pass_of_others_is_computed_again_once_and_then_shared():
    decoder = Decoder()
    one = target(decoder)
    found = [uncached(one, ids, START) for ids in (IDS, IDS, IDS, IDS[:, :3], IDS[:, :3])]
    assert decoder.n_passes == 3
    assert torch.equal(found[0], found[2])


def test_a_decoder_that_answers_otherwise_each_time_shares_nothing():
    decoder = Decoder(drift=1.0)
    one = target(decoder)
    found = [float(uncached(one, IDS, START)[0, 0, 0]) for _ in range(4)]
    assert decoder.n_passes == 4
    assert len(set(found)) == 4
    assert isinstance(one.passes, Passes) and not one.passes.shares and one.passes.nbytes == 0


def test_a_buffer_of_the_decoder_that_is_written_again_does_not_change_what_is_kept():
    class Reusing(Decoder):
        def full(self, ids: Tensor) -> Tensor:
            logits = super().full(ids)
            return self.out.copy_(logits) if logits.shape == self.out.shape else logits

    one = target(Reusing())
    first = uncached(one, IDS, START).clone()
    uncached(one, IDS, START)
    uncached(one, IDS + 1, START)
    assert torch.equal(uncached(one, IDS, START), first)


def test_weights_that_are_moved_are_another_decoder_of_which_nothing_is_kept():
    one = target(Decoder())
    assert isinstance(one.passes, Passes)
    moved = one.moved(0.1)
    found, nbytes = uncached(one, IDS, START), one.passes.nbytes
    assert not torch.equal(found, uncached(moved, IDS, START))
    assert one.passes.nbytes == nbytes  # nothing is kept of what is asked once


def test_a_run_asks_for_no_pass_that_another_run_has_asked_for(monkeypatch):
    shapes = counted(monkeypatch)
    one = subject(passes=Passes())
    case = Case(SCENARIOS["chunks"])
    first = play(one, case)
    n = len(shapes)
    again = play(one, case)
    assert len(shapes) == n > 0
    assert all(torch.equal(a, b) for a, b in zip(first.expected, again.expected, strict=True))


def test_a_check_does_not_load_the_compiler_and_counts_as_torch_does():
    code = """
import sys, torch
from kvtool.core.verify.precision import Promote
from kvtool.core.verify.target.work import work
linear, x = torch.nn.Linear(5, 7), torch.ones(2, 3, 5)
with torch.inference_mode(), Promote():
    torch.ones(2, 2) @ torch.ones(2, 2)
with torch.inference_mode():
    found = work(lambda: linear(x), [])
assert "torch._dynamo" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
with torch.inference_mode(), FlopCounterMode(display=False) as counter:
    linear(x)
assert found == counter.get_total_flops() > 0, found
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bugs_that_are_found_after_the_time_for_it_are_not_located():
    doctor = Examiner()
    doctor.spent = MAX_SECONDS
    assert doctor(None, None, 0, None) == Diagnosis(unexplained=NOT_LOOKED)  # type: ignore[arg-type]
