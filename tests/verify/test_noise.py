"""The measured floor: what is within it, what is beyond it, and what it would hide."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from kvtool.core.verify import noise

STEPS, SIZE = 12, 50
RIGHT = [np.random.default_rng(9).normal(size=(1, 2, SIZE)) for _ in range(STEPS)]


def run(seed: int, by: float = 1e-3) -> list[np.ndarray]:
    """A benign run: the right logits and noise."""
    draws = np.random.default_rng(seed)
    return [step + by * draws.normal(size=step.shape) for step in RIGHT]


VARIANTS = [run(seed) for seed in range(5)]


@pytest.mark.parametrize("seed", range(100, 120))
def test_another_benign_run_is_within_the_floor(seed: int) -> None:
    times = noise.ratio([run(seed)], VARIANTS)
    assert 0.5 < times < 1.3
    assert noise.judge(times, [50.0], limit=2.0) == noise.WITHIN


def test_a_fault_of_all_steps_is_beyond_it() -> None:
    faulty = [step + 5e-3 for step in run(7)]
    assert noise.judge(noise.ratio([faulty], VARIANTS), [50.0], limit=2.0) == noise.BEYOND


def test_a_fault_of_one_step_is_not_averaged_away() -> None:
    faulty = run(7)
    faulty[8] = faulty[8] + 5e-3
    middle, floor = noise.mean(VARIANTS), noise.floor(VARIANTS)
    found = noise.spread(faulty, middle)
    assert found.total / floor.total < 2 < found.over(floor)
    assert int(np.argmax(found.by_step)) == 8


def test_a_median_over_runs_is_not_moved_by_one_of_them() -> None:
    faulty = [step + 1.0 for step in run(7)]
    assert noise.ratio([run(20), faulty, run(21)], VARIANTS) < 1.3


def test_noise_that_would_hide_every_control_decides_nothing() -> None:
    assert noise.judge(0.9, [0.8, 0.9]) == noise.HIDDEN
    assert noise.judge(0.9, [0.8, 30.0, 30.0]) == noise.WITHIN
    assert noise.judge(3.0, [0.8, 0.9]) == noise.BEYOND, "what is seen is not hidden"


def test_a_floor_of_exactly_0_is_replaced_by_the_least() -> None:
    same = [RIGHT] * 4
    assert noise.floor(same).worst < 1e-15
    assert noise.ratio([run(3, 1e-8)], same, least=1e-7) < 1
    assert noise.ratio([run(3, 1e-8)], same) > 1e3


def test_what_is_not_a_number_is_beyond_every_floor() -> None:
    faulty = run(7)
    faulty[3] = faulty[3] * np.nan
    assert noise.judge(noise.ratio([faulty], VARIANTS), []) == noise.BEYOND


def test_one_run_has_no_spread() -> None:
    with pytest.raises(ValueError, match="1 variants have no spread"):
        noise.floor([RIGHT])


def test_the_rule_needs_numpy_alone() -> None:
    code = "import sys, kvtool.core.verify.noise; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
