"""A run that is stopped, fails or is resumed: to the byte the weights of one that was not."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from kvtool import ending
from kvtool.core.checkpoint import checkpoint
from kvtool.core.training.runs import RunFolder
from kvtool.core.training.train import Trainer
from kvtool.errors import CheckFailed
from kvtool.ui.progress import Progress
from training_cases import (
    EVAL_EVERY,
    STEPS,
    Forgetful,
    Hook,
    Scores,
    Unseeded,
    outcome,
    stop_and_resume,
    task,
    train,
)

pytestmark = pytest.mark.usefixtures("signals_as_in_the_app")
CPU = torch.device("cpu")


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
        ending.forget()
        hook = Hook(1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(ending.Ended):
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
    assert signal.getsignal(signal.SIGTERM) is ending._receive


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
