"""The training loop: it learns, at the rate asked for, and for as long as it should."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from kvtool.config import SCHEDULES, TrainLength
from kvtool.core.training.runs import RunFolder
from kvtool.core.training.train import FLOOR, LOG_EVERY, Trainer, learning_rate
from kvtool.errors import UsageError
from training_cases import (
    STEPS,
    WEIGHTS,
    Hook,
    Scores,
    outcome,
    stop_and_resume,
    task,
    train,
    trainer,
)

pytestmark = pytest.mark.usefixtures("signals_as_in_the_app")


# Learning


def test_the_learning_rate_rises_to_its_peak_and_falls_to_a_twentieth_of_it() -> None:
    rates = [learning_rate(2.0, 10, step, step / 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    top = rates.index(max(rates))
    assert 8 <= top <= 10 and 1.9 < max(rates) <= 2.0
    assert all(a > b for a, b in zip(rates[top:], rates[top + 1 :], strict=False))
    assert learning_rate(2.0, 10, 99, 1.0) == pytest.approx(2.0 * FLOOR)
    assert learning_rate(2.0, 10, 50, 0.5) == pytest.approx(2.0 * (FLOOR + (1 - FLOOR) / 2))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warm_up_the_first_step_has_the_peak_rate(schedule: str) -> None:
    assert [learning_rate(2.0, warmup, 0, 0.0, schedule) for warmup in (0, 1)] == [2.0, 2.0]


def test_the_inverse_square_root_peaks_at_the_end_of_warm_up() -> None:
    rates = [learning_rate(2.0, 10, step, step / 100, "inverse-sqrt") for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert max(rates) == rates[9] == 2.0
    assert rates[39] == pytest.approx(1.0)  # four times the steps, half the rate
    # Vaswani 2017, 5.3, with warm-up 10 and scaled to this peak
    formula = [min(n**-0.5, n * 10**-1.5) for n in range(1, 101)]
    assert rates == pytest.approx([2.0 * value / formula[9] for value in formula])


def test_a_constant_rate_stays_at_its_peak() -> None:
    rates = [learning_rate(2.0, 4, step, step / 8, "constant") for step in range(8)]
    assert rates == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_schedule_is_what_the_optimizer_gets_and_survives_a_stop(
    tmp_path: Path, schedule: str
) -> None:
    train(tmp_path / "whole", schedule=schedule)
    stop_and_resume(tmp_path / "stopped", 6, schedule=schedule)
    whole = outcome(tmp_path / "whole")
    assert whole == outcome(tmp_path / "stopped")
    rates = {line["step"]: line["lr"] for line in whole["log"] if "lr" in line}
    assert rates == {
        n: learning_rate(0.01, 4, n - 1, (n - 1) / STEPS, schedule) for n in (1, LOG_EVERY)
    }


def test_a_repeated_text_is_learned(tmp_path: Path) -> None:
    train(tmp_path, steps=150, eval_every=50)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    scores = [line["valid"]["bits_per_char"] for line in lines if "valid" in line]
    assert losses[0] > 1.7 and losses[-1] < 0.8  # ignorance of 6 tokens costs ln 6 = 1.8 nats
    # Who knew only how often each letter comes would need 1.57 bits.
    assert scores == sorted(scores, reverse=True) and scores[-1] < 1.1


def test_every_line_of_the_log_is_json_and_says_how_it_goes(tmp_path: Path) -> None:
    train(tmp_path, steps=2 * LOG_EVERY)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, LOG_EVERY, 2 * LOG_EVERY]
    assert [line["step"] for line in lines if "valid" in line] == [4, 8, 12, 16, 20]
    names = {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "seconds"}
    assert all(line.keys() == names for line in steps)
    assert all(set(line) == {"step", "valid", "seconds"} for line in lines if "valid" in line)
    assert [line["tokens"] for line in steps] == sorted(line["tokens"] for line in steps)


def test_only_matrices_decay(tmp_path: Path) -> None:
    with RunFolder(tmp_path, False, print) as folder:
        groups = trainer(folder, tmp_path, weight_decay=0.5).optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert [{p.ndim for p in group["params"]} for group in groups] == [{2}, {1}]


def test_a_gradient_longer_than_the_clip_is_cut_to_it(tmp_path: Path) -> None:
    with RunFolder(tmp_path, False, print) as folder:
        run = trainer(folder, tmp_path, clip=1e-3, steps=1)
        run.run()
    gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
    length = torch.stack([gradient.norm() for gradient in gradients]).norm()
    assert float(length) == pytest.approx(1e-3, rel=1e-3)
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["grad_norm"] > 0.1


# How long


@pytest.mark.parametrize("length", [{"steps": 11}, {"epochs": 2}])
def test_the_end_is_evaluated_and_saved_even_between_two_evaluations(
    tmp_path: Path, length: dict[str, Any]
) -> None:
    batches = len(task().batches(0))
    expected = length.get("steps", 2 * batches)
    at = train(tmp_path, eval_every=5, **length)
    assert at.step == expected and (at.epoch, at.batch) == divmod(expected, batches)
    assert outcome(tmp_path)["log"][-1]["step"] == expected


def test_minutes_are_those_of_training(tmp_path: Path) -> None:
    with patch("time.perf_counter", side_effect=(float(n) for n in range(1000))):
        at = train(tmp_path, minutes=0.1)
    assert (at.step, at.seconds) == (6, 6.0)  # each step takes one second of that clock


@pytest.mark.parametrize("given", [{}, {"steps": 1, "minutes": 1.0}, {"steps": 1, "epochs": 1}])
def test_a_length_is_given_in_one_unit(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--steps, --epochs, --minutes: give one"):
        TrainLength(**given)


@pytest.mark.parametrize(
    ("higher", "given"), [(False, (3.0, 2.0, 2.5, 2.0, 1.0)), (True, (0.0, 2.0, 1.5, 2.0, 3.0))]
)
def test_training_stops_when_the_score_has_not_improved_and_the_best_is_kept(
    tmp_path: Path, higher: bool, given: tuple[float, ...]
) -> None:
    scores = Scores(*given, higher=higher)
    at = train(tmp_path / "a", learn=scores, steps=100, patience=2)
    assert (at.step, at.best_step, at.best_score, at.stale) == (16, 8, 2.0, 2)
    best, last = (tmp_path / "a" / name / WEIGHTS for name in ("best", "last"))
    assert best.read_bytes() != last.read_bytes()
    again = train(tmp_path / "a", learn=Scores(higher=higher), steps=100, patience=2, resume=True)
    assert again == at


@pytest.mark.parametrize(
    ("higher", "before", "after"), [(False, (3.0, 2.0, 2.5), 2.1), (True, (1.0, 2.0, 1.5), 1.9)]
)
def test_patience_is_not_renewed_by_a_stop(
    tmp_path: Path, higher: bool, before: tuple[float, ...], after: float
) -> None:
    changes = {"steps": 100, "patience": 2}
    hook = Hook(13, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, learn=Scores(*before, higher=higher), watcher=hook, **changes)
    later = Scores(after, 2.0, higher=higher)
    at = train(tmp_path, learn=later, resume=True, **changes)
    assert (at.step, at.best_step, at.best_score) == (16, 8, 2.0)


@pytest.mark.parametrize("higher", [False, True])
def test_the_first_score_is_the_best_so_far_even_after_a_stop(tmp_path: Path, higher: bool) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, watcher=Hook(2, lambda: os.kill(os.getpid(), signal.SIGINT)), steps=4)
    at = train(tmp_path, learn=Scores(0.0, higher=higher), resume=True, steps=4)
    assert (at.best_step, at.best_score) == (4, 0.0) and (tmp_path / "best" / WEIGHTS).is_file()


# Memory


class Memory(Hook):
    """Remembers the number and bytes of all tensors and the resident memory, after some steps."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.done = steps, 0
        self.tensors: list[tuple[int, int]] = []
        self.resident: list[int] = []

    def update(self, text: str = "", **fields: Any) -> None:
        self.done += 1
        if self.done in self.steps:
            gc.collect()
            kinds = torch.Tensor, torch.nn.Parameter
            live = [x for x in gc.get_objects() if type(x) in kinds]
            live = [x for x in live if x.layout is torch.strided]  # sparse ones of other tests
            self.tensors.append((len(live), sum(x.untyped_storage().nbytes() for x in live)))
            give_back()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.resident.append(pages * os.sysconf("SC_PAGE_SIZE"))


def give_back() -> None:
    """Give the system what earlier tests have freed: a hoard could hide in it, and none be seen."""
    with contextlib.suppress(OSError, AttributeError):  # of glibc alone
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class Hoarder(Trainer):
    """A planted bug: the graph of every step is kept, in memory that Python does not see."""

    def _finite(self, what: str, value: float, step: int) -> float:
        hoard.append(torch.ones(2**16, requires_grad=True).exp().sum())
        return value


hoard: list[torch.Tensor] = []


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells resident memory")
@pytest.mark.parametrize(
    ("kind", "amp"),
    [(Trainer, False), (Trainer, True), (Hoarder, False)],  # the last shows that this can fail
    ids=["float32", "bfloat16", "hoarder"],
)
def test_memory_does_not_grow_over_steps(tmp_path: Path, kind: type[Trainer], amp: bool) -> None:
    memory = Memory(50, 150)
    train(tmp_path / "run", kind=kind, watcher=memory, steps=150, eval_every=1000, amp=amp)
    (n_before, before), (n_after, after) = memory.tensors
    grown = memory.resident[1] - memory.resident[0]
    hoard.clear()
    if kind is Hoarder:
        assert n_after > n_before and grown > 2**24
    else:  # batches differ in size
        assert n_after == n_before and after < 1.1 * before and grown < 2**22
