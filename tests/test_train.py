"""The training loop: it learns, it repeats itself to the byte, and it stops as it should."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from kvtool.app import Terminated, _terminate
from kvtool.config import SCHEDULES, TrainLength
from kvtool.core import checkpoint
from kvtool.core.runs import RunFolder
from kvtool.core.train import FLOOR, LOG_EVERY, Trainer, learning_rate
from kvtool.errors import CheckFailed, UsageError
from kvtool.ui.progress import Progress
from training_cases import (
    EVAL_EVERY,
    STEPS,
    WEIGHTS,
    Forgetful,
    Hook,
    Unseeded,
    outcome,
    task,
    train,
    trainer,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def signals_as_in_the_app() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminate)
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run that nobody stops leaves behind."""
    out = tmp_path_factory.mktemp("unbroken")
    train(out)
    return outcome(out)


class Spoilt:
    """A task in which something becomes not finite, at its `n`-th loss or evaluation."""

    def __init__(self, what: str, n: int) -> None:
        self.inner, self.what, self.left = task(), what, n

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def now(self, what: str) -> bool:
        self.left -= self.what == what
        return self.what == what and self.left == 0

    def loss(self, model: Any, batch: Any, share: Any) -> tuple[Any, int]:
        loss, n = self.inner.loss(model, batch, share)
        if self.now("loss"):
            return loss * float("nan"), n
        return (loss + (loss - loss).sqrt() if self.now("gradient's norm") else loss), n

    def evaluate(self, model: Any) -> dict[str, float]:
        figures = self.inner.evaluate(model)
        return {**figures, "bits_per_char": float("inf")} if self.now("bits per char") else figures


class Scores:
    """A task whose held-out scores are given."""

    def __init__(self, *scores: float, higher: bool = False) -> None:
        self.inner, self.scores = task(), iter(scores)
        self.higher_is_better = higher

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def evaluate(self, model: Any) -> dict[str, float]:
        return {"bits_per_char": next(self.scores)}


def stop_and_resume(out: Path, step: int, number: int = signal.SIGINT, **changes: Any) -> None:
    """Train, send a signal to ourselves in a step, and train to the end."""
    hook = Hook(step, lambda: os.kill(os.getpid(), number))
    with pytest.raises((KeyboardInterrupt, Terminated)):
        train(out, watcher=hook, **changes)
    train(out, resume=True, **changes)


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


# The same bytes


@pytest.mark.parametrize("amp", [False, True])
def test_one_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path, amp: bool) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        torch.rand(7)  # what was drawn before does not matter
        train(tmp_path / name, seed=seed, amp=amp)
    a, b, c = (outcome(tmp_path / name) for name in "abc")
    assert a == b and a["best"] != c["best"]


def test_the_largest_seed_trains(tmp_path: Path) -> None:
    assert train(tmp_path, seed=2**63 - 1, steps=2).step == 2


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_run_stopped_by_ctrl_c_at_any_step_goes_on_to_the_same_bytes(
    tmp_path: Path, unbroken: dict[str, Any], step: int
) -> None:
    stop_and_resume(tmp_path, step)
    assert outcome(tmp_path) == unbroken


@pytest.mark.parametrize("step", [1, 4, 7])
def test_a_run_that_fails_at_any_step_goes_on_to_the_same_bytes(
    tmp_path: Path, unbroken: dict[str, Any], step: int
) -> None:
    def fail() -> None:
        raise OSError("planted")

    with pytest.raises(OSError, match="planted"):
        train(tmp_path, watcher=Hook(step, fail))
    train(tmp_path, resume=True)
    assert outcome(tmp_path) == unbroken


def test_a_run_may_be_stopped_again_and_again(tmp_path: Path, unbroken: dict[str, Any]) -> None:
    for again in range(STEPS - 1):
        hook = Hook(1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Terminated):
            train(tmp_path, watcher=hook, resume=again > 0)
    train(tmp_path, resume=True)
    assert outcome(tmp_path) == unbroken


def test_the_mean_of_the_last_weights_is_scored_and_saved_if_it_is_better(tmp_path: Path) -> None:
    train(tmp_path, learn=Scores(5.0, 4.0, 1.0, 9.0, 8.0), average=3)
    scored = [
        (line["step"], name)
        for line in outcome(tmp_path)["log"]
        for name in ("valid", "averaged")
        if name in line
    ]
    assert scored == [(4, "valid"), (8, "valid"), (8, "averaged"), (12, "valid"), (12, "averaged")]
    with RunFolder(tmp_path, True, lambda _: None) as folder:
        state = folder.load_state()
    assert state is not None and state["position"]["best_step"] == 8
    first, second, _ = state["recent"]
    best = checkpoint.load(str(tmp_path / "best"), CPU, torch.float32).model.state_dict()
    for name, weight in best.items():
        torch.testing.assert_close(weight, (first[name] + second[name]) / 2)


@pytest.mark.parametrize("step", [3, 6, 9])
def test_a_stopped_run_that_averages_goes_on_to_the_same_bytes(tmp_path: Path, step: int) -> None:
    train(tmp_path / "whole", average=2)
    stop_and_resume(tmp_path / "stopped", step, average=2)
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_a_finished_run_that_is_resumed_stays_as_it_is(
    tmp_path: Path, unbroken: dict[str, Any]
) -> None:
    at = train(tmp_path)
    assert train(tmp_path, resume=True) == at and outcome(tmp_path) == unbroken


@pytest.mark.parametrize("kind", [Forgetful, Unseeded])
def test_a_trainer_that_forgets_is_caught_by_that_check(
    tmp_path: Path, kind: type[Trainer]
) -> None:
    train(tmp_path / "unbroken", kind=kind)
    stop_and_resume(tmp_path / "resumed", 6, kind=kind)
    unbroken, resumed = outcome(tmp_path / "unbroken"), outcome(tmp_path / "resumed")
    assert unbroken["position"]["step"] == resumed["position"]["step"]
    assert unbroken["last"] != resumed["last"]


# Stopping


def test_a_signal_lets_the_step_finish_and_says_how_to_go_on(tmp_path: Path) -> None:
    said: list[str] = []
    hook = Hook(6, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, watcher=hook, say=said.append)
    assert said[-1] == "stopped at step 6; go on with --resume"
    assert outcome(tmp_path)["position"]["step"] == 6
    train(tmp_path, resume=True, say=said.append)
    assert "resumed at step 6" in said


def test_a_second_ctrl_c_takes_effect_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, watcher=Hook(6, twice))
    assert outcome(tmp_path)["position"]["step"] == EVAL_EVERY


def test_ctrl_c_stays_ignored_where_it_was_and_handlers_come_back(tmp_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    said: list[str] = []
    hook = Hook(6, lambda: os.kill(os.getpid(), signal.SIGINT))
    at = train(tmp_path, watcher=hook, say=said.append)
    assert at.step == STEPS and not any("stopped" in line for line in said)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is _terminate


def test_a_thread_can_train_although_it_gets_no_signals(
    tmp_path: Path, unbroken: dict[str, Any]
) -> None:
    thread = threading.Thread(target=train, args=(tmp_path,))
    thread.start()
    thread.join()
    assert outcome(tmp_path) == unbroken


def test_a_resumed_run_is_shown_from_where_it_stood(tmp_path: Path) -> None:
    class Counter(Progress):
        steps = 0

        def advance(self, n: int = 1) -> None:
            self.steps += n

    with contextlib.suppress(KeyboardInterrupt):
        train(tmp_path, watcher=Hook(5, lambda: os.kill(os.getpid(), signal.SIGINT)))
    counter = Counter()
    train(tmp_path, resume=True, watcher=counter)
    assert counter.steps == STEPS


# What is not finite


@pytest.mark.parametrize(
    ("what", "n", "step", "value"),
    [
        ("loss", 1, 1, "nan"),
        ("loss", 6, 6, "nan"),
        ("gradient's norm", 8, 8, "nan"),
        ("bits per char", 2, 8, "inf"),
    ],
)
def test_what_is_not_finite_ends_the_run_by_name_before_it_is_saved(
    tmp_path: Path, unbroken: dict[str, Any], what: str, n: int, step: int, value: str
) -> None:
    with pytest.raises(CheckFailed, match=rf"^step {step}: the {what} is {value}\. Lower --lr"):
        train(tmp_path, learn=Spoilt(what, n))
    if step > EVAL_EVERY:
        best = checkpoint.load(str(tmp_path / "best"), CPU, torch.float32)
        assert all(p.isfinite().all() for p in best.model.parameters())
        assert outcome(tmp_path)["position"]["step"] == EVAL_EVERY
    train(tmp_path, resume=True)
    assert outcome(tmp_path) == unbroken
